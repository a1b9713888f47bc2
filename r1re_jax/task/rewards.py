"""The rule that judges a completion: the format first, then the label.

The format is right iff the stripped completion is `<think>…</think>`, white space or nothing,
`<answer>…</answer>`, each tag once, nothing else, thoughts not blank, and the stripped answer is

* `R(e1,e2)` or `R(e2,e1)`, R any text without round brackets or line breaks, spaces around the
comma allowed; or
* exactly a directionless label of the guide: the none label, or a relation marked [no direction].

Two kinds of answer are well formed and yet no label of the guide: an unknown R, and a direction on
a directionless label (`Other(e1,e2)`). Both are wrong, not malformed, and `predicted` is None;
`problem` tells them from each other. The direction is not dropped, because the guide says how such
a label is written and a lenient rule would reward not reading it.

Rewards follow R1-RE (Dai et al., arXiv 2507.04642): +1 for the format, then +2 for a gold label or
-1.5 for another; -3 for a wrong format, and nothing more.
"""

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass

from r1re_jax.task.relations import DIRECTIONS, Example, Schema

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"

_DIRECTED_ANSWER = re.compile(r"(?P<relation>[^()\n]+)\((?P<first>e[12]) *, *(?P<second>e[12])\)")


class Problem(enum.StrEnum):
    """Why a completion gives no label of the guide. All but the last two are format errors."""

    EMPTY = "empty"
    NO_THINK = "no_think"
    THINK_NOT_CLOSED = "think_not_closed"
    THINK_TWICE = "think_twice"
    NO_ANSWER = "no_answer"
    ANSWER_NOT_CLOSED = "answer_not_closed"
    ANSWER_TWICE = "answer_twice"
    TAG_ORDER = "tag_order"
    TEXT_BEFORE = "text_before"
    TEXT_BETWEEN = "text_between"
    TEXT_AFTER = "text_after"
    BLANK_THOUGHTS = "blank_thoughts"
    BLANK_ANSWER = "blank_answer"
    MISSING_DIRECTION = "missing_direction"
    BAD_ANSWER = "bad_answer"
    UNKNOWN_RELATION = "unknown_relation"
    NEEDLESS_DIRECTION = "needless_direction"

    @property
    def malformed(self) -> bool:
        """Whether the format is wrong; else the answer is well formed but no label of the guide."""
        return self not in (Problem.UNKNOWN_RELATION, Problem.NEEDLESS_DIRECTION)


@dataclass(frozen=True, kw_only=True)
class RewardTotals:
    """What a completion earns in all, by outcome (arXiv 2507.04642: +1+2, +1-1.5, -3)."""

    correct: float = 3.0
    wrong: float = -0.5
    malformed: float = -3.0

    def __post_init__(self) -> None:
        """Refuses totals under which a right label is not the best outcome."""
        if not self.correct > max(self.wrong, self.malformed):
            raise ValueError(
                f"correct is {self.correct}, wrong {self.wrong} and malformed {self.malformed}; a "
                "right label must earn the most"
            )


class RewardPart(enum.StrEnum):
    """One thing that completions can be compared by; `reward_part` gives its value."""

    TOTAL = "total"  # the rule's total, see `RewardTotals`
    FORMAT = "format"  # 1 where the format is right, else 0
    ANSWER = "answer"  # 1 where the label is right, else 0
    LENGTH = "length"  # 0, and down to -1 towards the limit, see `overlong_penalty`


@dataclass(frozen=True)
class Parsed:
    """A completion taken apart.

    Attributes:
      predicted: the canonical label, or None where the completion gives no label of the guide.
      reasoning: the stripped thoughts, also of a malformed completion that has one closed pair of
        think tags; else None.
      problem: None where `predicted` is a label.
    """

    predicted: str | None
    reasoning: str | None
    problem: Problem | None

    @property
    def format_ok(self) -> bool:
        """Whether the format is right, whatever the label."""
        return self.problem is None or not self.problem.malformed


@dataclass(frozen=True)
class Frame:
    """What stands in the think and answer tags of a completion, whatever the task.

    Attributes:
      reasoning: the stripped thoughts, as in `Parsed`.
      answer: the stripped answer; None where the tags are wrong.
      problem: what is wrong outside the answer, else None.
    """

    reasoning: str | None
    answer: str | None
    problem: Problem | None


@dataclass(frozen=True)
class Verdict:
    """The judgement of a completion.

    Attributes:
      reward: the total.
      format_ok: whether the format is right.
      correct: whether the label is one of the gold labels.
      predicted: the canonical label, or None.
      problem: why `predicted` is None, else None.
    """

    reward: float
    format_ok: bool
    correct: bool
    predicted: str | None
    problem: Problem | None

    @property
    def figures(self) -> Mapping[str, float]:
        """Further figures whose means are logged: none, a label is right or wrong."""
        return {}


