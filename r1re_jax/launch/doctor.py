"""Checks a run before it costs money: all that can be known before the first step.

Each check finds something or raises; one that fails is shown, and those that do not need what it
finds still run. Nothing is trained, and nothing is written but a file that vanishes at once.
"""

import dataclasses
import enum
import functools
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from rich.table import Table
from rich.text import Text

from r1re_jax.files import absolute, free_bytes, is_remote, place
from r1re_jax.launch.holdings import device_limit, held
from r1re_jax.policy import Limits
from r1re_jax.task.completions import Taught
from r1re_jax.task.lessons import Lesson
from r1re_jax.task.prompts import PromptEncoder
from r1re_jax.train.batch import blocks, check_batches, grpo_blocks
from r1re_jax.train.config import configuration_hash, read_settings
from r1re_jax.train.data import (
    EvalSet,
    TrainingData,
    check_completions,
    check_levels,
    check_prompts,
    open_mixture,
    open_sets,
    phase_source,
)
from r1re_jax.train.grpo_settings import GRPOSettings
from r1re_jax.train.parity import check_run
from r1re_jax.train.settings import LogSettings, Phase, Settings, SFTSettings
from r1re_jax.train.start import Start, load_start, run_layout, run_mesh
from r1re_jax.train.state import Layout, parameter_bytes
from r1re_jax.train.workdir import WorkdirError, check_workdir, newest_step, versions

# Steps whose lessons are looked at where lessons are made as they are asked for.
STEPS_SEEN = 4
STYLES = {"ok": "green", "failed": "bold red", "skipped": "yellow"}


class Status(enum.StrEnum):
    """How a check ended."""

    OK = "ok"
    FAILED = "failed"
    SKIPPED = "skipped"


