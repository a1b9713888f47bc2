"""All programs of a run, compiled for devices that need not be here, and what they need there.

No weights, data or tokenizer are read: shapes come from the settings. So token 0 stands in for the
stop tokens: the programs need what those of the run need, but are not the same.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from r1re_jax.annotate import Draw
from r1re_jax.launch.inspect import Memory, collectives_of, matrix_flops, memory_of
from r1re_jax.launch.topology import GIB, Slice
from r1re_jax.model.tree import Level, Tree
from r1re_jax.rollout.ahead import Ahead, compile_ahead, compile_rollout
from r1re_jax.rollout.decode import decode_chunk, prefill, start_state
from r1re_jax.rollout.sampling import SamplingSettings
from r1re_jax.rollout.shapes import widths
from r1re_jax.rollout.state import Program
from r1re_jax.train.batch import grpo_blocks
from r1re_jax.train.grpo import GRPO, GRPOBlock, make_grpo
from r1re_jax.train.grpo_settings import QuantiseSettings
from r1re_jax.train.sampler import Sampler
from r1re_jax.train.settings import Settings
from r1re_jax.train.start import abstract_model, run_sampler
from r1re_jax.train.state import (
    Layout,
    Params,
    TrainState,
    abstract_state,
    model_layout,
    model_state,
)

# "Used 27.11G of 15.75G", "memory required for HLO temporaries (1.00T) exceeds": what is too much.
_NAMED = re.compile(r"(?:Used |required[^(]*\()([\d.]+)([KMGT])")
_GIB_OF = {"K": 2.0**-20, "M": 2.0**-10, "G": 1.0, "T": 1024.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a program needs on each device.

    Attributes:
        name: of the program.
        memory: its own.
        resident: bytes of all else that is alive then: optimizer state, policies, caches.
        flops: of its matrix products, all devices together.
        collectives: kind -> count and bytes.
    """

    name: str
    memory: Memory
    resident: int
    flops: int
    collectives: Mapping[str, Mapping[str, float]]

    def as_json(self) -> dict[str, Any]:
        """Return it for people."""
        gib = lambda size: round(size / GIB, 3)  # noqa: E731
        return {
            "name": self.name,
            "peak_gib": gib(self.memory.peak),
            "resident_gib": gib(self.resident),
            "arguments_gib": gib(self.memory.arguments),
            "temporaries_gib": gib(self.memory.temporaries),
            "flops": self.flops,
            "collectives": {
                kind: {"count": of["count"], "gib": gib(of["bytes"])}
                for kind, of in self.collectives.items()
            },
        }


