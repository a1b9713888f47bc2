"""All programs of a run, compiled for devices that need not be here, and what they need there.

No weights, data or tokenizer are read: shapes come from the settings. So token 0 stands in for the
stop tokens: the programs need what those of the run need, but are not the same.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from r1re_jax.annotate import Draw
from r1re_jax.launch.needs import Report, inspect
from r1re_jax.launch.program import Rates
from r1re_jax.model.flops import Lengths, tree_load, update_flops
from r1re_jax.model.lora import is_adapter
from r1re_jax.model.tree import Level, Tree
from r1re_jax.rollout.ahead import Ahead, compile_ahead, compile_rollout, decode_rounds
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

@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """What the programs of a run are compiled for, in shapes.

    Attributes:
        settings: of the run.
        layout: the policy.
        grpo: the reinforcement; None of its arrays exist.
        sampler: draws for evaluation.
        rates: of a device; None where they are not known.
        state: of training.
        reference: of the KL term; empty for none.
    """

    settings: Settings
    layout: Layout
    grpo: GRPO
    sampler: Sampler
    rates: Rates | None
    state: TrainState
    reference: Params

    @classmethod
    def of(cls, settings: Settings, mesh: Mesh, rates: Rates | None) -> "_Run":
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
            rates=rates,
            state=abstract_state(grpo.optimizer, layout),
            reference=_read_only(policy, layout) if settings.grpo.kl_coefficient else {},
        )

    def inspect(self, ahead: Ahead, *, beside: Any) -> Report:
        """Return what a program needs; `beside` are the shapes of all else that is alive."""
        return inspect(ahead, beside=beside, rates=self.rates)


def compile_run(
    settings: Settings, mesh: Mesh, *, rates: Rates | None = None
) -> Iterator[Report]:
    """Compile the programs of GRPO and of its evaluations, one at a time.

    Yields:
        `relayout` where a copy of the policy draws, `guide_prefill`, those of `compile_rollout`,
        `evaluate` and what comes before it, `reference` where there is a KL term, `update` (the
        gradient of a micro-batch), `add` where there are several, and `apply` (the optimizer).
    """
    run = _Run.of(settings, mesh, rates)
    policy = run.state.params, run.layout.frozen
    always = policy, run.state.opt_state, run.reference
    yield from _drawing(run, always)
    if settings.evaluate.samples:
        yield from _evaluation(run, always)
    block = _block(settings)
    if run.reference:
        ahead = compile_ahead("reference", run.grpo.score, run.reference, block.tree)
        yield run.inspect(ahead, beside=(*policy, run.state.opt_state))
    yield from _update(run, block)


def _update(run: _Run, block: GRPOBlock) -> Iterator[Report]:
    """Compile the update; the time of all its programs is what the update's MFU rests on."""
    programs, beside = run.grpo.programs, (run.state.opt_state, run.reference)
    policy = run.state.params, run.layout.frozen
    ahead = compile_ahead("update", programs.gradient, run.layout.shapes, run.layout.frozen, block)
    gradient, rounds = ahead.returns[0], len(list(grpo_blocks(run.settings.grpo)))
    update = run.inspect(ahead, beside=(beside, gradient) if rounds > 1 else beside)
    others = []
    if rounds > 1:
        ahead = compile_ahead("add", programs.add, gradient, gradient)
        others.append(run.inspect(ahead, beside=(policy, beside)))
    ahead = compile_ahead("apply", programs.apply, run.state, gradient)
    others.append(run.inspect(ahead, beside=(run.reference, run.layout.frozen)))
    if run.rates is not None:
        often = {"update": rounds, "add": rounds - 1, "apply": 1}
        seconds = sum(often[of.name] * of.predicted.seconds for of in (update, *others))
        could = run.layout.mesh.size * run.rates.flops * seconds
        update = dataclasses.replace(update, mfu=_useful_flops(run) / could)
    yield from (update, *others)


def _useful_flops(run: _Run) -> int:
    """Return what an update must compute whose texts are all as long as their limits."""
    of, limits = run.settings.grpo, run.settings.training_limits
    full = lambda limit, *rows: np.full(rows, limit, np.int32)  # noqa: E731
    lengths = Lengths(
        full(limits.guide, of.trees),
        full(limits.question, of.trees, of.questions),
        full(limits.completion, of.trees, of.questions, of.group),
    )
    config = abstract_model(run.settings).config
    trained = (shape.size for name, shape in run.layout.shapes.items() if is_adapter(name))
    return update_flops(config, tree_load(lengths), adapter=sum(trained))


def _read_only(policy: Params, layout: Layout) -> Params:
    """Return the shapes of a policy that is only read: held as the forward computes."""
    dtype = nnx.merge(layout.graph, model_state(policy)).dtype
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype if x.dtype == jnp.int8 else dtype, sharding=x.sharding)
        for name, x in policy.items()
    }


def _drawing(run: _Run, always: Any) -> Iterator[Report]:
    """Compile what draws completions; parameters and moments are alive beside it."""
    of, limits, sampler = run.settings.grpo, run.settings.training_limits, run.grpo.drawing.sampler
    if sampler.copied:
        yield run.inspect(_relayout(sampler, run.layout), beside=always)
    guide = compile_ahead(
        "guide_prefill", prefill, *_model(sampler), (_level(limits.guide, of.trees),)
    )
    yield run.inspect(guide, beside=always)
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
        smallest_batch=of.smallest_batch,
        smallest_cache=of.smallest_cache,
        ancestors=guide.returns[1],
        mesh=sampler.layout.mesh,
    ):
        yield run.inspect(ahead, beside=(always, ahead.beside))


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
    yield run.inspect(guide, beside=always)
    question = compile_ahead(
        "evaluate_questions",
        prefill,
        *model,
        (_level(limits.question, of.batch),),
        ancestors=guide.returns[1],
        mesh=mesh,
    )
    yield run.inspect(question, beside=always)
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
    yield run.inspect(start, beside=always)
    decode = compile_ahead(
        "evaluate",
        decode_chunk,
        *model,
        start.returns,
        question.returns[1],
        rounds=decode_rounds(Draw.chunk),
        program=program,
    )
    yield run.inspect(decode, beside=always)


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


def _level(width: int, *rows: int) -> Level:
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.int32)  # noqa: E731
    return Level(shape(*rows, width), shape(*rows))
