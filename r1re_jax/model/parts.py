"""What attention attends to: a level's keys and values, and its queries laid below them."""

import dataclasses

import jax

from r1re_jax.model.int8 import Int8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """Keys and values of one level as seen by the queries.

    Attributes:
        key: [K, *B', A, S], B' a prefix of the queries' batch dimensions B; slots last, as their
            product with a few queries reads them. Int8 ones have a scale for each slot, and no
            gradient.
        value: [K, *B', S, A].
        length: [*B'] int32, the keys that all queries below a row see: its first so many. None for
            the queries' own row (B' = B), of which each sees those up to itself. What is
            hidden has weight 0 exactly, but must be finite (0 · NaN is NaN): padding is computed
            from real embeddings, so it is.
        first: int32 scalar, where in their own row the queries begin; None at its beginning.
    """

    key: jax.Array | Int8
    value: jax.Array | Int8
    length: jax.Array | None = None
    first: jax.Array | None = None

    @property
    def batch(self) -> int:
        """Leading dimensions that queries and keys share: the heads, and B'."""
        return self.key.ndim - 2

    @property
    def slots(self) -> int:
        """S, keys of a row."""
        return self.key.shape[-1]


def below(x_KBtgX: jax.Array, part: Part) -> jax.Array:
    """Lay what lies below each of a part's rows side by side: [K, *B', M, X]."""
    return x_KBtgX.reshape(*part.key.shape[: part.batch], -1, x_KBtgX.shape[-1])


def above(x_KbMX: jax.Array, query_KBtgA: jax.Array) -> jax.Array:
    """The inverse of `below`: [K, *B, t, g, X]."""
    return x_KbMX.reshape(*query_KBtgA.shape[:-1], x_KbMX.shape[-1])


def rows(part: Part) -> tuple[jax.Array, jax.Array]:
    """Return keys and values with their batch dimensions in one, [K, B', ...]."""
    flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[-2:])  # noqa: E731
    return flat(part.key), flat(part.value)