def inspect(ahead: Ahead, *, beside: Any) -> Report:
    """Return what a compiled program needs; `beside` are the shapes of all else that is alive."""
    return Report(
        name=ahead.name,
        memory=memory_of(ahead.compiled),
        resident=_bytes(beside),
        flops=matrix_flops(ahead.jaxpr, rounds=ahead.rounds),
        collectives=collectives_of(ahead.compiled.as_text(), rounds=ahead.rounds),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """What the programs of a run are compiled for, in shapes.

    Attributes:
        settings: of the run.
        layout: the policy.
        grpo: the reinforcement; None of its arrays exist.
        sampler: draws for evaluation.
        state: of training.
        reference: of the KL term; empty for none.
    """

    settings: Settings
    layout: Layout
    grpo: GRPO
    sampler: Sampler
    state: TrainState
    reference: Params

    @classmethod
    def of(cls, settings: Settings, mesh: Mesh) -> "_Run":
        """Build the run's programs without its arrays."""
        layout = model_layout(abstract_model(settings), mesh)
        policy = {**layout.frozen, **layout.shapes}
        sampler = run_sampler(settings, layout, QuantiseSettings())
        quantise = settings.grpo.quantise
        grpo = make_grpo(
            settings.grpo,
            limits=settings.training_limits,
            encoder=None,
            source=None,
            seed=settings.seed,
            first=0,
            layout=layout,
            reference=policy,
            frozen=layout.frozen,
            sampler=run_sampler(settings, layout, quantise),
        )
        return cls(
            settings=settings,
            layout=layout,
            grpo=grpo,
            sampler=sampler,
            state=abstract_state(grpo.optimizer, layout),
            reference=policy if settings.grpo.kl_coefficient else {},
        )


def compile_run(settings: Settings, mesh: Mesh) -> Iterator[Report]:
    """Compile the programs of GRPO and of its evaluations, one at a time.

    Yields:
        `relayout` where a copy of the policy draws, `guide_prefill`, those of `compile_rollout`,
        `evaluate` and what comes before it, `reference` where there is a KL term, `update` (the
        gradient of a micro-batch), `add` where there are several, and `apply` (the optimizer).
    """
    run = _Run.of(settings, mesh)
    policy = run.state.params, run.layout.frozen
    always = policy, run.state.opt_state, run.reference
    yield from _drawing(run, always)
    if settings.evaluate.samples:
        yield from _evaluation(run, always)
    block = _block(settings)
    if run.reference:
        ahead = compile_ahead("reference", run.grpo.score, run.reference, block.tree)
        yield inspect(ahead, beside=(*policy, run.state.opt_state))
    programs, beside = run.grpo.programs, (run.state.opt_state, run.reference)
    arguments = run.layout.shapes, run.layout.frozen, block
    update = compile_ahead("update", programs.gradient, *arguments)
    gradient = update.returns[0]
    several = len(list(grpo_blocks(settings.grpo))) > 1
    yield inspect(update, beside=(beside, gradient) if several else beside)
    if several:
        add = compile_ahead("add", programs.add, gradient, gradient)
        yield inspect(add, beside=always)
    apply = compile_ahead("apply", programs.apply, run.state, gradient)
    yield inspect(apply, beside=(run.reference, run.layout.frozen))


def _drawing(run: _Run, always: Any) -> Iterator[Report]:
    """Compile what draws completions; parameters and moments are alive beside it."""
    of, limits, sampler = run.settings.grpo, run.settings.training_limits, run.grpo.drawing.sampler
    if sampler.copied:
        yield inspect(_relayout(sampler, run.layout), beside=always)
    guide = compile_ahead(
        "guide_prefill", prefill, *_model(sampler), (_level(limits.guide, of.trees),)
    )
    yield inspect(guide, beside=always)
    for ahead in compile_rollout(
        *_model(sampler),
        (_level(limits.question, of.trees, of.questions),),
        keys=jax.ShapeDtypeStruct((of.trees, of.questions, of.group), jax.random.key(0).dtype),
        settings=SamplingSettings(temperature=of.temperature),
        limit=limits.completion,
        stop_ids=(0,),
        pad_id=0,
        chunk=of.chunk,
        compaction=of.compaction,
        ancestors=guide.returns[1],
        mesh=sampler.layout.mesh,
    ):
        yield inspect(ahead, beside=(always, ahead.beside))


def _relayout(sampler: Sampler, layout: Layout) -> Ahead:
    shapes = {**layout.frozen, **layout.shapes}
    return compile_ahead("relayout", sampler.relayout, {n: shapes[n] for n in sampler.copied})


def _model(sampler: Sampler) -> tuple[Any, Any]:
    return sampler.layout.graph, model_state(sampler.layout.shapes)


def _evaluation(run: _Run, always: Any) -> Iterator[Report]:
    """Compile the programs of an evaluation's first and largest batch."""
    of, limits, sampler = run.settings.evaluate, run.settings.limits, run.sampler
    model, mesh = _model(sampler), sampler.layout.mesh
    guide = compile_ahead("evaluate_guide", prefill, *model, (_level(limits.guide),))
    yield inspect(guide, beside=always)
    question = compile_ahead(
        "evaluate_questions",
        prefill,
        *model,
        (_level(limits.question, of.batch),),
        ancestors=guide.returns[1],
        mesh=mesh,
    )
    yield inspect(question, beside=always)
    program = Program(
        settings=SamplingSettings(temperature=of.temperature),
        stop_ids=(0,),
        pad_id=0,
        limit=limits.completion,
        chunk=Draw.chunk,
        mesh=mesh,
    )
    keys = jax.ShapeDtypeStruct((of.batch, of.samples), jax.random.key(0).dtype)
    start = compile_ahead(
        "evaluate_start",
        start_state,
        *model,
        *question.returns,
        keys,
        width=widths(limits.completion)[-1],
        program=program,
    )
    yield inspect(start, beside=always)
    decode = compile_ahead(
        "evaluate",
        decode_chunk,
        *model,
        start.returns,
        question.returns[1],
        rounds=Draw.chunk,
        program=program,
    )
    yield inspect(decode, beside=always)


def _block(settings: Settings) -> GRPOBlock:
    """Return the shapes of the largest micro-batch."""
    of, limits = settings.grpo, settings.training_limits
    first = next(grpo_blocks(of))
    trees, questions, group = (
        len(range(*part.indices(whole)))
        for part, whole in (
            (first.trees, of.trees),
            (first.questions, of.questions),
            (first.group, of.group),
        )
    )
    rows = trees, questions, group
    floats = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    tokens = floats(*rows, limits.completion)
    return GRPOBlock(
        tree=Tree(
            _level(limits.guide, trees),
            _level(limits.question, trees, questions),
            _level(limits.completion, *rows),
        ),
        advantage_NPG=floats(*rows),
        weight_NPGC=tokens,
        sampler_logp_NPGC=tokens,
        ref_logp_NPGC=tokens if of.kl_coefficient else None,
        old_logp_NPGC=tokens if of.inner_iterations > 1 else None,
        long_NPG=jax.ShapeDtypeStruct(rows, bool),
    )


def summary(
    reports: Sequence[Report],
    where: Slice | None,
    *,
    devices: int,
    refused: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return all programs' needs as a JSON object; `fits` is None where the memory is unknown.

    Args:
        reports: of the programs that were compiled.
        where: the slice; None for the devices that are here.
        devices: how many there are.
        refused: of a program that the compiler refused, see `refused`.
    """
    peak = max((report.memory.peak + report.resident for report in reports), default=0) / GIB
    if refused is not None:
        peak = max(peak, refused["gib"] or 0)
    fits = None
    if where is not None:
        fits = refused is None and peak <= where.chip.usable_gib
    known = {} if where is None else {"chips": where.chips, "hbm_gib_per_chip": where.chip.hbm_gib}
    return {
        "fits": fits,
        "devices": devices,
        **known,
        "peak_gib_per_chip": round(peak, 3),
        **({} if refused is None else {"refused": refused}),
        "programs": [report.as_json() for report in reports],
    }


def refused(error: Exception) -> dict[str, Any] | None:
    """Return what a compiler says that refuses a program for its memory; None of other errors."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    found = _NAMED.search(text)
    gib = float(found[1]) * _GIB_OF[found[2]] if found else None
    return {"gib": gib, "says": text.splitlines()[0]}


def shown(report: Report) -> str:
    """Return a line for people."""
    gathered = " ".join(f"{kind} {of['count']}" for kind, of in report.collectives.items())
    memory, beside = report.memory.peak / GIB, report.resident / GIB
    return (
        f"{report.name:24} {memory:8.3f} GiB and {beside:8.3f} beside it,"
        f" {report.flops / 1e12:10.3f} TFLOP  {gathered}"
    )


def _level(width: int, *rows: int) -> Level:
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.int32)  # noqa: E731
    return Level(shape(*rows, width), shape(*rows))


def _bytes(tree: Any) -> int:
    """Return the bytes of shapes on each device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )
