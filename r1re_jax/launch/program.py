"""A compiled program's text: its computations, loops and collectives, and how long it should take.

Times are *predicted*, from what the TPU compiler writes beside its operations:

- An operation takes its `estimated_cycles` at the chip's clock.
- A Pallas kernel takes max(FLOPs / peak, bytes / bandwidth) / 0.6 of what its call states.
- A collective takes its bytes over the chip's links, one after the other; an asynchronous one goes
  on beside what stands between its own start and done, and nothing else.
- A copy between memories takes its bytes over the memory's bandwidth, likewise.
- An operation without a cost takes its result's bytes over the bandwidth, and is listed.
- A loop takes as many rounds as the compiler knows, or as its caller says.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from r1re_jax.launch.prediction import Prediction, Rates

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Share of its roofline that a Pallas kernel is expected to reach.
KERNEL_SHARE = 0.6
# What moves no data, or is part of what does.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast partition-id replica-id after-all iota"
    " opt-barrier domain call conditional while".split()
)
_BYTES: Mapping[str, float] = {
    **dict.fromkeys(("s4", "u4"), 0.5),
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("s16", "u16", "bf16", "f16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64"), 8),
}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)")
_BODY = re.compile(r"body=%?([\w.\-]+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_INDEX = re.compile(r"index=(\d+)")
_BRANCHES = re.compile(
    r"(?:to_apply=|branch_computations=\{|true_computation=|false_computation=)%?([\w.\-]+)"
)
_TRIPS = re.compile(r"known_trip_count[^0-9]*(\d+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_COST = re.compile(r'"cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_OPERAND = re.compile(r"^%?([\w.\-]+)")
_GROUPS = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_GROUP_SHAPE = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_GROUP_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
# Memory space 1 is on the chip; 6 and others are registers.
_ON_CHIP = re.compile(r"S\(\d+\)")


@dataclasses.dataclass(frozen=True)
class Operation:
    """A line of a computation.

    Attributes:
        name: of its result.
        kind: such as `fusion`.
        result: the type it returns.
        text: the whole line.
    """

    name: str
    kind: str
    result: str
    text: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective as one device sees it.

    Attributes:
        kind: one of COLLECTIVES.
        result: bytes of its result.
        moved: bytes that arrive.
    """

    kind: str
    result: float
    moved: float


