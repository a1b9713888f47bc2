"""The official scorer of SemEval-2010 Task 8 (Hendrickx et al., 2010): its three ways.

Every way compares a gold label with an answer; an example without answer is *skipped*. Only
relations that occur in gold are scored. In the official way an answer of the right relation and the
wrong direction is counted apart: it is a false positive and a false negative of that relation.

The functions know no label set, so they serve any schema: `R` of a label is what stands before the
bracket.
"""

import enum
import functools
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from r1re_jax.task.schema import DataError, Schema

NONE = "Other"

_ANSWER = re.compile(r"(?P<id>\d+)\t(?P<label>.+)")


class Way(enum.StrEnum):
    """How labels are compared."""

    DIRECTED = "directed"
    """Each direction is a class of its own: (2·9+1)-way."""
    UNDIRECTED = "undirected"
    """Directions are ignored: (9+1)-way."""
    OFFICIAL = "official"
    """One class a relation, right only with the right direction: the task's official score."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Precision, recall and F1 of one class, in [0, 100]; 0 where there is nothing to divide by.

    Attributes:
      matched: right answers.
      answered: answers of this class.
      actual: examples of this class.
    """

    matched: int
    answered: int
    actual: int

    @property
    def precision(self) -> float:
        """Share of right answers among the answers."""
        return 100.0 * self.matched / self.answered if self.answered else 0.0

    @property
    def recall(self) -> float:
        """Share of right answers among the examples."""
        return 100.0 * self.matched / self.actual if self.actual else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        total = self.answered + self.actual
        return 100.0 * 2 * self.matched / total if total else 0.0


@dataclass(frozen=True, kw_only=True)
class Report:
    """The scorer's figures in one way.

    Attributes:
      way: how labels were compared.
      none: the none label, left out of micro and macro averages.
      confusion: gold class to answered class to count; without skipped examples, and in the
        official way without answers of the wrong direction.
      wrong_direction: by gold class, answers of the right relation and the wrong direction (zero
        but in the official way).
      skipped: examples without answer, by gold class.
    """

    way: Way
    none: str | None
    confusion: Mapping[str, Mapping[str, int]]
    wrong_direction: Mapping[str, int]
    skipped: Mapping[str, int]

    @functools.cached_property
    def classes(self) -> Mapping[str, Score]:
        """The score of every class that occurs in gold, by name, the none label last."""
        answered: Counter[str] = Counter(self.wrong_direction)
        for row in self.confusion.values():
            answered.update(row)
        names = sorted(self.confusion, key=lambda name: (name == self.none, name))
        return MappingProxyType({name: self._score(name, answered[name]) for name in names})

    def _score(self, name: str, answered: int) -> Score:
        row = self.confusion[name]
        actual = sum(row.values()) + self.wrong_direction[name] + self.skipped[name]
        return Score(matched=row.get(name, 0), answered=answered, actual=actual)

    @property
    def n(self) -> int:
        """Examples."""
        return sum(score.actual for score in self.classes.values())

    @property
    def answered(self) -> int:
        """Examples with an answer."""
        return self.n - sum(self.skipped.values())

    @property
    def matched(self) -> int:
        """Right answers, the none label's too."""
        return sum(score.matched for score in self.classes.values())

    @property
    def coverage(self) -> float:
        """Examples with an answer, in [0, 100]."""
        return 100.0 * self.answered / self.n

    @property
    def accuracy_of_answered(self) -> float:
        """Right answers among the examples with an answer, in [0, 100]; 0 where there is none."""
        return 100.0 * self.matched / self.answered if self.answered else 0.0

    @property
    def accuracy_skipped_wrong(self) -> float:
        """Accuracy in [0, 100] when a skipped example counts as wrong."""
        return 100.0 * self.matched / self.n

    @property
    def accuracy_skipped_none(self) -> float:
        """Accuracy in [0, 100] when a skipped example counts as answered with the none label."""
        right = self.matched + (0 if self.none is None else self.skipped.get(self.none, 0))
        return 100.0 * right / self.n

    @property
    def scored(self) -> tuple[Score, ...]:
        """The classes that are averaged: all that occur in gold but the none label."""
        return tuple(score for name, score in self.classes.items() if name != self.none)

    @property
    def micro(self) -> Score:
        """The scored classes taken together."""
        return Score(
            matched=sum(score.matched for score in self.scored),
            answered=sum(score.answered for score in self.scored),
            actual=sum(score.actual for score in self.scored),
        )

    @property
    def macro_precision(self) -> float:
        """Mean precision of the scored classes, in [0, 100]."""
        return _mean([score.precision for score in self.scored])

    @property
    def macro_recall(self) -> float:
        """Mean recall of the scored classes, in [0, 100]."""
        return _mean([score.recall for score in self.scored])

    @property
    def macro_f1(self) -> float:
        """Mean F1 of the scored classes, in [0, 100]; 0 where gold has none but the none label."""
        return _mean([score.f1 for score in self.scored])


