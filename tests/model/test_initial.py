"""Wired heads quote and find lines before any training; unwired ones do not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from r1re_jax.model.block import rotary, rotation
from r1re_jax.model.config import ModelConfig, preset
from r1re_jax.model.initial import wire_reading
from r1re_jax.model.qwen import Qwen, abstract_qwen

CONFIG = preset("nano", vocab=512, layers=3)
PERIOD, ANCHOR = 60, 0


def unwired(config: ModelConfig = CONFIG, *, seed: int = 0) -> Qwen:
    """Normal weights at the scales of Qwen.__init__, biases zero, norms one; drawn by NumPy."""
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(abstract_qwen(config))
    filled = []
    for path, variable in nnx.to_flat_state(state):
        array = np.zeros(variable.shape, np.float32)
        if "norm" in path or "norm" in str(path[-2:]):
            array += 1
        elif path[-1] != "bias":
            scale = variable.shape[-1 if path == ("embed",) else -2] ** -0.5
            branch = path[-2:-1] in (("output",), ("down",))
            scale *= (2 * config.layers) ** -0.5 if branch else 1
            array += scale * rng.normal(size=variable.shape)
        filled.append((path, variable.replace(jnp.asarray(array))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def wired(config: ModelConfig = CONFIG, *, seed: int = 0) -> Qwen:
    """The same, wired."""
    model = unwired(config)
    wire_reading(model, anchor=ANCHOR, seed=seed)
    return model


@nnx.jit
def logits(model: Qwen, tokens: jax.Array) -> jax.Array:
    """Compute [B, T, V]."""
    hidden, _ = model.extend(tokens, start=jnp.zeros(tokens.shape[0], jnp.int32))
    return model.logits(hidden)


def quoting_rank(model: Qwen) -> float:
    """Say everything twice: which part of the row's words is less likely than the right one?

    The current word is left out: a tied head says that again until training has taught it not to.
    """
    once = np.random.default_rng(1).permuted(np.tile(np.arange(CONFIG.vocab), (4, 1)), axis=1)
    rows = np.tile(once[:, :PERIOD], 2).astype(np.int32)
    said = np.asarray(logits(model, rows))[:, PERIOD:-1]
    mine = np.take_along_axis(said, once[:, None, :PERIOD].repeat(PERIOD - 1, 1), 2)
    at = np.arange(PERIOD - 1)
    mine[:, at, at] = np.inf
    return float((mine < mine[:, at, at + 1, None]).mean() * PERIOD / (PERIOD - 2))


def test_only_a_wired_model_quotes() -> None:
    assert 0.4 < quoting_rank(unwired()) < 0.6
    assert quoting_rank(wired()) > 0.8


def naming_accuracy(model: Qwen, *, lines: int = 6, rows: int = 32) -> float:
    """Choose among a guide's names the one in whose line a later quotation stands.

    A line is the anchor, a name and ten other words, no word twice; the quotation is the fifth and
    sixth of its line, and the name is asked for three words later, behind an anchor.
    """
    rng = np.random.default_rng(2)
    asked, names, gold = [], [], rng.integers(lines, size=rows)
    for answer in gold:
        words = rng.permutation(np.arange(1, CONFIG.vocab))
        guide, filler = words[: lines * 11].reshape(lines, 11), words[lines * 11 :]
        row = np.concatenate([np.insert(guide, 0, ANCHOR, axis=1).ravel(), filler[:40]])
        asked.append([*row, *guide[answer, 4:6], *filler[40:42], ANCHOR])
        names.append(guide[:, 0])
    last = np.asarray(logits(model, np.array(asked, np.int32)))[:, -1]
    return float((np.take_along_axis(last, np.array(names), 1).argmax(-1) == gold).mean())


def test_only_a_wired_model_names_the_line_of_a_quotation() -> None:
    assert naming_accuracy(unwired()) < 0.4
    assert naming_accuracy(wired()) > 0.55


def following_accuracy(model: Qwen, *, lines: int = 6, rows: int = 32) -> float:
    """Quote a line whose words the other lines share: which of their next words is likeliest?

    A line is the anchor, a name of its own, a word that stands in all lines and a last word of its
    own. The anchor, a name and the shared word are said again, and the last word is asked for.
    """
    rng = np.random.default_rng(3)
    asked, ends, gold = [], [], rng.integers(lines, size=rows)
    for answer in gold:
        words = rng.permutation(np.arange(1, CONFIG.vocab))
        names, last, shared, filler = words[:lines], words[20 : 20 + lines], words[40], words[50:80]
        guide = [[ANCHOR, name, shared, end] for name, end in zip(names, last, strict=True)]
        asked.append([*np.ravel(guide), *filler, ANCHOR, names[answer], shared])
        ends.append(last)
    said = np.asarray(logits(model, np.array(asked, np.int32)))[:, -1]
    return float((np.take_along_axis(said, np.array(ends), 1).argmax(-1) == gold).mean())


def test_only_a_wired_model_goes_on_in_the_same_line() -> None:
    assert following_accuracy(unwired()) < 0.4
    assert following_accuracy(wired()) > 0.55


def test_first_heads_look_one_to_four_tokens_back() -> None:
    blocks = wired().layers
    heads = lambda bias: bias[...][0].reshape(1, 1, -1, CONFIG.head_size)  # noqa: E731
    at = jnp.arange(200, dtype=jnp.int32)[None]
    turned = [
        rotary(jnp.repeat(heads(bias), 200, axis=1), rotation(at, CONFIG.rope_frequencies))[0]
        for bias in (blocks.query.bias, blocks.key.bias)
    ]
    query, key = (np.asarray(one, np.float64) for one in turned)
    for head, back in enumerate((1, 2, 3, 4)):
        scores = np.where(np.tri(200, dtype=bool), query[:, head] @ key[:, head // 2].T, -np.inf)
        np.testing.assert_array_equal(scores.argmax(-1)[back:], np.arange(200 - back))


def arrays(model: Qwen) -> dict[str, np.ndarray]:
    """Parameters by path."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): np.asarray(variable.get_value()) for path, variable in flat}


def test_wiring_is_a_function_of_its_seed() -> None:
    config = dataclasses.replace(CONFIG, vocab=32)
    one, same, other = (arrays(wired(config, seed=seed)) for seed in (3, 3, 4))
    assert all((one[name] == same[name]).all() for name in one)
    assert any((one[name] != other[name]).any() for name in one)


def test_wiring_leaves_the_rest_as_it_was() -> None:
    config = dataclasses.replace(CONFIG, vocab=32, layers=4)
    before, after = arrays(unwired(config)), arrays(wired(config))
    for name in ("embed", "layers.gate.weight", "layers.up.weight", "norm.weight"):
        np.testing.assert_array_equal(before[name], after[name])
    for name in ("layers.query.weight", "layers.key.weight", "layers.value.weight"):
        np.testing.assert_array_equal(before[name][3], after[name][3])
        assert np.isfinite(after[name]).all() and before[name].shape == after[name].shape


@pytest.mark.parametrize(
    "shape",
    [
        {"layers": 2},
        {"tied": False},
        {"head_size": 6},
        {"width": 64},
        {"kv_heads": 4},
        {"kv_heads": 1},
    ],
    ids=["two layers", "untied", "small head", "narrow", "ungrouped", "one group"],
)
def test_models_that_cannot_be_wired_are_refused(shape: dict[str, int]) -> None:
    model = abstract_qwen(dataclasses.replace(CONFIG, vocab=32, **shape))
    with pytest.raises(ValueError, match="three layers, a tied head, two key-value heads"):
        wire_reading(model, anchor=ANCHOR)
