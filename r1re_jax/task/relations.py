"""The words of the task: relations, schemas, marked examples and annotation guides.

A guide is Markdown of a fixed form, from which the schema (labels, directions, none label) is read:

    # title
    ## Entities
    - **Type**: definition
    ## Relations
    - **Rel(X = role, Y = role)**: definition
    - **Rel(X = role, Y = role)** [no direction]: definition
    - **Other**: the none label, which has no roles
    ## Rules
    1. a rule

The entity types may be left out: only the extraction of triplets (`r1re_jax.task.triplets`) reads
them, and labels of marked pairs do not depend on them.

A canonical label is `Rel(e1,e2)` (e1 fills role X), `Rel(e2,e1)`, `Rel` where the relation has no
direction, or the none label. e1 is always the mention that comes first in the text.
"""

import functools
import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from r1re_jax.files import absolute, place, read_text
from r1re_jax.task.schema import (
    DIRECTIONS,
    RESERVED_TAGS,
    DataError,
    EntityType,
    GuideError,
    Relation,
    Schema,
    TripletSchema,
    check_name,
)

__all__ = [
    "DIRECTIONS",
    "RESERVED_TAGS",
    "DataError",
    "EntityType",
    "Example",
    "Guide",
    "GuideError",
    "Mention",
    "Relation",
    "Schema",
    "TripletSchema",
    "check_span",
    "load_guide",
    "make_guide",
    "parse_guide",
    "parse_tagged",
]

NONE_DEFINITION = "none of the relations above holds between the two marked mentions."

_RELATION_LINE = re.compile(
    r"- \*\*(?P<name>[^()*]+)\(\s*X\s*=(?P<x>[^()*=]+),\s*Y\s*=(?P<y>[^()*=]+)\)\*\*"
    r"(?P<no_direction>\s*\[no direction\])?:(?P<definition>.*)"
)
_BARE_LINE = re.compile(r"- \*\*(?P<name>[^()*]+)\*\*:(?P<definition>.*)")
_RULE_LINE = re.compile(r"(?:\d+\.|-)\s+(?P<rule>.*\S)")
_MARK = re.compile(r"</?e[12]>")


@dataclass(frozen=True)
class Mention:
    """A marked span: `text` is what stands at [start, end), `type` an entity type if known."""

    text: str
    start: int
    end: int
    type: str | None = None


@dataclass(frozen=True)
class Example:
    """A sentence with a marked pair and its gold label.

    Attributes:
      id: unique within its data set.
      text: the sentence, without marks.
      head: e1, the mention that comes first in the text.
      tail: e2, which begins where head ends or later.
      label: the gold label in canonical form; "" where it is not known.
      labels: further accepted labels, where a pair has several.
      split: for example "train".
      domain: for example "general".
      reasoning: a worked thought for supervised warm starts.

    Raises:
      DataError: a span that does not match the text, or mentions out of order or overlapping.
    """

    id: str
    text: str
    head: Mention
    tail: Mention
    label: str = ""
    labels: tuple[str, ...] = ()
    split: str | None = None
    domain: str | None = None
    reasoning: str | None = None

    def __post_init__(self) -> None:
        """Checks the spans."""
        for role, mention in (("head", self.head), ("tail", self.tail)):
            check_span(role, mention, self.text)
        if self.tail.start < self.head.end:
            fault = "starts after" if self.head.start > self.tail.start else "overlaps"
            raise DataError(
                f"head [{self.head.start}, {self.head.end}) {fault} tail [{self.tail.start}, "
                f"{self.tail.end}); head must be the mention that comes first and end before tail "
                "starts (swap them, and with them the label's direction)"
            )

    @property
    def gold(self) -> frozenset[str]:
        """Every accepted label."""
        return frozenset(label for label in (self.label, *self.labels) if label)

    @property
    def question(self) -> str:
        """What a prompt asks about: the text with its marks."""
        return self.tagged

    @property
    def answer(self) -> str:
        """The gold answer as predictions hold it: the label."""
        return self.label

    @property
    def between(self) -> str:
        """The text between the two mentions."""
        return self.text[self.head.end : self.tail.start]

    @functools.cached_property
    def tagged(self) -> str:
        """The text with `<e1>…</e1>` and `<e2>…</e2>` around the mentions."""
        before, after = self.text[: self.head.start], self.text[self.tail.end :]
        return f"{before}<e1>{self.head.text}</e1>{self.between}<e2>{self.tail.text}</e2>{after}"


