"""Rollouts of a tiny model: what is drawn, when it stops, and what it may not depend on."""

import collections
import dataclasses
import functools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from r1re_jax import sharding
from r1re_jax.model.tree import Level, Tree
from r1re_jax.rollout import decode, shapes
from r1re_jax.rollout.keys import Purpose, example_ids, row_keys
from r1re_jax.rollout.rollout import Progress, Rollout, generate
from r1re_jax.rollout.sampling import SamplingSettings
from r1re_jax.rollout.state import DecodeState, Program, compact
from tests.oracles import flat_qwen
from tests.tiny import random_level, tiny_model

N, P, G, S, Q, C = 2, 3, 4, 7, 5, 12
# Each token stops with a chance of about 1 in 10: some rows end early and some not at all.
STOPS = (3, 17, 20, 40, 41, 63)
PAD = 3  # one of the stop tokens, as in many tokenizers
MODEL = tiny_model()
GRAPH, PARAMS = nnx.split(MODEL)


def make_levels(seed: int = 0) -> tuple[Level, Level]:
    """Ragged; the first guide is empty and one question has a single token."""
    random = np.random.default_rng(seed)
    guide, question = random_level(random, (N, S)), random_level(random, (N, P, Q), least=1)
    guide.length[0] = 0
    question.length[0, 1] = 1
    return guide, question


def make_keys(samples: range = range(G), *, step: int = 1) -> jax.Array:
    ids = example_ids("d", [str(i) for i in range(N * P)]).reshape(N, P, 2)
    return row_keys(0, Purpose.TRAIN, step, ids, samples)


def draw(levels: tuple[Level, ...], keys: jax.Array, **overrides: object) -> Rollout:
    given = dict(
        settings=SamplingSettings(), limit=C, stop_ids=STOPS, pad_id=PAD, chunk=5, params=PARAMS
    )
    given |= overrides
    return jax.device_get(generate(GRAPH, given.pop("params"), levels, keys=keys, **given))


@functools.cache
def usual() -> Rollout:
    return draw(make_levels(), make_keys())


