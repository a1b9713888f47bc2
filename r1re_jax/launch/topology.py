"""TPU slices that need not be here: their devices as the TPU compiler knows them."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from r1re_jax.launch.prediction import Rates
from r1re_jax.model.peaks import peak_of

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip of a generation has.

    Attributes:
        hbm_gib: memory that its maker states.
        usable_gib: what the compiler lets a program have on a device; v4 and tpu7x show two devices
            a chip.
        clock: cycles a second of a device: what makes its peak of the cycles of a large product.
        links: bytes a second that can arrive at a chip over all its links.
        examples: topologies that exist, smallest first.
        devices: how many a chip is where programs run: what `PEAKS` counts by.
    """

    hbm_gib: float
    usable_gib: float
    clock: float
    links: float
    examples: tuple[str, ...]
    devices: int = 1


# Google Cloud documentation, "HBM capacity per chip" at cloud.google.com/tpu/docs/NAME;
# "Interchip Interconnect BW per chip" there, in bytes; usable: what libtpu 0.0.42.1 says
# is available where a program is refused.
CHIPS = {
    "v4": Chip(32, 15.25, 1.05e9, 300e9, ("v4:2x2x1", "v4:2x2x2", "v4:2x2x4", "v4:4x4x4")),
    "v5e": Chip(16, 15.75, 1.5e9, 200e9, ("v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8")),
    "v5p": Chip(95, 95.74, 1.75e9, 600e9, ("v5p:2x2x1", "v5p:2x2x2", "v5p:2x2x4", "v5p:4x4x4")),
    "v6e": Chip(32, 31.25, 1.75e9, 448e9, ("v6e:2x2", "v6e:2x4", "v6e:4x4", "v6e:4x8", "v6e:8x8")),
    "tpu7x": Chip(
        192,
        94.75,
        2.2e9,
        600e9,
        ("tpu7x:2x2x1", "tpu7x:2x2x2", "tpu7x:2x2x4", "tpu7x:4x4x4"),
        devices=2,
    ),
}


class TopologyError(ValueError):
    """There is no such slice, or no TPU compiler to ask."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """Devices to compile for.

    Attributes:
        name: as it was asked for.
        devices: of jax.
        chips: how many there are; some show two devices each.
        chip: what each has.
    """

    name: str
    devices: Sequence[Any]
    chips: int
    chip: Chip

    @property
    def share(self) -> float:
        """How much of a chip a device is."""
        return self.chips / len(self.devices)

    @property
    def rates(self) -> Rates:
        """What one device does in a second: a chip's share, where the compiler shows two."""
        peak = peak_of(self.devices[0].device_kind)
        share = self.share * self.chip.devices
        return Rates(
            clock=self.chip.clock,
            flops=peak.flops["bfloat16"] * share,
            bandwidth=peak.bandwidth * share,
            links=self.chip.links * self.share,
        )


def tpu_slice(name: str) -> Slice:
    """Return the slice of a name such as "v5e:4x4".

    Raises:
        TopologyError: no such slice, or libtpu is not installed.
    """
    generation = name.partition(":")[0]
    if generation not in CHIPS:
        raise TopologyError(
            f"topology is {name!r}; expected GENERATION:SHAPE of {', '.join(CHIPS)}, such as"
            f" {', '.join(chip.examples[0] for chip in CHIPS.values())}"
        )
    chip = CHIPS[generation]
    # Read by libtpu when it is loaded: it would look for a TPU's metadata server, and for a lock.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except (RuntimeError, ValueError) as error:
        if "not installed" in str(error):
            raise TopologyError(
                f"there is no TPU compiler here ({error}): docs/tpu.md says how to get it"
            ) from error
        raise TopologyError(
            f"the TPU compiler knows no topology {name!r}; it knows {', '.join(chip.examples)}"
            f" ({str(error).splitlines()[0]})"
        ) from error
    chips = len({tuple(device.coords) for device in devices})
    return Slice(name=name, devices=devices, chips=chips, chip=chip)
