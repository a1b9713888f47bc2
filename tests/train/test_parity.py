"""The gate before the first step: what it lets through, and what it stops."""

import dataclasses
import functools
import itertools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from r1re_jax.model import qwen
from r1re_jax.model.config import Family
from r1re_jax.model.qwen import Qwen, abstract_qwen
from r1re_jax.model.tree import Level, Tree
from r1re_jax.policy import Policy
from r1re_jax.policy_files import load_policy
from r1re_jax.rl.scoring import completion_logp
from r1re_jax.task import miniworld
from r1re_jax.task.lessons import Lesson
from r1re_jax.train import parity as parity_module
from r1re_jax.train.data import open_training
from r1re_jax.train.parity import BANDS, Gap, Parity, ParityError, Way, band_of, in_three_ways
from r1re_jax.train.settings import Dtype
from r1re_jax.train.start import load_start
from r1re_jax.train.state import flat_params, model_layout, place_params
from tests.tiny import tiny_guide, tiny_policy
from tests.train import world
from tests.train.world import LIMITS, checkpoint_params, mesh_of, train

TOKENS = 10
# Where NumPy's float32 sums are in another order than XLA's.
ROUNDING = 1e-5


def _arguments(
    policy: Policy, *, mesh: tuple[int, int, int] = (1, 1, 1), dtype: str = "float32"
) -> dict[str, Any]:
    """What `measure` takes for two questions of a policy."""
    layout = model_layout(abstract_qwen(policy.config, dtype=dtype), mesh_of(*mesh))
    params = jax.device_get(flat_params(nnx.state(policy.model)))
    return {
        "layout": layout,
        "params": place_params(params, layout),
        "lesson": Lesson(tiny_guide(), world.examples(2)),
        "encoder": policy.encoder,
        "limits": LIMITS,
        "tokens": TOKENS,
        "seed": 0,
    }


def _measure(policy: Policy, **more: Any) -> Parity:
    return parity_module.measure(**_arguments(policy, **more))


@pytest.mark.parametrize("dtype", [*Dtype])
@pytest.mark.parametrize("family", [*Family])
def test_the_ways_agree_for_every_family(family: Family, dtype: Dtype) -> None:
    found = _measure(tiny_policy(family=family), dtype=dtype)
    assert found.ok and found.dtype is dtype and found.band == BANDS[dtype]
    found.require()
    assert [*found.gaps] == [*itertools.combinations(Way, 2)]
    assert TOKENS < found.tokens <= 4 * TOKENS
    rounded = dtype is Dtype.BFLOAT16
    for gap in found.gaps.values():
        assert 0 <= gap.mean <= gap.max < (0.2 if rounded else 1e-5)
    if rounded:
        assert found.gaps[Way.DECODE, Way.PREFILL].mean > 1e-5, "it is computed in bfloat16"


@pytest.mark.parametrize("dtype", [*Dtype])
def test_the_ways_agree_on_a_mesh(dtype: Dtype) -> None:
    policy = tiny_policy()
    spread = _measure(policy, mesh=(1, 2, 2), dtype=dtype)
    assert spread.ok
    if dtype is Dtype.FLOAT32:
        assert spread.tokens == _measure(policy).tokens, "the same draws as on one device"


def test_a_slow_oracle_gives_the_same_numbers() -> None:
    policy = tiny_policy(seed=3)
    arguments = _arguments(policy)
    tree, logp = in_three_ways(**arguments)
    expected = []
    for place in np.ndindex(tree.completion.length.shape):
        example = arguments["lesson"].examples[place[1]]
        row = policy.encoder.guide_tokens(tiny_guide()) + policy.encoder.question_tokens(example)
        first = len(row)
        row += [int(t) for t in tree.completion.tokens[place][: tree.completion.length[place]]]
        logits = policy.logits([row])[0].astype(np.float64)
        for token in range(first, len(row)):
            line = logits[token - 1]
            top = line.max()
            score = line[row[token]] - top - np.log(np.exp(line - top).sum())
            expected.append((place, token - first, score))
    for way in Way:
        for place, token, score in expected:
            assert abs(logp[way][place][token] - score) < ROUNDING, (way, place, token)
    found = parity_module.measure(**arguments)
    assert found.tokens == len(expected)
    for (one, other), gap in found.gaps.items():
        apart = [abs(float(logp[one][p][t]) - float(logp[other][p][t])) for p, t, _ in expected]
        assert gap.mean == pytest.approx(sum(apart) / len(apart), rel=1e-9)
        assert gap.max == max(apart)


def _later(self: Qwen, tokens: jax.Array, *, start: jax.Array, **more: Any) -> Any:
    """`decode` one position too late."""
    return _DECODE(self, tokens, start=start + 1, **more)


_DECODE = Qwen.decode


def _without_padding_masked(model: Qwen, tree: Tree) -> Any:
    """Scores as if the guide had no padding."""
    whole = jnp.full_like(tree.guide.length, tree.guide.tokens.shape[-1])
    guide = Level(tree.guide.tokens, whole)
    return completion_logp(model, Tree(guide, tree.question, tree.completion))


def _with_other_frequencies(model: Qwen, tree: Tree) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        turn = qwen.rotation
        patch.setattr(qwen, "rotation", lambda position, rate: turn(position, rate * 1.05))
        return completion_logp(model, tree)


