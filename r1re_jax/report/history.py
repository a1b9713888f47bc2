"""What a work directory says about its run, read leniently: half a run has a report too."""

import io
import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from etils import epath

from r1re_jax.files import absolute, children, open_bytes, place, read_text
from r1re_jax.report.writers import Value, read_metrics

_EVALUATION = re.compile(r"(?P<step>\d+)-(?P<name>.+)")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One finished evaluation.

    Attributes:
        step: of the run; 0 is before any training.
        name: of the evaluation set.
        metrics: its metrics.json.
        folder: holds metrics.json and predictions.jsonl.
    """

    step: int
    name: str
    metrics: dict[str, Any]
    folder: epath.Path

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval of Avg@k, where it is known."""
        ends = self.metrics.get("ci95")
        if isinstance(ends, list) and len(ends) == 2 and all(map(is_number, ends)):
            return ends[0], ends[1]
        return None


@dataclass(frozen=True, kw_only=True)
class History:
    """A run as its work directory tells it.

    Attributes:
        workdir: the folder.
        config: config.json, or empty.
        metrics: one dict a step, ascending.
        evaluations: by step, then name.
        completions: completions/<step>.jsonl files, ascending.
        gaps: what is missing or could not be read, one sentence each.
    """

    workdir: epath.Path
    config: dict[str, Any]
    metrics: tuple[dict[str, Value], ...]
    evaluations: tuple[Evaluation, ...]
    completions: tuple[epath.Path, ...]
    gaps: tuple[str, ...]

    @property
    def sets(self) -> tuple[str, ...]:
        """Names of the evaluation sets, in-domain first if a name says so, else alphabetical."""
        names = {evaluation.name for evaluation in self.evaluations}
        return tuple(sorted(names, key=lambda name: (is_out_of_domain(name), name)))

    @property
    def sft_steps(self) -> int:
        """Last step of the supervised warm start by config or metrics; 0 where there was none."""
        configured = section(self.config, "sft").get("steps")
        if isinstance(configured, int):
            return configured
        return max((row["step"] for row in self.metrics if row.get("phase") == "sft"), default=0)

    def series(self, name: str, *, phase: str = "") -> tuple[list[int], list[float]]:
        """Steps and values of one training metric, without gaps; of one phase only where given."""
        rows = [row for row in self.metrics if phase in ("", row.get("phase"))]
        pairs = [(row["step"], row[name]) for row in rows if is_number(row.get(name))]
        return [step for step, _ in pairs], [float(value) for _, value in pairs]

    def of_set(self, name: str) -> tuple[Evaluation, ...]:
        """The evaluations of one set by step."""
        return tuple(evaluation for evaluation in self.evaluations if evaluation.name == name)


def is_number(value: Any) -> bool:
    """Whether a figure can be drawn or printed (True and False cannot)."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_out_of_domain(name: str) -> bool:
    """Whether an evaluation set's name says that it is out of domain."""
    return "ood" in name.lower() or "out_of" in name.lower()


def section(config: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of config.json, which may hold the configuration itself or under `config`."""
    inner = config.get("config")
    found = (inner if isinstance(inner, dict) else config).get(name)
    return found if isinstance(found, dict) else {}


def read_history(workdir: str | os.PathLike) -> History:
    """Read everything a report needs; parts that are missing or broken become `gaps`.

    Raises:
        FileNotFoundError: no such folder, or one that holds nothing of a run.
        PlaceError: a bucket that cannot be reached.
    """
    workdir = place(workdir)
    if not workdir.is_dir():
        raise FileNotFoundError(
            f"no work directory at {absolute(workdir)}; give the one of run.train"
        )
    gaps: list[str] = []
    config = read_json(workdir / "config.json", gaps)
    metrics = _metrics(workdir / "metrics.jsonl", gaps)
    evaluations = tuple(_evaluations(workdir / "eval", gaps))
    lines = [path for path in children(workdir / "completions") if path.suffix == ".jsonl"]
    numbered = (path for path in lines if path.stem.isdigit())
    completions = tuple(sorted(numbered, key=lambda path: int(path.stem)))
    if not (config or metrics or evaluations or completions):
        raise FileNotFoundError(
            f"{absolute(workdir)} holds no run: expected config.json, metrics.jsonl, eval/ or"
            " completions/ as run.train writes them"
        )
    return History(
        workdir=workdir,
        config=config,
        metrics=metrics,
        evaluations=evaluations,
        completions=completions,
        gaps=tuple(gaps),
    )


def read_rows(path: epath.Path, *, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """The JSON objects of a .jsonl file, skipping what does not parse; at most `limit`."""
    if not path.is_file():
        return iter(())
    return itertools.islice(_rows(path), limit)


def _rows(path: epath.Path) -> Iterator[dict[str, Any]]:
    with io.TextIOWrapper(open_bytes(path), "utf-8") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict):
                yield row


def read_json(path: epath.Path, gaps: list[str]) -> dict[str, Any]:
    """A JSON object, or an empty one with the reason added to `gaps`."""
    if not path.is_file():
        gaps.append(f"{path.name} is missing")
        return {}
    try:
        found = json.loads(read_text(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        gaps.append(f"{path.name} could not be read: {error}")
        return {}
    if not isinstance(found, dict):
        gaps.append(f"{path.name} holds a {type(found).__name__}, expected a JSON object")
        return {}
    return found


def _metrics(path: epath.Path, gaps: list[str]) -> tuple[dict[str, Value], ...]:
    if not path.is_file():
        gaps.append("metrics.jsonl is missing: no training curves")
        return ()
    try:
        return tuple(read_metrics(path))
    except ValueError as error:
        gaps.append(str(error))
        return ()


def _evaluations(folder: epath.Path, gaps: list[str]) -> list[Evaluation]:
    """Finished evaluations by step and name; an unfinished one is a gap."""
    found = []
    for path in children(folder):
        match = _EVALUATION.fullmatch(path.name)
        if match is None or not path.is_dir():
            continue
        if not (path / "metrics.json").is_file():
            gaps.append(f"eval/{path.name} is not finished")
            continue
        metrics = read_json(path / "metrics.json", gaps)
        if metrics:
            step, name = int(match["step"]), match["name"]
            found.append(Evaluation(step=step, name=name, metrics=metrics, folder=path))
    if not found:
        gaps.append("there are no finished evaluations")
    return sorted(found, key=lambda evaluation: (evaluation.step, evaluation.name))
