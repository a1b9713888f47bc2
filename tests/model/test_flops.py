"""Counts of arithmetic and bytes: against plain loops, and against the products of the programs."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.interpreters import partial_eval

from r1re_jax.model.config import ModelConfig, preset
from r1re_jax.model.flops import (
    Lengths,
    Load,
    decode_bytes,
    forward_flops,
    matrix_size,
    pair_flops,
    step_flops,
    tree_flops,
    tree_load,
    update_flops,
)
from r1re_jax.model.lora import Lora, adapt, is_adapter
from r1re_jax.model.peaks import PEAKS, peak_of
from r1re_jax.model.qwen import Cache, Qwen, abstract_qwen
from r1re_jax.model.tree import Level, Tree
from r1re_jax.rl.scoring import completion_logp
from r1re_jax.train.state import flat_params, model_state
from tests.tiny import tiny_config

S, Q, C, P, G = 5, 3, 4, 2, 3
EVEN = Lengths.even(guide=S, question=Q, completion=C, questions=P, group=G)
LONG = Lengths.even(guide=1065, question=40, completion=512, questions=32, group=16)


@st.composite
def forests(draw: st.DrawFn) -> Lengths:
    trees, questions, group = (draw(st.integers(1, 3)) for _ in range(3))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = (trees,), (trees, questions), (trees, questions, group)
    guide, question, completion = (random.integers(0, 9, size).astype(np.int32) for size in sizes)
    return Lengths(guide, np.maximum(question, 1), completion)


shapes = st.builds(
    lambda layers, kv_heads, share, **more: tiny_config(
        layers=layers, kv_heads=kv_heads, query_heads=share * kv_heads, **more
    ),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    width=st.integers(1, 9),
    head_size=st.integers(1, 4).map(lambda half: 2 * half),
    mlp_width=st.integers(1, 9),
    vocab=st.integers(1, 9),
)


def _matrices(config: ModelConfig) -> list[tuple[int, int]]:
    """Inputs and outputs of every matrix of all layers."""
    query, kv = config.query_heads * config.head_size, config.kv_heads * config.head_size
    width, mlp = config.width, config.mlp_width
    one = [(width, query), (width, kv), (width, kv), (query, width)]
    return config.layers * [*one, (width, mlp), (width, mlp), (mlp, width)]


def _rows(lengths: Lengths) -> Iterator[tuple[int, int]]:
    """Tokens, and keys above, of every row of the tree."""
    for tree, guide in enumerate(lengths.guide.tolist()):
        yield guide, 0
        for question, tokens in enumerate(lengths.question[tree].tolist()):
            yield tokens, guide
            for completion in lengths.completion[tree, question].tolist():
                yield completion, guide + tokens


def _looped(config: ModelConfig, rows: Iterator[tuple[int, int]], logits: int) -> int:
    """Operations token by token, matrix by matrix, head by head and key by key."""
    total = 0
    for tokens, above in rows:
        for place in range(tokens):
            total += sum(2 * inputs * outputs for inputs, outputs in _matrices(config))
            for _ in range(config.layers * config.query_heads):
                for _ in range(above + place + 1):
                    total += 2 * config.head_size  # the score
                    total += 2 * config.head_size  # the value times its weight
    return total + logits * 2 * config.width * config.vocab


@settings(max_examples=25, deadline=None)
@given(shapes, forests())
def test_counts_are_those_of_loops(config: ModelConfig, lengths: Lengths) -> None:
    tokens = int(lengths.completion.sum())
    forward = _looped(config, _rows(lengths), tokens)
    assert forward_flops(config, tree_load(lengths)) == forward
    fed = Lengths(lengths.guide, lengths.question, np.maximum(lengths.completion - 1, 0))
    logits = lengths.question.size + int(fed.completion.sum())
    counted = step_flops(config, drawn=lengths, kept=lengths, scored=2, updates=3)
    assert counted.rollout == _looped(config, _rows(fed), logits)
    assert counted.reference == 2 * forward
    assert counted.update == 3 * 3 * forward
    assert counted.total == counted.rollout + counted.reference + counted.update


@settings(max_examples=25, deadline=None)
@given(shapes, forests(), st.integers(1, 4), st.integers(1, 2))
def test_bytes_are_those_of_decoding_token_by_token(
    config: ModelConfig, lengths: Lengths, copies: int, own: int
) -> None:
    weights = 1 + config.vocab
    key, total = 2 * config.layers * config.kv_heads * config.head_size, 0
    for step in itertools.count(1):  # the token that goes in: token 0 comes from the prompt
        runs_NPG = lengths.completion > step
        if not runs_NPG.any():
            break
        total += 2 * weights
        for tree, guide in enumerate(lengths.guide.tolist()):
            total += 2 * copies * key * guide * bool(runs_NPG[tree].any())
            for question, tokens in enumerate(lengths.question[tree].tolist()):
                total += 2 * key * tokens * bool(runs_NPG[tree, question].any())
                total += own * key * step * int(runs_NPG[tree, question].sum())
    read = {"weights": 2 * weights, "itemsize": 2, "own_itemsize": own, "copies": copies}
    assert decode_bytes(config, lengths, **read) == total


def products(jaxpr: Any) -> int:
    """Operations of every dot_general of a jaxpr; a scan's body as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_has_equations):
            if _has_equations(inner):
                total += times * products(getattr(inner, "jaxpr", inner))
    return total


