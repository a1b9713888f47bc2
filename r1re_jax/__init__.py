"""R1-RE in JAX: relation extraction taught by reinforcement learning with verifiable reward."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load_policy"]


def __getattr__(name: str) -> Any:
    """Import `load_policy` on first use, so that `r1re_jax.task` needs no jax (PEP 562)."""
    if name == "load_policy":
        from r1re_jax.policy_files import load_policy

        return load_policy
    raise AttributeError(f"module 'r1re_jax' has no attribute {name!r}")
