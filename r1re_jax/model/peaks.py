"""What devices could do at best: arithmetic and memory bandwidth by `jax.Device.device_kind`."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Peak:
    """What a maker states of one device, as JAX counts devices (a chip, or half of a TPU7x).

    Attributes:
        flops: dtype that the forward computes in -> FLOP/s of dense matrix products.
        bandwidth: bytes/s of the device's memory.
    """

    flops: Mapping[str, float]
    bandwidth: float


def _tpu(bfloat16: float, bandwidth: float) -> Peak:
    """At JAX's default precision a TPU multiplies float32 too in one pass of bfloat16."""
    return Peak({"bfloat16": bfloat16, "float32": bfloat16}, bandwidth)


def _gpu(bfloat16: float, bandwidth: float) -> Peak:
    """At JAX's default precision float32 is multiplied as TF32, at half the rate of bfloat16."""
    half = {"bfloat16": bfloat16, "float16": bfloat16}
    return Peak({**half, "float32": bfloat16 / 2}, bandwidth)


# Google Cloud documentation, "Peak compute per chip (bf16)" and "HBM bandwidth per chip", of tpu7x
# half of them, at cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}.
_V4, _V5E = _tpu(275e12, 1.2e12), _tpu(197e12, 819e9)
_V5P, _V6E = _tpu(459e12, 2.765e12), _tpu(918e12, 1.638e12)
_V7X = _tpu(2307e12 / 2, 7.38e12 / 2)
# NVIDIA's data sheets of the A100, H100 and H200; without sparsity, which theirs count as twice as
# much.
_A100_40, _A100_80 = _gpu(312e12, 1.555e12), _gpu(312e12, 2.039e12)
_A100_80_PCIE = _gpu(312e12, 1.935e12)
_H100, _H100_PCIE, _H200 = _gpu(989e12, 3.35e12), _gpu(756e12, 2.0e12), _gpu(989e12, 4.8e12)

PEAKS: dict[str, Peak] = {
    "TPU v4": _V4,
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU7x": _V7X,
    "NVIDIA A100-SXM4-40GB": _A100_40,
    "NVIDIA A100-PCIE-40GB": _A100_40,
    "NVIDIA A100-SXM4-80GB": _A100_80,
    "NVIDIA A100 80GB PCIe": _A100_80_PCIE,
    "NVIDIA H100 80GB HBM3": _H100,
    "NVIDIA H100 PCIe": _H100_PCIE,
    "NVIDIA H200": _H200,
}


def peak_of(kind: str) -> Peak | None:
    """Return the peak of a kind of device; None where it is not known, as of CPUs."""
    return PEAKS.get(kind)