def relation_reward(
    text: str, example: Example, schema: Schema, *, totals: RewardTotals = RewardTotals()
) -> Verdict:
    """Judges a completion against the gold labels of its example.

    Args:
      text: the completion, without its stop token.
      example: its `gold` holds every accepted label.
      schema: the labels of the guide in the prompt.
      totals: the reward of each outcome.

    Returns:
      The verdict; any text at all gets one.
    """
    parsed = parse_completion(text, schema)
    correct = parsed.predicted is not None and parsed.predicted in example.gold
    if correct:
        reward = totals.correct
    else:
        reward = totals.wrong if parsed.format_ok else totals.malformed
    return Verdict(reward, parsed.format_ok, correct, parsed.predicted, parsed.problem)


def reward_part(part: RewardPart, verdict: Verdict, *, overlong: float = 0.0) -> float:
    """The value of one part of a completion's reward.

    Args:
      part: which.
      verdict: of the completion.
      overlong: its `overlong_penalty`.
    """
    match part:
        case RewardPart.TOTAL:
            return verdict.reward
        case RewardPart.FORMAT:
            return float(verdict.format_ok)
        case RewardPart.ANSWER:
            return float(verdict.correct)
        case RewardPart.LENGTH:
            return overlong


def overlong_penalty(tokens: int, *, truncated: bool, limit: int, buffer: int) -> float:
    """DAPO's soft punishment of long completions (arXiv 2503.14476, equation 13), in tokens.

    0 up to limit - buffer tokens, from there on linearly down to -1 at the limit, and -1 for a
    completion that was cut off: it would have been longer than the limit.

    Args:
      tokens: of the completion, its stop token included.
      truncated: whether it was cut off at the limit.
      limit: most tokens of a completion.
      buffer: tokens below the limit within which the penalty grows, from 1 on.
    """
    if truncated:
        return -1.0
    return -min(max(tokens - (limit - buffer), 0) / buffer, 1.0)


def parse_completion(text: str, schema: Schema) -> Parsed:
    """Reads the label that a completion gives under a guide's schema. Never raises."""
    frame = parse_frame(text)
    if frame.answer is None:
        return Parsed(None, frame.reasoning, frame.problem)
    predicted, problem = parse_answer(frame.answer, schema)
    return Parsed(predicted, frame.reasoning, problem)


def parse_frame(text: str) -> Frame:
    """Reads thoughts and answer out of their tags, or says what is wrong. Never raises."""
    text = text.strip()
    problem = _tag_problem(text)
    if problem is not None:
        return Frame(_reasoning(text), None, problem)
    answer = text[text.index(ANSWER_OPEN) + len(ANSWER_OPEN) : -len(ANSWER_CLOSE)].strip()
    return Frame(_reasoning(text), answer, None)


def parse_answer(answer: str, schema: Schema) -> tuple[str | None, Problem | None]:
    """The canonical label of a stripped answer and None, or None and the problem."""
    if answer in schema.directionless:
        return answer, None
    match = _DIRECTED_ANSWER.fullmatch(answer)
    if match is None:
        if not answer:
            return None, Problem.BLANK_ANSWER
        known = any(answer == relation.name for relation in schema.relations)
        return None, Problem.MISSING_DIRECTION if known else Problem.BAD_ANSWER
    direction = f"{match['first']},{match['second']}"
    if direction not in DIRECTIONS:
        return None, Problem.BAD_ANSWER
    label = f"{match['relation']}({direction})"
    if label in schema:
        return label, None
    needless = match["relation"] in schema.directionless
    return None, Problem.NEEDLESS_DIRECTION if needless else Problem.UNKNOWN_RELATION


def _tag_problem(text: str) -> Problem | None:
    """What is wrong outside the answer, the first fault in a fixed order; `text` is stripped."""
    if not text:
        return Problem.EMPTY
    for opening, closing, missing, open_end, twice in (
        (THINK_OPEN, THINK_CLOSE, Problem.NO_THINK, Problem.THINK_NOT_CLOSED, Problem.THINK_TWICE),
        (
            ANSWER_OPEN,
            ANSWER_CLOSE,
            Problem.NO_ANSWER,
            Problem.ANSWER_NOT_CLOSED,
            Problem.ANSWER_TWICE,
        ),
    ):
        opened, closed = text.count(opening), text.count(closing)
        if opened > 1 or closed > 1:
            return twice
        if not opened:
            return missing
        if not closed:
            return open_end
    think, thought, answer, answered = (
        text.index(tag) for tag in (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)
    )
    if not think < thought < answer < answered:
        return Problem.TAG_ORDER
    if think > 0:
        return Problem.TEXT_BEFORE
    if text[thought + len(THINK_CLOSE) : answer].strip():
        return Problem.TEXT_BETWEEN
    if answered + len(ANSWER_CLOSE) < len(text):
        return Problem.TEXT_AFTER
    return None if text[len(THINK_OPEN) : thought].strip() else Problem.BLANK_THOUGHTS


def _reasoning(text: str) -> str | None:
    """The stripped thoughts where there is one closed pair of think tags and they are not blank."""
    if text.count(THINK_OPEN) != 1 or text.count(THINK_CLOSE) != 1:
        return None
    thoughts = text[text.index(THINK_OPEN) + len(THINK_OPEN) :].partition(THINK_CLOSE)
    return thoughts[0].strip() or None if thoughts[1] else None
