"""Group relative policy optimization (arXiv 2402.03300), one step at a time.

Lessons, completions by sampling, rewards by rule, advantages within each group, log-probabilities
of the reference, and one or several updates. Until the first update nothing of the state changes,
so that a step can be given up at any `tick` before it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from r1re_jax.model.qwen import Qwen
from r1re_jax.model.tree import Level, Tree
from r1re_jax.policy import Limits
from r1re_jax.rl.advantages import combined_advantages
from r1re_jax.rl.correction import correction_sums, importance_weights, longest_quarter
from r1re_jax.rl.kinds import CorrectionKind
from r1re_jax.rl.losses import token_weights
from r1re_jax.rl.masks import length_mask
from r1re_jax.rl.objective import objective
from r1re_jax.rl.scoring import completion_logp
from r1re_jax.rollout.rollout import Rollout
from r1re_jax.sharding import on_device
from r1re_jax.task.lessons import Source
from r1re_jax.task.prompts import PromptEncoder
from r1re_jax.train.batch import check_mesh, grpo_blocks, spread, spread_tree
from r1re_jax.train.drawing import Drawing, Tick
from r1re_jax.train.figures import (
    Clock,
    completion_rows,
    drawing_metrics,
    sampling_metrics,
    update_metrics,
)
from r1re_jax.train.groups import Groups
from r1re_jax.train.grpo_settings import GRPOSettings
from r1re_jax.train.meter import Meter, make_meter
from r1re_jax.train.optimizer import learning_rate, make_optimizer
from r1re_jax.train.reference import followed
from r1re_jax.train.sampler import Sampler, make_sampler
from r1re_jax.train.state import Layout, Params, TrainState, model_state
from r1re_jax.train.update import (
    Gradient,
    Programs,
    SamplerDriftError,
    StepResult,
    compute_gradient,
    make_programs,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPOBlock:
    """A micro-batch of completions.

    Attributes:
        tree: guides, questions, completions.
        advantage_NPG: fp32.
        weight_NPGC: fp32, this block's part of the whole step's token weights.
        sampler_logp_NPGC: fp32, as the sampler computed them.
        ref_logp_NPGC: fp32 under the reference; None without a KL term.
        old_logp_NPGC: fp32 under the policy that sampled; None if that is the policy being updated.
        long_NPG: bool, the longest completions of the step, reported by themselves; None for none.
    """

    tree: Tree
    advantage_NPG: Any
    weight_NPGC: Any
    sampler_logp_NPGC: Any
    ref_logp_NPGC: Any = None
    old_logp_NPGC: Any = None
    long_NPG: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPO:
    """The reinforcement's steps; made by `make_grpo`.

    Attributes:
        settings: of the phase.
        drawing: how completions are drawn and judged.
        correction: of what the sampler drew; never `auto`.
        first: steps that were completed before the phase.
        layout: the model without its arrays.
        optimizer: of the phase.
        programs: jitted updates.
        score: jitted, (params, tree) -> logp_NPGC.
        reference: all parameters of a frozen reference; None without a KL term, or where the
            reference follows the policy and is part of the state.
        meter: judges how well steps use the devices.
    """

    settings: GRPOSettings
    drawing: Drawing
    correction: CorrectionKind
    first: int
    layout: Layout
    optimizer: optax.GradientTransformation
    programs: Programs
    score: Callable[[Params, Tree], jax.Array]
    reference: Params | None
    meter: Meter

    @property
    def source(self) -> Source:
        """Lessons of a step."""
        return self.drawing.source

    def step(self, state: TrainState, number: int, *, tick: Tick) -> StepResult:
        """Do step `number` (of the whole run, from 1) on a state that has completed the one before.

        The state is donated by the first update; everything that can fail on its data fails before.

        Raises:
            NonFiniteError: a loss or gradient, before that update.
            SamplerDriftError: before the first update.
            LimitError: a guide or question that is too long.
        """
        clock, params = Clock(), self.programs.whole(state.params)
        moving = None if state.reference is None else self.programs.whole(state.reference)
        reference = self.reference if moving is None else moving
        begun: list[list[GRPOBlock]] = []

        def score(tree: Tree, rollout: Rollout) -> None:
            begun.append(self._scored(params, reference, tree, rollout, tick))

        # Which groups are kept does not depend on rewards where no others are drawn in their place:
        # then the device scores while the host judges.
        early = score if not self.settings.refill else lambda tree, rollout: None
        drawn = self.drawing.draw(params, number, tick=tick, clock=clock, meanwhile=early)
        kept = drawn.groups.choose(self.settings.questions)
        advantage_NPG = self._advantages(kept)
        completion = Level(kept.rollout.tokens, kept.rollout.length)
        tree = Tree(drawn.guide, kept.question, completion)
        if not begun:
            score(tree, kept.rollout)
        metrics = {"draws": float(drawn.draws), **sampling_metrics(drawn.groups, self.settings)}
        places_NP = drawn.groups.places(self.settings.questions)
        metrics |= drawing_metrics(drawn.groups, kept, places_NP)
        batch = self._compared(begun[0], advantage_NPG)
        clock.lap("reference")
        state, gradients = self._updates(state, batch, tick)
        if state.reference is not None:
            state = dataclasses.replace(
                state,
                reference=followed(
                    state.reference,
                    state.params,
                    self.settings.reference,
                    done=number - self.first,
                ),
            )
        clock.lap("update", after=state.params)
        metrics |= update_metrics(gradients)
        done = (number - 1 - self.first) * self.settings.inner_iterations
        rate = learning_rate(
            self.settings.optimizer, updates_per_step=self.settings.inner_iterations
        )
        metrics |= {"learning_rate": float(rate(done)), **clock.seconds()}
        metrics["tokens_per_second"] = (
            float(drawn.groups.rollout.length.sum()) / metrics["step_time"]
        )
        metrics |= self.meter.grpo(drawn.lengths, tree, self.settings, seconds=metrics)
        rows = completion_rows(kept, advantage_NPG, parts=tuple(self.settings.rewards))
        return StepResult(state, metrics, rows)

    def _advantages(self, kept: Groups) -> np.ndarray:
        """Compare each reward within its group; [N, P, G]."""
        weights = tuple(self.settings.rewards.values()) or (1.0,)
        reward_RNPG = np.moveaxis(kept.parts, -1, 0)
        return np.asarray(combined_advantages(reward_RNPG, weights, kind=self.settings.advantage))

    @functools.partial(jax.profiler.annotate_function, name="reference")
    def _scored(
        self,
        params: Params,
        reference: Params | None,
        tree: Tree,
        rollout: Rollout,
        tick: Tick,
    ) -> list[GRPOBlock]:
        """Cut the step into micro-batches and score them under the frozen policies they need.

        The scores are begun, not awaited; advantages are still blank.
        """
        settings = self.settings
        mask_NPGC = length_mask(rollout.length, rollout.tokens.shape[-1])
        if settings.mask_truncated:
            mask_NPGC &= ~rollout.truncated[..., None]
        weight_NPGC = np.asarray(token_weights(mask_NPGC, kind=settings.loss))
        long_NPG = longest_quarter(rollout.length)
        batch = []
        for block in grpo_blocks(settings):
            tick("reference")
            part = block.of_tree(tree)
            # On policy the update's own forward gives the old log-probabilities; see `grpo_loss`.
            old = self.score(params, part) if settings.inner_iterations > 1 else None
            ref_logp = None if reference is None else self.score(reference, part)
            batch.append(
                GRPOBlock(
                    tree=part,
                    advantage_NPG=None,
                    weight_NPGC=block.of(weight_NPGC),
                    sampler_logp_NPGC=block.of(rollout.logp),
                    ref_logp_NPGC=ref_logp,
                    old_logp_NPGC=old,
                    long_NPG=block.of(long_NPG),
                )
            )
        return batch

    def _compared(self, batch: Sequence[GRPOBlock], advantage_NPG: np.ndarray) -> list[GRPOBlock]:
        """Give each block its advantages, and wait for its scores."""
        whole = [
            dataclasses.replace(of, advantage_NPG=block.of(advantage_NPG))
            for block, of in zip(grpo_blocks(self.settings), batch, strict=True)
        ]
        return jax.block_until_ready(whole)

    def _updates(
        self, state: TrainState, batch: Sequence[GRPOBlock], tick: Tick
    ) -> tuple[TrainState, list[Gradient]]:
        """Update once per inner iteration; a signal is heeded only before the first."""
        gradients = []
        for iteration in range(self.settings.inner_iterations):
            listen = tick if iteration == 0 else _deaf
            gradient = compute_gradient(
                self.programs,
                state.params,
                batch,
                tick=lambda: listen("update"),  # noqa: B023
            )
            if iteration == 0:
                self._check_drift(gradient)
            state = self._apply(state, gradient)
            gradients.append(dataclasses.replace(gradient, params={}))
        return state, gradients

    def _apply(self, state: TrainState, gradient: Gradient) -> TrainState:
        """Update what the optimizer updates; a reference that follows the policy is not donated."""
        reference, state = state.reference, dataclasses.replace(state, reference=None)
        state = self.programs.apply(state, gradient.params)
        return dataclasses.replace(state, reference=reference)

    def _check_drift(self, gradient: Gradient) -> None:
        gap = gradient.sums["logp_gap"] / max(gradient.sums["tokens"], 1)
        if gap > self.settings.max_logp_gap:
            raise SamplerDriftError(
                f"sampler and trainer differ by {gap:.3g} nats a token in the mean, more than"
                f" grpo.max_logp_gap = {self.settings.max_logp_gap}: the sampled completions are"
                " not those of the policy that is trained. Try model.dtype=float32, and"
                " grpo.quantise without int8"
            )


def make_grpo(
    settings: GRPOSettings,
    *,
    limits: Limits,
    encoder: PromptEncoder,
    source: Source,
    seed: int,
    first: int,
    layout: Layout,
    reference: Params | None,
    sampler: Sampler | None = None,
    frozen: Params | None = None,
) -> GRPO:
    """Build the reinforcement.

    Args:
        settings: of the phase.
        limits: widths of the levels.
        encoder: words to tokens and back.
        source: lessons of a step.
        seed: of sampling.
        first: steps that were completed before the phase.
        layout: the model without its arrays.
        reference: all parameters of a frozen one; needed if the KL coefficient is not 0, unless
            the reference follows the policy: then it is part of the state.
        sampler: what draws; None for what `settings.quantise` makes of the model, on its mesh.
        frozen: parameters that an adapter leaves as they are.

    Raises:
        ValueError: micro-batches that the mesh cannot share evenly, or no reference.
    """
    sizes = settings.trees, settings.questions, settings.micro_batch
    check_mesh(*sizes, mesh=layout.mesh, phase="grpo")
    if settings.kl_coefficient and reference is None and not settings.reference.every:
        raise ValueError(
            f"grpo.kl_coefficient is {settings.kl_coefficient} but there is no reference"
        )
    optimizer = make_optimizer(
        settings.optimizer,
        matrices=layout.matrices,
        updates_per_step=settings.inner_iterations,
    )

    drawing = Drawing(
        settings=settings,
        limits=limits,
        encoder=encoder,
        source=source,
        seed=seed,
        sampler=sampler or make_sampler(layout, settings.quantise),
    )
    correction = drawing.sampler.correction(settings.correction, trained=layout)

    def loss(model: Qwen, block: GRPOBlock) -> tuple[jax.Array, dict[str, jax.Array]]:
        below = dataclasses.replace(block, tree=None)
        block = dataclasses.replace(
            spread(below, layout.mesh), tree=spread_tree(block.tree, layout.mesh)
        )
        return grpo_loss(model, block, settings, correction=correction)

    def score(params: Params, tree: Tree) -> jax.Array:
        model = nnx.merge(layout.graph, model_state(on_device(params)))
        return _score(model, spread_tree(tree, layout.mesh), settings).logp_NPGC

    return GRPO(
        settings=settings,
        drawing=drawing,
        correction=correction,
        first=first,
        layout=layout,
        optimizer=optimizer,
        programs=make_programs(loss, layout=layout, optimizer=optimizer, frozen=frozen),
        score=jax.jit(score),
        reference=reference if settings.kl_coefficient else None,
        meter=make_meter(layout, sampler=drawing.sampler.layout),
    )


def grpo_loss(
    model: Qwen,
    block: GRPOBlock,
    settings: GRPOSettings,
    *,
    correction: CorrectionKind = CorrectionKind.NONE,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the block's part of the objective, and sums (and maxima) for metrics.

    Args:
        model: the policy.
        block: of the step.
        settings: of the phase.
        correction: of what the sampler drew; not `auto`.
    """
    scores = _score(model, block.tree, settings)
    logp = scores.logp_NPGC
    mask = length_mask(block.tree.completion.length, logp.shape[-1])
    constant = jax.lax.stop_gradient(logp)
    old = constant if block.old_logp_NPGC is None else block.old_logp_NPGC
    importance = None
    if correction is not CorrectionKind.NONE:
        importance = importance_weights(
            old,
            block.sampler_logp_NPGC,
            mask,
            kind=correction,
            limit=settings.correction_limit,
        )
    loss, sums = objective(
        logp,
        old_logp_PGC=old,
        ref_logp_PGC=block.ref_logp_NPGC,
        advantage_PG=block.advantage_NPG,
        mask_PGC=mask,
        weight_PGC=block.weight_NPGC,
        settings=settings.objective,
        # Only where it is paid for: else no gradient flows through the entropies.
        entropy_PGC=scores.entropy_NPGC if settings.entropy_coefficient else None,
        importance_PGC=importance,
    )
    sums |= correction_sums(
        old, block.sampler_logp_NPGC, mask, weight_PGC=importance, long_PG=block.long_NPG
    )
    gap = jnp.where(mask, jnp.abs(constant - block.sampler_logp_NPGC), 0.0)
    entropy = jax.lax.stop_gradient(scores.entropy_NPGC)
    more = {"entropy": entropy.sum(), "logp_gap": gap.sum(), "logp_gap_max": gap.max()}
    return loss, sums | more


def _score(model: Qwen, tree: Tree, settings: GRPOSettings) -> Any:
    return completion_logp(
        model, tree, temperature=settings.temperature, chunk=settings.score_chunk
    )


def _deaf(_: str) -> None:
    """A tick that heeds nothing: between the updates of one step there is no state to save."""
