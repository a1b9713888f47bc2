"""Every command that README and docs show is executed, in a copy of the checkout.

Blocks marked `cpu` run with the recipes' smoke argument, blocks marked `tpu` with --dry-run, or as
run.compile of a short run for the slice.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests.docs.pages import MARKS, PAGES, ROOT, Block, blocks, stray_commands
from tests.simulated import xla_flags

LIBTPU = ROOT / ".cache" / "tpu"
OWN_DATA = "docs/own_data.md"
# A run of one phase on every device of a slice; tests/launch/test_tpu.py compiles GRPO for some.
SLICE = (
    "--config.mesh.fsdp=-1 --config.grpo.steps=0 --config.sft.steps=1"
    " --config.sft.questions=64 --config.evaluate.samples=0"
)
WITH_COMMANDS = [page for page in PAGES if any(block.mark for block in blocks(page))]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_commands_says_where_it_runs(page: str) -> None:
    assert not stray_commands(page), "put commands into a block: ```bash cpu, or ```bash tpu"
    for block in blocks(page):
        if block.language in ("bash", "sh", "shell", "console"):
            assert len(set(block.words) & set(MARKS)) == 1, block.text


def test_the_pages_have_commands() -> None:
    assert {"README.md", OWN_DATA, "docs/tpu.md"} <= set(WITH_COMMANDS)


def adapted(command: str, mark: str) -> str:
    """The command as it is executed: short, or without a TPU."""
    command = re.sub(
        r"--config=(configs/[\w/]+\.py)(?::(\S+))?",
        lambda found: f"--config={found[1]}:{found[2] + ',' if found[2] else ''}smoke",
        command,
    )
    command = command.replace("run/quickstart.sh", "run/quickstart.sh --smoke")
    command = command.replace("run/base.sh", "run/base.sh smoke")
    command = re.sub(r"run/test\.sh$", "run/test.sh tests/task/test_own_data.py", command)
    command = command.replace("pip install", "pip install --dry-run --no-deps --no-build-isolation")
    if "run.export" in command:  # of what a block before has trained here
        command = command.replace("gs://BUCKET/", "")
    if mark == "tpu":
        command = re.sub(r"(run/tpu\.sh \w+)", r"\1 --dry-run", command)
    if "run.compile" in command and "--topology" in command:
        command += f" {SLICE}"
    return command.replace("PYTHONPATH=TPU", f"PYTHONPATH={LIBTPU}")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Compiled programs of one page serve the next."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def checkout(tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the checkout whose .venv is this one's, set up."""
    copy = tmp_path / "r1re_jax"
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listing.stdout.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    (copy / ".venv").mkdir()
    for part in ("bin", "include", "lib", "lib64", "pyvenv.cfg"):
        if (pathlib.Path(sys.prefix) / part).exists():
            (copy / ".venv" / part).symlink_to(pathlib.Path(sys.prefix) / part)
    stamp = (
        f"cd {copy} && (printf '%s\\n' {copy} && cat run/setup.sh setup.cfg pyproject.toml"
        " requirements/runtime.txt requirements/dev.txt) | cksum > .venv/r1re-setup.stamp"
    )
    commit = "git init -q && git add -A && git -c user.name=n -c user.email=e commit -qm copy"
    subprocess.run(["bash", "-c", f"{stamp} && {commit}"], check=True)
    # What would reach a cloud is only asked for.
    (copy / ".fakes").mkdir()
    for name in ("gcloud", "sky", "ssh-add"):
        (copy / ".fakes" / name).write_text("#!/bin/sh\nexit 0\n")
        (copy / ".fakes" / name).chmod(0o755)
    return copy


def environment(page: str, checkout: pathlib.Path, cache: pathlib.Path) -> dict[str, str]:
    # As a user has it: one device, and nothing said of the hub, which no short run asks.
    ours = ("XLA_FLAGS", "HF_HUB_OFFLINE", "HF_TOKEN")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    if page != "README.md":  # its programs are optimised ones, as users get them
        kept["XLA_FLAGS"] = xla_flags(1)
    path = f"{checkout / '.fakes'}:{checkout / '.venv' / 'bin'}:{os.environ['PATH']}"
    return kept | {"PATH": path, "PYTHONPATH": str(checkout), "R1RE_CACHE": str(cache)}


def write_files(page: str, checkout: pathlib.Path) -> None:
    for block in blocks(page):
        if block.file:
            (checkout / block.file).parent.mkdir(parents=True, exist_ok=True)
            (checkout / block.file).write_text(block.text, "utf-8")


def execute(script: str, checkout: pathlib.Path, env: dict[str, str]) -> None:
    """Run a block; it must succeed, and an upload without credentials must be refused."""
    found = subprocess.run(
        ["bash", "-ec", script], cwd=checkout, env=env, capture_output=True, text=True, timeout=1200
    )
    told = f"{script}\n{found.stdout[-3000:]}\n{found.stderr[-3000:]}"
    if "--push=" in script:
        assert found.returncode == 1 and "hf auth login" in found.stderr, told
        return
    assert found.returncode == 0, told
    assert "does not provide the extra" not in found.stderr, told


def run_block(
    block: Block, checkout: pathlib.Path, env: dict[str, str], data: pathlib.Path | None
) -> None:
    if block.language == "python":
        (checkout / "block.py").write_text(block.text, "utf-8")
        execute("python block.py", checkout, env)
        return
    lines = []
    for command in block.commands:
        if "FOLDER" in command and data is None:
            continue  # the data of others, which is not here
        if "PYTHONPATH=TPU" in command and not LIBTPU.is_dir():
            continue  # run/test.sh --all installs it
        command = command.replace("R1RE_DATA=FOLDER", f"R1RE_DATA={data}")
        lines.append(adapted(command, block.mark or ""))
    execute("\n".join(lines), checkout, env)


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_every_command_of_a_page_works(
    page: str, checkout: pathlib.Path, cache: pathlib.Path
) -> None:
    env = environment(page, checkout, cache)
    shared = pathlib.Path(os.environ.get("R1RE_SHARED", ROOT.parent / "shared")) / "data"
    if page != OWN_DATA:
        write_files(OWN_DATA, checkout)
        (checkout / "incidents" / "guide.md").unlink()  # run.prepare overwrites nothing
    for block in blocks(page):
        if block.file:
            (checkout / block.file).parent.mkdir(parents=True, exist_ok=True)
            (checkout / block.file).write_text(block.text, "utf-8")
        elif block.mark:
            run_block(block, checkout, env, shared if shared.is_dir() else None)
