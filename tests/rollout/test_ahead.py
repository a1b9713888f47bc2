"""Compiling ahead: the programs are those that the rollout then asks for."""

import collections
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from r1re_jax.rollout import shapes
from r1re_jax.rollout.ahead import compile_rollout
from r1re_jax.rollout.keys import Purpose, example_ids, row_keys
from r1re_jax.rollout.rollout import Progress, generate
from r1re_jax.rollout.sampling import SamplingSettings
from tests.rollout.test_rollout import GRAPH, PAD, PARAMS, STOPS, C, Q, S
from tests.tiny import random_level

OPTIONS = {
    "jax_compilation_cache_dir": None,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@pytest.fixture
def kept(tmp_path: pathlib.Path) -> Iterator[None]:
    """Programs are kept, and those of other tests forgotten."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    for name, value in OPTIONS.items():
        jax.config.update(name, tmp_path.as_posix() if value is None else value)
    compilation_cache.reset_cache()
    jax.clear_caches()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_a_rollout_finds_what_was_compiled_ahead(
    kept: None, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(shapes, "NARROWEST", 8)
    random = np.random.default_rng(3)
    levels = (random_level(random, (1, S)), random_level(random, (1, 4, Q), least=1))
    ids = example_ids("d", [str(i) for i in range(4)])[None]
    keys = row_keys(0, Purpose.TRAIN, 1, ids, range(2))
    settings = {"settings": SamplingSettings(), "limit": C, "stop_ids": STOPS, "pad_id": PAD}
    settings |= {"chunk": 2, "compaction": 1}
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)  # noqa: E731
    names = [
        found.name
        for found in compile_rollout(
            GRAPH,
            jax.tree.map(shape, PARAMS),
            jax.tree.map(shape, levels),
            keys=shape(keys),
            **settings,
        )
    ]
    assert [name for name in names if name.startswith("decode")] == [
        f"decode_{rows}x{width}" for rows in (8, 4, 2, 1) for width in (8, 16)
    ]
    assert names[:2] == ["question_prefill", "start"]

    files = lambda: collections.Counter(  # noqa: E731
        path.name.partition("-")[0] for path in tmp_path.glob("jit_*-cache")
    )
    before, seen = files(), list[Progress]()
    assert before["jit_decode_chunk"] == 8
    jax.clear_caches()
    generate(GRAPH, PARAMS, levels, keys=keys, on_chunk=seen.append, **settings)
    assert len({(one.batch, one.width) for one in seen}) > 2
    after = files()
    for program in ("jit_prefill", "jit_start_state", "jit_decode_chunk", "jit_grown"):
        assert after[program] == before[program] > 0, program