def _has_equations(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def _products_of(function: Callable, *args: Any) -> int:
    return products(jax.make_jaxpr(function)(*args).jaxpr)


def _full_tree() -> Tree:
    """Shapes of a tree whose rows fill their levels."""
    level = lambda *shape: Level(np.zeros(shape, np.int32), np.full(shape[:-1], shape[-1]))  # noqa: E731
    return Tree(level(1, S), level(1, P, Q), level(1, P, G, C))


def _masked() -> Load:
    """The pairs of rows with their own later tokens, which the program computes and hides."""
    rows = (1, S), (P, Q), (P * G, C)
    return Load(pairs=sum(count * tokens * (tokens - 1) // 2 for count, tokens in rows))


def _loss(model: Qwen) -> jax.Array:
    return completion_logp(model, _full_tree(), chunk=2).logp_NPGC.sum()


@pytest.mark.parametrize("layers", [2, 9])  # unrolled, and as a loop
@pytest.mark.parametrize("tied", [False, True])
def test_the_count_is_what_the_forward_multiplies(layers: int, tied: bool) -> None:
    config = tiny_config(layers=layers, tied=tied)
    graph, state = nnx.split(abstract_qwen(config))
    found = _products_of(lambda state: _loss(nnx.merge(graph, state)), state)
    assert found == forward_flops(config, tree_load(EVEN) + _masked())


def test_a_gradient_is_two_more_forwards() -> None:
    config = tiny_config()
    graph, state = nnx.split(abstract_qwen(config))
    loss = jax.value_and_grad(lambda state: _loss(nnx.merge(graph, state)))
    load = tree_load(EVEN) + _masked()
    assert _products_of(loss, state) == update_flops(config, load) + _again(config, load)


def test_an_adapter_is_counted_and_what_it_leaves_needs_one_gradient() -> None:
    config = tiny_config()
    graph, state = nnx.split(adapt(abstract_qwen(config), Lora(rank=3)))
    params = flat_params(state)
    trained = {name: value for name, value in params.items() if is_adapter(name)}
    frozen = {name: value for name, value in params.items() if not is_adapter(name)}
    adapter, load = sum(value.size for value in trained.values()), tree_load(EVEN) + _masked()

    def loss(trained: dict, frozen: dict) -> jax.Array:
        return _loss(nnx.merge(graph, model_state({**frozen, **trained})))

    expected = forward_flops(config, load, adapter=adapter)
    assert _products_of(loss, trained, frozen) == expected
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(trained, frozen).jaxpr
    # What the compiler removes: gradients of frozen matrices, which nothing uses.
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    expected = update_flops(config, load, adapter=adapter) + _again(config, load)
    assert products(used) == expected


def _again(config: ModelConfig, load: Load) -> int:
    """What a backward pass computes once more, uncounted: logits and scores, half of attention."""
    return forward_flops(config, Load(logits=load.logits)) + pair_flops(config) * load.pairs // 2


def test_the_count_is_what_decoding_multiplies() -> None:
    config = tiny_config()
    graph, state = nnx.split(abstract_qwen(config))
    size, stack = config.head_size, (config.layers, config.kv_heads)
    cache = lambda *batch, tokens: Cache(  # noqa: E731
        np.zeros((*stack, *batch, size, tokens)),
        np.zeros((*stack, *batch, tokens, size)),
        np.full(batch, tokens),
    )
    above = cache(1, tokens=S), cache(1, P, tokens=Q)

    def token(state: nnx.State) -> jax.Array:
        model, batch = nnx.merge(graph, state), (1, P, G)
        hidden, _ = model.decode(
            np.zeros(batch, np.int32),
            step=np.int32(0),
            start=np.full(batch, S + Q),
            ancestors=above,
            own=model.empty_cache(batch, C),
        )
        return model.logits(hidden)

    rows = P * G
    expected = forward_flops(config, Load(tokens=rows, pairs=rows * (S + Q + C), logits=rows))
    assert _products_of(token, state) == expected


def test_the_tree_saves_what_flat_rows_repeat() -> None:
    config, rows = preset("qwen2.5-7b"), 32 * 16
    tree = tree_flops(config, guide=1065, question=40, completion=512, questions=32, group=16)
    assert tree == forward_flops(config, tree_load(LONG))
    flat = Lengths.even(guide=1105, question=0, completion=512, questions=1, group=1)
    assert 2 < rows * forward_flops(config, tree_load(flat)) / tree < 1617 / 512 + 0.1
    # 6.5 billion elements of matrices (Qwen2.5-7B without embeddings), two operations each.
    assert matrix_size(config) == pytest.approx(6.53e9, rel=0.01)
    step = step_flops(config, drawn=LONG, kept=LONG)
    assert step.total == pytest.approx(5 * tree, rel=0.01)


def test_weights_dominate_what_few_rows_must_read() -> None:
    config = preset("qwen2.5-7b")
    few = Lengths.even(guide=1065, question=40, completion=2, questions=1, group=1)
    weights = 2 * (matrix_size(config) + config.width * config.vocab)
    read = decode_bytes(config, few, weights=weights, itemsize=2)
    assert read == pytest.approx(weights, rel=0.01)


def test_peaks_of_known_devices() -> None:
    assert peak_of("cpu") is None
    lite = PEAKS["TPU v5 lite"]
    assert (lite.flops["bfloat16"], lite.bandwidth) == (197e12, 819e9)
    for peak in PEAKS.values():
        # Between the oldest and the newest, in operations a byte: a slip of a digit is outside.
        assert 100 < peak.flops["bfloat16"] / peak.bandwidth < 600
        assert peak.flops["float32"] <= peak.flops["bfloat16"]
