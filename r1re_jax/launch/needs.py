"""What a compiled program needs: memory, operations, collectives, and the time it should take."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from r1re_jax.launch.prediction import Prediction, Rates
from r1re_jax.launch.program import Text
from r1re_jax.launch.topology import GIB, Slice
from r1re_jax.rollout.ahead import Ahead
from r1re_jax.sharding import HOST

# "Used 27.11G of 15.75G", "memory required for HLO temporaries (1.00T) exceeds": what is too much.
_NAMED = re.compile(r"(?:Used |required[^(]*\()([\d.]+)([KMGT])")
_GIB_OF = {"K": 2.0**-20, "M": 2.0**-10, "G": 1.0, "T": 1024.0}


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
        """All that the program holds: the runtime sets aside each kind for as long as it runs."""
        return self.arguments + self.temporaries + self.outputs


def memory_of(compiled: jax.stages.Compiled) -> Memory:
    """Return the compiler's own count."""
    found = compiled.memory_analysis()
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    return Memory(found.argument_size_in_bytes, found.temp_size_in_bytes, outputs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a program needs on each device.

    Attributes:
        name: of the program.
        memory: its own.
        resident: bytes of all else that is alive then: optimizer state, policies, caches.
        flops: of its matrix products, all devices together.
        collectives: kind -> count and bytes.
        predicted: how long it takes; None where the devices are not known.
        steps: tokens that a decoding program draws of each row; 0 of others.
        mfu: predicted, of the update: what it must compute over what the devices could.
        bandwidth_use: predicted, of decoding: its arguments, read once a token, over what the
            memory could deliver.
    """

    name: str
    memory: Memory
    resident: int
    flops: int
    collectives: Mapping[str, Mapping[str, float]]
    predicted: Prediction | None = None
    steps: int = 0
    mfu: float | None = None
    bandwidth_use: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Return it for people."""
        gib = lambda size: round(size / GIB, 3)  # noqa: E731
        found = {
            "name": self.name,
            "peak_gib": gib(self.memory.peak),
            "resident_gib": gib(self.resident),
            "arguments_gib": gib(self.memory.arguments),
            "temporaries_gib": gib(self.memory.temporaries),
            "flops": self.flops,
            "collectives": {
                kind: {
                    "count": of["count"],
                    "gib": gib(of["bytes"]),
                    "largest_bytes": int(of["largest"]),
                }
                for kind, of in self.collectives.items()
            },
            "predicted_seconds": None,
            "predicted_mfu": None if self.mfu is None else round(self.mfu, 3),
        }
        if self.predicted is not None:
            time = self.predicted
            found |= {
                "predicted_seconds": float(f"{time.seconds:.4g}"),
                "predicted_waiting": float(f"{time.waiting:.4g}"),
                "predicted_kernels": float(f"{time.kernels:.4g}"),
                "uncosted": dict(time.uncosted),
            }
        if self.predicted is not None and self.steps:
            found["predicted_seconds_per_token"] = float(
                f"{self.predicted.seconds / self.steps:.4g}"
            )
            found["predicted_bandwidth_use"] = round(self.bandwidth_use, 3)
        return found


def inspect(ahead: Ahead, *, beside: Any, rates: Rates | None) -> Report:
    """Return what a compiled program needs.

    Args:
        ahead: the program.
        beside: shapes of all else that is alive while it runs.
        rates: of a device; None where they are not known.
    """
    text, memory = Text.of(ahead.compiled.as_text()), memory_of(ahead.compiled)
    predicted = None if rates is None else text.predicted(rates, rounds=ahead.rounds)
    steps, use = math.prod(ahead.rounds) if ahead.rounds else 0, None
    if predicted is not None and steps:
        use = memory.arguments / rates.bandwidth / (predicted.seconds / steps)
    return Report(
        name=ahead.name,
        memory=memory,
        resident=shape_bytes(beside),
        flops=matrix_flops(ahead.jaxpr, rounds=ahead.rounds),
        collectives=text.collectives(rounds=ahead.rounds),
        predicted=predicted,
        steps=steps,
        bandwidth_use=use,
    )


def matrix_flops(jaxpr: Any, *, rounds: Sequence[int] = ()) -> int:
    """Return the operations of all matrix products, loops counted as often as they run.

    Args:
        jaxpr: of the whole program, all devices together.
        rounds: of loops whose rounds are not known, the outermost first; products stand in the
            innermost such loop.
    """
    once, looped = _flops(jaxpr)
    return once + math.prod(rounds) * looped


def _flops(jaxpr: Any) -> tuple[int, int]:
    """Return those outside of while loops, and of one round of the loops."""
    once = looped = 0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            once += 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
            continue
        if name == "pallas_call":  # what its grid does in all, as the call states it
            once += equation.params["cost_estimate"].flops
            continue
        times = equation.params["length"] if name == "scan" else 1
        if name == "shard_map":  # what stands in it, every device does
            times = equation.params["mesh"].size
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_has_equations):
            if _has_equations(inner):
                outside, within = _flops(inner)
                if name == "while":
                    looped += outside + within
                else:
                    once, looped = once + times * outside, looped + times * within
    return once, looped


