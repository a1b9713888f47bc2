"""The supervised warm start: maximum likelihood of given completions, over the tree of GRPO."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from r1re_jax.model.qwen import Qwen
from r1re_jax.model.tree import Tree
from r1re_jax.policy import Limits
from r1re_jax.rl.scoring import completion_logp
from r1re_jax.task.completions import Taught
from r1re_jax.task.lessons import Lesson, Source
from r1re_jax.task.prompts import PromptEncoder
from r1re_jax.train.batch import (
    blocks,
    check_mesh,
    completion_level,
    example_names,
    prompt_levels,
    spread_tree,
)
from r1re_jax.train.meter import Meter, make_meter
from r1re_jax.train.optimizer import learning_rate, make_optimizer
from r1re_jax.train.settings import SFTSettings
from r1re_jax.train.state import Layout, Params, TrainState
from r1re_jax.train.update import Programs, StepResult, compute_gradient, make_programs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SFTBlock:
    """A micro-batch.

    Attributes:
        tree: one completion per question, G = 1.
        weight: fp32 scalar, 1 / completion tokens of the whole step.
    """

    tree: Tree
    weight: jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFT:
    """The warm start's steps; made by `make_sft`.

    Attributes:
        settings: of the phase.
        limits: widths of the levels.
        encoder: words to tokens.
        source: lessons of a step.
        optimizer: of the phase.
        programs: jitted.
        meter: judges how well steps use the devices.
    """

    settings: SFTSettings
    limits: Limits
    encoder: PromptEncoder
    source: Source
    optimizer: optax.GradientTransformation
    programs: Programs
    meter: Meter

    def step(self, state: TrainState, number: int, *, tick: Callable[[str], None]) -> StepResult:
        """Do step `number` (from 1) on a state that has completed the one before; donates it.

        Raises:
            NonFiniteError: before the update.
            LimitError: a guide, question or completion that is too long.
        """
        began = time.perf_counter()
        cycle = self.settings.cycle or number
        lessons = self.source.lessons((number - 1) % cycle)
        tree = sft_tree(lessons, self.encoder, self.limits, taught=self.settings.taught)
        gradient = compute_gradient(
            self.programs, state.params, self._blocks(tree), tick=lambda: tick("update")
        )
        state = self.programs.apply(state, gradient.params)
        seconds = time.perf_counter() - began
        tokens = gradient.sums["tokens"]
        metrics = {
            "loss": gradient.loss,
            "entropy": gradient.sums["entropy"] / tokens,
            "completions/mean_length": tokens / tree.completion.length.size,
            "grad_norm": gradient.norm,
            "learning_rate": float(learning_rate(self.settings.optimizer)(number - 1)),
            "tokens_per_second": tokens / seconds,
            "step_time": seconds,
            **self.meter.sft(tree, seconds=seconds),
        }
        return StepResult(state, metrics)

    def _blocks(self, tree: Tree) -> Iterator[SFTBlock]:
        weight = np.float32(1 / tree.completion.length.sum())
        settings = self.settings
        for block in blocks(settings.trees, settings.questions, settings.micro_batch):
            yield SFTBlock(block.of_tree(tree), weight)


def make_sft(
    settings: SFTSettings,
    *,
    limits: Limits,
    encoder: PromptEncoder,
    source: Source,
    layout: Layout,
    frozen: Params | None = None,
) -> SFT:
    """Build the warm start; `frozen` are the parameters that an adapter leaves as they are.

    Raises:
        ValueError: micro-batches that the mesh cannot share evenly.
    """
    sizes = settings.trees, settings.questions, settings.micro_batch
    check_mesh(*sizes, mesh=layout.mesh, phase="sft")
    optimizer = make_optimizer(settings.optimizer, matrices=layout.matrices)

    def loss(model: Qwen, block: SFTBlock) -> tuple[jax.Array, dict[str, jax.Array]]:
        spread = SFTBlock(spread_tree(block.tree, layout.mesh), block.weight)
        return sft_loss(model, spread)

    return SFT(
        settings=settings,
        limits=limits,
        encoder=encoder,
        source=source,
        optimizer=optimizer,
        programs=make_programs(loss, layout=layout, optimizer=optimizer, frozen=frozen),
        meter=make_meter(layout),
    )


def sft_loss(model: Qwen, block: SFTBlock) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return -Σ weight · log-probability of the block's completion tokens, and sums for metrics."""
    scores = completion_logp(model, block.tree)
    sums = {
        "tokens": jnp.sum(block.tree.completion.length),
        "entropy": jax.lax.stop_gradient(jnp.sum(scores.entropy_NPGC)),
    }
    return -block.weight * jnp.sum(scores.logp_NPGC), sums


def sft_tree(
    lessons: Sequence[Lesson], encoder: PromptEncoder, limits: Limits, *, taught: Taught
) -> Tree:
    """Encode lessons with the completions to learn, one for each question: G = 1.

    Raises:
        LimitError: something is too long; the message counts and names.
    """
    texts = [
        [encoder.task.completion(example, taught=taught) for example in lesson.examples]
        for lesson in lessons
    ]
    completion = completion_level(texts, encoder, limits, names=example_names(lessons))
    return Tree(*prompt_levels(lessons, encoder, limits), completion)
