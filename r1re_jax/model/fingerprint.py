"""A fingerprint of weights that covers every bit, and that is the same on every mesh."""

import functools
import hashlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

# Odd constants of MurmurHash3's finaliser and of the golden ratio, for two sums that differ.
_ROUNDS = ((0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35), (0x85EBCA77, 0xCC9E2D51, 0x1B873593))


def fingerprint(params: Mapping[str, jax.Array], *, dtype: str | jnp.dtype) -> str:
    """Return a SHA-256 over names, shapes and two checksums of each parameter's bits.

    A checksum adds up, modulo 2³², a mix of every number's bits with its place. Such sums do not
    depend on their order, hence not on how a parameter is spread over devices; each device reads
    its part once, where it lies.

    Args:
        params: dotted name -> array of a float type.
        dtype: type that numbers are rounded to first, so that it does not matter in which wider
            type they are held.
    """
    sums = jax.device_get(_checksums(dict(params), dtype=jnp.dtype(dtype)))
    digest = hashlib.sha256()
    for name in sorted(params):
        shape = tuple(map(int, params[name].shape))
        digest.update(f"{name}{shape}".encode() + np.asarray(sums[name], "<u4").tobytes())
    return digest.hexdigest()


@functools.partial(jax.jit, static_argnames="dtype")
def _checksums(params: dict[str, jax.Array], *, dtype: jnp.dtype) -> dict[str, jax.Array]:
    """Return name -> uint32 [2]."""
    return {name: _checksum(value, dtype) for name, value in params.items()}


def _checksum(value: jax.Array, dtype: jnp.dtype) -> jax.Array:
    kind = jnp.finfo(dtype)
    # Not by a cast there and back, which the compiler may leave out.
    rounded = jax.lax.reduce_precision(value.astype(jnp.float32), kind.nexp, kind.nmant)
    bits = jax.lax.bitcast_convert_type(rounded, jnp.uint32)
    place = jnp.zeros(value.shape, jnp.uint32)
    for axis, size in enumerate(value.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, value.shape, axis)
    return jnp.stack([jnp.sum(_mixed(bits, place, one), dtype=jnp.uint32) for one in _ROUNDS])


def _mixed(bits: jax.Array, place: jax.Array, constants: tuple[int, int, int]) -> jax.Array:
    """Spread a change of any bit, or of the place, over the whole word (as MurmurHash3 does)."""
    first, second, third = map(np.uint32, constants)
    word = (bits ^ (place * first)) * second
    word = (word ^ (word >> np.uint32(13))) * third
    return word ^ (word >> np.uint32(16))
