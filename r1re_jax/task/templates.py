"""The words around a guide and a sentence, for each task."""

import dataclasses
import enum
from dataclasses import dataclass


class GuideInPrompt(enum.StrEnum):
    """How much of the guide a prompt shows; the schema that judges is the guide's in any case."""

    WHOLE = "whole"
    NONE = "none"  # an ablation: the guide's level holds the instruction and the cue alone


class PromptError(ValueError):
    """A tokenizer, template or text of which no sound prompt can be made."""


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """The words around a guide and a sentence.

    Attributes:
      system: the system message; "" leaves it out (a chat template may then bring its own).
      instruction: what the user's turn begins with.
      cue: stands between the guide and the sentence; ends the level of the guide.
      guide: how much of the guide is shown.
    """

    system: str
    instruction: str
    cue: str = "Sentence:"
    guide: GuideInPrompt = GuideInPrompt.WHOLE

    def __post_init__(self) -> None:
        """Refuses words that would move the boundary between the levels."""
        object.__setattr__(self, "guide", GuideInPrompt(self.guide))
        for name in ("instruction", "cue"):
            value = getattr(self, name)
            if not value or value != value.strip():
                raise PromptError(
                    f"template {name} must be text without outer white space, found {value!r}"
                )

    def to_json(self) -> dict[str, str]:
        """A JSON object that `from_json` reads; a guide that is shown whole is not mentioned."""
        fields = {name: str(value) for name, value in dataclasses.asdict(self).items()}
        if self.guide is GuideInPrompt.WHOLE:
            del fields["guide"]
        return fields

    @classmethod
    def from_json(cls, fields: dict[str, str]) -> "PromptTemplate":
        """The template of a JSON object; PromptError for unknown, missing or non-text fields."""
        expected = {field.name for field in dataclasses.fields(cls)}
        words = {"guide": GuideInPrompt.WHOLE.value} | fields
        if set(words) != expected or not all(isinstance(value, str) for value in words.values()):
            raise PromptError(
                f"a prompt template has the text fields {sorted(expected)}, found {fields}"
            )
        return cls(**words)


DEFAULT_TEMPLATE = PromptTemplate(
    system="You annotate relations between two marked mentions.",
    instruction=(
        "Read the guide, then label the pair <e1>, <e2> in the sentence. Reason inside "
        "<think></think>, then give one label of the guide inside <answer></answer>: "
        "Relation(e1,e2) if e1 is X, Relation(e2,e1) if e2 is X, or the bare name where a label "
        "has no direction."
    ),
)

TRIPLET_TEMPLATE = PromptTemplate(
    system="You annotate entities and the relations between them.",
    instruction=(
        "Read the guide, then find all its entities and relations in the sentence. Reason inside "
        "<think></think>, then give one JSON object inside <answer></answer>: "
        '{"entities": [{"text": ..., "type": ...}], "triplets": [{"head": ..., "relation": ..., '
        '"tail": ...}]}, with words as the sentence has them; head is X, tail is Y.'
    ),
)
