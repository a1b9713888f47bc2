"""Policies in files: loaded from folders, GGUF files, work directories and names, and saved."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from r1re_jax import files, hosts
from r1re_jax.model.config import ModelConfig
from r1re_jax.model.fingerprint import fingerprint
from r1re_jax.model.gguf_file import GGUFFile, gguf_config, load_gguf, open_gguf
from r1re_jax.model.hf import load_hf, save_hf
from r1re_jax.model.hf_config import WeightsError, config_from_hf, hf_config
from r1re_jax.model.hf_tokenizer import save_tokenizer
from r1re_jax.model.lora import adapt, is_adapter, merge
from r1re_jax.model.peft import CONFIG, save_peft
from r1re_jax.model.qwen import Qwen, Remat, abstract_qwen
from r1re_jax.policy import Limits, Policy, Wordless, check_vocabulary
from r1re_jax.policy_source import (
    ADAPTED,
    CHECKPOINTS,
    WORDS,
    Adapted,
    PolicyError,
    choose_step,
    filled,
    find,
    is_workdir,
    named_params,
    read_adapted,
    read_json,
    restore,
)
from r1re_jax.task.prompts import PromptEncoder
from r1re_jax.task.tasks import TaskKind, make_task
from r1re_jax.task.templates import PromptError, PromptTemplate
from r1re_jax.tokenizer import gguf_tokenizer, load_tokenizer

RECIPE, CARD = "r1re.json", "README.md"


def load_policy(
    source: str | os.PathLike,
    *,
    dtype: str = "float32",
    param_dtype: str | None = None,
    remat: Remat = Remat.NONE,
    mesh: Mesh | None = None,
    step: int | None = None,
) -> Policy:
    """Load a policy.

    What lies in a bucket is read from there if it is a work directory, and else copied to this
    machine's folder for temporary files first.

    Args:
        source: a Hugging Face folder (its r1re.json, where there is one, says template, limits and
            stop tokens), a GGUF file, a work directory of run.train, "base:NAME" for a policy that
            comes with the package, one of `r1re_jax.published.PUBLISHED`, or a name on the Hugging
            Face hub.
        dtype: what the forward computes in.
        param_dtype: of the parameters; None: `dtype`. Training keeps them in float32.
        remat: what the backward pass computes again.
        mesh: where the parameters go, by the sharding table; None: the first device.
        step: of a work directory's checkpoints; None takes the best, where the run scored them,
            else the newest.

    Raises:
        PolicyError: nothing of that kind there; the message says what was looked for.
        WeightsError: files that cannot be read.
        PlaceError: a bucket that cannot be reached.
    """
    where = find(source)
    kinds = {"dtype": dtype, "param_dtype": param_dtype or dtype, "remat": remat, "mesh": mesh}
    if is_workdir(where):
        step = choose_step(where, step)
        model = _trained_model(where, step, **kinds)
        with files.fetched(where / WORDS) as words:
            return _policy(model, words, provenance=f"{source}, step {step}")
    if step is not None:
        raise PolicyError(f"{where} is no work directory, so it has no step {step}")
    if not where.is_file():
        _check_folder(where)
    with files.fetched(where) as here:
        if here.is_file():
            file = open_gguf(here)
            return _gguf_policy(load_gguf(file, **kinds), file, provenance=str(source))
        return _policy(load_hf(here, **kinds), here, provenance=str(source))


def policy_config(source: str | os.PathLike) -> ModelConfig:
    """Read the shape of a policy's model, and no weights; errors as of `load_policy`."""
    where = find(source)
    if where.is_file():
        with files.fetched(where) as here:
            return gguf_config(open_gguf(here))
    if is_workdir(where):
        return config_from_hf(read_json(where / WORDS / "config.json"))
    _check_folder(where)
    return config_from_hf(read_json(where / "config.json"))


