"""A step's lessons as arrays, and their cut into micro-batches."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from r1re_jax import sharding
from r1re_jax.model.tree import Level, Tree, pad_level
from r1re_jax.policy import Limits
from r1re_jax.task.lessons import Lesson
from r1re_jax.task.prompts import PromptEncoder
from r1re_jax.train.grpo_settings import GRPOSettings
from r1re_jax.train.settings import Settings


@dataclasses.dataclass(frozen=True)
class Block:
    """A micro-batch: some trees, or some questions of one tree, and completions of each.

    Attributes:
        trees: which of N.
        questions: which of P.
        group: which of G.
    """

    trees: slice
    questions: slice
    group: slice

    def of(self, array: Any) -> Any:
        """Return this block's part of [N, P, G, ...]."""
        return array[self.trees, self.questions, self.group]

    def of_tree(self, tree: Tree) -> Tree:
        """Return this block's part of a tree of arrays."""
        guide, question, completion = tree.guide, tree.question, tree.completion
        above = self.trees, self.questions
        return Tree(
            Level(guide.tokens[self.trees], guide.length[self.trees]),
            Level(question.tokens[above], question.length[above]),
            Level(self.of(completion.tokens), self.of(completion.length)),
        )


def blocks(
    trees: int, questions: int, micro_batch: int, *, group: int = 1, micro_group: int = 0
) -> Iterator[Block]:
    """Cut [trees, questions, group] into blocks; 0 takes all that there are.

    Whole trees stay together where they fit, so that a guide is computed as seldom as possible.

    Args:
        trees: N.
        questions: P.
        micro_batch: questions of a block.
        group: G.
        micro_group: completions of each question of a block; divides G.
    """
    size, deep = micro_batch or trees * questions, micro_group or group
    high, wide = max(1, size // questions), min(size, questions)
    for tree in range(0, trees, high):
        for question in range(0, questions, wide):
            for first in range(0, group, deep):
                yield Block(
                    slice(tree, tree + high),
                    slice(question, question + wide),
                    slice(first, first + deep),
                )


def grpo_blocks(settings: GRPOSettings) -> Iterator[Block]:
    """Cut a step into its micro-batches."""
    return blocks(
        settings.trees,
        settings.questions,
        settings.micro_batch,
        group=settings.group,
        micro_group=settings.micro_group,
    )


def prompt_levels(
    lessons: Sequence[Lesson], encoder: PromptEncoder, limits: Limits
) -> tuple[Level, Level]:
    """Encode guides [N, S] and questions [N, P, Q].

    Raises:
        LimitError: a guide or a question is longer than its limit; names the longest.
    """
    guide = pad_level(
        [encoder.guide_tokens(lesson.guide) for lesson in lessons],
        limit=limits.guide,
        pad_id=encoder.pad_id,
        name="guide",
        names=[lesson.guide.title for lesson in lessons],
    )
    question = pad_level(
        [[encoder.question_tokens(example) for example in lesson.examples] for lesson in lessons],
        limit=limits.question,
        pad_id=encoder.pad_id,
        name="question",
        names=example_names(lessons),
    )
    return guide, question


def completion_level(
    texts: Sequence[Sequence[str]],
    encoder: PromptEncoder,
    limits: Limits,
    *,
    names: Sequence[str],
) -> Level:
    """Encode one given completion for each question: [N, P, 1, C], the stop token included.

    Raises:
        LimitError: a completion is longer than its limit; names the longest.
    """
    return pad_level(
        [[[encoder.completion_tokens(text)] for text in row] for row in texts],
        limit=limits.completion,
        pad_id=encoder.pad_id,
        name="completion",
        names=names,
    )


def example_names(lessons: Sequence[Lesson]) -> list[str]:
    """Return the ids of all examples, lesson by lesson."""
    return [example.id for lesson in lessons for example in lesson.examples]


def spread(tree: Any, mesh: Mesh) -> Any:
    """Inside jit: shard axis 1 of arrays [N, P, ...] over the devices that share the questions."""

    def one(x: jax.Array) -> jax.Array:
        spec = sharding.spec((None, "question"))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return jax.tree.map(one, tree)


def spread_tree(tree: Tree, mesh: Mesh) -> Tree:
    """`spread` for the levels below the guide; every device keeps the whole guide."""
    return Tree(tree.guide, spread(tree.question, mesh), spread(tree.completion, mesh))


def check_batches(settings: Settings, *, mesh: Mesh) -> None:
    """Refuse batches of any part of a run that the mesh cannot share evenly.

    Raises:
        ValueError: naming the keys to change.
    """
    drawing = sharding.drawing_mesh(mesh, tensor=settings.mesh.drawing_tensor)
    if settings.evaluate.samples and settings.data.eval:
        check_mesh(1, settings.evaluate.batch, 0, mesh=drawing, phase="evaluate")
    if settings.grpo.steps:  # a rollout has all questions of a step
        check_mesh(settings.grpo.trees, settings.grpo.questions, 0, mesh=drawing, phase="grpo")
    ways, limit = mesh.shape["sequence"], settings.training_limits.completion
    if limit % ways:
        key = "limits" if settings.data.train.limits is None else "data.train.limits"
        raise ValueError(
            f"mesh.sequence: {ways} devices share the positions of a completion, and"
            f" {key}.completion={limit} cannot be parted evenly; the next that can is"
            f" {-(-limit // ways) * ways}"
        )
    for phase, of in settings.phases.items():
        check_mesh(of.trees, of.questions, of.micro_batch, mesh=mesh, phase=phase.value)


def check_mesh(trees: int, questions: int, micro_batch: int, *, mesh: Mesh, phase: str) -> None:
    """Refuse micro-batches whose questions cannot be shared evenly by the mesh.

    Raises:
        ValueError: naming the keys to change.
    """
    ways = sharding.question_ways(mesh)
    first = next(blocks(trees, questions, micro_batch))
    wide = first.questions.stop - first.questions.start
    if wide % ways:
        raise ValueError(
            f"{phase}: {wide} questions of a tree are computed at a time, by {ways} devices"
            " (mesh.data times mesh.fsdp, in drawing with mesh.sequence and mesh.drawing_tensor);"
            f" make the batch in {phase} a multiple of {ways}"
        )
