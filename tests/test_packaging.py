"""The repository itself: the lock, recipes without logic, sizes, and nothing of one machine."""

import ast
import configparser
import os
import pathlib
import re
import subprocess
from collections.abc import Iterator

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import r1re_jax

ROOT = pathlib.Path(__file__).resolve().parents[1]
RUNTIME, DEV, TPU = (ROOT / "requirements" / f"{name}.txt" for name in ("runtime", "dev", "tpu"))
MAX_FILE_BYTES = 12_000_000
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_LOOP_LINES = 150
SOURCES = sorted(
    path for room in ("r1re_jax", "run", "configs") for path in (ROOT / room).rglob("*.py")
)
CONFIGS = [path for path in SOURCES if path.is_relative_to(ROOT / "configs")]


def _files() -> list[pathlib.Path]:
    """Every file that is or could be committed; of a copy without git, all but caches."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode == 0:
        paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    else:
        hidden = {".venv", ".cache", ".git", "__pycache__", "build", "dist", "runs", "out"}
        paths = []
        for folder, folders, names in os.walk(ROOT):
            folders[:] = [name for name in folders if name not in hidden]
            paths += [pathlib.Path(folder, name) for name in names]
    return [path for path in paths if path.is_file()]


def _pins(path: pathlib.Path) -> dict[str, Version]:
    """Versions by canonical name; fails on a line that is anything but an exact pin."""
    text = re.sub(r"\\\n\s*", " ", path.read_text())
    pins = {}
    for line in text.splitlines():
        if not line or line.lstrip().startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+)((?: +--hash=sha256:[0-9a-f]{64})*)", line)
        assert match, f"{path.name}: no exact pin: {line[:80]}"
        name, version, hashes = match.groups()
        assert bool(hashes) == (path != DEV), f"{path.name}: hashes of {name}"
        pins[canonicalize_name(name)] = Version(version)
    return pins


def _requirements(section: str, option: str) -> list[Requirement]:
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / "setup.cfg")
    return [Requirement(line) for line in settings[section][option].split("\n") if line]


def _imports(path: pathlib.Path) -> Iterator[str]:
    """Top-level names of everything that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "").split(".")[0]


@pytest.mark.parametrize("path", [RUNTIME, DEV, TPU], ids=lambda path: path.name)
def test_lock_names_releases_and_nothing_else(path) -> None:
    assert not re.search(r"://|^\s*-[^-]|--(?!hash)| @ ", path.read_text(), re.MULTILINE)
    local = {name: str(pin) for name, pin in _pins(path).items() if pin.local}
    assert not local, "a local version is of one machine"


def test_lock_answers_every_requirement() -> None:
    runtime, dev = _pins(RUNTIME), _pins(DEV)
    assert not runtime.keys() & dev.keys()
    wanted = [(r, runtime) for r in _requirements("options", "install_requires")]
    wanted += [(r, runtime | dev) for r in _requirements("options.extras_require", "dev")]
    assert len(wanted) > 20
    for requirement, pins in wanted:
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement} is not in the lock: bash requirements/renew.sh"
        assert pin in requirement.specifier, f"{requirement} against the lock's {pin}"


def test_lock_holds_no_gpu_libraries_and_the_library_no_torch() -> None:
    everything = _pins(RUNTIME) | _pins(DEV)
    assert not [name for name in everything if re.match(r"nvidia|cuda|triton", name)]
    assert not {"torch", "tensorflow"} & _pins(RUNTIME).keys()


def test_libtpu_goes_with_the_locked_jax() -> None:
    tpu = {r.name: r.specifier for r in _requirements("options.extras_require", "tpu")}
    assert _pins(RUNTIME)["jax"] == _pins(RUNTIME)["jaxlib"] == Version("0.10.2")
    assert str(tpu["libtpu"]) == "==0.0.42.1", "jaxlib 0.10.2 was built with libtpu 0.0.42.1"
    pins = _pins(TPU)
    assert pins["libtpu"] == Version("0.0.42.1") and not pins.keys() & _pins(RUNTIME).keys()
    assert pins["setuptools"] == _pins(DEV)["setuptools"], "what builds the editable install"


def test_one_version_everywhere() -> None:
    version = r1re_jax.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


RECIPES = [path for path in CONFIGS if "\ndef get_config(" in path.read_text("utf-8")]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_how_it_is_run_where_how_long_and_how_well(path) -> None:
    header = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    for word in ("command", "hardware", "time", "score"):
        assert re.search(rf"^{word}: +\S", header, re.M), word


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_imports_neither_jax_nor_the_library(path) -> None:
    outside = set(_imports(path)) & {"jax", "flax", "optax", "numpy", "r1re_jax", "run", ".", ""}
    assert not outside, f"{path.relative_to(ROOT)} imports {sorted(outside)}: recipes hold no logic"


def test_files_are_small() -> None:
    big = {str(p.relative_to(ROOT)): p.stat().st_size for p in _files()}
    assert not {name: size for name, size in big.items() if size > MAX_FILE_BYTES}


def test_nothing_speaks_of_one_machine() -> None:
    folders = "|".join(("work", "root", "opt", "home/[a-z]+"))
    pattern = re.compile(rf"(?<![\w.~/:-])/(?:{folders})/|file:/{{2}}|{re.escape(str(ROOT))}\b")
    found = []
    for path in _files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        lines = enumerate(text.splitlines(), start=1)
        found += [f"{path.relative_to(ROOT)}:{n}" for n, line in lines if pattern.search(line)]
    assert not found, "a path of one machine"


def test_files_and_functions_keep_their_budget() -> None:
    over = []
    for path in SOURCES:
        text = path.read_text()
        name = str(path.relative_to(ROOT))
        if text.count("\n") > MAX_FILE_LINES:
            over.append(f"{name}: {text.count(chr(10))} lines")
        limit = MAX_LOOP_LINES if name == "r1re_jax/train/loop.py" else MAX_FUNCTION_LINES
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > limit:
                    over.append(f"{name}:{node.lineno} {node.name}: {lines} lines")
    assert not over