def _trained_model(
    workdir: epath.Path,
    step: int,
    *,
    dtype: str,
    param_dtype: str,
    remat: Remat,
    mesh: Mesh | None,
) -> Qwen:
    """Load a checkpoint's model; where it holds an adapter, the base with it merged."""
    folder = workdir / CHECKPOINTS / str(step) / "params"
    model = abstract_qwen(policy_config(workdir), dtype=dtype, remat=remat)
    adapted = read_adapted(workdir)
    if adapted is None:
        return filled(model, restore(model, folder, dtype=param_dtype, mesh=mesh))
    # Not narrower than the run had it, so that its fingerprint can be compared.
    held = jnp.promote_types(param_dtype, adapted.dtype)
    try:
        base = load_policy(adapted.base, param_dtype=str(held), mesh=mesh, step=adapted.step)
    except (PolicyError, WeightsError) as error:
        raise PolicyError(
            f"{workdir} holds an adapter, but not its base: {error}. Say in {WORDS}/{ADAPTED} where"
            " it is"
        ) from error
    params = named_params(base.model)
    adapted.check(fingerprint(params, dtype=adapted.dtype))
    shapes = adapt(model, adapted.lora)
    adapter = restore(shapes, folder, mesh=mesh, wanted=is_adapter)
    params = merge(params, adapter, scale=adapted.lora.scale)
    return filled(model, {name: value.astype(param_dtype) for name, value in params.items()})


def _check_folder(folder: epath.Path) -> None:
    if not (folder / "config.json").is_file():
        raise PolicyError(
            f"{folder} holds no policy: expected config.json and safetensors (a Hugging Face"
            f" folder), or {WORDS}/ and {CHECKPOINTS}/ (a work directory)"
        )


