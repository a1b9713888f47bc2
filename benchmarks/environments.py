"""Environments of the peers: each has its own, made from its pinned requirements where missing."""

import subprocess
import sys
from pathlib import Path

PEERS = Path(__file__).parent / "peers"


def peer_python(name: str, venvs: Path) -> Path:
    """Return the Python of a peer's environment, VENVS/NAME; make the environment where needed.

    Args:
        name: trl or tunix: the requirements are `peers/NAME.txt`.
        venvs: folder of the environments.

    Raises:
        RuntimeError: the requirements cannot be installed.
    """
    folder, requirements = venvs / name, PEERS / f"{name}.txt"
    python, done = folder / "bin" / "python", folder / "requirements.txt"
    # Written last, so that half an environment is not taken for a whole one.
    if done.is_file() and done.read_text() == requirements.read_text():
        return python
    print(f"making {folder} (once; some minutes)", file=sys.stderr, flush=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--requirement", str(requirements)]
    for command in ([sys.executable, "-m", "venv", str(folder)], install):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
    done.write_text(requirements.read_text())
    return python
