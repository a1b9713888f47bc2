import hashlib
import itertools

import jax
import numpy as np
import pytest

from r1re_jax.rollout.keys import Purpose, example_id, example_ids, row_keys, token_keys


def data(keys: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(keys))


def test_example_id_is_the_head_of_sha256() -> None:
    digest = hashlib.sha256(b"semeval/42").digest()
    high, low = (int(word) for word in example_id("semeval", "42"))
    assert (high << 32) | low == int.from_bytes(digest[:8], "big")
    assert example_ids("d", []).shape == (0, 2)
    assert (example_ids("d", ["a", "b"])[1] == example_id("d", "b")).all()


def test_a_key_is_a_chain_of_fold_ins() -> None:
    ids = example_ids("d", ["a"])
    key = jax.random.key(5)
    for word in (2, 9, *ids[0], 3):
        key = jax.random.fold_in(key, word)
    assert (data(row_keys(5, Purpose.EVALUATE, 9, ids, [3])[0, 0]) == data(key)).all()
    token = token_keys(row_keys(5, Purpose.EVALUATE, 9, ids, [3]), 7)
    assert (data(token[0, 0]) == data(jax.random.fold_in(key, 7))).all()


def test_keys_follow_what_a_row_is_and_not_where_it_stands() -> None:
    ids = example_ids("d", [str(i) for i in range(6)]).reshape(2, 3, 2)
    whole = data(row_keys(0, Purpose.TRAIN, 1, ids, range(4)))
    assert whole.shape[:3] == (2, 3, 4)
    turned = data(row_keys(0, Purpose.TRAIN, 1, ids[::-1, ::-1], range(4)))
    assert (turned[::-1, ::-1] == whole).all()
    later = data(row_keys(0, Purpose.TRAIN, 1, ids[1, 2], [2, 3]))
    assert (later == whole[1, 2, 2:]).all()


def test_every_part_of_a_key_matters() -> None:
    ids = example_ids("d", ["a", "b"])
    swapped = ids[:1, ::-1].copy()
    rows = [
        row_keys(seed, purpose, step, some, range(3))
        for seed, purpose, step in itertools.product((0, 1), Purpose, (0, 1))
        for some in (ids, swapped)
    ]
    tokens = [data(token_keys(keys, token)) for keys in rows for token in range(3)]
    flat = np.concatenate([array.reshape(-1, array.shape[-1]) for array in tokens])
    assert len(np.unique(flat, axis=0)) == len(flat) == 2 * len(Purpose) * 2 * 3 * 3 * 3


def test_large_numbers_keep_all_their_bits() -> None:
    ids = example_ids("d", ["a"])
    keys = [
        data(row_keys(seed, Purpose.TRAIN, step, ids, [0]))
        for seed, step in ((0, 0), (2**31, 0), (2**32 - 1, 0), (0, 2**32 - 1))
    ]
    assert len({array.tobytes() for array in keys}) == 4


def test_numbers_over_32_bits_are_refused() -> None:
    ids = example_ids("d", ["a"])
    with pytest.raises(ValueError, match="seed is 4294967296"):
        row_keys(2**32, Purpose.TRAIN, 0, ids, [0])
    with pytest.raises(ValueError, match="step is -1"):
        row_keys(0, Purpose.TRAIN, -1, ids, [0])
    with pytest.raises(ValueError, match="sample index is -2"):
        row_keys(0, Purpose.TRAIN, 0, ids, [-2])


def test_ids_of_another_form_are_refused() -> None:
    with pytest.raises(ValueError, match="int64"):
        row_keys(0, Purpose.TRAIN, 0, np.zeros((1, 2), np.int64), [0])
    with pytest.raises(ValueError, match=r"uint32\[3\]"):
        row_keys(0, Purpose.TRAIN, 0, np.zeros(3, np.uint32), [0])
