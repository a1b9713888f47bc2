"""An adapter in the format of PEFT, Hugging Face's library of adapters, for others to load.

PEFT keeps A as [r, in] and B as [out, r] of every layer by itself, named by the module that they
adapt, and computes x·Aᵀ·Bᵀ · lora_alpha / r beside it, which is what ours compute.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from r1re_jax.model.lora import DOWN, UP, WEIGHT, Lora
from r1re_jax.model.names import BY_OURS, Form

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # PEFT's wrappers around the network


def save_peft(
    adapter: Mapping[str, jax.Array],
    folder: str | os.PathLike,
    *,
    lora: Lora,
    base: str,
    dtype: str = "float32",
) -> None:
    """Write a folder for `peft.PeftModel.from_pretrained(network, folder)`, whole or not at all.

    Args:
        adapter: dotted name -> A or B.
        folder: absent or empty.
        lora: rank and alpha.
        base: where the base is; what PEFT looks for where it is given no network.
        dtype: of the weights.
    """
    folder, tensors = Path(folder), {}
    for down in (name for name in adapter if name.endswith(DOWN)):
        of = down.removesuffix(DOWN)
        for ours, theirs in ((down, "lora_A"), (of + UP, "lora_B")):
            for layer, matrix in enumerate(np.asarray(adapter[ours])):
                module = _module(of, layer)
                turned = matrix.T.astype(jnp.dtype(dtype))
                tensors[f"{_PREFIX}{module}.{theirs}.weight"] = np.ascontiguousarray(turned)
    parts = {
        _module(name.removesuffix(DOWN)).rpartition(".")[2] for name in adapter if DOWN in name
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": sorted(parts),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        save_file(tensors, beside / WEIGHTS, metadata={"format": "pt"})
        (beside / WEIGHTS).chmod(0o644)  # the library closes its files to others
        (beside / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        beside.chmod(0o755)  # mkdtemp's folders are closed to others
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _module(ours: str, layer: int = 0) -> str:
    """Return Hugging Face's name of the module whose weight is a matrix of ours."""
    return BY_OURS[ours + WEIGHT].theirs(Form.HF, layer).removesuffix(WEIGHT)
