"""Services that show a run beside others: TensorBoard's files, Weights & Biases, trackio.

Credentials come from the service's environment (`WANDB_API_KEY`, `HF_TOKEN`), never from a config.
"""

import importlib
import importlib.util
import json
import tempfile
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from absl import logging
from etils import epath

from r1re_jax import files
from r1re_jax.report.writers import TensorBoardWriter, plain
from r1re_jax.train.hooks import Writer
from r1re_jax.train.settings import LogSettings

IDENTITY = "tracking.json"


class TrackerError(ValueError):
    """A service that is asked for and cannot be used."""


class TrackerWriter:
    """Sends the numbers of a step to a service; what fails there is told once and never raised."""

    def __init__(self, name: str, *, log: Callable[..., None], finish: Callable[[], None]):
        """Take the service's functions.

        Args:
            name: of the service, for messages.
            log: takes names with numbers, and `step`.
            finish: ends the run there.
        """
        self._name, self._log, self._finish = name, log, finish
        self._failed = False

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Send each number under its name; strings and missing values are left out."""
        numbers = {name: plain(value) for name, value in values.items()}
        numbers = {name: x for name, x in numbers.items() if isinstance(x, int | float)}
        self._call(lambda: self._log(numbers, step=int(step)))

    def close(self) -> None:
        """End the run there."""
        self._call(self._finish)

    def _call(self, send: Callable[[], None]) -> None:
        # A service that cannot be reached must not end a training that goes well: its figures are
        # in metrics.jsonl whatever happens.
        try:
            send()
        except Exception as error:
            if not self._failed:
                logging.warning("%s takes no figures, the run goes on: %s", self._name, error)
            self._failed = True


def open_trackers(
    log: LogSettings, workdir: epath.Path, *, config: Mapping[str, Any], resume_step: int
) -> tuple[Writer, ...]:
    """Open the services that a config names; a run that goes on goes on there too.

    Args:
        log: names them.
        workdir: of the run; its name is the run's, tracking.json there holds its id.
        config: resolved, shown beside the run.
        resume_step: last step that counts. W&B and trackio keep what they were told of later steps:
            the resumed run computes the same figures again.

    Raises:
        TrackerError: a service that is not installed, or that refuses the run at its start.
    """
    writers: list[Writer] = []
    if log.tensorboard:
        writers.append(TensorBoardWriter(workdir / "tensorboard", resume_step=resume_step))
    asked = {"project": log.project, "config": dict(config), "resume": "allow"}
    name = files.absolute(workdir).name
    if log.wandb:
        identity = _identity(workdir)
        # Of a run in a bucket it keeps its own files on this machine.
        beside = tempfile.mkdtemp(prefix="r1re-wandb-") if files.is_remote(workdir) else workdir
        writers.append(_begun("wandb", **asked, id=identity, name=name, dir=str(beside)))
    if log.trackio:  # it knows a run by its name alone
        writers.append(_begun("trackio", **asked, name=f"{name}-{_identity(workdir)}"))
    return tuple(writers)


def check_trackers(log: LogSettings) -> None:
    """Refuse services whose package is not installed.

    Raises:
        TrackerError: names the package and how to get it.
    """
    for name in ("wandb", "trackio"):
        if getattr(log, name) and importlib.util.find_spec(name) is None:
            raise TrackerError(
                f"log.{name} is set, and {name} is not installed here: pip install"
                f" -e '.[track]', or set log.{name} = False"
            )


def _begun(name: str, /, **asked: Any) -> TrackerWriter:
    """Begin a run at a service."""
    service = importlib.import_module(name)
    try:
        service.init(**asked)
    except Exception as error:  # each service has errors of its own
        raise TrackerError(
            f"{name} refuses the run: {error}. Give it what it asks for in the environment"
            f" (of W&B WANDB_API_KEY, or WANDB_MODE=offline), or set log.{name} = False"
        ) from error
    return TrackerWriter(name, log=service.log, finish=service.finish)


def _identity(workdir: epath.Path) -> str:
    """Return the run's id, made once and kept in the work directory."""
    path = workdir / IDENTITY
    if not path.exists():
        files.write(path, json.dumps({"id": uuid.uuid4().hex[:8]}) + "\n")
    return json.loads(files.read_text(path))["id"]
