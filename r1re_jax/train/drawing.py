"""What a GRPO step draws: the completions of its questions, judged, in groups."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from r1re_jax import hosts
from r1re_jax.model.flops import Lengths
from r1re_jax.model.qwen import Cache
from r1re_jax.model.tree import Level, Tree
from r1re_jax.policy import Limits
from r1re_jax.rollout.decode import prefill
from r1re_jax.rollout.keys import Purpose, example_ids, row_keys
from r1re_jax.rollout.rollout import Rollout, generate
from r1re_jax.rollout.sampling import SamplingSettings
from r1re_jax.task.lessons import Lesson, Source
from r1re_jax.task.prompts import PromptEncoder
from r1re_jax.task.rewards import RewardPart, overlong_penalty, reward_part
from r1re_jax.task.tasks import AnyVerdict
from r1re_jax.train.batch import prompt_levels
from r1re_jax.train.figures import Clock
from r1re_jax.train.groups import Groups, Judged, as_examples, join
from r1re_jax.train.grpo_settings import GRPOSettings
from r1re_jax.train.sampler import Sampler
from r1re_jax.train.state import Params, model_state

Tick = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a step drew.

    Attributes:
        guide: [N, S].
        groups: all that were drawn, [N, P · draws].
        draws: rounds of P questions under each guide.
    """

    guide: Level
    groups: Groups
    draws: int

    @property
    def lengths(self) -> Lengths:
        """True tokens of all that was drawn."""
        groups = self.groups
        return Lengths(self.guide.length, groups.question.length, groups.rollout.length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    """How completions are drawn and judged.

    Attributes:
        settings: of the phase.
        limits: widths of the levels.
        encoder: words to tokens and back.
        source: lessons of a step.
        seed: of sampling.
        sampler: the model that draws.
    """

    settings: GRPOSettings
    limits: Limits
    encoder: PromptEncoder
    source: Source
    seed: int
    sampler: Sampler

    def draw(
        self,
        params: Params,
        number: int,
        *,
        tick: Tick,
        clock: Clock,
        meanwhile: Callable[[Tree, Rollout], None] = lambda tree, rollout: None,
    ) -> Drawn:
        """Draw groups of P questions a guide; again while too few of them have signal.

        Args:
            params: all of the policy's; only read.
            number: of the step, from 1.
            tick: called with what goes on; what it raises ends the drawing.
            clock: its laps `rollout` and `reward` are taken here.
            meanwhile: called with what was drawn before it is judged: may give the device work to
                do while the host reads completions.

        Raises:
            LimitError: a guide or question that is too long.
            ValueError: a question that occurs twice.
        """
        tick("rollout")
        settings, params = self.settings, self.sampler.params(params)
        lessons = self.source.lessons(number - 1)
        guide, question = prompt_levels(lessons, self.encoder, self.limits)
        ids = question_ids(lessons)
        _, caches = prefill(self.sampler.layout.graph, model_state(params), (guide,))
        groups: list[Groups] = []
        for start in range(0, settings.questions_drawn, settings.questions):
            part = slice(start, start + settings.questions)
            level = Level(question.tokens[:, part], question.length[:, part])
            keys = row_keys(self.seed, Purpose.TRAIN, number, ids[:, part], range(settings.group))
            rollout = self._rollout(params, caches, level, keys, tick)
            if part.stop >= settings.questions_drawn:
                del params, caches  # the device needs their memory for what comes next
            clock.lap("rollout")
            meanwhile(Tree(guide, level, Level(rollout.tokens, rollout.length)), rollout)
            below = [Lesson(lesson.guide, lesson.examples[part]) for lesson in lessons]
            groups.append(self._judge(below, level, rollout, tick))
            clock.lap("reward")
            if (join(groups).signal.sum(axis=1) >= settings.questions).all():
                break
        return Drawn(guide, join(groups), len(groups))

    @functools.partial(jax.profiler.annotate_function, name="rollout")
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
            self.sampler.layout.graph,
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
            compaction=settings.compaction,
            smallest_batch=settings.smallest_batch,
            smallest_cache=settings.smallest_cache,
            on_chunk=lambda progress: tick(f"rollout {progress.tokens}/{progress.limit}"),
            mesh=self.sampler.layout.mesh,
        )
        return hosts.on_host(rollout)

    @functools.partial(jax.profiler.annotate_function, name="reward")
    def _judge(
        self, lessons: Sequence[Lesson], question: Level, rollout: Rollout, tick: Tick
    ) -> Groups:
        """Turn tokens into texts, and texts into verdicts and rewards.

        Each process judges its share of the questions, and tells the others.
        """
        overlong_NPG, (trees, questions, samples) = self._overlong(rollout), rollout.length.shape
        own: list[dict[str, Any]] = []
        for number in hosts.mine(trees * questions):
            tree, place = divmod(number, questions)
            tick("reward")
            lesson = lessons[tree]
            schema, example = self.encoder.task.schema(lesson.guide), lesson.examples[place]
            for sample in range(samples):
                where = tree, place, sample
                text = self.encoder.decode(rollout.tokens[where][: rollout.length[where]])
                verdict = self.encoder.task.judge(text, example, schema)
                reward, parts = self._reward(verdict, float(overlong_NPG[where]))
                found = Judged(
                    text=text,
                    reward=reward,
                    parts=parts,
                    format_ok=verdict.format_ok,
                    correct=verdict.correct,
                    predicted=verdict.predicted,
                    figures=verdict.figures,
                )
                own.append(vars(found))
        judged = [Judged(**values) for values in hosts.exchange(own)]
        verdicts_NPG = np.empty(rollout.length.shape, object)
        verdicts_NPG.reshape(-1)[:] = judged
        return Groups(
            examples=as_examples([lesson.examples for lesson in lessons]),
            question=question,
            rollout=rollout,
            verdicts=verdicts_NPG,
            reward=np.array([of.reward for of in judged], np.float32).reshape(overlong_NPG.shape),
            parts=np.array([of.parts for of in judged], np.float32).reshape(
                *overlong_NPG.shape, -1
            ),
            overlong=overlong_NPG.astype(np.float32),
        )

    def _overlong(self, rollout: Rollout) -> np.ndarray:
        """Return the penalty of every completion, [N, P, G]."""
        buffer, limit = self.settings.overlong_buffer, self.limits.completion
        penalty_NPG = np.zeros(rollout.length.shape)
        for where in np.ndindex(penalty_NPG.shape) if buffer else ():
            penalty_NPG[where] = overlong_penalty(
                int(rollout.length[where]),
                truncated=bool(rollout.truncated[where]),
                limit=limit,
                buffer=buffer,
            )
        return penalty_NPG

    def _reward(self, verdict: AnyVerdict, overlong: float) -> tuple[float, list[float]]:
        """Return a completion's reward in all, and the parts that are compared by themselves."""
        settings = self.settings
        if not settings.rewards:
            reward = verdict.reward + settings.overlong_weight * overlong
            return reward, [reward]
        parts = [
            reward_part(RewardPart(name), verdict, overlong=overlong) for name in settings.rewards
        ]
        weighted = zip(settings.rewards.values(), parts, strict=True)
        return sum(weight * part for weight, part in weighted), parts


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
