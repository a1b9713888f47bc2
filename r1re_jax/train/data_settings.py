"""What a config's `data` section says: what to train on, and which sets to evaluate on."""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

from r1re_jax.policy import Limits
from r1re_jax.task.templates import GuideInPrompt


class DataKind(enum.StrEnum):
    """Where examples come from; `r1re_jax.train.data` opens each."""

    JSONL = "jsonl"
    SEMEVAL2010 = "semeval2010"
    MINIWORLD = "miniworld"


def at_least(settings: Any, least: float, *names: str) -> None:
    """Refuse settings of which a named one is below `least`."""
    for name in names:
        if not getattr(settings, name) >= least:
            raise ValueError(f"{name} is {getattr(settings, name)}; it must be at least {least}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """What to train on.

    Attributes:
        kind: where the examples come from.
        path: file of examples; of semeval2010, the official text file, empty for the hub.
        guide: Markdown file of the guide.
        limits: widths of the levels in training, where they may be narrower than those that
            evaluation and exports need; None takes those of the run. Padding is computed too.
        options: of miniworld, arguments of its source.
    """

    kind: DataKind
    path: str = ""
    guide: str = ""
    limits: Limits | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtraSettings:
    """A further data set to train on.

    Attributes:
        kind: as in `SourceSettings`.
        path: as in `SourceSettings`.
        guide: as in `SourceSettings`.
        options: as in `SourceSettings`.
        weight: how often a tree of a step is of this set, where `data.train` has the weight 1.
    """

    kind: DataKind
    path: str = ""
    guide: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a set that is never drawn."""
        if not self.weight > 0:
            raise ValueError(f"weight is {self.weight}; it must be above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSetSettings:
    """A set of examples to evaluate on.

    Attributes:
        kind: where the examples come from.
        path: as in `SourceSettings`.
        guide: as in `SourceSettings`.
        limit: at most this many examples, the first ones; 0 takes all.
        protocol: which split and rules the figures are of; copied into metrics.json.
        options: of miniworld, arguments of its set.
    """

    kind: DataKind
    path: str = ""
    guide: str = ""
    limit: int = 0
    protocol: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a negative limit."""
        at_least(self, 0, "limit")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The examples to train on, and named sets to evaluate on.

    Attributes:
        train: what to train on.
        extra: name -> further data sets; each tree of a step draws the one that it is of.
        eval: name -> what to evaluate on.
        guide_in_prompt: how much of the guide prompts show, in training and in evaluation.
    """

    train: SourceSettings
    extra: Mapping[str, ExtraSettings] = dataclasses.field(default_factory=dict)
    guide_in_prompt: GuideInPrompt = GuideInPrompt.WHOLE
    eval: Mapping[str, EvalSetSettings] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse set names that would make bad folder or metric names."""
        for name in self.eval:
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f"eval set {name!r}: use letters, digits, - and _ only")
