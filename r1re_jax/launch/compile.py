"""All programs of a run, compiled for devices that need not be here, and what they need there.

No weights, data or tokenizer are read: shapes come from the settings. So token 0 stands in for the
stop tokens: the programs need what those of the run need, but are not the same.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from r1re_jax.annotate import Draw
from r1re_jax.launch.needs import Report, inspect
from r1re_jax.launch.prediction import Rates
from r1re_jax.model.flops import Lengths, pair_flops, tree_load, update_flops
from r1re_jax.model.lora import is_adapter
from r1re_jax.model.tree import Level, Tree
from r1re_jax.rollout.ahead import Ahead, compile_ahead, compile_rollout, decode_rounds
from r1re_jax.rollout.decode import decode_chunk, prefill, start_state
from r1re_jax.rollout.sampling import SamplingSettings
from r1re_jax.rollout.shapes import widths
from r1re_jax.rollout.state import Program
from r1re_jax.sharding import on_host
from r1re_jax.train.batch import Block, blocks, check_batches, grpo_blocks
from r1re_jax.train.grpo import GRPOBlock, make_grpo
from r1re_jax.train.grpo_settings import GRPOSettings, QuantiseSettings
from r1re_jax.train.sampler import Sampler
from r1re_jax.train.settings import Settings, SFTSettings
from r1re_jax.train.sft import SFTBlock, make_sft
from r1re_jax.train.start import abstract_model, run_layout, run_sampler
from r1re_jax.train.state import (
    Layout,
    Params,
    TrainState,
    abstract_state,
    model_state,
)
from r1re_jax.train.update import Programs


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """What the programs of a run are compiled for, in shapes.

    Attributes:
        settings: of the run.
        layout: the policy.
        sampler: draws for evaluation.
        rates: of a device; None where they are not known.
        policy: all of its parameters.
        reference: of the KL term; empty for none.
    """

    settings: Settings
    layout: Layout
    sampler: Sampler
    rates: Rates | None
    policy: Params
    reference: Params

    def inspect(self, ahead: Ahead, *, beside: Any) -> Report:
        """Return what a program needs; `beside` are the shapes of all else that is alive."""
        return inspect(ahead, beside=beside, rates=self.rates)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Training:
    """How a phase updates.

    Attributes:
        settings: of the phase.
        programs: jitted.
        state: what they update.
        block: the largest micro-batch.
        rounds: micro-batches of a step.
    """

    settings: GRPOSettings | SFTSettings
    programs: Programs
    state: TrainState
    block: GRPOBlock | SFTBlock
    rounds: int


def compile_run(settings: Settings, mesh: Mesh, *, rates: Rates | None = None) -> Iterator[Report]:
    """Compile the programs of a run, one at a time.

    Yields:
        Of GRPO, `relayout` where a copy of the policy draws, `guide_prefill`, those of
        `compile_rollout`, `reference` where there is a KL term, and `old` (the policy's own scores)
        where one rollout serves several updates; `evaluate` and what comes before it; `update`
        (the gradient of a micro-batch), `add` where there are several, and `apply` (the optimizer).
        Where there is a warm start before GRPO, its updates are `sft_…`.
    """
    layout = run_layout(settings, mesh)
    policy = {**layout.frozen, **layout.shapes}
    compared = settings.grpo.steps and settings.grpo.kl_coefficient
    run = _Run(
        settings=settings,
        layout=layout,
        sampler=run_sampler(settings, layout, QuantiseSettings()),
        rates=rates,
        policy=policy,
        reference=_read_only(policy, layout, settings) if compared else {},
    )
    if settings.grpo.steps:
        yield from _grpo(run)
    if settings.sft.steps:
        yield from _sft(run)


def _grpo(run: _Run) -> Iterator[Report]:
    """Compile the programs of GRPO and of its evaluations."""
    of, layout = run.settings.grpo, run.layout
    check_batches(run.settings, mesh=layout.mesh)
    grpo = make_grpo(
        of,
        limits=run.settings.training_limits,
        encoder=None,
        source=None,
        seed=run.settings.seed,
        first=0,
        layout=layout,
        reference=run.policy,
        frozen=layout.frozen,
        sampler=run_sampler(run.settings, layout, of.quantise),
    )
    state, block = abstract_state(grpo.optimizer, layout), _grpo_block(run.settings)
    always = run.policy, state.opt_state, run.reference
    yield from _drawing(run, grpo.drawing.sampler, always)
    if run.settings.evaluate.samples:
        yield from _evaluation(run, always)
    if run.reference:
        ahead = compile_ahead("reference", grpo.score, run.reference, block.tree)
        yield run.inspect(ahead, beside=(run.policy, state.opt_state))
    if of.inner_iterations > 1:  # else the update's own forward gives them
        ahead = compile_ahead("old", grpo.score, run.policy, block.tree)
        yield run.inspect(ahead, beside=(run.reference, state.opt_state))
    training = _Training(
        settings=of,
        programs=grpo.programs,
        state=state,
        block=block,
        rounds=len(list(grpo_blocks(of))),
    )
    yield from _updates(run, training)


def _sft(run: _Run) -> Iterator[Report]:
    """Compile the programs of the warm start, and of evaluations where there is no GRPO."""
    of, layout = run.settings.sft, run.layout
    sft = make_sft(
        of,
        limits=run.settings.training_limits,
        encoder=None,
        source=None,
        layout=layout,
        frozen=layout.frozen,
    )
    state, alone = abstract_state(sft.optimizer, layout), not run.settings.grpo.steps
    if alone and run.settings.evaluate.samples:
        always = run.policy, state.opt_state
        if run.sampler.copied:
            yield run.inspect(_relayout(run.sampler, run.policy), beside=always)
        yield from _evaluation(run, always)
    cut = list(blocks(of.trees, of.questions, of.micro_batch))
    tree = _block_tree(run.settings, of, cut[0], group=1)
    training = _Training(
        settings=of,
        programs=sft.programs,
        state=state,
        block=SFTBlock(tree, jax.ShapeDtypeStruct((), jnp.float32)),
        rounds=len(cut),
    )
    for report in _updates(dataclasses.replace(run, reference={}), training):
        yield report if alone else dataclasses.replace(report, name=f"sft_{report.name}")


def _updates(run: _Run, of: _Training) -> Iterator[Report]:
    """Compile a phase's update; the time of all its programs is what the update's MFU rests on."""
    programs, state, layout = of.programs, of.state, run.layout
    ahead = compile_ahead("update", programs.gradient, layout.shapes, layout.frozen, of.block)
    gradient, beside = ahead.returns[0], (state.opt_state, run.reference)
    update = run.inspect(ahead, beside=(beside, gradient) if of.rounds > 1 else beside)
    others = []
    if of.rounds > 1:
        ahead = compile_ahead("add", programs.add, gradient, gradient)
        others.append(run.inspect(ahead, beside=(run.policy, beside)))
    ahead = compile_ahead("apply", programs.apply, state, gradient)
    others.append(run.inspect(ahead, beside=(run.reference, layout.frozen)))
    if run.rates is not None:
        often = {"update": of.rounds, "add": of.rounds - 1, "apply": 1}
        seconds = sum(often[one.name] * one.predicted.seconds for one in (update, *others))
        could = layout.mesh.size * run.rates.flops * seconds
        update = dataclasses.replace(update, mfu=_useful_flops(run, of.settings) / could)
    yield from (update, *others)


def predicted_step(settings: Settings, reports: Sequence[Report]) -> dict[str, float] | None:
    """Return the predicted seconds of a GRPO step, by its parts, if no completion ends early.

    Between programs nothing is counted, nor is what the host does; None without predictions.
    """
    of, seconds = settings.grpo, {}
    for report in reports:
        if report.predicted is None:
            return None
        seconds[report.name] = report.predicted.seconds
    if not of.steps or "apply" not in seconds:
        return None
    limit, rows = settings.training_limits.completion, of.trees * of.questions * of.group
    sizes, drawn, rollout = widths(limit, smallest=of.smallest_cache), 1, 0.0
    for width in sizes:
        # The cache lacks a row's last token, which is never looked at.
        until = min(width + 1, limit)
        chunks = math.ceil((until - drawn) / of.chunk)
        rollout += chunks * seconds[f"decode_{rows}x{width}"]
        drawn = min(drawn + chunks * of.chunk, limit)
    rollout += sum(seconds.get(n, 0.0) for n in ("guide_prefill", "question_prefill", "start"))
    rounds = len(list(grpo_blocks(of)))
    parts = {
        "relayout": seconds.get("relayout", 0.0),
        "rollout": rollout,
        "reference": rounds * seconds.get("reference", 0.0),
        "update": rounds * seconds["update"]
        + (rounds - 1) * seconds.get("add", 0.0)
        + seconds["apply"],
    }
    parts["step"] = sum(parts.values())
    parts["tokens_per_second"] = rows * limit / parts["step"]
    return {name: float(f"{value:.4g}") for name, value in parts.items()}


def _useful_flops(run: _Run, of: GRPOSettings | SFTSettings) -> int:
    """Return what an update must compute whose texts are all as long as their limits.

    As MFU is mostly told: six operations a token for every parameter, and attention (PaLM, arXiv
    2204.02311, appendix B). Where an adapter is trained, what its update computes.
    """
    limits, group = run.settings.training_limits, of.group if isinstance(of, GRPOSettings) else 1
    full = lambda limit, *rows: np.full(rows, limit, np.int32)  # noqa: E731
    lengths = Lengths(
        full(limits.guide, of.trees),
        full(limits.question, of.trees, of.questions),
        full(limits.completion, of.trees, of.questions, group),
    )
    config = abstract_model(run.settings).config
    load, sizes = tree_load(lengths), {name: x.size for name, x in run.policy.items()}
    adapter = sum(size for name, size in sizes.items() if is_adapter(name))
    if adapter:
        return update_flops(config, load, adapter=adapter)
    return 6 * sum(sizes.values()) * load.tokens + 3 * pair_flops(config) * load.pairs


def _read_only(policy: Params, layout: Layout, settings: Settings) -> Params:
    """Return the shapes of a policy that is only read: held as the forward computes."""
    dtype = nnx.merge(layout.graph, model_state(policy)).dtype
    where = on_host if settings.mesh.reference_on_host else lambda sharding: sharding
    return {
        name: jax.ShapeDtypeStruct(
            x.shape, x.dtype if x.dtype == jnp.int8 else dtype, sharding=where(x.sharding)
        )
        for name, x in policy.items()
    }


def _drawing(run: _Run, sampler: Sampler, always: Any) -> Iterator[Report]:
    """Compile what draws completions; parameters and moments are alive beside it."""
    of, limits = run.settings.grpo, run.settings.training_limits
    if sampler.copied:
        yield run.inspect(_relayout(sampler, run.policy), beside=always)
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


def _relayout(sampler: Sampler, policy: Params) -> Ahead:
    return compile_ahead("relayout", sampler.relayout, {n: policy[n] for n in sampler.copied})


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


def _grpo_block(settings: Settings) -> GRPOBlock:
    """Return the shapes of the largest micro-batch."""
    of = settings.grpo
    tree = _block_tree(settings, of, next(grpo_blocks(of)), group=of.group)
    *rows, limit = tree.completion.tokens.shape
    floats = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    tokens = floats(*rows, limit)
    return GRPOBlock(
        tree=tree,
        advantage_NPG=floats(*rows),
        weight_NPGC=tokens,
        sampler_logp_NPGC=tokens,
        ref_logp_NPGC=tokens if of.kl_coefficient else None,
        old_logp_NPGC=tokens if of.inner_iterations > 1 else None,
        long_NPG=jax.ShapeDtypeStruct(tuple(rows), bool),
    )


def _block_tree(
    settings: Settings, of: GRPOSettings | SFTSettings, block: Block, *, group: int
) -> Tree:
    """Return the shapes of a micro-batch's tree."""
    limits, whole = settings.training_limits, (of.trees, of.questions, group)
    cut = zip((block.trees, block.questions, block.group), whole, strict=True)
    trees, questions, rows = (len(range(*part.indices(size))) for part, size in cut)
    return Tree(
        _level(limits.guide, trees),
        _level(limits.question, trees, questions),
        _level(limits.completion, trees, questions, rows),
    )


def _level(width: int, *rows: int) -> Level:
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.int32)  # noqa: E731
    return Level(shape(*rows, width), shape(*rows))
