"""The examples of a run, opened and checked before anything is computed."""

import dataclasses
import difflib
import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from r1re_jax.model.tree import pad_level
from r1re_jax.policy import Limits
from r1re_jax.task import miniworld
from r1re_jax.task.completions import Taught
from r1re_jax.task.lessons import DatasetSource, Lesson, MixedSource, Source
from r1re_jax.task.prompts import PromptEncoder
from r1re_jax.task.readers import (
    data_sha256,
    load_hub_semeval2010,
    packaged_guide,
    read_semeval2010,
    resolve_data,
)
from r1re_jax.task.relations import DataError, Guide, load_guide
from r1re_jax.task.tasks import RELATION, AnyExample, Task, TaskKind
from r1re_jax.train.data_settings import (
    DataKind,
    DataSettings,
    EvalSetSettings,
    ExtraSettings,
    SourceSettings,
)
from r1re_jax.train.settings import Phase, Settings

PACKAGED = "packaged:"
# What miniworld writes for each task: lessons, and a held-out set.
WORLDS: dict[TaskKind, tuple[Callable[..., Source], Callable[..., Any]]] = {
    TaskKind.RELATION: (miniworld.source, miniworld.examples),
    TaskKind.TRIPLETS: (miniworld.triplet_source, miniworld.triplet_examples),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What to train on.

    Attributes:
        source: (trees, questions) -> lessons of every step.
        known: a guide with all of its examples for each data set that is read from files.
        complete: whether that is all; else other lessons are made as they are asked for.
        sha256: name of each file -> SHA-256 of its content.
    """

    source: Callable[[int, int], Source]
    known: tuple[Lesson, ...]
    complete: bool
    sha256: Mapping[str, str]

    @property
    def guides(self) -> tuple[Guide, ...]:
        """The guides that are known before the run."""
        return tuple(lesson.guide for lesson in self.known)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSet:
    """A named set to evaluate on.

    Attributes:
        name: of the set.
        guide: of all examples.
        examples: what to ask.
        sha256: of the data file; empty where there is none.
    """

    name: str
    guide: Guide
    examples: tuple[AnyExample, ...]
    sha256: str


def open_mixture(settings: DataSettings, *, seed: int, task: Task = RELATION) -> TrainingData:
    """Open everything to train on; with extra sets each tree of a step draws its own.

    Raises:
        DataError: as `open_training`; or one id twice under guides of one title.
        GuideError: as `open_training`.
        ValueError: as `open_training`.
    """
    main = open_training(settings.train, seed=seed, task=task)
    if not settings.extra:
        return main
    sets = [main, *(open_training(one, seed=seed, task=task) for one in settings.extra.values())]
    known = tuple(lesson for one in sets for lesson in one.known)
    _check_names(known)
    return TrainingData(
        source=lambda trees, questions: MixedSource(
            sources=tuple(one.source(trees, questions) for one in sets),
            weights=(1.0, *(one.weight for one in settings.extra.values())),
            trees=trees,
            seed=seed,
        ),
        known=known,
        complete=all(one.complete for one in sets),
        sha256={name: digest for one in sets for name, digest in one.sha256.items()},
    )


def _check_names(sets: Sequence[Lesson]) -> None:
    """Refuse examples that a step could not tell apart: random keys are of title and id."""
    names = Counter((one.guide.title, example.id) for one in sets for example in one.examples)
    repeated = [name for name, count in names.items() if count > 1]
    if repeated:
        title, first = repeated[0]
        raise DataError(
            f"{len(repeated)} examples of different data sets have one id under guides of one"
            f" title, {first!r} of {title!r} first; give the guides titles, or the examples ids, of"
            " their own"
        )


def open_training(
    settings: SourceSettings | ExtraSettings, *, seed: int, task: Task = RELATION
) -> TrainingData:
    """Open one data set; the one place where the kinds of sources are told apart.

    Raises:
        DataError: a file that is missing, empty or breaks the data contract.
        GuideError: a guide that cannot be read, or lacks what the task needs.
        ValueError: options that miniworld's source does not take.
    """
    if settings.kind is DataKind.MINIWORLD:
        make, _ = WORLDS[task.kind]
        _check_options(make, settings.options, own=("trees", "questions", "seed"))

        def world(trees: int, questions: int) -> Source:
            return make(trees=trees, questions=questions, seed=seed, **settings.options)

        world(1, 1)  # refuses bad values now and not when a phase begins
        return TrainingData(source=world, known=(), complete=False, sha256={})
    guide, examples, hashes = _read(settings, task, split="train")
    return TrainingData(
        source=lambda trees, questions: DatasetSource(
            guide, examples, trees=trees, questions=questions, seed=seed
        ),
        known=(Lesson(guide, examples),),
        complete=True,
        sha256=hashes,
    )


def phase_source(settings: Settings, data: TrainingData, phase: Phase) -> Source:
    """Return the lessons of a phase.

    Raises:
        ValueError: fewer examples than one step takes.
    """
    if phase is Phase.SFT:
        return data.source(settings.sft.trees, settings.sft.questions)
    return data.source(settings.grpo.trees, settings.grpo.questions_drawn)


def open_sets(
    settings: Mapping[str, EvalSetSettings], *, task: Task = RELATION
) -> dict[str, EvalSet]:
    """Open the sets to evaluate on.

    Raises:
        DataError: a file that is missing, empty or breaks the data contract.
        GuideError: a guide that cannot be read, or lacks what the task needs.
    """
    return {name: _open_set(name, one, task) for name, one in settings.items()}


def _open_set(name: str, settings: EvalSetSettings, task: Task) -> EvalSet:
    if settings.kind is DataKind.MINIWORLD:
        _, make = WORLDS[task.kind]
        _check_options(make, settings.options)
        guide, examples = make(**settings.options)
        hashes: dict[str, str] = {}
    else:
        guide, examples, hashes = _read(settings, task, split="test")
    examples = tuple(examples)[: settings.limit or None]
    return EvalSet(name=name, guide=guide, examples=examples, sha256=hashes.get(settings.path, ""))


def check_prompts(
    data: TrainingData,
    sets: Sequence[EvalSet],
    *,
    encoder: PromptEncoder,
    settings: Settings,
) -> None:
    """Tokenise everything that is known before the run, and refuse what does not fit.

    Examples that are made as they are asked for are checked as they come.

    Raises:
        LimitError: rows longer than their limit; counts them and names the longest.
        PromptError: levels whose tokens are not those of the whole prompt.
        DataError: training examples without label.
    """
    limits = settings.training_limits
    for lesson in data.known:
        check_levels(lesson.guide, lesson.examples, encoder=encoder, limits=limits)
        blank = [example.id for example in lesson.examples if not example.answer]
        if blank:
            raise DataError(
                f"{len(blank)} of {len(lesson.examples)} training examples have no label,"
                f" {blank[0]} first; neither a completion nor a reward can be made of them"
            )
        if settings.sft.steps:
            check_completions(
                lesson.examples,
                encoder=encoder,
                limits=limits,
                taught=settings.sft.taught,
            )
    for one in sets:
        check_levels(one.guide, one.examples, encoder=encoder, limits=settings.limits)


def check_levels(
    guide: Guide, examples: Sequence[AnyExample], *, encoder: PromptEncoder, limits: Limits
) -> None:
    """Refuse a guide or sentences that are longer than their limits, or split at a bad place."""
    encoder.check(guide, examples)
    pad = {"pad_id": encoder.pad_id}
    tokens = [encoder.guide_tokens(guide)]
    pad_level(tokens, limit=limits.guide, name="guide", names=[guide.title], **pad)
    rows = [encoder.question_tokens(example) for example in examples]
    ids = [example.id for example in examples]
    pad_level(rows, limit=limits.question, name="question", names=ids, **pad)


def check_completions(
    examples: Sequence[AnyExample],
    *,
    encoder: PromptEncoder,
    limits: Limits,
    taught: Taught,
) -> None:
    """Refuse completions of the supervised warm start that are longer than their limit."""
    pad_level(
        [
            encoder.completion_tokens(encoder.task.completion(example, taught=taught))
            for example in examples
        ],
        limit=limits.completion,
        pad_id=encoder.pad_id,
        name="completion",
        names=[example.id for example in examples],
    )


def _read(
    settings: SourceSettings | ExtraSettings | EvalSetSettings, task: Task, *, split: str
) -> tuple[Guide, tuple[AnyExample, ...], dict[str, str]]:
    """Read guide and examples of a file (or of the hub), and hashes of the files by their names."""
    if settings.options:
        raise DataError(
            f"data of kind {settings.kind} has no options, found {dict(settings.options)}"
        )
    if settings.kind is DataKind.SEMEVAL2010 and task.kind is not TaskKind.RELATION:
        raise DataError(
            f"data of kind {settings.kind} has marked pairs, which the task {task.kind} does not"
            f" take; expected {DataKind.JSONL} or {DataKind.MINIWORLD}"
        )
    hashes = {}
    if settings.kind is DataKind.SEMEVAL2010 and not settings.guide:
        guide = packaged_guide("semeval2010_short")
    else:
        guide = _guide(settings, hashes)
    if settings.kind is DataKind.SEMEVAL2010 and not settings.path:
        return guide, tuple(load_hub_semeval2010(split)), hashes
    if not settings.path:
        raise DataError(f"data of kind {settings.kind} needs `path`, a file of examples")
    if settings.kind is DataKind.SEMEVAL2010:
        examples = read_semeval2010(settings.path)
        for example in examples:
            guide.schema.check_label(example.label)
    else:
        examples = task.read(settings.path, task.schema(guide))
    hashes[settings.path] = data_sha256(settings.path)
    return guide, tuple(examples), hashes


def _check_options(
    function: Callable, options: Mapping[str, Any], *, own: Sequence[str] = ()
) -> None:
    """Refuse options that a function does not take, or that the run sets itself."""
    known = [name for name in inspect.signature(function).parameters if name not in own]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise DataError(f"unknown option {name!r} of miniworld; {hint}")


def _guide(
    settings: SourceSettings | ExtraSettings | EvalSetSettings, hashes: dict[str, Any]
) -> Guide:
    if not settings.guide:
        raise DataError(
            f"data of kind {settings.kind} needs `guide`, a Markdown file or {PACKAGED}NAME"
        )
    if settings.guide.startswith(PACKAGED):
        guide = packaged_guide(settings.guide.removeprefix(PACKAGED))
    else:
        guide = load_guide(resolve_data(settings.guide))
    hashes[settings.guide] = guide.sha256
    return guide