def _has_equations(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def shape_bytes(tree: Any) -> int:
    """Return the bytes of shapes on each device; what lies in the host's memory is none."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if x.sharding is None or x.sharding.memory_kind != HOST
    )


def summary(
    reports: Sequence[Report],
    where: Slice | None,
    *,
    devices: int,
    refused: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return all programs' needs as a JSON object; `fits` is None where the memory is unknown.

    Args:
        reports: of the programs that were compiled.
        where: the slice; None for the devices that are here.
        devices: how many there are.
        refused: of a program that the compiler refused, see `refused`.
    """
    peak = max((report.memory.peak + report.resident for report in reports), default=0) / GIB
    if refused is not None:
        peak = max(peak, refused["gib"] or 0)
    fits = None
    if where is not None:
        fits = refused is None and peak <= where.chip.usable_gib
    known: dict[str, Any] = {}
    if where is not None:  # a device's share, as all that stands beside it
        hbm = int(where.chip.hbm_gib * where.share)
        known = {"chips": where.chips, "hbm_gib_per_chip": hbm}
    return {
        "fits": fits,
        "devices": devices,
        **known,
        "peak_gib_per_chip": round(peak, 3),
        **({} if refused is None else {"refused": refused}),
        "programs": [report.as_json() for report in reports],
    }


def refused(error: Exception) -> dict[str, Any] | None:
    """Return what a compiler says that refuses a program for its memory; None of other errors."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    found = _NAMED.search(text)
    gib = float(found[1]) * _GIB_OF[found[2]] if found else None
    (program,) = getattr(error, "__notes__", [None])
    return {"program": program, "gib": gib, "says": text.splitlines()[0]}


def advice(result: Mapping[str, Any], where: Slice) -> str:
    """Say which program is too big for a slice, and what would make it smaller."""
    if "refused" in result:
        program, gib = result["refused"]["program"], result["refused"]["gib"]
    else:
        of = max(result["programs"], key=lambda one: one["peak_gib"] + one["resident_gib"])
        program, gib = of["name"], of["peak_gib"] + of["resident_gib"]
    known = "more" if gib is None else f"{gib:.2f} GiB"
    what = next(change for names, change in _SMALLER if (program or "").startswith(names))
    return (
        f"{program} needs {known} of a device, which has {where.chip.usable_gib} GiB. Try {what},"
        " or a larger slice"
    )


# What a program's memory depends on most, by its name.
_SMALLER = (
    (("update", "sft_", "add"), "half of micro_batch or micro_group, or model.remat=layer"),
    (("reference",), "half of grpo.micro_batch or grpo.micro_group"),
    (
        ("decode", "start", "grow", "compact", "rows"),
        "a shorter limits.completion, a smaller grpo.group, or grpo.quantise.cache=int8",
    ),
    (("evaluate",), "a smaller evaluate.batch"),
    (("",), "a larger mesh.fsdp, or first_moment=bfloat16"),
)


def shown(report: Report) -> str:
    """Return a line for people."""
    gathered = " ".join(f"{kind} {of['count']}" for kind, of in report.collectives.items())
    memory, beside = report.memory.peak / GIB, report.resident / GIB
    time = "" if report.predicted is None else f" predicted {report.predicted.seconds:9.4f} s "
    mfu = "" if report.mfu is None else f" MFU {100 * report.mfu:.0f} % "
    return (
        f"{report.name:24} {memory:8.3f} GiB and {beside:8.3f} beside it,"
        f" {report.flops / 1e12:10.3f} TFLOP {time}{mfu} {gathered}"
    )
