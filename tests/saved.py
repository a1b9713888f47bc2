"""Policies as they are saved: with words of their own, and as a work directory."""

import dataclasses
import json
import pathlib

import jax
import orbax.checkpoint as ocp
from flax import nnx

from r1re_jax.policy import Policy
from r1re_jax.policy_files import save_words
from r1re_jax.task.prompts import PromptEncoder
from r1re_jax.task.templates import PromptTemplate
from tests.tiny import tiny_guide, tiny_policy, tiny_tokenizer


def worded_policy() -> Policy:
    """Random weights, with a template and stop tokens that are not the default ones."""
    tokenizer = tiny_tokenizer()
    template = PromptTemplate(system="Be brief.", instruction="Read and answer.")
    return dataclasses.replace(
        tiny_policy(),
        encoder=PromptEncoder(tokenizer, template=template, stop_tokens=["<|im_start|>"]),
        guide_sha256={"Tiny": tiny_guide().sha256},
    )


def named(policy: Policy, factor: float = 1.0) -> dict[str, jax.Array]:
    """Parameters by dotted name, as checkpoints hold them."""
    flat = nnx.to_flat_state(nnx.state(policy.model, nnx.Param))
    return {".".join(map(str, path)): leaf.get_value() * factor for path, leaf in flat}


def make_workdir(policy: Policy, place: pathlib.Path, scores: dict[str, float]) -> pathlib.Path:
    """A work directory whose step s holds the policy's parameters times s."""
    save_words(policy, place / "policy")
    with ocp.StandardCheckpointer() as checkpointer:
        for step in (1, 2, 10):
            checkpointer.save(place.absolute() / f"checkpoints/{step}/params", named(policy, step))
    meta = place / "checkpoints/10/meta"
    meta.mkdir()
    (meta / "metadata").write_text(json.dumps({"step": 10, "scores": scores}))
    (place / "config.json").write_text(json.dumps({"config": {}}))
    return place