@dataclass(frozen=True)
class Guide:
    """An annotation guide.

    Attributes:
      title: the words behind `# `.
      schema: labels, directions and none label.
      rules: the rules, one line each.
      text: the Markdown as it stands in the file; this is what a prompt shows.
      entities: the entity types; empty where the guide names none.
    """

    title: str
    schema: Schema
    rules: tuple[str, ...]
    text: str
    entities: tuple[EntityType, ...] = ()

    @functools.cached_property
    def triplets(self) -> TripletSchema:
        """The schema of triplets; GuideError where the guide names no entity types."""
        if not self.entities:
            raise GuideError(
                f"the guide {self.title!r} names no entity types, which the extraction of triplets "
                f"needs; write {_ENTITIES!r} before {_RELATIONS!r}. {_ENTITY_FORM}"
            )
        return TripletSchema(self.entities, self.schema.relations)

    @functools.cached_property
    def sha256(self) -> str:
        """Hex digest of the text: what an exported policy remembers of its guide."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def parse_tagged(tagged: str, *, id: str = "-", label: str = "") -> Example:
    """The example of a text with `<e1>…</e1>` and `<e2>…</e2>`; inverts `Example.tagged`.

    Raises:
      DataError: a mark that is missing, repeated or out of order.
    """
    marks = list(_MARK.finditer(tagged))
    found = [mark.group() for mark in marks]
    if found != ["<e1>", "</e1>", "<e2>", "</e2>"]:
        raise DataError(
            "expected the marks <e1> </e1> <e2> </e2>, once each and in this order (e1 is the "
            f"mention that comes first), found {' '.join(found) or 'none'} in {tagged!r}"
        )
    text = _MARK.sub("", tagged)
    # A mark's place in the plain text is its place here less the marks before it.
    places = [mark.start() - shift for mark, shift in zip(marks, (0, 4, 9, 13), strict=True)]
    head, tail = (Mention(text[start:end], start, end) for start, end in (places[:2], places[2:]))
    return Example(id=id, text=text, head=head, tail=tail, label=label)


def load_guide(path: str | os.PathLike[str]) -> Guide:
    """Reads a guide file (UTF-8); GuideError names the file and the line."""
    try:
        text = read_text(place(path), "utf-8-sig")
    except FileNotFoundError:
        raise GuideError(
            f"no guide at {absolute(place(path))}: expected a Markdown file with '## Relations'"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise GuideError(f"cannot read the guide {absolute(place(path))}: {error}") from None
    return parse_guide(text, source=str(path))


def parse_guide(text: str, *, source: str = "guide") -> Guide:
    """Reads a guide from Markdown of the form in this module's docstring.

    Raises:
      GuideError: a title, relations or a line that is missing, repeated or not of the form; names
        `source` and the line.
    """
    title, sections = _sections(text, source=source)
    entities = _entities(sections.get(_ENTITIES, []))
    if _ENTITIES in sections and not entities:
        raise GuideError(f"{source}: no entity types under {_ENTITIES!r}. {_ENTITY_FORM}")
    relations, none = _relations(sections.get(_RELATIONS, []))
    if not relations:
        raise GuideError(f"{source}: no relations; expected lines under '{_RELATIONS}'. {_FORM}")
    rules = _rules(line for _, line in sections.get(_RULES, []))
    return Guide(title, Schema(relations, none), rules, text, entities)


def make_guide(
    title: str,
    schema: Schema,
    *,
    rules: Iterable[str] = (),
    none_definition: str = NONE_DEFINITION,
    entities: tuple[EntityType, ...] = (),
) -> Guide:
    """Writes a guide for a schema; `parse_guide` of its text gives the same guide back."""
    lines = [f"# {title}", ""]
    if entities:
        lines += [_ENTITIES, "", *(f"- **{one.name}**: {one.definition}" for one in entities), ""]
    lines += [_RELATIONS, ""]
    for relation in schema.relations:
        mark = "" if relation.directed else " [no direction]"
        roles = f"X = {relation.x_role}, Y = {relation.y_role}"
        lines.append(f"- **{relation.name}({roles})**{mark}: {relation.definition}")
    if schema.none is not None:
        lines.append(f"- **{schema.none}**: {none_definition}")
    lines += ["", _RULES, ""]
    lines += [f"{number}. {rule}" for number, rule in enumerate(rules, start=1)]
    guide = parse_guide("\n".join(lines).rstrip() + "\n", source=title)
    if guide.schema != schema or guide.title != title or guide.entities != entities:
        raise GuideError(
            f"guide {title!r}: names, roles and definitions must be plain single lines"
        )
    return guide


_FORM = (
    "A relation is '- **Name(X = role, Y = role)**: definition', with ' [no direction]' behind the "
    "bold part if it has none; the none label is '- **Name**: definition'"
)
_ENTITY_FORM = "An entity type is '- **Name**: definition'"
_ENTITIES, _RELATIONS, _RULES = "## Entities", "## Relations", "## Rules"


def _sections(text: str, *, source: str) -> tuple[str, dict[str, list[tuple[str, str]]]]:
    """The title, and by section its lines that are not blank, each with its place."""
    title: str | None = None
    sections: dict[str, list[tuple[str, str]]] = {}
    expected = ["# title", _ENTITIES, _RELATIONS, _RULES]
    for number, line in enumerate(text.split("\n"), start=1):
        line, where = line.rstrip(), f"{source}:{number}"
        if not line:
            continue
        if title is None:
            if not line.startswith("# "):
                raise GuideError(
                    f"{where}: the title is missing; expected '# title', found {line!r}"
                )
            title, expected = line[2:].strip(), expected[1:]
        elif line.startswith("#") or not sections:
            if line not in expected:
                shown = [repr(heading) for heading in expected if heading != _ENTITIES]
                follows = " or ".join(shown) or "no further heading"
                may = f" ({_ENTITIES!r} may come first)" if _ENTITIES in expected else ""
                raise GuideError(f"{where}: expected {follows}, found {line!r}{may}")
            expected = expected[expected.index(line) + 1 :]
            section = sections.setdefault(line, [])
        else:
            section.append((where, line))
    if title is None:
        raise GuideError(f"{source}:1: the title is missing; expected '# title', found no text")
    return title, sections


def _entities(lines: Iterable[tuple[str, str]]) -> tuple[EntityType, ...]:
    """The entity types of the lines under '## Entities'."""
    entities: dict[str, EntityType] = {}
    for where, line in lines:
        match = _BARE_LINE.fullmatch(line)
        if match is None or not match["definition"].strip() or not match["name"].strip():
            raise GuideError(f"{where}: cannot read {line!r}. {_ENTITY_FORM}")
        name = match["name"].strip()
        if name in entities:
            raise GuideError(f"{where}: {name!r} is defined twice; names must differ")
        try:
            entities[name] = EntityType(name, match["definition"].strip())
        except GuideError as error:
            raise GuideError(f"{where}: {error}") from None
    return tuple(entities.values())


def _relations(lines: Iterable[tuple[str, str]]) -> tuple[tuple[Relation, ...], str | None]:
    """The relations and the none label of the lines under '## Relations'."""
    relations: dict[str, Relation] = {}
    none: str | None = None
    for where, line in lines:
        entry = _relation_entry(line, where=where)
        name = entry if isinstance(entry, str) else entry.name
        if name in relations or name == none:
            raise GuideError(f"{where}: {name!r} is defined twice; names must differ")
        if isinstance(entry, Relation):
            relations[name] = entry
        elif none is None:
            none = name
        else:
            raise GuideError(
                f"{where}: a second none label, {name!r} beside {none!r}; expected at most one. "
                f"{_FORM}"
            )
    return tuple(relations.values()), none


def _relation_entry(line: str, *, where: str) -> Relation | str:
    """The relation of a line under '## Relations', or the none label as a string."""
    match = _RELATION_LINE.fullmatch(line)
    none = match or _BARE_LINE.fullmatch(line)
    if none is None or not none["definition"].strip() or not none["name"].strip():
        raise GuideError(f"{where}: cannot read {line!r}. {_FORM}")
    try:
        if match is None:
            check_name(none["name"].strip())
            return none["name"].strip()
        return Relation(
            name=match["name"].strip(),
            x_role=match["x"].strip(),
            y_role=match["y"].strip(),
            directed=match["no_direction"] is None,
            definition=match["definition"].strip(),
        )
    except GuideError as error:
        raise GuideError(f"{where}: {error}") from None


def _rules(lines: Iterable[str]) -> tuple[str, ...]:
    """The rules; a line without number or dash goes on with the rule before."""
    rules: list[str] = []
    for line in lines:
        match = _RULE_LINE.fullmatch(line)
        if match is not None:
            rules.append(match["rule"])
        elif rules:
            rules[-1] = f"{rules[-1]} {line.strip()}"
        else:
            rules.append(line.strip())
    return tuple(rules)


def check_span(role: str, mention: Mention, text: str) -> None:
    """Refuses a span that is not in the text or holds other words."""
    if not 0 <= mention.start < mention.end <= len(text):
        raise DataError(
            f"{role} [{mention.start}, {mention.end}) is no span of a text of {len(text)} "
            "characters; expected 0 <= start < end"
        )
    found = text[mention.start : mention.end]
    if found != mention.text:
        raise DataError(
            f"{role} is {mention.text!r} but text[{mention.start}:{mention.end}] is {found!r}; "
            "correct the offsets (in characters) or the mention"
        )
