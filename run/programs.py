"""Compiled programs kept from one start to the next.

They lie in the cache folder (see `run.fetch`), apart for each kind of processor: a program for one
may not run on another. $JAX_COMPILATION_CACHE_DIR names another place; R1RE_KEEP_PROGRAMS=0 keeps
none.
"""

import hashlib
import os
import pathlib
import platform

# Shorter compilations are not worth a file.
LEAST_SECONDS = 0.1


def keep_programs() -> None:
    """Let jax keep what it compiles; call it before anything is compiled."""
    if os.environ.get("R1RE_KEEP_PROGRAMS") == "0" or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    import jax

    from r1re_jax.published import cache_folder

    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "programs" / machine()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)


def machine() -> str:
    """Return a name for the processor's instruction set."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    flags = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return hashlib.sha256("\n".join([platform.machine(), *flags]).encode()).hexdigest()[:12]
