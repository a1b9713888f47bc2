"""XLA_FLAGS of the processes that run tests: simulated devices, and programs compiled fast."""

import os

# Most of the suite's time is XLA compiling programs that then run for moments. Less of LLVM's
# optimisation and no MLIR emitters take a third off, and a test of what a program computes loses
# nothing by it (level 0 compiles faster still, but a real policy then decodes for minutes).
# tests/docs runs README's commands as users compile them.
_FAST = "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false"
_DEVICES = "--xla_force_host_platform_device_count"


def first_flags(devices: int) -> str:
    """XLA_FLAGS of the process of tests. What it was started with stands last, and so it counts."""
    return f"{_DEVICES}={devices} {_FAST} {os.environ.get('XLA_FLAGS', '')}".strip()


def xla_flags(devices: int) -> str:
    """XLA_FLAGS of a process that a test starts: this one's, with so many devices."""
    return f"{os.environ['XLA_FLAGS']} {_DEVICES}={devices}"
