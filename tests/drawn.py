"""Models filled with NumPy's random numbers: no compilation, and no parameter is zero or one."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from r1re_jax.model.config import ModelConfig
from r1re_jax.model.names import NAMES, Form
from r1re_jax.model.qwen import Qwen, Remat, abstract_qwen


def small_config(**overrides: object) -> ModelConfig:
    """Two layers, four query heads on two key-value heads, and no two sizes alike."""
    shape = dict(vocab=61, layers=2, width=16, query_heads=4, kv_heads=2, head_size=6, mlp_width=20)
    return ModelConfig(**{**shape, "rope_theta": 1e4, "norm_eps": 1e-5, **overrides})


def drawn_model(
    config: ModelConfig, *, seed: int = 0, dtype: str = "float32", remat: Remat = Remat.NONE
) -> Qwen:
    """Weights keep the scale of their inputs; norms scatter around 1 and biases around 0.

    A bias left out or a norm's weight forgotten shows, as it would not at initial values.
    """
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(abstract_qwen(config, dtype=dtype, remat=remat))
    filled = []
    for path, variable in nnx.to_flat_state(state):
        array = rng.normal(size=variable.shape).astype(np.float32)
        if "norm" in path[-2 if path[-1] == "weight" else -1]:
            array = 1 + array / 4
        elif path[-1] == "weight" or path == ("head",):
            array *= variable.shape[-2] ** -0.5
        filled.append((path, variable.replace(jnp.asarray(array))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def drawn_tensors(config: ModelConfig, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Return the tensors of a drawn model as Hugging Face names and turns them."""
    found = {}
    flat = dict(nnx.to_flat_state(nnx.state(drawn_model(config, seed=seed))))
    for name in NAMES:
        if (path := tuple(name.ours.split("."))) not in flat:
            continue
        value = np.asarray(flat[path].get_value())
        for i, layer in enumerate(value if name.stacked else value[None]):
            found[name.theirs(Form.HF, i)] = layer.T if name.transposed else layer
    return found
