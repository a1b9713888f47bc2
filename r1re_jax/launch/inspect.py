"""What a compiled program needs: memory, collectives, operations."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|called_computations)=\{?%?([\w.\-]+)")
_TRIPS = re.compile(r"known_trip_count[^0-9]*(\d+)")
_COLLECTIVE = re.compile(rf" ({'|'.join(COLLECTIVES)})(-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device.

    Attributes:
        arguments: of the program.
        temporaries: while it runs.
        outputs: that are no argument's buffer.
    """

    arguments: int
    temporaries: int
    outputs: int

    @property
    def peak(self) -> int:
        """All that the program holds."""
        return self.arguments + self.temporaries + self.outputs


def memory_of(compiled: jax.stages.Compiled) -> Memory:
    """Return the compiler's own count."""
    found = compiled.memory_analysis()
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    return Memory(found.argument_size_in_bytes, found.temp_size_in_bytes, outputs)


def collectives_of(text: str, *, rounds: int = 1) -> dict[str, dict[str, float]]:
    """Return how often each kind of collective runs, and the bytes of its results on a device.

    Args:
        text: of the compiled program.
        rounds: how often a loop's body runs whose trips the compiler does not know.
    """
    bodies, entry = _computations(text)
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            found = _COLLECTIVE.search(line)
            if found:
                count[found[1]] += times
                size[found[1]] += times * _result_bytes(line[: found.start()])
            trips = times
            if " while(" in line:
                known = _TRIPS.search(line)
                trips = times * (int(known[1]) if known else rounds)
            for called in _CALLED.findall(line):
                visit(called, trips)

    visit(entry, 1)
    return {
        kind: {"count": count[kind], "bytes": size[kind]} for kind in COLLECTIVES if count[kind]
    }


def matrix_flops(jaxpr: Any, *, rounds: int = 1) -> int:
    """Return the operations of all matrix products, loops counted as often as they run.

    Args:
        jaxpr: of the whole program, all devices together.
        rounds: how often the innermost bodies of while loops run in all.
    """
    once, looped = _flops(jaxpr)
    return once + rounds * looped


def _flops(jaxpr: Any) -> tuple[int, int]:
    """Return those outside of while loops, and of one round of the loops."""
    once = looped = 0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            once += 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_has_equations):
            if _has_equations(inner):
                outside, within = _flops(inner)
                if equation.primitive.name == "while":
                    looped += outside + within
                else:
                    once, looped = once + times * outside, looped + times * within
    return once, looped


def _has_equations(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def _computations(text: str) -> tuple[Mapping[str, list[str]], str]:
    """Return the lines of each computation of a compiled program's text, and the first's name."""
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif line.startswith("  ") and name:
            bodies[name].append(line)
    return bodies, entry


def _result_bytes(declaration: str) -> float:
    """Bytes of the largest array of what an operation returns: starts return their operand too."""
    sizes = [
        _BYTES.get(dtype, 0) * math.prod(int(size) for size in shape.split(",") if size)
        for dtype, shape in _ARRAY.findall(declaration.partition(" = ")[2])
    ]
    return max(sizes, default=0)
