"""The reference that a KL term holds the policy to, where it follows the policy.

A frozen reference is a file of the run (`r1re_jax.train.checkpoint.keep_reference`). One that moves
is part of the training state and saved with every checkpoint: a resumed run must find it as it was.
"""

import functools

import jax
import jax.numpy as jnp

from r1re_jax.train.grpo_settings import ReferenceSettings
from r1re_jax.train.state import Params


def copied(params: Params) -> Params:
    """Return parameters in buffers of their own: an update is given the policy's to overwrite."""
    return jax.tree.map(jnp.copy, params)


def followed(
    reference: Params, params: Params, settings: ReferenceSettings, *, done: int
) -> Params:
    """Return the reference after the phase's step number `done`.

    Every `settings.every` steps reference ← decay · reference + (1 − decay) · policy: TR-DPO's soft
    update, and its hard one where decay is 0 (arXiv 2404.09656).

    Args:
        reference: donated where it moves.
        params: of the policy, after the step; only read.
        settings: how it moves.
        done: steps of the phase that are completed.
    """
    if not settings.every or done % settings.every:
        return reference
    if not settings.decay:
        return copied(params)
    return _mixed(reference, params, decay=settings.decay)


@functools.partial(jax.jit, donate_argnums=0, static_argnames="decay")
def _mixed(reference: Params, params: Params, *, decay: float) -> Params:
    return jax.tree.map(lambda r, p: decay * r + (1 - decay) * p, reference, params)