@dataclasses.dataclass(frozen=True)
class Text:
    """A program's computations by name, and the one that is entered."""

    computations: Mapping[str, Sequence[Operation]]
    entry: str

    @classmethod
    def of(cls, text: str) -> "Text":
        """Read the text of a compiled program."""
        found: dict[str, list[Operation]] = {}
        name = entry = ""
        for line in text.splitlines():
            head = _HEAD.match(line)
            if head:
                name = head[2]
                found[name] = []
                entry = name if head[1] else entry
                continue
            parts = _LINE.match(line)
            if parts and name:
                found[name].append(Operation(parts[1], parts[3], parts[2], line))
        return cls(found, entry)

    def collectives(self, *, rounds: Sequence[int] = ()) -> dict[str, dict[str, float]]:
        """Return how often each kind runs, the bytes of all its results on a device, the largest's.

        Args:
            rounds: of loops whose rounds the compiler does not know, the outermost first.
        """
        count: Counter[str] = Counter()
        size: Counter[str] = Counter()
        largest: Counter[str] = Counter()
        for body, times in self.bodies(self.entry, 1, rounds):
            for found in self._of_body(body).values():
                count[found.kind] += times
                size[found.kind] += times * found.result
                largest[found.kind] = max(largest[found.kind], found.result)
        kinds = (kind for kind in COLLECTIVES if count[kind])
        return {
            kind: {"count": count[kind], "bytes": size[kind], "largest": largest[kind]}
            for kind in kinds
        }

    def predicted(self, rates: Rates, *, rounds: Sequence[int] = ()) -> "Prediction":
        """Return how long the program should take on a device."""
        total = Prediction()
        for body, times in self.bodies(self.entry, 1, rounds):
            total += self._time(body, rates).times(times)
        return total

    def bodies(self, name: str, times: int, rounds: Sequence[int]) -> Iterator[tuple[str, int]]:
        """Yield what runs as a sequence of operations, and how often."""
        yield name, times
        for operation in self.computations.get(name, ()):
            if operation.kind == "while":
                trips, body = self._trips(operation), _BODY.search(operation.text)
                known = trips is not None
                often = trips if known else next(iter(rounds), 1)
                inner = rounds if known else rounds[1:]
                if body:
                    yield from self.bodies(body[1], times * often, inner)
            elif operation.kind in ("call", "conditional"):
                for branch in _BRANCHES.findall(operation.text):
                    yield from self.bodies(branch, times, rounds)

    def _trips(self, loop: Operation) -> int | None:
        """Return how often a loop runs; None where only the run knows.

        The compiler says so, or the condition compares a counter that begins at 0 with a constant.
        """
        said = _TRIPS.search(loop.text)
        if said:
            return int(said[1])
        condition = self.computations.get(_CONDITION.search(loop.text)[1], ())
        test = next((one for one in condition if "ROOT" in one.text), None)
        if test is None or test.kind != "compare" or "direction=LT" not in test.text:
            return None
        counter, bound = (_named(condition, name) for name in _operands(test)[:2])
        if counter is None or bound is None or bound.kind != "constant":
            return None
        place = _INDEX.search(counter.text)
        step = self._step(_BODY.search(loop.text)[1], int(place[1])) if place else 1
        return -(-_constant(bound) // step)

    def _step(self, body: str, place: int) -> int:
        """Return what a loop adds to its counter, an element of the tuple that it carries."""
        operations = self.computations.get(body, ())
        root = next(one for one in operations if "ROOT" in one.text)
        operands = _operands(root)
        added = _named(operations, operands[place]) if place < len(operands) else None
        for name in _operands(added) if added is not None and added.kind == "add" else ():
            of = _named(operations, name)
            if of is not None and of.kind == "constant":
                return max(_constant(of), 1)
        return 1

    def _of_body(self, body: str) -> dict[str, Collective]:
        """Return the collectives of a body once each, by channel: parts of one share it."""
        return {
            channel: collective
            for operation in self.computations.get(body, ())
            for channel, collective in self._within(operation)
        }

    def _within(self, operation: Operation) -> Iterator[tuple[str, Collective]]:
        """Yield the collectives that an operation is, or that are fused into it."""
        kind = operation.kind.removesuffix("-start")
        if kind in COLLECTIVES:
            channel = _CHANNEL.search(operation.text)
            yield (channel[1] if channel else operation.name), _collective(kind, operation)
        elif operation.kind in ("fusion", "async-start", "custom-call"):
            for called in _CALLED.findall(operation.text):
                for inner in self.computations.get(called, ()):
                    yield from self._within(inner)

    def _written(self, operation: Operation, results: Mapping[str, str]) -> float:
        """Return the bytes that an operation writes to the device's memory."""
        result = operation.result
        if operation.kind == "dynamic-update-slice":  # in place: what is put, and not all of it
            result = results.get(_operands(operation)[1], result)
        return sum(_sizes(result, on_chip=False))

    def _time(self, body: str, rates: Rates) -> "Prediction":
        """Run a body's operations in order: compute, links and memory each at one thing a time."""
        operations = self.computations.get(body, ())
        ends_at: dict[str, int] = {}  # channel -> the last operation that is part of it
        for place, operation in enumerate(operations):
            for channel, _ in self._within(operation):
                ends_at[channel] = place
            if operation.kind.endswith("-done"):
                ends_at[_OPERAND.match(operation.text.partition("-done(")[2])[1]] = place
        timeline, begun = _Timeline(), set[str]()
        results = {operation.name: operation.result for operation in operations}
        for place, operation in enumerate(operations):
            for channel, collective in self._within(operation):
                done = channel
                if operation.kind.endswith("-start") and operation.name in ends_at:
                    done = operation.name
                if channel not in begun:
                    begun.add(channel)
                    timeline.begin("links", done, collective.moved / rates.links)
            timeline.work(operation, rates, written=self._written(operation, results))
            for name in [name for name in timeline.pending if ends_at.get(name, place) <= place]:
                timeline.wait(name)
        for name in list(timeline.pending):
            timeline.wait(name)
        return timeline.result


class _Timeline:
    """A body while it runs: `now`, when each resource is free again, and what is awaited."""

    def __init__(self) -> None:
        self.now = 0.0
        self.free = {"links": 0.0, "memory": 0.0}
        self.pending: dict[str, float] = {}
        self.result = Prediction()

    def begin(self, resource: str, name: str, seconds: float) -> None:
        """Start what ends when the resource has done all before it, and this."""
        self.free[resource] = max(self.now, self.free[resource]) + seconds
        self.pending[name] = self.free[resource]

    def wait(self, name: str) -> None:
        """Stand still until something that was begun has ended."""
        late = max(0.0, self.pending.pop(name) - self.now)
        self.now += late
        self.result += Prediction(waiting=late)

    def work(self, operation: Operation, rates: Rates, *, written: float) -> None:
        """Do an operation that is not a collective, or begin a copy.

        Args:
            operation: to do.
            rates: of the device.
            written: bytes of its result, of what is in the device's memory.
        """
        text, kind = operation.text, operation.kind
        cycles, cost = _CYCLES.search(text), _COST.search(text)
        if cycles:
            found = Prediction(compute=int(cycles[1]) / rates.clock)
        elif cost and "tpu_custom_call" in text:
            flops, moved = int(cost[1]) / rates.flops, int(cost[2]) / rates.bandwidth
            seconds = max(flops, moved) / KERNEL_SHARE
            found = Prediction(compute=seconds, kernels=seconds)
        elif kind in ("copy-start", "slice-start", "dynamic-slice-start", "async-start"):
            moved = max(_sizes(operation.result), default=0.0)
            self.begin("memory", operation.name, moved / rates.bandwidth)
            return
        elif kind.endswith(("-start", "-done")) or kind in (*_FREE, *COLLECTIVES):
            return
        elif 'custom_call_target="AllocateBuffer"' in text or _is_async_part(operation):
            return
        else:
            if not written:  # numbers in registers, or in the chip's own memory
                return
            seconds = written / rates.bandwidth
            found = Prediction(compute=seconds, uncosted=Counter([_name(operation)]))
        self.now += found.compute
        self.result += found


def _named(operations: Sequence[Operation], name: str) -> Operation | None:
    return next((one for one in operations if one.name == name), None)


def _operands(operation: Operation) -> list[str]:
    """Return the names of an operation's operands."""
    inside = operation.text.partition(f" {operation.kind}(")[2]
    return re.findall(r"%([\w.\-]+)", inside.partition(")")[0])


def _constant(operation: Operation) -> int:
    return int(re.search(r"constant\((-?\d+)\)", operation.text)[1])


def _is_async_part(operation: Operation) -> bool:
    """Whether it only begins or ends a collective that other operations are fused with."""
    return operation.name.startswith("async-collective-") or "AsyncCollective" in operation.text


def _name(operation: Operation) -> str:
    target = re.search(r'custom_call_target="([^"]*)"', operation.text)
    return f"{operation.kind} {target[1]}" if target else operation.kind


def _collective(kind: str, operation: Operation) -> Collective:
    """Read a collective; of n devices each receives (n − 1) / n of what the kind moves."""
    result = max(_sizes(operation.result), default=0.0)
    devices = _group_size(operation.text)
    others = (devices - 1) / devices if devices else 1.0
    moved = {
        "all-gather": result * others,
        "all-reduce": 2 * result * others,  # a reduce-scatter and an all-gather
        "reduce-scatter": result * (devices - 1 if devices else 1),
        "all-to-all": result * others,
        "collective-permute": result,
    }[kind]
    return Collective(kind, result, moved)


def _group_size(text: str) -> int:
    """Return how many devices take part; 0 where the text does not say."""
    listed = _GROUPS.search(text)
    if listed:
        return len(listed[1].split(","))
    shape = _GROUP_SHAPE.search(text)
    if shape:
        return int(shape[2])
    mesh = _GROUP_MESH.search(text)
    if not mesh:
        return 0
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]) if axis in sizes)


def _sizes(result: str, *, on_chip: bool = True) -> list[float]:
    """Return the bytes of each array of a result; those in the chip's own memory too, or not.

    Scalars are in registers.
    """
    return [
        _BYTES.get(dtype, 0) * math.prod(int(size) for size in shape.split(",") if size)
        for dtype, shape, layout in _ARRAY.findall(result)
        if on_chip or not (_ON_CHIP.search(layout) or shape == "")
    ]