def assert_same_samples(found: Rollout, expected: Rollout) -> None:
    """Tokens are equal; log-probabilities up to the rounding of another batch shape."""
    for name in ("tokens", "length", "truncated"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    np.testing.assert_allclose(found.logp, expected.logp, atol=2e-5)


def flat_logp(
    levels: tuple[Level, Level], rollout: Rollout, temperature: float = 1.0
) -> np.ndarray:
    """Log-probabilities of the drawn tokens by a plain forward over flat rows in float64."""
    tree = Tree(*levels, Level(rollout.tokens, rollout.length))
    params = flat_qwen.parameters(MODEL)
    with jax.enable_x64(True):
        score = jax.jit(
            lambda params: flat_qwen.flat_scores(
                params, MODEL.config, tree, temperature=temperature
            )[0]
        )
        return np.asarray(score(params))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_cached_decoding_equals_teacher_forcing(temperature: float) -> None:
    levels = make_levels()
    rollout = draw(levels, make_keys(), settings=SamplingSettings(temperature=temperature))
    expected = flat_logp(levels, rollout, temperature)
    assert (rollout.length < C).any() and (rollout.length == C).any()
    np.testing.assert_allclose(rollout.logp, expected, atol=1e-5)


def test_rows_are_as_documented() -> None:
    rollout = usual()
    assert rollout.tokens.shape == rollout.logp.shape == (N, P, G, C)
    assert rollout.tokens.dtype == rollout.length.dtype == np.int32
    assert rollout.logp.dtype == np.float32 and rollout.truncated.dtype == bool
    stop_NPGC = np.isin(rollout.tokens, STOPS)
    ends = collections.Counter()
    for place in np.ndindex(N, P, G):
        length, tokens = rollout.length[place], rollout.tokens[place]
        stopped = bool(stop_NPGC[place][length - 1])
        assert not stop_NPGC[place][: length - 1].any()
        assert rollout.truncated[place] == (not stopped)
        assert stopped or length == C
        assert (tokens[length:] == PAD).all() and (rollout.logp[place][length:] == 0).all()
        assert (rollout.logp[place][:length] < 0).all()
        if stopped:
            ends[int(tokens[length - 1])] += 1
    assert len(ends) > 2, "several stop tokens end completions"


def test_a_stop_token_drawn_last_is_no_truncation() -> None:
    whole = usual()
    length = int(np.unique(whole.length[whole.length < C])[0])
    cut = draw(make_levels(), make_keys(), limit=length)
    at_limit = (whole.length == length) & ~whole.truncated
    assert at_limit.any()
    assert not cut.truncated[at_limit].any() and (cut.length[at_limit] == length).all()
    np.testing.assert_array_equal(cut.truncated, whole.length > length)
    np.testing.assert_array_equal(cut.tokens, whole.tokens[..., :length])


def test_reruns_are_bit_equal() -> None:
    again = draw(make_levels(), make_keys())
    for found, expected in zip(jax.tree.leaves(again), jax.tree.leaves(usual()), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_another_step_draws_other_samples() -> None:
    other = draw(make_levels(), make_keys(step=2))
    assert (other.tokens[..., 0] != usual().tokens[..., 0]).mean() > 0.5


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunks_change_no_sample(chunk: int) -> None:
    again = draw(make_levels(), make_keys(), chunk=chunk)
    np.testing.assert_array_equal(again.tokens, usual().tokens)
    np.testing.assert_array_equal(again.logp, usual().logp)


def test_batch_order_changes_no_sample() -> None:
    guide, question = make_levels()
    trees, questions = [1, 0], [2, 0, 1]
    levels = (
        Level(guide.tokens[trees], guide.length[trees]),
        Level(question.tokens[trees][:, questions], question.length[trees][:, questions]),
    )
    found = draw(levels, make_keys()[jnp.array(trees)][:, jnp.array(questions)])
    expected = jax.tree.map(lambda x: x[trees][:, questions], usual())
    assert_same_samples(found, expected)


def test_group_split_changes_no_sample() -> None:
    parts = [draw(make_levels(), make_keys(part)) for part in (range(0, 1), range(1, G))]
    joined = jax.tree.map(lambda *x: np.concatenate(x, axis=2), *parts)
    assert_same_samples(joined, usual())


def test_batch_split_and_shared_ancestors_change_no_sample() -> None:
    guide, question = make_levels()
    _, above = decode.prefill(GRAPH, PARAMS, (guide,))
    part = (Level(question.tokens[:, 1:], question.length[:, 1:]),)
    found = draw(part, make_keys()[:, 1:], ancestors=above)
    assert_same_samples(found, jax.tree.map(lambda x: x[:, 1:], usual()))


def test_questions_without_a_guide() -> None:
    _, question = make_levels()
    alone = Level(question.tokens[0], question.length[0])
    found = draw((alone,), make_keys()[0])
    # The first guide is empty, so its questions are what they are without one.
    assert_same_samples(found, jax.tree.map(lambda x: x[0], usual()))


def test_a_question_of_length_0_has_no_completions() -> None:
    guide, question = make_levels()
    question.length[1, 2] = 0
    rollout = draw((guide, question), make_keys())
    assert (rollout.length[1, 2] == 0).all() and not rollout.truncated[1, 2].any()
    assert (rollout.tokens[1, 2] == PAD).all() and (rollout.logp[1, 2] == 0).all()
    others = np.ones((N, P), bool)
    others[1, 2] = False
    np.testing.assert_array_equal(rollout.tokens[others], usual().tokens[others])


def test_greedy_is_an_argmax_loop() -> None:
    levels = make_levels()
    rollout = draw(levels, make_keys(range(1)), settings=SamplingSettings(temperature=0.0))
    params = flat_qwen.parameters(MODEL)
    with jax.enable_x64(True):
        logits = jax.jit(lambda tokens_T: flat_qwen.logits(params, MODEL.config, tokens_T[None])[0])
        for n, p in np.ndindex(N, P):
            row = [
                *levels[0].tokens[n, : levels[0].length[n]],
                *levels[1].tokens[n, p, : levels[1].length[n, p]],
            ]
            start = len(row)
            while len(row) - start < C and not (len(row) > start and row[-1] in STOPS):
                padded = np.array(row + [0] * (S + Q + C - len(row)))
                row.append(int(jnp.argmax(logits(padded)[len(row) - 1])))
            assert rollout.tokens[n, p, 0, : rollout.length[n, p, 0]].tolist() == row[start:]
    np.testing.assert_allclose(rollout.logp, flat_logp(levels, rollout), atol=1e-5)


@pytest.mark.parametrize("compaction", [1, 4])
@pytest.mark.parametrize("chunk", [1, 3])
def test_compaction_changes_no_sample(
    compaction: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished rows are dropped as often as can be, and the cache grows by twos."""
    rows: list[tuple[int, ...]] = []
    whole = decode.decode_chunk

    def counted(graph: object, params: object, state: DecodeState, *a: object, **k: object):
        rows.append((*state.done.shape, state.past.value[0].shape[-2]))
        return whole(graph, params, state, *a, **k)

    monkeypatch.setattr(decode, "decode_chunk", counted)
    monkeypatch.setattr(shapes, "NARROWEST", 8)
    found = draw(make_levels(), make_keys(), chunk=chunk, compaction=compaction)
    assert_same_samples(found, usual())
    counts = [math.prod(shape[1:3]) for shape in rows]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < counts[0] <= P * G
    assert set(counts) <= set(shapes.row_counts(P * G, steps=compaction))
    assert rows[0][-1] < rows[-1][-1] == shapes.slots(C - 1)


def test_compaction_without_trees_and_with_blank_questions() -> None:
    """Levels without an axis of trees, as a policy's `generate` has them."""
    question = random_level(np.random.default_rng(5), (P, Q))
    question.length[:] = 2, 0, 3
    keys = make_keys()[0]
    plain = draw((question,), keys)
    assert plain.length[1].sum() == 0 and not plain.truncated[1].any()
    assert_same_samples(draw((question,), keys, chunk=2, compaction=4), plain)


def test_decoding_ends_when_all_rows_are_done() -> None:
    seen: list[Progress] = []
    every = tuple(range(64))
    rollout = draw(make_levels(), make_keys(), stop_ids=every, on_chunk=seen.append)
    assert (rollout.length == 1).all()
    rows = N * P * G
    whole = Progress(tokens=1, limit=C, rows_done=rows, rows=rows, batch=rows, width=16)
    assert seen == [whole]


def test_on_chunk_sees_every_chunk() -> None:
    seen: list[Progress] = []
    draw(make_levels(), make_keys(), on_chunk=seen.append)
    assert [progress.tokens for progress in seen] == [6, 11, 12]
    assert seen[-1].rows == N * P * G
    assert seen[-1].rows_done == int((~usual().truncated).sum())


def test_on_chunk_may_end_the_rollout() -> None:
    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt(progress.tokens)

    with pytest.raises(KeyboardInterrupt, match="6"):
        draw(make_levels(), make_keys(), on_chunk=stop)


def test_nothing_is_compiled_twice(caplog: pytest.LogCaptureFixture) -> None:
    usual()
    moved = jax.tree.map(lambda x: x * 1.01, PARAMS)
    with jax.log_compiles(True), caplog.at_level(logging.DEBUG, logger="jax"):
        other = draw(make_levels(1), make_keys(step=7), params=moved)
        compiled = [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]
        assert compiled == []
        # The count is real: another limit is another program.
        draw(make_levels(1), make_keys(), limit=C - 1)
        compiled = [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]
    assert other.tokens.shape == usual().tokens.shape
    assert any("decode_chunk" in message for message in compiled)


def test_the_own_cache_is_updated_in_place() -> None:
    program = Program(settings=SamplingSettings(), stop_ids=STOPS, pad_id=PAD, limit=C, chunk=4)
    hidden, caches = decode.prefill(GRAPH, PARAMS, make_levels())
    keys = make_keys()
    state = decode.start_state(GRAPH, PARAMS, hidden, caches, keys, width=24, program=program)
    past = state.past.key[0]
    decode.decode_chunk(GRAPH, PARAMS, state, caches, program=program)
    assert past.is_deleted()


@pytest.mark.parametrize("compaction", [0, 1])
def test_a_mesh_changes_no_sample(compaction: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = sharding.make_mesh(data=1, fsdp=-1)
    questions = len(jax.devices())
    random = np.random.default_rng(3)
    levels = (random_level(random, (1, S)), random_level(random, (1, questions, Q), least=1))
    ids = example_ids("d", [str(i) for i in range(questions)])[None]
    keys = row_keys(0, Purpose.TRAIN, 1, ids, range(2))
    spread = jax.device_put(PARAMS, sharding.parameter_shardings(PARAMS, mesh))
    monkeypatch.setattr(shapes, "NARROWEST", 8)
    seen: list[Progress] = []
    found = generate(
        GRAPH,
        spread,
        levels,
        keys=keys,
        settings=SamplingSettings(),
        limit=C,
        stop_ids=STOPS,
        pad_id=PAD,
        chunk=2,
        compaction=compaction,
        on_chunk=seen.append,
        mesh=mesh,
    )
    # Two rows of each question; half of them is as few as the devices can share.
    assert {one.batch for one in seen} == (
        {2 * questions, questions} if compaction else {2 * questions}
    )
    assert len(found.tokens.sharding.device_set) == questions
    assert_same_samples(jax.device_get(found), draw(levels, keys))


def test_dropping_rows_leaves_heads_and_rows_on_their_devices() -> None:
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    random = np.random.default_rng(3)
    levels = (random_level(random, (1, S)), random_level(random, (1, 4, Q), least=1))
    ids = example_ids("d", [str(i) for i in range(4)])[None]
    keys = row_keys(0, Purpose.TRAIN, 1, ids, range(2))
    program = Program(
        settings=SamplingSettings(), stop_ids=STOPS, pad_id=PAD, limit=C, chunk=4, mesh=mesh
    )
    spread = jax.device_put(PARAMS, sharding.parameter_shardings(PARAMS, mesh))
    hidden, caches = decode.prefill(GRAPH, spread, levels, mesh=mesh)
    state = decode.start_state(GRAPH, spread, hidden, caches, keys, width=16, program=program)
    slots = np.array([[0, 3, 7, 8]], np.int32)
    state, question = compact(state, caches[-1], slots, program=program)
    for own in (*state.past.key, *state.recent.value):
        heads, _, rows, _, tokens, size = own.shape
        assert own.sharding.shard_shape(own.shape) == (heads // 2, 1, rows // 4, 1, tokens, size)
    layers, heads, _, rows, tokens, size = question.key.shape
    held = question.key.sharding.shard_shape(question.key.shape)
    assert held == (layers, heads // 2, 1, rows // 4, tokens, size)
    assert state.done.tolist()[0][3] == [True], "the last slot holds no row"


def test_bfloat16_decodes_what_bfloat16_scores() -> None:
    model = tiny_model(dtype="bfloat16")
    graph, params = nnx.split(model)
    rollout = generate(
        graph,
        params,
        make_levels(),
        keys=make_keys(),
        settings=SamplingSettings(),
        limit=C,
        stop_ids=STOPS,
        pad_id=PAD,
    )
    assert rollout.logp.dtype == jnp.float32
    expected = flat_logp(make_levels(), jax.device_get(rollout))
    np.testing.assert_allclose(rollout.logp, expected, atol=0.2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(limit=0), "limit is 0"),
        (dict(chunk=0), "chunk is 0"),
        (dict(compaction=-1), "compaction is -1"),
        (dict(stop_ids=()), "no stop token"),
    ],
)
def test_settings_without_meaning_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(make_levels(), make_keys(), **wrong)


def test_keys_of_other_questions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[2, 2, 4\] and the questions \[2, 3\]"):
        draw(make_levels(), make_keys()[:, :2])


def test_a_rollout_is_a_pytree() -> None:
    assert dataclasses.asdict(jax.tree.map(np.shape, usual()))["length"] == (N, P, G)
