"""How fast a device is, and how long a program should take on it."""

import dataclasses
from collections import Counter


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Attributes:
        clock: cycles.
        flops: of matrix products.
        bandwidth: bytes of its memory.
        links: bytes that arrive over its links, all together.
    """

    clock: float
    flops: float
    bandwidth: float
    links: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """How long a program should take, in seconds.

    Attributes:
        compute: of operations on the chip, kernels included.
        kernels: of Pallas kernels among it.
        waiting: for collectives and copies that nothing hides.
        uncosted: operations by kind that the compiler gives no cost for.
    """

    compute: float = 0.0
    kernels: float = 0.0
    waiting: float = 0.0
    uncosted: Counter[str] = dataclasses.field(default_factory=Counter)

    @property
    def seconds(self) -> float:
        """In all."""
        return self.compute + self.waiting

    def __add__(self, other: "Prediction") -> "Prediction":
        """One after the other."""
        return Prediction(
            compute=self.compute + other.compute,
            kernels=self.kernels + other.kernels,
            waiting=self.waiting + other.waiting,
            uncosted=self.uncosted + other.uncosted,
        )

    def times(self, count: float) -> "Prediction":
        """So many in a row; what is uncosted is listed once."""
        return Prediction(
            compute=self.compute * count,
            kernels=self.kernels * count,
            waiting=self.waiting * count,
            uncosted=self.uncosted,
        )
