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

from r1re_jax.launch.inspect import Memory, collectives_of, matrix_flops, memory_of
from r1re_jax.launch.topology import GIB, Slice
from r1re_jax.model.tree import Level, Tree
from r1re_jax.rollout.ahead import Ahead, compile_ahead, compile_rollout
from r1re_jax.rollout.decode import prefill
from r1re_jax.rollout.sampling import SamplingSettings
from r1re_jax.train.batch import blocks
from r1re_jax.train.grpo import GRPO, GRPOBlock, make_grpo
from r1re_jax.train.settings import Settings
from r1re_jax.train.start import abstract_model
from r1re_jax.train.state import abstract_state, model_layout, model_state

# "Used 27.11G of 15.75G", "memory required for HLO temporaries (1.00T) exceeds": what is too much.
_NAMED = re.compile(r"(?:Used |required[^(]*\()([\d.]+)([KMGT])")
_GIB_OF = {"K": 2.0**-20, "M": 2.0**-10, "G": 1.0, "T": 1024.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a program needs on each device.

    Attributes:
        name: of the program.
        memory: its own.
        resident: bytes of all else that is alive then: optimizer state, policies.
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


def inspect(ahead: Ahead, *, resident: int) -> Report:
    """Return what a compiled program needs."""
    return Report(
        name=ahead.name,
        memory=memory_of(ahead.compiled),
        resident=resident,
        flops=matrix_flops(ahead.jaxpr, rounds=ahead.rounds),
        collectives=collectives_of(ahead.compiled.as_text(), rounds=ahead.rounds),
    )


def compile_run(settings: Settings, mesh: Mesh) -> Iterator[Report]:
    """Compile the programs of GRPO, one at a time.

    Yields:
        `guide_prefill`, those of `compile_rollout`, `reference` where there is a KL term, `update`
        (the gradient of a micro-batch) and `apply` (the optimizer).
    """
    layout = model_layout(abstract_model(settings), mesh)
    policy = {**layout.frozen, **layout.shapes}
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
    )
    state = abstract_state(grpo.optimizer, layout)
    reference = policy if settings.grpo.kl_coefficient else {}
    trained, moments, frozen = map(_bytes, (state.params, state.opt_state, layout.frozen))
    beside = moments + _bytes(reference)
    if grpo.drawing.sampler.layout is not layout:  # a copy of the policy draws
        beside += trained + frozen
    for ahead in _drawing(settings, grpo, mesh):
        yield inspect(ahead, resident=beside)
    block = _block(settings)
    if reference:
        ahead = compile_ahead("reference", grpo.score, reference, block.tree)
        yield inspect(ahead, resident=trained + moments)
    update = compile_ahead("update", grpo.programs.gradient, layout.shapes, layout.frozen, block)
    yield inspect(update, resident=beside)
    apply = compile_ahead("apply", grpo.programs.apply, state, update.returns[0])
    yield inspect(apply, resident=_bytes(reference) + frozen)


def _drawing(settings: Settings, grpo: GRPO, mesh: Mesh) -> Iterator[Ahead]:
    """Compile what draws completions."""
    of, limits, sampler = settings.grpo, settings.training_limits, grpo.drawing.sampler
    model = sampler.layout.graph, model_state({**sampler.layout.frozen, **sampler.layout.shapes})
    guide = compile_ahead("guide_prefill", prefill, *model, (_level(limits.guide, of.trees),))
    yield guide
    yield from compile_rollout(
        *model,
        (_level(limits.question, of.trees, of.questions),),
        keys=jax.ShapeDtypeStruct((of.trees, of.questions, of.group), jax.random.key(0).dtype),
        settings=SamplingSettings(temperature=of.temperature),
        limit=limits.completion,
        stop_ids=(0,),
        pad_id=0,
        chunk=of.chunk,
        compaction=of.compaction,
        ancestors=guide.returns[1],
        mesh=mesh,
    )


def _block(settings: Settings) -> GRPOBlock:
    """Return the shapes of the largest micro-batch."""
    of, limits = settings.grpo, settings.training_limits
    first = next(blocks(of.trees, of.questions, of.micro_batch))
    trees, questions = (
        len(range(*part.indices(whole)))
        for part, whole in ((first.trees, of.trees), (first.questions, of.questions))
    )
    rows = trees, questions, of.group
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
