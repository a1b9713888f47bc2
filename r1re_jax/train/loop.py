"""A run from its settings to its last checkpoint: SFT, then GRPO, evaluated, saved and resumed.

After step n comes, in this order: completions, evaluation, the line of metrics.jsonl, checkpoint. A
run goes on from its newest checkpoint, having dropped what it wrote on later steps, so that every
completed step is in its files once, whenever it was killed. Completions and lines are written while
the next step begins, and are on disk before the checkpoint. Randomness is a function of the step,
so a resumed run repeats the one that was not interrupted bit by bit.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from absl import logging
from etils import epath
from jax.sharding import Mesh

from r1re_jax import hosts
from r1re_jax.evaluate import evaluate
from r1re_jax.files import place
from r1re_jax.policy_files import save_words
from r1re_jax.policy_source import read_adapted
from r1re_jax.task.lessons import Source
from r1re_jax.train import grpo as grpo_phase
from r1re_jax.train import sft as sft_phase
from r1re_jax.train.aside import Aside
from r1re_jax.train.batch import check_batches
from r1re_jax.train.checkpoint import Checkpoints, Meta, keep_reference, load_reference
from r1re_jax.train.config import configuration_hash
from r1re_jax.train.data import (
    EvalSet,
    TrainingData,
    check_prompts,
    open_mixture,
    open_sets,
    phase_source,
)
from r1re_jax.train.hooks import Hooks, Writer, flush_all, write_all
from r1re_jax.train.optimizer import make_optimizer
from r1re_jax.train.parity import check_run
from r1re_jax.train.reference import copied
from r1re_jax.train.settings import Phase, Settings
from r1re_jax.train.signals import Stopped
from r1re_jax.train.start import Start, load_start, policy_of, run_mesh
from r1re_jax.train.state import TrainState, create_state, no_adapter
from r1re_jax.train.update import NonFiniteError, StepResult, completed
from r1re_jax.train.workdir import (
    check_workdir,
    forget_after,
    newest_step,
    open_workdir,
    versions,
    write_json,
    write_lines,
)

QUIET = Hooks()
# Where several processes, which ask all at once, would wait for what their devices do.
UNHEARD = ("reward", "reference", "update")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended.

    Attributes:
        step: last completed step.
        steps: steps that the settings ask for.
        stopped: why it ended before them; None if it did not.
    """

    step: int
    steps: int
    stopped: Stopped | None


class Trainer(Protocol):
    """What a phase trains with: `r1re_jax.train.sft.SFT`, `r1re_jax.train.grpo.GRPO`."""

    optimizer: optax.GradientTransformation
    source: Source

    def step(self, state: TrainState, number: int, *, tick: Callable[[str], None]) -> StepResult:
        """Do one step."""