class Skipped(Exception):  # noqa: N818  no error: there is nothing to check
    """A check that has nothing to check; says why."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        value: for the checks that need it.
        facts: name -> value, for people.
    """

    value: Any
    facts: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing to look at.

    Attributes:
        name: of the check.
        run: takes what the checks in `needs` found; raises where something is wrong.
        needs: names of earlier checks.
    """

    name: str
    run: Callable[..., Finding]
    needs: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Result:
    """How one check ended, and what it found; `problem` says why it failed or was skipped."""

    name: str
    status: Status
    found: Mapping[str, Any]
    problem: str = ""


def examine(
    config: Mapping[str, Any],
    workdir: str | os.PathLike | None = None,
    *,
    trackers: Callable[[LogSettings], None],
) -> Iterator[Result]:
    """Yield the result of every check, in order, as it ends.

    Args:
        config: as a recipe returns it.
        workdir: of the run; None leaves it unchecked.
        trackers: refuses services that the run reports to and that are not installed.
    """
    values: dict[str, Any] = {}
    for check in _checks(config, workdir, trackers):
        missing = [name for name in check.needs if name not in values]
        if missing:
            yield Result(check.name, Status.SKIPPED, {}, f"needs {', '.join(missing)}")
            continue
        try:
            finding = check.run(*(values[name] for name in check.needs))
        except Skipped as reason:
            yield Result(check.name, Status.SKIPPED, {}, str(reason))
        except Exception as error:  # whatever it is: the other checks still run
            yield Result(check.name, Status.FAILED, {}, _problem(error))
        else:
            values[check.name] = finding.value
            yield Result(check.name, Status.OK, finding.facts)


def report(results: Sequence[Result]) -> dict[str, Any]:
    """Return the results as a JSON object: whether none failed, and each check."""
    failed = any(result.status is Status.FAILED for result in results)
    return {"ok": not failed, "checks": [dataclasses.asdict(result) for result in results]}


def table(results: Sequence[Result]) -> Table:
    """Return the results for people: a row a check, a line a fact."""
    shown = Table("check", "", "found", show_lines=True)
    for result in results:
        lines = [f"{name}: {value}" for name, value in result.found.items()]
        # As text: brackets in paths and shapes are no markup.
        found = Text("\n".join([*([result.problem] if result.problem else []), *lines]))
        status = Text(result.status, style=STYLES[result.status])
        shown.add_row(result.name, status, found)
    return shown


def _problem(error: Exception) -> str:
    """Say what went wrong; errors that are not written for people with their type."""
    known = isinstance(error, ValueError | OSError | RuntimeError)
    return str(error) if known and str(error) else f"{type(error).__name__}: {error}"


def _checks(
    config: Mapping[str, Any],
    workdir: str | os.PathLike | None,
    trackers: Callable[[LogSettings], None],
) -> tuple[Check, ...]:
    """Return all checks, each behind those that it needs."""
    return (
        Check("config", functools.partial(_config, config)),
        Check("versions", _versions),
        Check("trackers", functools.partial(_trackers, trackers), ("config",)),
        Check("devices", _devices, ("config",)),
        Check("parameters", _parameters, ("config", "devices")),
        Check("memory", _memory, ("config", "devices", "parameters")),
        Check("batch", _batch, ("config", "devices")),
        Check("data", _data, ("config",)),
        Check("policy", _policy, ("config", "devices", "parameters")),
        Check("prompts", _prompts, ("config", "data", "policy")),
        Check("workdir", functools.partial(_workdir, workdir), ("config", "data")),
        Check("parity", _parity, ("config", "batch", "data", "policy")),
    )


def _config(config: Mapping[str, Any]) -> Finding:
    settings = read_settings(config)
    steps = ", ".join(f"{of.steps} {phase}" for phase, of in settings.phases.items())
    return Finding(settings, {"hash": configuration_hash(settings), "steps": steps})


def _trackers(check: Callable[[LogSettings], None], settings: Settings) -> Finding:
    log = settings.log
    names = [name for name in ("tensorboard", "wandb", "trackio") if getattr(log, name)]
    check(log)
    return Finding(names, {"beside metrics.jsonl": ", ".join(names) or "none"})


def _versions() -> Finding:
    found = versions()
    try:
        found["libtpu"] = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        pass  # needed on TPUs alone
    return Finding(found, found)


def _devices(settings: Settings) -> Finding:
    mesh = run_mesh(settings)
    kinds = sorted({device.device_kind for device in jax.devices()})
    facts = {
        "devices": f"{jax.device_count()} {jax.default_backend()} ({', '.join(kinds)})",
        "processes": jax.process_count(),
        "mesh": ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
    }
    return Finding(mesh, facts)


def _parameters(settings: Settings, mesh: Mesh) -> Finding:
    """Heads, vocabulary and widths must divide by the mesh."""
    layout = run_layout(settings, mesh)
    total, local = parameter_bytes(layout)
    facts = {
        "parameters": f"{sum(shape.size for shape in layout.shapes.values()):,}",
        "bytes": f"{total:,} in all, {local:,} on each device (float32, without the optimizer)",
        "computed in": settings.model.dtype.value,
    }
    if layout.frozen:
        facts |= _adapter(layout)
    return Finding(layout, facts)


def _adapter(layout: Layout) -> dict[str, str]:
    """Tell what LoRA trains from what it leaves as it is."""
    total, local = parameter_bytes(layout)
    own, mine = parameter_bytes(dataclasses.replace(layout, frozen={}))
    count = lambda shapes: sum(shape.size for shape in shapes.values())  # noqa: E731
    dtype = next(iter(layout.frozen.values())).dtype
    return {
        "parameters": f"{count(layout.frozen):,}, frozen, and {count(layout.shapes):,} of adapters",
        "bytes": f"{total - own:,} in all, {local - mine:,} on each device ({dtype}), and"
        f" {own:,} and {mine:,} (float32, without the optimizer)",
    }


def _memory(settings: Settings, mesh: Mesh, _: Layout) -> Finding:
    """What the run holds must fit; run.compile knows what its programs need beside it."""
    found, limit = held(settings, mesh), device_limit()
    found.check(limit)
    facts = found.facts()
    return Finding(found, facts | ({} if limit is None else {"a device has": f"{limit:,} bytes"}))


def _batch(settings: Settings, mesh: Mesh) -> Finding:
    facts: dict[str, str] = {}
    for phase, of in settings.phases.items():
        facts |= {f"{phase} {name}": fact for name, fact in _sizes(settings, of).items()}
    check_batches(settings, mesh=mesh)
    return Finding(facts, facts)


def _sizes(settings: Settings, of: SFTSettings | GRPOSettings) -> dict[str, str]:
    """Count what a step of a phase computes in one pass, padding included."""
    limits = settings.training_limits
    if isinstance(of, GRPOSettings):
        group, cut = of.group, list(grpo_blocks(of))
    else:
        group, cut = 1, list(blocks(of.trees, of.questions, of.micro_batch))
    tree = flat = 0
    for block in cut:
        count = lambda part: part.stop - part.start  # noqa: E731
        trees = count(block.trees)
        questions = trees * count(block.questions)
        rows = questions * count(block.group)
        tree += trees * limits.guide + questions * limits.question + rows * limits.completion
        flat += rows * (limits.guide + limits.question + limits.completion)
    return {
        "step": f"{of.trees} guides × {of.questions} questions × {group} completions",
        "tokens": f"{tree:,} on the tree, {flat:,} as flat rows ({flat / tree:.1f} times as many)",
        "micro-batches": f"{len(cut)}, of {questions} questions × {rows // questions} completions",
    }


def _data(settings: Settings) -> Finding:
    task = settings.task_rules
    data = open_mixture(settings.data, seed=settings.seed, task=task)
    sets = open_sets(settings.data.eval, task=task)
    for phase in settings.phases:
        phase_source(settings, data, phase)
    known = [f"{len(one.examples):,} examples under {one.guide.title!r}" for one in data.known]
    facts = {"train": ", ".join(known + ["made as they are asked for"] * (not data.complete))}
    facts |= {
        f"eval {name}": f"{len(one.examples):,} examples under {one.guide.title!r}"
        for name, one in sets.items()
    }
    return Finding((data, sets), facts)


def _policy(settings: Settings, mesh: Mesh, layout: Layout) -> Finding:
    """Load it as the run will; the layout is needed because weights go straight to their shards."""
    start = load_start(settings, mesh=mesh, guides=(), fresh=True)
    policy, encoder = start.policy, start.policy.encoder
    named = lambda id: f"{id} {policy.tokenizer.convert_ids_to_tokens(id)!r}"  # noqa: E731
    facts = {
        "weights": policy.provenance,
        "family": policy.config.family.value,
        "tokenizer": f"{len(policy.tokenizer):,} tokens, the model has {policy.config.vocab:,}",
        "stop tokens": ", ".join(map(named, encoder.stop_ids)),
        "pad": named(encoder.pad_id),
    }
    return Finding(start, facts)


def _prompts(
    settings: Settings, opened: tuple[TrainingData, Mapping[str, EvalSet]], start: Start
) -> Finding:
    """Refuse what does not fit, and find the longest of every level."""
    (data, sets), encoder = opened, start.policy.encoder
    limits = settings.training_limits
    check_prompts(data, [*sets.values()], encoder=encoder, settings=settings)
    facts: dict[str, str] = {}
    for phase in settings.phases:
        # Of SFT alone the completions are known.
        taught = settings.sft.taught if phase is Phase.SFT else None
        lessons = _lessons(settings, data, phase)
        for lesson in lessons if not data.complete else ():
            check_levels(lesson.guide, lesson.examples, encoder=encoder, limits=limits)
            if taught is not None:
                check_completions(lesson.examples, encoder=encoder, limits=limits, taught=taught)
        facts[f"{phase} longest"] = _longest(lessons, encoder, limits, taught=taught)
    for name, one in sets.items():
        lessons = [Lesson(one.guide, one.examples)]
        facts[f"{name} longest"] = _longest(lessons, encoder, settings.limits)
    if not data.complete:
        facts["looked at"] = f"the first {STEPS_SEEN} steps of each phase"
    return Finding(facts, facts)


def _lessons(settings: Settings, data: TrainingData, phase: Phase) -> list[Lesson]:
    """Return all lessons that are known, or those of the first steps."""
    if data.complete:
        return list(data.known)
    source = phase_source(settings, data, phase)
    steps = range(min(STEPS_SEEN, settings.phases[phase].steps))
    return [lesson for step in steps for lesson in source.lessons(step)]


def _longest(
    lessons: Sequence[Lesson],
    encoder: PromptEncoder,
    limits: Limits,
    *,
    taught: Taught | None = None,
) -> str:
    """Say how long the longest row of each level is, and how long it may be."""
    examples = [example for lesson in lessons for example in lesson.examples]
    lengths = {
        "guide": [len(encoder.guide_tokens(lesson.guide)) for lesson in lessons],
        "question": [len(encoder.question_tokens(example)) for example in examples],
    }
    if taught is not None:
        make = encoder.task.completion
        texts = [make(example, taught=taught) for example in examples]
        lengths["completion"] = [len(encoder.completion_tokens(text)) for text in texts]
    return ", ".join(
        f"{level} {max(found, default=0)} of {getattr(limits, level)}"
        for level, found in lengths.items()
    )


def _workdir(
    workdir: str | os.PathLike | None,
    settings: Settings,
    opened: tuple[TrainingData, Mapping[str, EvalSet]],
) -> Finding:
    """Check whose it is, and write and remove a file where it is or will be made."""
    if workdir is None:
        raise Skipped("give --workdir to check it")
    workdir = absolute(place(workdir))
    check_workdir(workdir, settings, data=opened[0].sha256)
    folder = workdir
    while not (folder.exists() or is_remote(folder)):
        folder = folder.parent
    if folder.exists() and not folder.is_dir():
        raise WorkdirError(f"{folder} is a file; expected a folder, or nothing yet")
    free, step = free_bytes(folder), newest_step(workdir)
    facts = {
        "state": "nothing to go on from" if step is None else f"goes on from step {step}",
        "free": "as much as the bucket takes" if free is None else f"{free / 2**30:.1f} GiB",
    }
    return Finding(workdir, facts)


def _parity(
    settings: Settings,
    batch: Mapping[str, str],
    opened: tuple[TrainingData, Mapping[str, EvalSet]],
    start: Start,
) -> Finding:
    """Compare sampler and trainer; the batch is needed because the mesh must share questions."""
    parity = check_run(settings, opened[0], start)
    if parity is None:
        raise Skipped("switched off by model.parity_tokens=0")
    return Finding(parity, parity.facts())
