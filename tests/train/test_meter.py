"""How a step's use of its devices comes from counts, seconds and peaks."""

import dataclasses

import numpy as np
import pytest

from r1re_jax.model.flops import Lengths, decode_bytes, step_flops, tree_load, update_flops
from r1re_jax.model.int8 import Quantisation
from r1re_jax.model.lora import Lora, adapt
from r1re_jax.model.peaks import Peak
from r1re_jax.model.quantise import quantise
from r1re_jax.model.qwen import abstract_qwen
from r1re_jax.model.tree import Level, Tree
from r1re_jax.train import meter as meter_module
from r1re_jax.train.grpo_settings import GRPOSettings
from r1re_jax.train.meter import Meter, make_meter
from r1re_jax.train.state import Layout, drawing_layout, model_layout
from tests.tiny import random_level, tiny_config
from tests.train.world import mesh_of

CONFIG = tiny_config()
SECONDS = {"step_time": 4.0, "step_time/rollout": 0.5}


def _layout(mesh: tuple[int, ...] = (1, 1, 1), *, dtype: str = "float32") -> Layout:
    return model_layout(abstract_qwen(CONFIG, dtype=dtype), mesh_of(*mesh))


def _tree(questions: int = 2) -> Tree:
    random = np.random.default_rng(questions)
    guide, question = random_level(random, (1, 9)), random_level(random, (1, questions, 5), least=1)
    return Tree(guide, question, random_level(random, (1, questions, 3, 8), least=1))


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Peak:
    peak = Peak({"bfloat16": 2e9, "float32": 1e9}, 1e8)
    monkeypatch.setattr(meter_module, "peak_of", lambda kind: peak)
    return peak


def test_where_no_peak_is_known_there_is_no_share_of_it() -> None:
    meter, tree = make_meter(_layout()), _tree()
    expected = update_flops(CONFIG, tree_load(Lengths.of(tree))) / 2 / 1e12
    assert meter.sft(tree, seconds=2.0) == {"tflops": pytest.approx(expected)}
    found = meter.grpo(Lengths.of(tree), tree, GRPOSettings(questions=2), seconds=SECONDS)
    assert found.keys() == {"tflops"}


def test_shares_are_of_all_devices(known: Peak) -> None:
    layout, tree = _layout((2, 2, 2), dtype="bfloat16"), _tree()
    meter = make_meter(layout, sampler=_layout((2, 2, 2)))
    settings = GRPOSettings(questions=2, kl_coefficient=0.1, inner_iterations=2)
    lengths = Lengths.of(tree)
    found = meter.grpo(lengths, tree, settings, seconds=SECONDS)
    counted = step_flops(CONFIG, drawn=lengths, kept=lengths, scored=2, updates=2).total
    assert found["tflops"] == pytest.approx(counted / 4 / 1e12)
    assert found["mfu"] == pytest.approx(counted / 4 / (8 * 2e9))
    moved = decode_bytes(CONFIG, lengths, weights=meter.weights, itemsize=4, copies=4)
    assert found["hbm_use"] == pytest.approx(moved / 0.5 / (8 * 1e8))
    assert meter.sft(tree, seconds=4.0)["mfu"] < found["mfu"]


def test_weights_are_read_where_they_lie() -> None:
    """Heads by every group that shares questions, MLP and head once a slice, embedding by none."""
    model, mesh = abstract_qwen(CONFIG, dtype="bfloat16"), mesh_of(2, 2, 2)
    meter = make_meter(model_layout(model, mesh), sampler=drawing_layout(model, mesh))
    width, layers, kv = CONFIG.width, CONFIG.layers, CONFIG.kv_heads * CONFIG.head_size
    query, mlp = CONFIG.query_heads * CONFIG.head_size, CONFIG.mlp_width
    heads = layers * (2 * width * query + 2 * width * kv + query + 2 * kv)
    slices = layers * 3 * width * mlp + width * CONFIG.vocab
    norms = 8 * (2 * layers + 1) * width
    assert meter.weights == 2 * (4 * heads + 2 * slices + norms)
    assert (meter.itemsize, meter.copies) == (2, 4)


def test_int8_is_read_as_bytes() -> None:
    model = abstract_qwen(CONFIG, dtype="bfloat16")
    both = {"weights": Quantisation.INT8, "cache": Quantisation.INT8}
    layout = model_layout(model, mesh_of(1, 1, 1))
    whole = make_meter(layout, sampler=drawing_layout(model, layout.mesh))
    small = make_meter(layout, sampler=drawing_layout(quantise(model, **both), layout.mesh))
    assert (whole.itemsize, whole.own_itemsize) == (2, 2)
    assert (small.itemsize, small.own_itemsize) == (2, 1), "guides' and questions' keys stay wide"
    assert 0.5 < small.weights / whole.weights < 0.8, "matrices halve; norms do not"


def test_rounds_are_decoded_one_after_the_other(known: Peak) -> None:
    meter, tree = make_meter(_layout()), _tree(4)
    lengths = Lengths.of(tree)
    halves = [
        Lengths(lengths.guide, lengths.question[:, part], lengths.completion[:, part])
        for part in (slice(0, 2), slice(2, 4))
    ]
    kept = Tree(
        tree.guide,
        *(Level(x.tokens[:, :2], x.length[:, :2]) for x in (tree.question, tree.completion)),
    )
    found = meter.grpo(lengths, kept, GRPOSettings(questions=2), seconds=SECONDS)
    read = {"weights": meter.weights, "itemsize": 4}
    moved = sum(decode_bytes(CONFIG, half, **read) for half in halves)
    assert found["hbm_use"] == pytest.approx(moved / 0.5 / 1e8)
    none = GRPOSettings(questions=2, kl_coefficient=0.0)
    assert meter.grpo(lengths, kept, none, seconds=SECONDS)["tflops"] < found["tflops"]


def test_an_adapter_is_known_by_its_parameters() -> None:
    layout = model_layout(adapt(abstract_qwen(CONFIG), Lora(rank=3)), mesh_of(1, 1, 1))
    meter = make_meter(layout)
    assert meter.adapter == sum(shape.size for shape in layout.shapes.values())
    whole = dataclasses.replace(meter, adapter=0)
    assert _rate(meter) < _rate(whole)


def _rate(meter: Meter) -> float:
    return meter.sft(_tree(), seconds=1.0)["tflops"]