def run_training(
    settings: Settings,
    workdir: str | os.PathLike,
    *,
    hooks: Hooks = QUIET,
    mesh: Mesh | None = None,
) -> Outcome:
    """Train from the work directory's newest checkpoint, or from the start, to the last step.

    Args:
        settings: of the run.
        workdir: config.json, policy/, checkpoints/, reference/, completions/ and eval/ are written
            there; metrics by the hooks' writers.
        hooks: what is called outside.
        mesh: instead of that of the settings.

    Raises:
        WorkdirError: the directory is of another configuration.
        ParityError: sampler and trainer disagree before the first step; nothing was written.
        NonFiniteError: a loss or gradient is no finite number; nothing was updated with it, and
            nonfinite-<step>.json says what the step saw.
        ValueError: data, limits, policy or mesh that do not fit; see the parts.
    """
    mesh = mesh or run_mesh(settings)
    task = settings.task_rules
    data = open_mixture(settings.data, seed=settings.seed, task=task)
    sets = open_sets(settings.data.eval, task=task)
    # Refused now and not when a phase begins.
    check_batches(settings, mesh=mesh)
    for phase in settings.phases:
        phase_source(settings, data, phase)
    # Nothing is written before everything has been read: a slip leaves no work directory behind.
    check_workdir(workdir, settings, data=data.sha256)
    newest = newest_step(workdir)
    hooks.note("loading the policy")
    start = load_start(
        settings,
        mesh=mesh,
        guides=data.guides,
        fresh=newest is None,
        adapted=read_adapted(place(workdir)),
    )
    check_prompts(data, [*sets.values()], encoder=start.policy.encoder, settings=settings)
    if newest is None:
        hooks.note("comparing sampler and trainer")
        check_run(settings, data, start)
    hosts.meet("all have read the work directory")
    workdir = open_workdir(workdir, settings, data=data.sha256)
    if hosts.is_first() and not (workdir / "policy" / "r1re.json").exists():
        save_words(start.policy, workdir / "policy", adapted=start.adapted)
    hosts.meet("the work directory is open")
    scores: dict[int, float] = {}
    checkpoints = Checkpoints(workdir, keep=settings.checkpoint.keep, scores=scores)
    try:
        return _Run(
            settings=settings,
            workdir=workdir,
            hooks=hooks,
            data=data,
            sets=sets,
            checkpoints=checkpoints,
            scores=scores,
            aside=Aside(),
        ).run(start, newest)
    finally:
        checkpoints.close()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """A run's unchanging parts; `scores` alone grows. `aside` writes completions and lines."""

    settings: Settings
    workdir: epath.Path
    hooks: Hooks
    data: TrainingData
    sets: Mapping[str, EvalSet]
    checkpoints: Checkpoints
    scores: dict[int, float]
    aside: Aside

    def run(self, start: Start, newest: int | None) -> Outcome:
        """Go on from the newest checkpoint until the last step or a request to stop."""
        step, pending = 0, None
        if newest is not None:
            meta = self.checkpoints.meta(newest)
            step, pending = newest, meta.pending
            self.scores.update(meta.scores)
            logging.info("going on from step %d in %s", step, self.workdir)
        for name in forget_after(self.workdir, step):
            logging.info("removed %s: its step is done again", name)
        hosts.meet("later steps are forgotten")
        # A line is written when its step has nothing left to do.
        written = step - 1 if pending is not None or newest is None else step
        writers = self.hooks.writers(written)
        try:
            return self._steps(start, step, pending, fresh=newest is None, writers=writers)
        finally:
            self.aside.close()
            for writer in writers:
                writer.close()

    def _steps(
        self,
        start: Start,
        step: int,
        pending: Mapping[str, Any] | None,
        *,
        fresh: bool,
        writers: Sequence[Writer],
    ) -> Outcome:
        settings, trainer, phase = self.settings, None, None
        if fresh:
            state = TrainState(step=jnp.int32(0), params=start.params, opt_state=())
            start = dataclasses.replace(start, params=None)
            pending = {} if settings.evaluate.at_start else None
        else:
            optimizer = self._optimizer(settings.phase_of(max(step, 1)), start)
            state = self.checkpoints.restore(
                step,
                layout=start.layout,
                optimizer=optimizer,
                reference=step > settings.sft.steps and settings.grpo.reference.every > 0,
            )
        stopped = None
        try:
            if pending is not None:
                self._after(start, state, step, pending, writers)
                pending = None
            while step < settings.steps:
                self.hooks.poll()
                if phase is not settings.phase_of(step + 1):
                    phase = settings.phase_of(step + 1)
                    trainer, state = self._begin(phase, start, state, step)
                self.hooks.before_step(phase.value, step + 1)
                result = self._step(trainer, state, step + 1)
                state, step = completed(result.state), step + 1
                pending = {"phase": phase.value, **result.metrics}
                if result.completions and _due(step, self.settings.log.completions):
                    path = self.workdir / "completions" / f"{step}.jsonl"
                    self.aside.do(write_lines, path, result.completions)
                self._after(start, state, step, pending, writers)
                pending = None
        except Stopped as error:
            stopped = error
        if stopped is not None and step and not self.checkpoints.holds(step):
            self.aside.do(flush_all, writers)
            self._save(state, step, pending)
        self.aside.settle()
        self.checkpoints.wait()
        return Outcome(step=step, steps=settings.steps, stopped=stopped)

    def _begin(
        self, phase: Phase, start: Start, state: TrainState, step: int
    ) -> tuple[Trainer, TrainState]:
        """Build a phase's trainer; at the phase's first step its optimizer starts afresh."""
        settings = self.settings
        first = 0 if phase is Phase.SFT else settings.sft.steps
        total = settings.sft.steps if phase is Phase.SFT else settings.steps
        if self.hooks.progress is not None:
            self.hooks.progress.phase(phase.value, total=total, done=step)
        shared = {
            "limits": settings.training_limits,
            "encoder": start.policy.encoder,
            "layout": start.layout,
            "frozen": start.frozen,
            "source": phase_source(settings, self.data, phase),
        }
        trainer: Trainer
        if phase is Phase.SFT:
            trainer = sft_phase.make_sft(settings.sft, **shared)
        else:
            trainer = grpo_phase.make_grpo(
                settings.grpo,
                seed=settings.seed,
                first=first,
                sampler=start.drawing_as(settings.grpo.quantise),
                reference=self._reference(start, state, step, first),
                **shared,
            )
        if step == first:
            state = create_state(state.params, trainer.optimizer, start.layout, step=step)
            if phase is Phase.GRPO and settings.grpo.reference.every:
                state = dataclasses.replace(state, reference=copied(state.params))
        return trainer, state

    def _reference(
        self, start: Start, state: TrainState, step: int, first: int
    ) -> Mapping[str, Any] | None:
        """The policy at the phase's start, kept once; None where no KL term needs just that."""
        if not self.settings.grpo.kl_coefficient or self.settings.grpo.reference.every:
            return None
        if start.frozen and first == 0:  # the adapter began as nothing: the base is the reference
            return start.whole(no_adapter(start.layout))
        if step == first:
            self.checkpoints.wait()  # of several processes two savers must not commit at once
            keep_reference(self.workdir, state.params, step=first)
        held = {"dtype": start.policy.model.dtype, "on_host": self.settings.mesh.reference_on_host}
        return start.whole(load_reference(self.workdir, start.layout, step=first, **held))

    def _optimizer(self, phase: Phase, start: Start) -> optax.GradientTransformation:
        of = self.settings.sft if phase is Phase.SFT else self.settings.grpo
        return make_optimizer(of.optimizer, matrices=start.layout.matrices)

    def _step(self, trainer: Trainer, state: TrainState, number: int) -> StepResult:
        """Do a step; what is not finite is written down with the questions that led to it."""
        try:
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                return trainer.step(state, number, tick=self._tick)
        except NonFiniteError as error:
            path = self.workdir / f"nonfinite-{number}.json"
            lessons = trainer.source.lessons(number - 1)
            prompts = [
                {"guide": lesson.guide.title, "ids": [example.id for example in lesson.examples]}
                for lesson in lessons
            ]
            write_json(path, {"step": number, "problem": str(error), "prompts": prompts})
            raise NonFiniteError(
                f"step {number}: {error}. Nothing was updated with it; {path} has the questions."
                " Lower the learning rate, in a new work directory"
            ) from error

    def _tick(self, note: str) -> None:
        self.hooks.note(note)
        if note not in UNHEARD or jax.process_count() == 1:
            self.hooks.poll()

    def _after(
        self,
        start: Start,
        state: TrainState,
        step: int,
        figures: Mapping[str, Any],
        writers: Sequence[Writer],
    ) -> None:
        """Do what follows a completed step; only its evaluation can be stopped."""
        settings = self.settings
        ends = step in (settings.sft.steps, settings.steps)
        evaluated = {}
        if step == 0 or _due(step, settings.evaluate.every) or ends:
            evaluated = self._evaluate(start, state, step)
        values = {**figures, **evaluated}
        if evaluated or (values and step % settings.log.every == 0):
            self.aside.do(write_all, writers, step, values)
        better = False
        if settings.checkpoint.best and evaluated:
            score = evaluated[f"eval/{settings.checkpoint.best}"]
            # Step 0 has no checkpoint to compare with.
            before = [score for of, score in self.scores.items() if of]
            better = step > 0 and score > max(before, default=-math.inf)
            self.scores[step] = score
        due = step and (_due(step, settings.checkpoint.every) or ends or better)
        if due and not self.checkpoints.holds(step):
            self.aside.do(flush_all, writers)  # the checkpoint counts its lines
            self._save(state, step, None)

    @functools.partial(jax.profiler.annotate_function, name="evaluation")
    def _evaluate(self, start: Start, state: TrainState, step: int) -> dict[str, float]:
        """Evaluate on every set; figures by `eval/SET/METRIC`."""
        settings, figures = self.settings.evaluate, {}
        if not settings.samples:
            return figures
        policy = policy_of(start, state.params)
        for name, one in self.sets.items():
            self.hooks.note(f"evaluation, {name}")
            metrics = evaluate(
                policy,
                one.examples,
                one.guide,
                name=name,
                out=self.workdir / "eval" / f"{step}-{name}",
                samples=settings.samples,
                temperature=settings.temperature,
                greedy=settings.greedy,
                seed=self.settings.seed,
                step=step,
                batch=settings.batch,
                protocol=self.settings.data.eval[name].protocol,
                model=f"{self.settings.model.path or self.settings.model.preset}, step {step}",
                data_sha256=one.sha256,
                mesh=start.sampler.layout.mesh,
                on_batch=lambda done, total, name=name: self._tick(f"{name} {done}/{total}"),
                on_chunk=lambda progress, name=name: self._tick(
                    f"{name} {progress.tokens}/{progress.limit}"
                ),
            )
            kept = (metric for metric in self.settings.eval_metrics if metric in metrics)
            figures |= {f"eval/{name}/{metric}": metrics[metric] for metric in kept}
        return figures

    @functools.partial(jax.profiler.annotate_function, name="checkpoint")
    def _save(self, state: TrainState, step: int, pending: Mapping[str, Any] | None) -> None:
        self.hooks.note("save")
        self.aside.settle()
        meta = Meta(
            step=step,
            phase=self.settings.phase_of(step),
            configuration=configuration_hash(self.settings),
            versions=versions(),
            scores=self.scores,
            pending=pending,
        )
        self.checkpoints.save(state, meta)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
