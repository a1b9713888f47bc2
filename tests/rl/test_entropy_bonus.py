"""The entropy bonus: its value, its gradient against that of softmax by hand, and off, nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from r1re_jax.model.tree import Tree
from r1re_jax.rl.losses import token_weights
from r1re_jax.rl.masks import length_mask
from r1re_jax.rl.objective import LossSettings, metrics, objective
from r1re_jax.rl.scoring import completion_logp
from r1re_jax.train.grpo import GRPOBlock, grpo_loss
from r1re_jax.train.grpo_settings import GRPOSettings
from tests.tiny import random_level, tiny_model

P, G, C, V = 2, 3, 4, 5
C_ENTROPY = 0.3


def batch(kind: str) -> tuple[np.ndarray, dict]:
    """Logits [P, G, C, V], and the rest of an objective."""
    rng = np.random.default_rng(0)
    mask = np.asarray(length_mask(rng.integers(0, C + 1, (P, G)), C))
    rest = {
        "token": rng.integers(0, V, (P, G, C)),
        "advantage_PG": rng.normal(size=(P, G)).astype(np.float32),
        "mask_PGC": mask,
        "weight_PGC": np.asarray(token_weights(mask, kind=kind)),
    }
    return rng.normal(size=(P, G, C, V)), rest


def loss(logits: jax.Array, rest: dict, settings: LossSettings) -> tuple:
    rest = dict(rest)
    logp = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logp, rest.pop("token")[..., None], -1)[..., 0]
    entropy = -jnp.sum(jnp.exp(logp) * logp, -1)
    return objective(
        chosen,
        old_logp_PGC=jax.lax.stop_gradient(chosen),
        ref_logp_PGC=None,
        settings=settings,
        entropy_PGC=entropy if settings.entropy_coefficient else None,
        **rest,
    )


@pytest.mark.parametrize("kind", ["grpo", "token_mean", "dr_grpo", "gspo", "cispo"])
def test_value_and_gradient_by_hand(kind: str) -> None:
    logits, rest = batch(kind)
    values = {}
    for coefficient in (0.0, C_ENTROPY):
        settings = LossSettings(kind=kind, kl_coefficient=0.0, entropy_coefficient=coefficient)
        f = jax.value_and_grad(lambda x, s=settings: loss(x, rest, s), has_aux=True)
        values[coefficient] = f(jnp.asarray(logits, jnp.float32))
    ((plain, _), slope), ((value, sums), gradient) = values[0.0], values[C_ENTROPY]

    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    entropy = np.zeros((P, G, C))
    expected = np.zeros(logits.shape)
    for where in zip(*np.nonzero(rest["mask_PGC"]), strict=True):
        entropy[where] = -sum(q * np.log(q) for q in p[where])
        for v in range(V):  # d entropy / d logit_v = -p_v (log p_v + entropy)
            change = -p[where][v] * (np.log(p[where][v]) + entropy[where])
            expected[(*where, v)] = -C_ENTROPY * rest["weight_PGC"][where] * change
    bonus = C_ENTROPY * (rest["weight_PGC"] * entropy).sum()
    np.testing.assert_allclose(value, plain - bonus, rtol=1e-5)
    np.testing.assert_allclose(metrics(sums)["entropy_bonus"], bonus, rtol=1e-5)
    np.testing.assert_allclose(gradient - slope, expected, atol=1e-6)
    if kind == "token_mean":
        np.testing.assert_allclose(bonus, C_ENTROPY * entropy.sum() / rest["mask_PGC"].sum())


def test_nothing_under_the_mask_is_read() -> None:
    _, rest = batch("grpo")
    del rest["token"]
    mask = rest["mask_PGC"]
    logp = np.full((P, G, C), -1.0, np.float32)
    settings = LossSettings(kl_coefficient=0.0, entropy_coefficient=C_ENTROPY)
    f = jax.value_and_grad(
        lambda entropy: objective(
            logp,
            old_logp_PGC=logp,
            ref_logp_PGC=None,
            settings=settings,
            entropy_PGC=entropy,
            **rest,
        )[0]
    )
    clean, dirty = (f(jnp.where(mask, 1.5, under)) for under in (0.0, np.nan))
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)


def test_off_nothing_more_is_computed_and_on_a_gradient_flows() -> None:
    random = np.random.default_rng(0)
    tree = Tree(
        random_level(random, (1, 9), least=1),
        random_level(random, (1, 2, 5), least=1),
        random_level(random, (1, 2, 3, 6)),
    )
    graph, params = nnx.split(tiny_model())
    score = jax.jit(lambda params: completion_logp(nnx.merge(graph, params), tree))
    logp = score(params).logp_NPGC
    block = GRPOBlock(
        tree=tree,
        advantage_NPG=np.zeros((1, 2, 3), np.float32),
        weight_NPGC=np.full((1, 2, 3, 6), 0.1, np.float32),
        sampler_logp_NPGC=logp,
    )
    settings = GRPOSettings(steps=1, kl_coefficient=0.0)

    def program(settings: GRPOSettings) -> jax.stages.Compiled:
        def f(params: nnx.State, block: GRPOBlock) -> jax.Array:
            return grpo_loss(nnx.merge(graph, params), block, settings)[0]

        return jax.jit(jax.grad(f)).lower(params, block).compile()

    off = program(settings)
    on = program(dataclasses.replace(settings, entropy_coefficient=0.5))
    flops = [compiled.cost_analysis()["flops"] for compiled in (off, on)]
    assert flops[0] < flops[1]
    # Equal rewards and no KL term: without the bonus there is nothing to learn.
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(off(params, block)))
    gradient = on(params, block)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) > 1e-4
    stepped = jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient)
    assert score(stepped).entropy_NPGC.sum() > score(params).entropy_NPGC.sum()


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match="entropy_coefficient is -1.0"):
        LossSettings(entropy_coefficient=-1.0)
    logits, rest = batch("grpo")
    del rest["token"]
    logp = np.zeros((P, G, C))
    with pytest.raises(ValueError, match="but there are no entropies"):
        objective(
            logp,
            old_logp_PGC=logp,
            ref_logp_PGC=None,
            settings=LossSettings(kl_coefficient=0.0, entropy_coefficient=1.0),
            **rest,
        )