def save_policy(
    policy: Policy,
    folder: str | os.PathLike,
    *,
    dtype: str = "float32",
    card: str = "",
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Write a Hugging Face folder that transformers and `load_policy` load to equal logits.

    Args:
        policy: its weights, tokenizer, and r1re.json with template, limits and stop tokens.
        folder: absent, empty or an earlier export; appears whole or not at all. In a bucket it must
            be absent, its config.json comes last, and it is written on this machine first.
        dtype: of the weights: float32, bfloat16 or float16.
        card: text of the model card, README.md; "" writes none.
        max_shard_bytes: above it the weights go into several files with an index.
        overwrite: replace the folder whatever it holds.

    Raises:
        WeightsError: the folder is in use by something else, or the dtype is not supported.
    """
    with files.written(_target(folder, overwrite=overwrite), last="config.json") as here:
        save_hf(
            policy.model,
            here,
            dtype=dtype,
            stop_ids=policy.encoder.stop_ids,
            pad_id=policy.encoder.pad_id,
            bos_id=policy.tokenizer.bos_token_id,
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
            also=functools.partial(_write_words, policy, card=card),
        )


def _target(folder: str | os.PathLike, *, overwrite: bool = False) -> epath.Path:
    """Return where to write; `save_hf` and `save_peft` look at folders of this machine alone.

    Raises:
        WeightsError: a bucket holds something of that name.
    """
    folder = files.place(folder)
    if files.is_remote(folder) and folder.exists():
        if not overwrite:
            raise WeightsError(f"{folder} exists; nothing is overwritten. Choose another folder")
        if hosts.is_first():
            folder.rmtree()
    return folder


def save_adapter(
    workdir: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    step: int | None = None,
    dtype: str = "float32",
) -> None:
    """Write the adapter of a LoRA run alone, in PEFT's format; its base is not read.

    Args:
        workdir: of the run.
        folder: absent or empty; appears whole or not at all.
        step: as of `load_policy`.
        dtype: of the weights.

    Raises:
        PolicyError: no work directory, or one whose checkpoints hold no adapter.
    """
    where = find(workdir)
    adapted = read_adapted(where)
    if adapted is None:
        raise PolicyError(f"{where} holds no adapter: it is no work directory of a LoRA run")
    model = adapt(abstract_qwen(policy_config(where)), adapted.lora)
    parameters = where / CHECKPOINTS / str(choose_step(where, step)) / "params"
    adapter = restore(model, parameters, wanted=is_adapter)
    with files.written(_target(folder), last=CONFIG) as here:
        save_peft(adapter, here, lora=adapted.lora, base=adapted.base, dtype=dtype)


def save_words(
    policy: Policy, folder: str | os.PathLike, *, adapted: Adapted | None = None
) -> None:
    """Write all of a policy but its weights: what `load_policy` needs beside checkpoints.

    A run writes it once, into `policy/` of its work directory.

    Args:
        policy: its config, tokenizer, template, limits and stop tokens.
        folder: is made.
        adapted: of which base checkpoints hold an adapter; None where they hold all parameters.
    """
    with files.written(files.place(folder), last=RECIPE) as here:
        here.mkdir(parents=True, exist_ok=True)
        if adapted is not None:
            text = json.dumps(dataclasses.asdict(adapted), ensure_ascii=False, indent=2)
            (here / ADAPTED).write_text(text + "\n", "utf-8")
        ids = {"stop_ids": policy.encoder.stop_ids, "pad_id": policy.encoder.pad_id}
        config = hf_config(policy.config, bos_id=policy.tokenizer.bos_token_id, **ids)
        (here / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        _write_words(policy, here)


def _write_words(policy: Policy, folder: Path, *, card: str = "") -> None:
    """Write tokenizer, r1re.json and, where there is one, the model card."""
    save_tokenizer(
        policy.tokenizer,
        folder,
        family=policy.config.family,
        chat_template=policy.encoder.chat_template,
    )
    if card:
        (folder / CARD).write_text(card, "utf-8")
    recipe = {
        "template": policy.encoder.template.to_json(),
        "limits": dataclasses.asdict(policy.limits),
        "stop_ids": list(policy.encoder.stop_ids),
        "guide_sha256": dict(policy.guide_sha256),
        "totals": dataclasses.asdict(policy.encoder.task.totals),
    }
    if policy.encoder.task.kind is not TaskKind.RELATION:
        recipe["task"] = policy.encoder.task.kind.value
    text = json.dumps(recipe, ensure_ascii=False, indent=2) + "\n"
    (folder / RECIPE).write_text(text, "utf-8")


def _policy(model: Qwen, folder: Path, *, provenance: str) -> Policy:
    """Put tokenizer, template, limits and stop tokens of a folder around a model."""
    if not (folder / RECIPE).is_file():
        return _worded(
            model,
            functools.partial(load_tokenizer, folder),
            stop_tokens=_hf_stops(folder),
            provenance=provenance,
        )
    tokenizer, recipe = load_tokenizer(folder), read_json(folder / RECIPE)
    try:
        template = PromptTemplate.from_json(recipe["template"])
        limits = Limits(**recipe["limits"])
        stops, guides = recipe["stop_ids"], recipe["guide_sha256"]
        # Not named where it is of marked pairs, as in recipes from before there were others.
        kind = TaskKind(recipe.get("task", TaskKind.RELATION))
        task = make_task(kind)
        totals = dataclasses.replace(task.totals, **recipe.get("totals", {}))
    except (KeyError, TypeError, ValueError) as error:
        raise PolicyError(f"{folder / RECIPE} cannot be used: {error!r}") from None
    task = dataclasses.replace(task, totals=totals)
    return Policy(
        model=model,
        tokenizer=tokenizer,
        encoder=PromptEncoder(tokenizer, task=task, template=template, stop_tokens=stops),
        limits=limits,
        guide_sha256=guides,
        provenance=provenance,
    )


def _gguf_policy(model: Qwen, file: GGUFFile, *, provenance: str) -> Policy:
    """Put tokenizer and stop tokens of a GGUF file around its model."""
    name = file.path.name
    return _worded(
        model,
        functools.partial(gguf_tokenizer, file.metadata, source=name),
        stop_tokens=[],
        provenance=provenance,
    )


def _worded(
    model: Qwen, load: Callable[[], Any], *, stop_tokens: Sequence[int], provenance: str
) -> Policy:
    """Put a pretrained model's tokenizer around it; without a usable one, why there is none."""
    try:
        tokenizer = load()
        check_vocabulary(tokenizer, model.config)
        encoder = PromptEncoder(tokenizer, stop_tokens=stop_tokens)
    except (PolicyError, PromptError) as error:
        tokenizer, encoder = None, Wordless(str(error))
    return Policy(model=model, tokenizer=tokenizer, encoder=encoder, provenance=provenance)


def _hf_stops(folder: Path) -> list[int]:
    """Return the stop tokens that a Hugging Face folder names beside its tokenizer's."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            stops = read_json(folder / name).get("eos_token_id")
            if stops is not None:
                return list(stops) if isinstance(stops, list) else [stops]
    return []
