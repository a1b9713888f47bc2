"""Labels: relations, entity types, and the schemas that a guide gives.

A canonical label is `Rel(e1,e2)` (e1 fills role X), `Rel(e2,e1)`, `Rel` where the relation has no
direction, or the none label. e1 is always the mention that comes first in the text.
"""

import difflib
import functools
from collections.abc import Sequence
from dataclasses import dataclass

# A relation named with one of these could never be given as an answer.
RESERVED_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
DIRECTIONS = ("e1,e2", "e2,e1")


class GuideError(ValueError):
    """A guide or schema that cannot be used; the message says where and what is expected."""


class DataError(ValueError):
    """An example that breaks the data contract; readers put `file:line` in front."""


@dataclass(frozen=True)
class Relation:
    """A relation of a guide.

    Attributes:
      name: text without round brackets or line breaks.
      x_role: what fills the first role X.
      y_role: what fills the second role Y.
      directed: whether the label says which mention fills X.
      definition: one line of prose about X and Y.
    """

    name: str
    x_role: str = ""
    y_role: str = ""
    directed: bool = True
    definition: str = ""

    def __post_init__(self) -> None:
        """Refuses a name that no answer could give."""
        check_name(self.name)

    @property
    def labels(self) -> tuple[str, ...]:
        """The relation's canonical labels: one for each direction, or the bare name."""
        if not self.directed:
            return (self.name,)
        return tuple(f"{self.name}({direction})" for direction in DIRECTIONS)


@dataclass(frozen=True)
class Schema:
    """The label set of a guide: its relations and at most one none label."""

    relations: tuple[Relation, ...]
    none: str | None = None

    def __post_init__(self) -> None:
        """Refuses an empty label set and a name that is taken twice."""
        if not self.relations:
            raise GuideError("a schema needs at least one relation, found none")
        names = [relation.name for relation in self.relations]
        if self.none is not None:
            check_name(self.none)
            names.append(self.none)
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise GuideError(f"names must differ, found more than once: {', '.join(repeated)}")

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """Every canonical label, in the order of the guide, the none label last."""
        labels = [label for relation in self.relations for label in relation.labels]
        return tuple(labels if self.none is None else [*labels, self.none])

    @functools.cached_property
    def directionless(self) -> frozenset[str]:
        """The labels that are bare names: relations without direction, and the none label."""
        bare = {relation.name for relation in self.relations if not relation.directed}
        return frozenset(bare if self.none is None else bare | {self.none})

    @functools.cached_property
    def _relation_by_label(self) -> dict[str, str]:
        table = {label: relation.name for relation in self.relations for label in relation.labels}
        return table if self.none is None else table | {self.none: self.none}

    def __contains__(self, label: object) -> bool:
        """Whether `label` is a canonical label of this schema."""
        return label in self._relation_by_label

    def relation_of(self, label: str) -> str:
        """The name of a label's relation, or the none label; DataError for an unknown label."""
        self.check_label(label)
        return self._relation_by_label[label]

    def check_label(self, label: str) -> None:
        """Raises DataError, with the nearest label, where the schema lacks `label`."""
        _check_known(label, self.labels, "label")


@dataclass(frozen=True)
class EntityType:
    """An entity type of a guide.

    Attributes:
      name: text without round brackets or line breaks.
      definition: one line of prose.
    """

    name: str
    definition: str = ""

    def __post_init__(self) -> None:
        """Refuses a name that no answer could give."""
        check_name(self.name)


@dataclass(frozen=True)
class TripletSchema:
    """What may be extracted from a sentence under a guide: entity types and relations.

    A none label has no place here: what holds no relation is left out of the answer.
    """

    entities: tuple[EntityType, ...]
    relations: tuple[Relation, ...]

    def __post_init__(self) -> None:
        """Refuses a schema without types or relations, and a name that is taken twice."""
        for what, names in (("entity type", self.types), ("relation", self.names)):
            if not names:
                raise GuideError(f"a schema of triplets needs at least one {what}, found none")
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                raise GuideError(
                    f"names of a schema must differ, found more than one {what} "
                    f"{', '.join(repeated)}"
                )

    @functools.cached_property
    def types(self) -> tuple[str, ...]:
        """Names of the entity types, in the order of the guide."""
        return tuple(entity.name for entity in self.entities)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the relations, in the order of the guide."""
        return tuple(relation.name for relation in self.relations)

    @functools.cached_property
    def directionless(self) -> frozenset[str]:
        """Names of the relations whose head and tail may change places."""
        return frozenset(relation.name for relation in self.relations if not relation.directed)

    def check_type(self, name: str) -> None:
        """Raises DataError, with the nearest one, where no entity type is called `name`."""
        _check_known(name, self.types, "entity type")

    def check_relation(self, name: str) -> None:
        """Raises DataError, with the nearest one, where no relation is called `name`."""
        _check_known(name, self.names, "relation")


def _check_known(name: str, known: Sequence[str], what: str) -> None:
    """Refuses a name that a guide lacks."""
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise DataError(f"the guide has no {what} {name!r}{hint} Its {what}s are: {', '.join(known)}")


def check_name(name: str) -> None:
    """Refuses a relation name, type or none label that no answer could give."""
    if (
        not name
        or name != name.strip()
        or any(sign in name for sign in ("(", ")", "\n", "\r", *RESERVED_TAGS))
    ):
        raise GuideError(
            f"bad name {name!r}: expected text without round brackets, line breaks, outer spaces, "
            f"{' '.join(RESERVED_TAGS)}"
        )
