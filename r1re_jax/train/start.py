"""What a run starts from: devices, policy, and programs' layout."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from r1re_jax import sharding
from r1re_jax.model.config import ModelConfig, preset
from r1re_jax.model.fingerprint import fingerprint
from r1re_jax.model.lora import adapt
from r1re_jax.model.qwen import Qwen, abstract_qwen
from r1re_jax.policy import Policy
from r1re_jax.policy_files import load_policy, policy_config
from r1re_jax.policy_source import (
    ADAPTED,
    WORDS,
    Adapted,
    PolicyError,
    choose_step,
    find,
    is_workdir,
    lasting,
    named_params,
    read_adapted,
)
from r1re_jax.task.prompts import PromptEncoder
from r1re_jax.task.relations import Guide
from r1re_jax.task.templates import GuideInPrompt
from r1re_jax.tokenizer import load_tokenizer
from r1re_jax.train.grpo_settings import QuantiseSettings
from r1re_jax.train.sampler import Sampler, make_sampler
from r1re_jax.train.settings import Settings
from r1re_jax.train.state import (
    Layout,
    Params,
    flat_params,
    fresh_adapter,
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
        sampler: what draws with the policy as it is, not quantised.
        params: the run's own copy of what is trained, to be donated; None where a checkpoint has
            later ones.
        frozen: the base's parameters, where an adapter is trained; never donated.
        adapted: what the adapter belongs to; None where all parameters are trained.
    """

    policy: Policy
    layout: Layout
    sampler: Sampler
    params: Params | None
    frozen: Params = dataclasses.field(default_factory=dict)
    adapted: Adapted | None = None

    def whole(self, params: Params) -> Params:
        """Return all parameters: the trained ones given, and the frozen ones."""
        return {**self.frozen, **params}

    def drawing_as(self, quantise: QuantiseSettings) -> Sampler:
        """Return what draws with the policy, quantised as the settings say."""
        if quantise == QuantiseSettings():
            return self.sampler
        return make_sampler(self.layout, quantise, mesh=self.sampler.layout.mesh)


def run_mesh(settings: Settings, *, devices: Sequence[Any] | None = None) -> Mesh:
    """Make the mesh that the settings ask for, of some devices or of all."""
    sizes = settings.mesh
    return sharding.make_mesh(
        data=sizes.data,
        fsdp=sizes.fsdp,
        sequence=sizes.sequence,
        tensor=sizes.tensor,
        devices=devices,
    )


def run_sampler(settings: Settings, layout: Layout, quantise: QuantiseSettings) -> Sampler:
    """Make what draws with a run's policy, of the devices of the run's mesh.

    Raises:
        ValueError: mesh.drawing_tensor does not divide them.
    """
    mesh = sharding.drawing_mesh(layout.mesh, tensor=settings.mesh.drawing_tensor)
    return make_sampler(layout, quantise, mesh=mesh)


def abstract_model(settings: Settings) -> Qwen:
    """Return the model's shapes without reading or drawing weights.

    Raises:
        PolicyError: no such policy.
        ValueError: no such preset, a config.json of another architecture, or targets of LoRA that
            it cannot adapt.
    """
    of = settings.model
    config = preset(of.preset) if of.preset else policy_config(of.path)
    model = abstract_qwen(config, dtype=of.dtype.value, remat=of.remat, attention=of.attention)
    return adapt(model, settings.lora) if settings.lora.rank else model


def run_layout(settings: Settings, mesh: Mesh) -> Layout:
    """Describe the model of a run without its arrays."""
    moments_on_host = settings.mesh.moments_on_host
    return model_layout(abstract_model(settings), mesh, moments_on_host=moments_on_host)


def load_start(
    settings: Settings,
    *,
    mesh: Mesh,
    guides: Sequence[Guide],
    fresh: bool,
    adapted: Adapted | None = None,
) -> Start:
    """Load or draw the policy that the run starts from.

    Args:
        settings: of the run.
        mesh: where parameters go.
        guides: of the training examples, remembered by exports; those of lessons that are made as
            they are asked for are not known.
        fresh: whether parameters are wanted.
        adapted: the base that the run's adapter was trained on so far.

    Raises:
        PolicyError: no such policy or tokenizer, they do not belong together, or the base is not
            the one that it was.
    """
    if adapted is not None:  # it may have been moved
        model = dataclasses.replace(settings.model, path=adapted.base)
        settings = dataclasses.replace(settings, model=model)
    model = abstract_model(settings)
    layout, params = run_layout(settings, mesh), None
    frozen: Params = {}
    if settings.lora.rank:
        if adapted is None and not fresh:
            raise PolicyError(
                f"there are checkpoints of an adapter, but {WORDS}/{ADAPTED}, which says of which"
                " base, is missing; put it back"
            )
        policy, adapted = _load_base(settings, mesh=mesh, adapted=adapted)
        frozen = named_params(policy.model)
        if fresh:
            params = fresh_adapter(layout, seed=settings.seed)
    elif settings.model.path:
        policy = load_policy(
            settings.model.path,
            dtype=settings.model.dtype.value,
            param_dtype="float32",
            remat=settings.model.remat,
            mesh=mesh,
        )
        _check_shape(policy.model.config, settings)
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
    return Start(
        policy=policy,
        layout=layout,
        sampler=run_sampler(settings, layout, QuantiseSettings()),
        params=params,
        frozen=frozen,
        adapted=adapted,
    )


def _check_shape(found: ModelConfig, settings: Settings) -> None:
    """Refuse weights of another shape than `model.preset` says.

    Raises:
        PolicyError: they differ; names how.
    """
    if not settings.model.preset:
        return
    expected = vars(preset(settings.model.preset))
    other = [
        f"{name} is {value} and not {expected[name]}"
        for name, value in vars(found).items()
        if value != expected[name]
    ]
    if other:
        raise PolicyError(
            f"{settings.model.path} has not the shape of model.preset={settings.model.preset}:"
            f" {', '.join(other)}; remove model.preset, or correct it"
        )


def _load_base(
    settings: Settings, *, mesh: Mesh, adapted: Adapted | None
) -> tuple[Policy, Adapted]:
    """Load what an adapter is trained on, in the type of the forward, and say which it is."""
    path, dtype = settings.model.path, settings.model.dtype.value
    if not path:
        raise PolicyError(
            f"lora.rank is {settings.lora.rank}, but model.preset starts from random weights, which"
            " an adapter leaves as they are: give model.path"
        )
    where = find(path)
    if read_adapted(where) is not None:
        raise PolicyError(
            f"{path} holds an adapter itself: its weights are merged anew wherever they are loaded,"
            " to rounding. Export it (run.export), and begin from the export"
        )
    step = None if adapted is None else adapted.step
    if is_workdir(where):
        step = choose_step(where, step)
    policy = load_policy(
        path, dtype=dtype, param_dtype=dtype, remat=settings.model.remat, mesh=mesh, step=step
    )
    _check_shape(policy.model.config, settings)
    found = Adapted(
        base=lasting(path),
        step=step,
        dtype=dtype,
        fingerprint=fingerprint(named_params(policy.model), dtype=dtype),
        lora=settings.lora,
    )
    if adapted is not None:
        adapted.check(found.fingerprint)
    return policy, found


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
    """Return the policy that draws with these parameters.

    It shares their buffers until the next update, but for those that drawing wants copied.
    """
    drawing = start.sampler.params(start.whole(params))
    model = nnx.merge(start.sampler.layout.graph, model_state(drawing))
    return dataclasses.replace(start.policy, model=model)
