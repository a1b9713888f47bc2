"""Group relative policy optimization (arXiv 2402.03300), one step at a time.

Lessons, completions by sampling, rewards by rule, advantages within each group, log-probabilities
of the reference, and one or several updates. Until the first update nothing of the state changes,
so that a step can be given up at any `tick` before it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from r1re_jax.model.qwen import Cache, Qwen
from r1re_jax.model.tree import Level, Tree
from r1re_jax.policy import Limits
from r1re_jax.rl.advantages import group_advantages
from r1re_jax.rl.losses import token_weights
from r1re_jax.rl.masks import length_mask
from r1re_jax.rl.objective import objective
from r1re_jax.rl.scoring import completion_logp
from r1re_jax.rollout.decode import prefill
from r1re_jax.rollout.keys import Purpose, example_ids, row_keys
from r1re_jax.rollout.rollout import Rollout, generate
from r1re_jax.rollout.sampling import SamplingSettings
from r1re_jax.task.lessons import Lesson, Source
from r1re_jax.task.prompts import PromptEncoder
from r1re_jax.task.rewards import relation_reward
from r1re_jax.task.tasks import TaskKind
from r1re_jax.train.batch import blocks, check_mesh, prompt_levels, spread, spread_tree
from r1re_jax.train.figures import Clock, completion_rows, sampling_metrics, update_metrics
from r1re_jax.train.groups import Groups, as_examples, join
from r1re_jax.train.optimizer import learning_rate, make_optimizer
from r1re_jax.train.settings import GRPOSettings
from r1re_jax.train.state import Layout, Params, TrainState, model_state
from r1re_jax.train.update import (
    Gradient,
    Programs,
    SamplerDriftError,
    StepResult,
    compute_gradient,
    make_programs,
)

Tick = Callable[[str], None]


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
    """

    tree: Tree
    advantage_NPG: Any
    weight_NPGC: Any
    sampler_logp_NPGC: Any
    ref_logp_NPGC: Any = None
    old_logp_NPGC: Any = None


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """What a step drew: guides [N, S], groups, and in how many rounds."""

    guide: Level
    groups: Groups
    draws: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPO:
    """The reinforcement's steps; made by `make_grpo`.

    Attributes:
        settings: of the phase.
        limits: widths of the levels.
        encoder: words to tokens and back.
        source: lessons of a step.
        seed: of sampling.
        first: steps that were completed before the phase.
        layout: the model without its arrays.
        optimizer: of the phase.
        programs: jitted updates.
        score: jitted, (params, tree) -> logp_NPGC.
        reference: all parameters of the reference; None without a KL term.
    """

    settings: GRPOSettings
    limits: Limits
    encoder: PromptEncoder
    source: Source
    seed: int
    first: int
    layout: Layout
    optimizer: optax.GradientTransformation
    programs: Programs
    score: Callable[[Params, Tree], jax.Array]
    reference: Params | None

    def step(self, state: TrainState, number: int, *, tick: Tick) -> StepResult:
        """Do step `number` (of the whole run, from 1) on a state that has completed the one before.

        The state is donated by the first update; everything that can fail on its data fails before.

        Raises:
            NonFiniteError: a loss or gradient, before that update.
            SamplerDriftError: before the first update.
            LimitError: a guide or question that is too long.
        """
        clock, params = Clock(), self.programs.whole(state.params)
        drawn = self._draw(params, number, tick, clock)
        kept = drawn.groups.choose(self.settings.questions)
        advantage_NPG = np.asarray(group_advantages(kept.reward, kind=self.settings.advantage))
        completion = Level(kept.rollout.tokens, kept.rollout.length)
        tree = Tree(drawn.guide, kept.question, completion)
        batch = self._scored(params, tree, kept.rollout, advantage_NPG, tick)
        clock.lap("reference")
        state, gradients = self._updates(state, batch, tick)
        clock.lap("update")
        metrics = sampling_metrics(drawn.groups)
        metrics |= {
            "draws": float(drawn.draws),
            "frac_kept_zero_std": float(1 - kept.signal.mean()),
        }
        metrics |= update_metrics(gradients)
        done = (number - 1 - self.first) * self.settings.inner_iterations
        rate = learning_rate(
            self.settings.optimizer, updates_per_step=self.settings.inner_iterations
        )
        metrics |= {"learning_rate": float(rate(done)), **clock.seconds()}
        metrics["tokens_per_second"] = float(drawn.groups.rollout.length.sum()) / metrics["seconds"]
        return StepResult(state, metrics, completion_rows(kept, advantage_NPG))

    def _draw(self, params: Params, number: int, tick: Tick, clock: Clock) -> "_Drawn":
        """Draw groups of P questions a guide; again while too few of them have signal."""
        settings = self.settings
        lessons = self.source.lessons(number - 1)
        guide, question = prompt_levels(lessons, self.encoder, self.limits)
        ids = question_ids(lessons)
        _, caches = prefill(self.layout.graph, model_state(params), (guide,))
        groups: list[Groups] = []
        for start in range(0, settings.questions_drawn, settings.questions):
            part = slice(start, start + settings.questions)
            level = Level(question.tokens[:, part], question.length[:, part])
            keys = row_keys(self.seed, Purpose.TRAIN, number, ids[:, part], range(settings.group))
            rollout = self._rollout(params, caches, level, keys, tick)
            clock.lap("rollout")
            below = [Lesson(lesson.guide, lesson.examples[part]) for lesson in lessons]
            groups.append(self._judge(below, level, rollout, tick))
            clock.lap("reward")
            if (join(groups).signal.sum(axis=1) >= settings.questions).all():
                break
        return _Drawn(guide, join(groups), len(groups))

    def _rollout(
        self,
        params: Params,
        guide: tuple[Cache, ...],
        question: Level,
        keys: jax.Array,
        tick: Tick,
    ) -> Rollout:
        """Sample G completions of every question; returned on the host."""
        settings = self.settings
        rollout = generate(
            self.layout.graph,
            model_state(params),
            (question,),
            ancestors=guide,
            keys=keys,
            settings=SamplingSettings(
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                min_p=settings.min_p,
            ),
            limit=self.limits.completion,
            stop_ids=self.encoder.stop_ids,
            pad_id=self.encoder.pad_id,
            chunk=settings.chunk,
            on_chunk=lambda progress: tick(f"rollout {progress.tokens}/{progress.limit}"),
            mesh=self.layout.mesh,
        )
        return jax.device_get(rollout)

    def _judge(
        self, lessons: Sequence[Lesson], question: Level, rollout: Rollout, tick: Tick
    ) -> Groups:
        """Turn tokens into texts, and texts into verdicts."""
        task = self.encoder.task
        # The rule of pairs by its name here, so that another can be put in its place.
        judge = relation_reward if task.kind is TaskKind.RELATION else task.judge
        texts_NPG = np.empty(rollout.length.shape, object)
        verdicts_NPG = np.empty(rollout.length.shape, object)
        for tree, lesson in enumerate(lessons):
            schema = task.schema(lesson.guide)
            for place, example in enumerate(lesson.examples):
                tick("reward")
                for sample, length in enumerate(rollout.length[tree, place]):
                    where = tree, place, sample
                    texts_NPG[where] = self.encoder.decode(rollout.tokens[where][:length])
                    verdicts_NPG[where] = judge(texts_NPG[where], example, schema)
        rewards = [verdict.reward for verdict in verdicts_NPG.flat]
        return Groups(
            examples=as_examples([lesson.examples for lesson in lessons]),
            question=question,
            rollout=rollout,
            texts=texts_NPG,
            verdicts=verdicts_NPG,
            reward=np.array(rewards, np.float32).reshape(verdicts_NPG.shape),
        )

    def _scored(
        self, params: Params, tree: Tree, rollout: Rollout, advantage_NPG: np.ndarray, tick: Tick
    ) -> list[GRPOBlock]:
        """Cut the step into micro-batches and score them under the frozen policies they need."""
        settings = self.settings
        mask_NPGC = length_mask(rollout.length, rollout.tokens.shape[-1])
        weight_NPGC = np.asarray(token_weights(mask_NPGC, kind=settings.loss))
        batch = []
        for block in blocks(settings.trees, settings.questions, settings.micro_batch):
            tick("reference")
            part = block.of_tree(tree)
            # On policy the update's own forward gives the old log-probabilities; see `grpo_loss`.
            old = self.score(params, part) if settings.inner_iterations > 1 else None
            reference = None if self.reference is None else self.score(self.reference, part)
            batch.append(
                GRPOBlock(
                    tree=part,
                    advantage_NPG=block.of(advantage_NPG),
                    weight_NPGC=block.of(weight_NPGC),
                    sampler_logp_NPGC=block.of(rollout.logp),
                    ref_logp_NPGC=reference,
                    old_logp_NPGC=old,
                )
            )
        return jax.block_until_ready(batch)

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
            state = self.programs.apply(state, gradient.params)
            gradients.append(dataclasses.replace(gradient, params={}))
        return state, gradients

    def _check_drift(self, gradient: Gradient) -> None:
        gap = gradient.sums["logp_gap"] / max(gradient.sums["tokens"], 1)
        if gap > self.settings.max_logp_gap:
            raise SamplerDriftError(
                f"sampler and trainer differ by {gap:.3g} nats a token in the mean, more than"
                f" grpo.max_logp_gap = {self.settings.max_logp_gap}: the sampled completions are"
                " not those of the policy that is trained. Try model.dtype=float32"
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
        reference: all its parameters; needed if the KL coefficient is not 0.
        frozen: parameters that an adapter leaves as they are.

    Raises:
        ValueError: micro-batches that the mesh cannot share evenly, or no reference.
    """
    sizes = settings.trees, settings.questions, settings.micro_batch
    check_mesh(*sizes, mesh=layout.mesh, phase="grpo")
    if settings.kl_coefficient and reference is None:
        raise ValueError(
            f"grpo.kl_coefficient is {settings.kl_coefficient} but there is no reference"
        )
    optimizer = make_optimizer(
        settings.optimizer,
        matrices=layout.matrices,
        updates_per_step=settings.inner_iterations,
    )

    def loss(model: Qwen, block: GRPOBlock) -> tuple[jax.Array, dict[str, jax.Array]]:
        below = dataclasses.replace(block, tree=None)
        block = dataclasses.replace(
            spread(below, layout.mesh), tree=spread_tree(block.tree, layout.mesh)
        )
        return grpo_loss(model, block, settings)

    def score(params: Params, tree: Tree) -> jax.Array:
        model = nnx.merge(layout.graph, model_state(params))
        return _score(model, spread_tree(tree, layout.mesh), settings).logp_NPGC

    return GRPO(
        settings=settings,
        limits=limits,
        encoder=encoder,
        source=source,
        seed=seed,
        first=first,
        layout=layout,
        optimizer=optimizer,
        programs=make_programs(loss, layout=layout, optimizer=optimizer, frozen=frozen),
        score=jax.jit(score),
        reference=reference if settings.kl_coefficient else None,
    )


def grpo_loss(
    model: Qwen, block: GRPOBlock, settings: GRPOSettings
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the block's part of the objective, and sums (and maxima) for metrics."""
    scores = _score(model, block.tree, settings)
    logp = scores.logp_NPGC
    mask = length_mask(block.tree.completion.length, logp.shape[-1])
    constant = jax.lax.stop_gradient(logp)
    loss, sums = objective(
        logp,
        old_logp_PGC=constant if block.old_logp_NPGC is None else block.old_logp_NPGC,
        ref_logp_PGC=block.ref_logp_NPGC,
        advantage_PG=block.advantage_NPG,
        mask_PGC=mask,
        weight_PGC=block.weight_NPGC,
        settings=settings.objective,
    )
    gap = jnp.where(mask, jnp.abs(constant - block.sampler_logp_NPGC), 0.0)
    entropy = jax.lax.stop_gradient(scores.entropy_NPGC)
    more = {"entropy": entropy.sum(), "logp_gap": gap.sum(), "logp_gap_max": gap.max()}
    return loss, sums | more


def question_ids(lessons: Sequence[Lesson]) -> np.ndarray:
    """Return [N, P, 2] uint32, the id of every question; a guide's title names its data set.

    Raises:
        ValueError: a question that occurs twice: its completions would be drawn alike.
    """
    ids = [
        example_ids(lesson.guide.title, [example.id for example in lesson.examples])
        for lesson in lessons
    ]
    names = [(lesson.guide.title, example.id) for lesson in lessons for example in lesson.examples]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(
            f"{len(repeated)} questions occur twice in one step, {repeated[0][1]!r} of"
            f" {repeated[0][0]!r} first; give every example an id of its own"
        )
    return np.stack(ids)


def _score(model: Qwen, tree: Tree, settings: GRPOSettings) -> Any:
    return completion_logp(
        model, tree, temperature=settings.temperature, chunk=settings.score_chunk
    )


def _deaf(_: str) -> None:
    """A tick that heeds nothing: between the updates of one step there is no state to save."""
