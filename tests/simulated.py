"""XLA_FLAGS of the processes that run tests: simulated devices, and programs compiled fast."""

# Most of the suite's time is XLA compiling programs that then run for moments. Without LLVM's
# optimisation and the MLIR emitters of fusions it takes a fifth of the time, and a test of what a
# program computes loses nothing by it. tests/docs runs README's commands as users compile them.
_FAST = ("--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false")


def xla_flags(devices: int, given: str = "") -> str:
    """XLA_FLAGS for so many simulated devices; what is given by name already stays as it is."""
    wanted = (f"--xla_force_host_platform_device_count={devices}", *_FAST)
    return " ".join([given, *(flag for flag in wanted if flag.split("=")[0] not in given)]).strip()
