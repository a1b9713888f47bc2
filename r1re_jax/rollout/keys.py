"""Random keys of tokens: pure functions of what a token is, not of how it was computed.

The key of a token depends on (purpose, seed, step, example id, sample index, token index) alone:
not on its place in the batch, on how a group was split, on which rows are done, or on restarts.
"""

import enum
import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


class Purpose(enum.StrEnum):
    """What completions are drawn for; each has randomness of its own."""

    TRAIN = "train"
    EVALUATE = "evaluate"
    GENERATE = "generate"
    PARITY = "parity"


# Written out, since these numbers are part of every key: a new purpose takes a new number.
_TAGS = {Purpose.TRAIN: 1, Purpose.EVALUATE: 2, Purpose.GENERATE: 3, Purpose.PARITY: 4}


def example_id(dataset: str, example: str) -> np.ndarray:
    """Return the 64-bit id of an example: the first 8 bytes of SHA-256 of "dataset/id".

    Returns:
        [2] uint32, high word first.
    """
    digest = hashlib.sha256(f"{dataset}/{example}".encode()).digest()
    return np.frombuffer(digest[:8], ">u4").astype(np.uint32)


def example_ids(dataset: str, examples: Sequence[str]) -> np.ndarray:
    """Return [len(examples), 2] uint32, the `example_id` of each."""
    return np.array([example_id(dataset, example) for example in examples], np.uint32).reshape(
        -1, 2
    )


def row_keys(
    seed: int, purpose: Purpose, step: int, example_ids: np.ndarray, samples: Sequence[int]
) -> jax.Array:
    """Return the key of every completion; `token_keys` makes the keys of its tokens.

    Args:
        seed: 0 … 2³²−1.
        purpose: what the completions are for.
        step: training step, or the step of the weights that are evaluated.
        example_ids: [*B, 2] uint32, one id per question.
        samples: G sample indices: `range(G)`, or a part of it where a group is drawn in pieces.

    Returns:
        Typed keys [*B, G].

    Raises:
        ValueError: a number that does not fit 32 bits, or ids of another form.
    """
    example_ids = np.asarray(example_ids)
    if example_ids.dtype != np.uint32 or example_ids.shape[-1:] != (2,):
        raise ValueError(
            f"example ids are {example_ids.dtype}{list(example_ids.shape)};"
            " expected uint32[..., 2] from example_ids()"
        )
    head = np.array([_TAGS[Purpose(purpose)], _word(step, "step")], np.uint32)
    indices = np.array([_word(index, "sample index") for index in samples], np.uint32)
    return _row_keys(np.uint32(_word(seed, "seed")), head, example_ids, indices)


def token_keys(row_keys: jax.Array, token: jax.Array) -> jax.Array:
    """Return the keys [*B] of token number `token` (scalar) of every row, from typed keys [*B]."""
    flat = jax.vmap(jax.random.fold_in, in_axes=(0, None))(row_keys.reshape(-1), token)
    return flat.reshape(row_keys.shape)


@jax.jit
def _row_keys(seed: jax.Array, head: jax.Array, ids: jax.Array, samples: jax.Array) -> jax.Array:
    shape = (*ids.shape[:-1], samples.shape[0])
    words = [*(jnp.broadcast_to(word, shape) for word in head)]
    words += [jnp.broadcast_to(ids[..., word, None], shape) for word in (0, 1)]
    words.append(jnp.broadcast_to(samples, shape))
    fold = jax.vmap(jax.random.fold_in)
    keys = jnp.broadcast_to(jax.random.key(seed), (samples.size * (ids.size // 2),))
    for word in words:
        keys = fold(keys, word.reshape(-1))
    return keys.reshape(shape)


def _word(number: int, name: str) -> int:
    if not 0 <= number < 2**32:
        raise ValueError(f"{name} is {number}; it must be at least 0 and below 2**32")
    return int(number)