def semeval2010_macro_f1(gold: Sequence[str], predicted: Sequence[str | None]) -> float:
    """The official score: macro-F1 with direction over the relations in gold, Other left out.

    Args:
      gold: canonical labels.
      predicted: as many answers; None is a skipped example, which lowers recall only.

    Returns:
      A number in [0, 100].
    """
    return semeval2010_report(gold, predicted, way=Way.OFFICIAL).macro_f1


def semeval2010_report(
    gold: Sequence[str],
    predicted: Sequence[str | None],
    *,
    way: Way | str = Way.OFFICIAL,
    none: str | None = NONE,
) -> Report:
    """Counts answers as the official scorer does.

    Args:
      gold: canonical labels.
      predicted: as many answers, None for a skipped example; any other text is an answer.
      way: how labels are compared.
      none: the label that is left out of the averages.

    Returns:
      The report.

    Raises:
      ValueError: no examples, or another number of answers than of gold labels.
    """
    if len(gold) != len(predicted) or not gold:
        raise ValueError(
            "expected as many answers as gold labels and at least one, found "
            f"{len(predicted)} and {len(gold)}"
        )
    way = Way(way)
    confusion: dict[str, Counter[str]] = {_class(label, way): Counter() for label in gold}
    wrong_direction, skipped = dict.fromkeys(confusion, 0), dict.fromkeys(confusion, 0)
    for label, answer in zip(gold, predicted, strict=True):
        actual = _class(label, way)
        if answer is None:
            skipped[actual] += 1
        elif way is Way.OFFICIAL and answer != label and _class(answer, way) == actual:
            wrong_direction[actual] += 1
        else:
            confusion[actual][_class(answer, way)] += 1
    return Report(
        way=way, none=none, confusion=confusion, wrong_direction=wrong_direction, skipped=skipped
    )


def check_answers(path: str | os.PathLike[str], *, schema: Schema) -> list[str]:
    """The format errors of an answer file, as the official checker finds them, with `file:line`.

    A line is `<number> TAB <label>`, with a label of the schema in canonical form; no number twice.
    """
    return _answers(path, schema)[1]


def read_answers(path: str | os.PathLike[str], *, schema: Schema) -> dict[str, str]:
    """Answers by example number from an answer file; DataError lists all its format errors."""
    answers, errors = _answers(path, schema)
    if errors:
        raise DataError("\n".join(errors))
    return answers


def _answers(path: str | os.PathLike[str], schema: Schema) -> tuple[dict[str, str], list[str]]:
    answers: dict[str, str] = {}
    errors: list[str] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), start=1):
        match = _ANSWER.fullmatch(line.rstrip("\r"))
        if match is None:
            if line.strip():
                errors.append(f"{path}:{number}: expected '<number> TAB <label>', found {line!r}")
            continue
        if match["label"] not in schema:
            errors.append(f"{path}:{number}: unknown label {match['label']!r}")
        elif match["id"] in answers:
            errors.append(f"{path}:{number}: example {match['id']} has an answer already")
        else:
            answers[match["id"]] = match["label"]
    return answers, errors


def _class(label: str, way: Way) -> str:
    return label if way is Way.DIRECTED else label.partition("(")[0]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
