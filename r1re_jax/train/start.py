"""What a run starts from: devices, policy, and programs' layout."""

import dataclasses
from collections.abc import Sequence

from flax import nnx
from jax.sharding import Mesh

from r1re_jax import sharding
from r1re_jax.model.config import preset
from r1re_jax.model.qwen import Qwen, abstract_qwen
from r1re_jax.policy import Policy
from r1re_jax.policy_files import load_policy, policy_config
from r1re_jax.task.prompts import PromptEncoder
from r1re_jax.task.relations import Guide
from r1re_jax.task.templates import GuideInPrompt
from r1re_jax.tokenizer import load_tokenizer
from r1re_jax.train.settings import Settings
from r1re_jax.train.state import (
    Layout,
    Params,
    flat_params,
    model_layout,
    model_state,
    place_params,
    random_params,
)


@dataclasses.dataclass(frozen=True)
class Start:
    """A policy taken apart: what stays the same in training, and what changes.

    Attributes:
        policy: tokenizer, encoder, limits, and a model of shapes in place of arrays.
        layout: the model without its arrays, on the mesh.
        params: the run's own copy, to be donated; None where a checkpoint has later ones.
    """

    policy: Policy
    layout: Layout
    params: Params | None


def run_mesh(settings: Settings) -> Mesh:
    """Make the mesh that the settings ask for."""
    sizes = settings.mesh
    return sharding.make_mesh(data=sizes.data, fsdp=sizes.fsdp, tensor=sizes.tensor)


def abstract_model(settings: Settings) -> Qwen:
    """Return the model's shapes without reading or drawing weights.

    Raises:
        PolicyError: no such policy.
        ValueError: no such preset, or a config.json of another architecture.
    """
    path = settings.model.path
    config = policy_config(path) if path else preset(settings.model.preset)
    return abstract_qwen(config, dtype=settings.model.dtype.value, remat=settings.model.remat)


def load_start(settings: Settings, *, mesh: Mesh, guides: Sequence[Guide], fresh: bool) -> Start:
    """Load or draw the policy that the run starts from.

    Args:
        settings: of the run.
        mesh: where parameters go.
        guides: of the training examples, remembered by exports; those of lessons that are made as
            they are asked for are not known.
        fresh: whether parameters are wanted.

    Raises:
        PolicyError: no such policy or tokenizer, or they do not belong together.
    """
    model = abstract_model(settings)
    layout, params = model_layout(model, mesh), None
    if settings.model.path:
        policy = load_policy(
            settings.model.path,
            dtype=settings.model.dtype.value,
            param_dtype="float32",
            remat=settings.model.remat,
            mesh=mesh,
        )
        if fresh:
            params = place_params(flat_params(nnx.state(policy.model)), layout)
    else:
        tokenizer = load_tokenizer(settings.tokenizer)
        encoder = PromptEncoder(tokenizer)
        policy = Policy(model=model, tokenizer=tokenizer, encoder=encoder, provenance="random")
        if fresh:
            params = random_params(model.config, layout, seed=settings.seed)
    # Limits and what prompts show are the config's: the loaded ones say what an earlier run had.
    policy = policy.for_task(settings.task_rules)
    policy = dataclasses.replace(
        policy,
        model=model,
        encoder=_showing(policy, settings.data.guide_in_prompt),
        limits=settings.limits,
        guide_sha256={guide.title: guide.sha256 for guide in guides},
    )
    return Start(policy=policy, layout=layout, params=params)


def _showing(policy: Policy, guide: GuideInPrompt) -> PromptEncoder:
    """Return the policy's encoder with prompts that show as much of the guide as is asked for."""
    encoder = policy.encoder
    if encoder.template.guide is guide:
        return encoder
    template = dataclasses.replace(encoder.template, guide=guide)
    return PromptEncoder(
        policy.tokenizer, task=encoder.task, template=template, stop_tokens=encoder.stop_ids
    )


def policy_of(start: Start, params: Params) -> Policy:
    """Return the policy with these parameters; shares their buffers until the next update."""
    model = nnx.merge(start.layout.graph, model_state(params))
    return dataclasses.replace(start.policy, model=model)
