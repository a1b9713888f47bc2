"""Merging adapters in plain NumPy, and a model's parameters as NumPy arrays."""

from collections.abc import Mapping

import numpy as np
from flax import nnx

from r1re_jax.model.lora import Lora
from r1re_jax.model.qwen import Qwen

Arrays = Mapping[str, np.ndarray]


def arrays(model: Qwen) -> Arrays:
    """Parameters on the host."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in flat}


def merged_by_hand(base: Arrays, adapter: Arrays, lora: Lora) -> Arrays:
    """W[l] + alpha / rank · A[l]·B[l], layer by layer in float64."""
    found = dict(base)
    for part in {name.split(".")[1] for name in adapter}:
        of = f"layers.{part}"
        a, b = (adapter[f"{of}.adapter.{side}"].astype(np.float64) for side in "ab")
        weight = base[f"{of}.weight"].astype(np.float64)
        for layer in range(len(weight)):
            weight[layer] += lora.alpha / lora.rank * (a[layer] @ b[layer])
        found[f"{of}.weight"] = weight.astype(np.float32)
    return found
