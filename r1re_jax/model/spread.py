"""What computes attention, and how the devices of a mesh share it out."""

import dataclasses
import enum
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from r1re_jax import sharding
from r1re_jax.model import kernels as chip
from r1re_jax.model.int8 import Int8
from r1re_jax.model.parts import Part, above, rows


class Attention(enum.StrEnum):
    """What computes attention."""

    AUTO = "auto"  # kernels on TPUs where they take a part, else XLA
    XLA = "xla"
    KERNELS = "kernels"  # on other devices they are interpreted: slow, and for tests


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Computes parts by the kernels of `r1re_jax.model.kernels`.

    Attributes:
        interpret: run them on any device, slowly; head sizes may be any then.
    """

    interpret: bool = False

    def takes(self, shape: Sequence[int], part: Part) -> bool:
        """Whether a kernel computes a part for queries [K, *B, T, g, A]."""
        plain = not isinstance(part.key, Int8) and not isinstance(part.value, Int8)
        fits = shape[-1] % chip.LANES == 0 or self.interpret
        return plain and fits

    def forward(self, query_KBTgA: jax.Array, part: Part) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return what `_partial` does; the sum of weights is 1, and m their logarithm."""
        of, flat, length = self._flat(query_KBTgA, part)
        out, lse = chip.forward(flat(query_KBTgA), *rows(part), length, of)
        top = above(lse[..., None], query_KBTgA)
        return top, jnp.ones_like(top), above(out, query_KBTgA)

    def backward(
        self,
        query: jax.Array,
        cotangent: jax.Array,
        lse: jax.Array,
        delta: jax.Array,
        part: Part,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the gradients of a part's key and value, and of the queries."""
        of, flat, length = self._flat(query, part)
        arrays = *rows(part), length, flat(cotangent), flat(lse)[..., 0], flat(delta)[..., 0]
        by_key, by_value, by_query = chip.backward(flat(query), *arrays, of)
        by_key, by_value = by_key.reshape(part.key.shape), by_value.reshape(part.value.shape)
        return by_key, by_value, by_query.reshape(query.shape)

    def _flat(self, query: jax.Array, part: Part) -> tuple[chip.Shape, Any, jax.Array]:
        """Return the sizes, how queries become [K, B', M, X], and the lengths [B']."""
        heads, many = query.shape[0], math.prod(query.shape[1 : part.batch])
        of = chip.Shape(
            heads=heads,
            rows=many,
            queries=math.prod(query.shape[part.batch : -1]),
            slots=part.slots,
            size=query.shape[-1],
            group=query.shape[-2] if part.length is None else 0,
            interpret=self.interpret,
        )
        first = jnp.int32(0) if part.first is None else part.first
        length = jnp.broadcast_to(first, many) if part.length is None else part.length.reshape(many)
        return of, lambda x: x.reshape(heads, many, -1, x.shape[-1]), length


@dataclasses.dataclass(frozen=True)
class Spread:
    """Devices that share out attention, each computing its own by one program.

    Attributes:
        mesh: heads lie over `tensor`, questions over `data` and `fsdp`, positions of queries over
            `sequence`; every device has all keys that its queries see.
        kernels: what computes parts that they take; XLA computes the others.
    """

    mesh: Mesh
    kernels: Kernels | None = None

    @classmethod
    def on(cls, mesh: Mesh, way: Attention) -> "Spread | None":
        """Return how a mesh shares attention out; None where that is left to XLA."""
        is_tpu = mesh.devices.flat[0].platform == "tpu"
        by_xla = way is Attention.XLA or (way is Attention.AUTO and not is_tpu)
        if by_xla and mesh.shape["sequence"] == 1:
            return None
        return cls(mesh, None if by_xla else Kernels(interpret=not is_tpu))

    def suits(self, shape: Sequence[int], parts: Sequence[Part]) -> bool:
        """Whether queries [K, *B, T, g, A] share out evenly, and there is a reason to."""
        local, axis = list(shape), _questions(shape, parts)
        tensor, ways = self.mesh.shape["tensor"], sharding.question_ways(self.mesh)
        if local[0] % tensor or (axis is not None and local[1 + axis] % ways):
            return False
        if sharding.shares_positions(self.mesh, shape[-3]):
            return True
        local[0] //= tensor
        if axis is not None:
            local[1 + axis] //= ways
        return self.kernels is not None and any(self.kernels.takes(local, part) for part in parts)

    def __call__(self, function: Any, query: jax.Array, parts: tuple[Part, ...]) -> jax.Array:
        """Return `function(query, parts, kernels)` of queries [K, *B, T, g, A]."""
        axis, mesh = _questions(query.shape, parts), self.mesh

        def spec(x: jax.Array, batch: int, *, heads: bool, own: bool = False) -> PartitionSpec:
            """Of an array whose first dimensions are the heads, if it has them, and the batch."""
            names: list[str | None] = ["kv_heads"] * heads + [None] * (x.ndim - heads)
            if axis is not None and batch > axis:
                names[heads + axis] = "question"
            if own and sharding.shares_positions(mesh, x.shape[-3]):
                names[-3] = "position"
            return sharding.spec(tuple(names))

        def of_part(part: Part) -> Part:
            batch = part.batch - 1
            length = None if part.length is None else spec(part.length, batch, heads=False)
            keys = lambda x: spec(x, batch, heads=True)  # noqa: E731
            return Part(jax.tree.map(keys, part.key), jax.tree.map(keys, part.value), length)

        def mine(own: jax.Array, parts: tuple[Part, ...]) -> jax.Array:
            if own.shape[-3] < query.shape[-3]:
                first = jax.lax.axis_index("sequence") * own.shape[-3]
                parts = tuple(
                    dataclasses.replace(part, first=first) if part.length is None else part
                    for part in parts
                )
            return function(own, parts, self.kernels)

        where = spec(query, query.ndim - 4, heads=True, own=True)
        return jax.shard_map(
            mine,
            mesh=mesh,
            in_specs=(where, tuple(map(of_part, parts))),
            out_specs=where,
            check_vma=False,
        )(query, parts)


def _questions(shape: Sequence[int], parts: Sequence[Part]) -> int | None:
    """Return which batch dimension is that of the questions: the first below the guides.

    None at the guides' own level: every device has all of them.
    """
    guides = min(part.batch for part in parts) - 1
    return guides if guides < len(shape) - 4 else None
