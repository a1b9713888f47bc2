"""XLA_FLAGS of the processes that run tests: simulated devices, and programs compiled fast."""

# Most of the suite's time is XLA compiling programs that then run for moments. Less of LLVM's
# optimisation and no MLIR emitters take a third off, and a test of what a program computes loses
# nothing by it (level 0 compiles faster still, but a real policy then decodes for minutes).
# tests/docs runs README's commands as users compile them.
_FAST = ("--xla_backend_optimization_level=1", "--xla_cpu_use_fusion_emitters=false")


def xla_flags(devices: int, given: str = "") -> str:
    """XLA_FLAGS for so many simulated devices; what is given by name already stays as it is."""
    wanted = (f"--xla_force_host_platform_device_count={devices}", *_FAST)
    return " ".join([given, *(flag for flag in wanted if flag.split("=")[0] not in given)]).strip()
