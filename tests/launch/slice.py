"""run/tpu.sh in a test: a fake gcloud is first on the PATH, and all that it writes in a folder."""

import dataclasses
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
from typing import Any

from tests.launch import fake_gcloud

ROOT = pathlib.Path(__file__).resolve().parents[2]
WHERE = "--project=p1 --zone=z1"
SECRETS = {"HF_TOKEN": "hf_s3cret'token", "WANDB_API_KEY": "k3y-of w&b", "R1RE_DATA": "gs://b/data"}
COMMAND = ("python", "-m", "run.train", "--config=configs/miniworld.py", "--workdir=gs://b/runs/x")


@dataclasses.dataclass
class Slice:
    """A project with room for one slice.

    Attributes:
        folder: holds the fake's world and calls, the state and the temporary files.
        variables: of the environment, besides PATH and HOME.
    """

    folder: pathlib.Path
    variables: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.folder / "bin").exists():  # a copy
            return
        for name in ("bin", "fake", "tmp"):
            (self.folder / name).mkdir()
        program = self.folder / "bin" / "gcloud"
        call = shlex.join([sys.executable, "-I", "-S", fake_gcloud.__file__])
        program.write_text(f'#!/bin/sh\nexec {call} "$@"\n')
        program.chmod(0o755)
        self.change(**fake_gcloud.NEW)
        (self.repository / "run").mkdir(parents=True)
        for path in (ROOT / "run").glob("*.sh"):
            shutil.copy(path, self.repository / "run")
        self.git("init", "--quiet")
        self.commit()

    def copy(self, folder: pathlib.Path) -> "Slice":
        """Return another one in the same state, in a folder of its own."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return Slice(folder, variables=dict(self.variables))

    @property
    def repository(self) -> pathlib.Path:
        """A repository that holds the scripts alone."""
        return self.folder / "repository"

    def git(self, *arguments: str) -> str:
        """Call git there."""
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        command = ["git", *who, *arguments]
        return subprocess.run(
            command, cwd=self.repository, check=True, capture_output=True, text=True
        ).stdout.strip()

    def commit(self) -> str:
        """Commit what is there; return the hash."""
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message=one")
        return self.git("rev-parse", "HEAD")

    @property
    def world(self) -> dict[str, Any]:
        """What there is at the fake's."""
        return json.loads((self.folder / "fake" / "world.json").read_text())

    def change(self, **values: Any) -> None:
        """Change what there is."""
        path = self.folder / "fake" / "world.json"
        path.write_text(json.dumps((self.world if path.exists() else {}) | values))

    def environment(self) -> dict[str, str]:
        """All of a call's environment."""
        return {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "TMPDIR": str(self.folder / "tmp"),
            "FAKE_GCLOUD": str(self.folder / "fake"),
            "R1RE_TPU_STATE": str(self.folder / "state"),
            "R1RE_TPU_PROJECT": "p1",
            "CLOUDSDK_COMPUTE_ZONE": "z1",
            "R1RE_TPU_POLL": "0",
            "R1RE_TPU_PATIENCE": "2",
        } | self.variables

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Call run/tpu.sh."""
        return subprocess.run(
            ["bash", self.repository / "run" / "tpu.sh", *arguments],
            env=self.environment(),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def done(self, *arguments: str) -> str:
        """Call run/tpu.sh, which must succeed; return what it says."""
        result = self.run(*arguments)
        assert result.returncode == 0, result.stderr
        return result.stderr

    def launch(self) -> "Slice":
        """Bring it to where a run has just been started."""
        for arguments in (["create"], ["setup"], ["launch", "--", *COMMAND]):
            self.done(*arguments)
        self.calls()
        return self

    def calls(self) -> list[str]:
        """Return all calls of gcloud so far, and forget them; temporary folders are SCRATCH."""
        path = self.folder / "fake" / "calls.jsonl"
        if not path.exists():
            return []
        lines = [" ".join(json.loads(line)) for line in path.read_text().splitlines()]
        path.unlink()
        return [_unnamed(line, str(self.folder / "tmp")) for line in lines]


def _unnamed(line: str, folder: str) -> str:
    words = line.split(" ")
    return " ".join(
        f"SCRATCH/{pathlib.Path(word).name}" if word.startswith(folder) else word for word in words
    )
