"""What an exported policy began from, and under which licence that was published."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from etils import epath

from r1re_jax.files import PlaceError, absolute, fetched, place
from r1re_jax.model.gguf_file import open_gguf
from r1re_jax.policy_files import CARD, RECIPE
from r1re_jax.policy_source import BASE, PolicyError, find, is_workdir
from r1re_jax.published import PUBLISHED
from r1re_jax.report.history import read_json, section

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
LICENCE_KEYS = ("license", "license_name", "license_link")
UNKNOWN = "unknown"
LONGEST = 16  # runs that began from each other


@dataclass(frozen=True, kw_only=True)
class Ancestor:
    """Something that a policy began from.

    Attributes:
        name: for people; of a local path its last part alone.
        hub: its name on the Hugging Face hub, or of what it is itself an export of; "" if unknown.
        metadata: front matter of its model card; empty where there is none.
    """

    name: str
    hub: str | list[str] = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Licence:
    """A licence and who said so.

    Attributes:
        fields: what a model card's front matter says of it.
        origin: what the licence was taken from; "" where it is unknown.
    """

    fields: Mapping[str, Any]
    origin: str

    @property
    def name(self) -> str:
        """The licence for people."""
        shown = self.fields["license"]
        further = [str(self.fields[key]) for key in LICENCE_KEYS[1:] if key in self.fields]
        text = ", ".join(map(str, shown)) if isinstance(shown, list) else str(shown)
        return f"{text} ({', '.join(further)})" if further else text


def ancestors(source: str | os.PathLike) -> list[Ancestor]:
    """Return what a policy comes from, the nearest first, as far as it is known.

    Of a run that is what its configuration says that it began from, and so on through the runs
    before; a folder or hub name is its own and only ancestor.
    """
    name, found = os.fspath(source), []
    for depth in range(LONGEST):
        where = _place(name)
        if where is None or not is_workdir(where):
            return [*found, _ancestor(name, where)]
        if depth:
            found.append(Ancestor(name=f"run {absolute(where).name}"))
        name = section(read_json(where / "config.json", []), "model").get("path")
        if not name:
            break
    return found


def licence_of(given: str, chain: Sequence[Ancestor]) -> Licence:
    """Return the licence that was given, else that of the nearest ancestor whose card names one."""
    if given:
        return Licence(fields={"license": given}, origin="as given at the export")
    for one in chain:
        if one.metadata.get("license"):
            fields = {key: one.metadata[key] for key in LICENCE_KEYS if one.metadata.get(key)}
            return Licence(fields=fields, origin=f"that of {one.name}, by its model card")
    return Licence(fields={"license": UNKNOWN}, origin="")


def _place(name: str) -> epath.Path | None:
    """Return where a policy is on this machine or in a bucket, or None."""
    if name.startswith(BASE):
        try:
            return find(name)
        except PolicyError:  # a run of another version began from it
            return None
    try:
        where = place(name)
    except PlaceError:  # a bucket that is no more, or not for us
        return None
    return where if where.exists() else None


def _ancestor(name: str, where: epath.Path | None) -> Ancestor:
    if name in PUBLISHED:
        one = PUBLISHED[name]
        return Ancestor(name=name, hub=one.base, metadata={"license": one.license})
    if where is not None and where.is_file():
        with fetched(where) as here:
            said = open_gguf(here).metadata.get("general.license")
        return Ancestor(name=where.name, metadata={"license": said} if said else {})
    if where is None and HUB_NAME.fullmatch(name):
        return Ancestor(name=name, hub=name, metadata=_hub_metadata(name))
    if where is None or name.startswith(BASE):
        shown = name if name.startswith(BASE) else Path(name).name
        return Ancestor(name=shown, metadata={} if where is None else front_matter(where / CARD))
    said = front_matter(where / CARD)
    # An export of ours is one step of the way; what another folder began from is not what we did.
    hub = said.get("base_model") if (where / RECIPE).is_file() else ""
    return Ancestor(name=absolute(where).name, hub=hub or "", metadata=said)


def _hub_metadata(name: str) -> Mapping[str, Any]:
    """Return the front matter of a model's card on the hub; empty where it cannot be reached."""
    from huggingface_hub import hf_hub_download

    try:
        return front_matter(place(hf_hub_download(name, CARD)))
    except Exception:  # whatever failed there: offline, no card, no access; nothing is known then
        return {}


def front_matter(path: epath.Path) -> Mapping[str, Any]:
    """Return the YAML front matter of a model card; empty where none can be read."""
    from huggingface_hub.repocard import metadata_load

    try:
        with fetched(path) as here:
            return (metadata_load(here) if here.is_file() else None) or {}
    except Exception:  # whatever YAML's reader raises: such a card says nothing
        return {}