# What is wrong -> what to put where, and the way that it makes differ from the others.
FAULTS = {
    "decode is one position late": (Qwen, "decode", _later, Way.DECODE),
    "scored at another temperature": (
        parity_module,
        "completion_logp",
        functools.partial(completion_logp, temperature=1.1),
        Way.TRAINING,
    ),
    "scored with padding seen": (
        parity_module,
        "completion_logp",
        _without_padding_masked,
        Way.TRAINING,
    ),
    "scored with other frequencies": (
        parity_module,
        "completion_logp",
        _with_other_frequencies,
        Way.TRAINING,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_one_way_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, wrong, way = FAULTS[fault]
    monkeypatch.setattr(where, name, wrong)
    # A model of its own: programs that are compiled already would not see the fault.
    theta = 9_000.0 + [*FAULTS].index(fault)
    found = _measure(tiny_policy(rope_theta=theta))
    assert not found.ok
    for pair, gap in found.gaps.items():
        assert gap.within(found.band) == (way not in pair), pair
    with pytest.raises(ParityError) as error:
        found.require()
    for pair, gap in found.gaps.items():
        assert f"{', '.join(pair)}: mean {gap.mean:.2e}, max {gap.max:.2e}" in str(error.value)
    assert "band: mean 1.00e-04, max 1.00e-03" in str(error.value)
    assert "model.dtype=float32" in str(error.value)
    assert "model.parity_tokens=0" in str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_fails(value: float) -> None:
    arguments = _arguments(tiny_policy())
    spoiled = np.array(arguments["params"]["layers.gate.weight"])
    spoiled[1, 2, 3] = value
    arguments["params"] = arguments["params"] | {"layers.gate.weight": jnp.asarray(spoiled)}
    found = parity_module.measure(**arguments)
    assert not found.ok
    with pytest.raises(ParityError, match="mean nan, max nan"):
        found.require()


@pytest.mark.parametrize(
    ("gap", "expected"),
    [
        (Gap(0.1, 0.5), True),
        (Gap(0.2, 0.5), False),
        (Gap(0.1, 0.6), False),
        (Gap(np.nan, 0.5), False),
        (Gap(0.1, np.nan), False),
        (Gap(0.1, -np.inf), False),
    ],
)
def test_both_numbers_must_be_within_the_band(gap: Gap, expected: bool) -> None:
    assert gap.within(Gap(0.1, 0.5)) == expected


def test_float32_is_held_to_its_band_only_where_products_are_float32() -> None:
    tight, coarse = BANDS[Dtype.FLOAT32], BANDS[Dtype.BFLOAT16]
    assert band_of(Dtype.FLOAT32, platform="cpu") == tight
    assert band_of(Dtype.FLOAT32, platform="tpu") == coarse
    for precision in parity_module.EXACT:
        with jax.default_matmul_precision(precision):
            assert band_of(Dtype.FLOAT32, platform="tpu") == tight
            assert band_of(Dtype.BFLOAT16, platform="tpu") == coarse
    with jax.default_matmul_precision("bfloat16"):
        assert band_of(Dtype.FLOAT32, platform="tpu") == coarse


def test_the_band_of_bfloat16_tells_rounding_from_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy("base:miniworld")
    (lesson,) = miniworld.source(trees=1, questions=2).lessons(0)
    arguments = _arguments(policy, dtype="bfloat16")
    arguments |= {"lesson": lesson, "limits": policy.limits, "tokens": 16}
    right = parity_module.measure(**arguments)
    assert right.ok
    assert max(gap.mean for gap in right.gaps.values()) > BANDS[Dtype.FLOAT32].mean
    monkeypatch.setattr(Qwen, "decode", _later)
    wrong = parity_module.measure(**{**arguments, "tokens": 15})
    assert not wrong.ok
    assert wrong.gaps[Way.TRAINING, Way.PREFILL].within(wrong.band)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return world.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scoring as the gate sees it is wrong; training's own is not."""
    wrong = functools.partial(completion_logp, temperature=1.5)
    monkeypatch.setattr(parity_module, "completion_logp", wrong)


def _one_step(inputs: pathlib.Path, **changes: Any) -> Any:
    return world.settings(inputs, sft__steps=1, grpo__steps=0, **changes)


@pytest.mark.usefixtures("broken")
def test_a_run_stops_before_anything_is_updated_or_written(
    inputs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    # A length of its own, for programs of its own.
    settings = _one_step(inputs, model__parity_tokens=7)
    with pytest.raises(ParityError, match="decode, training: mean .*, max "):
        train(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("broken")
def test_the_gate_can_be_switched_off(inputs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert train(_one_step(inputs, model__parity_tokens=0), tmp_path).step == 1
    assert checkpoint_params(tmp_path, 1)


def test_a_run_that_goes_on_is_not_held_up(
    inputs: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    measure = parity_module.measure
    monkeypatch.setattr(
        parity_module, "measure", lambda *args, **more: measured.append(1) or measure(*args, **more)
    )
    train(_one_step(inputs), tmp_path)
    train(world.settings(inputs, sft__steps=2, grpo__steps=0), tmp_path)
    assert len(measured) == 1, "where it began"


@pytest.mark.parametrize(("mesh", "expected"), [((1, 1, 1), 2), ((2, 2, 1), 4), ((1, 2, 1), 2)])
def test_the_mesh_shares_the_questions_evenly(
    inputs: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    mesh: tuple[int, int, int],
    expected: int,
) -> None:
    settings = _one_step(inputs, sft__questions=8)
    data = open_training(settings.data.train, seed=settings.seed)
    start = load_start(settings, mesh=mesh_of(*mesh), guides=data.guides, fresh=True)
    asked = []
    nothing = Parity(dtype=Dtype.FLOAT32, tokens=0, gaps={}, band=BANDS[Dtype.FLOAT32])
    monkeypatch.setattr(
        parity_module,
        "measure",
        lambda layout, params, lesson, **more: asked.append(lesson) or nothing,
    )
    parity_module.check_run(settings, data, start)
    first = data.source(1, 8).lessons(0)[0]
    assert asked == [dataclasses.replace(first, examples=first.examples[:expected])]
