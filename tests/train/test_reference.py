"""References that follow the policy: their formula, and that a restart finds them bit by bit."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1re_jax.task import tasks
from r1re_jax.train import reference as reference_module
from r1re_jax.train.grpo_settings import GRPOSettings, ReferenceSettings
from r1re_jax.train.reference import copied, followed
from tests.train import canned, world
from tests.train.world import StopAt, assert_bit_equal, checkpoint_params, metrics, train


def _policies(steps: int) -> list[dict[str, np.ndarray]]:
    """The policy at the phase's start, and after every step."""
    random = np.random.default_rng(0)
    return [
        {name: random.normal(size=3).astype(np.float32) for name in ("embed", "norm.weight")}
        for _ in range(steps + 1)
    ]


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_it_follows_by_its_formula(every: int, decay: float) -> None:
    policies = _policies(7)
    reference = copied(jax.tree.map(jnp.asarray, policies[0]))
    expected = {name: value.astype(np.float64) for name, value in policies[0].items()}
    settings = ReferenceSettings(every=every, decay=decay)
    for done, policy in enumerate(policies[1:], 1):
        reference = followed(reference, jax.tree.map(jnp.asarray, policy), settings, done=done)
        if done % every == 0:
            expected = {n: decay * expected[n] + (1 - decay) * policy[n] for n in policy}
        for name, value in expected.items():
            np.testing.assert_allclose(reference[name], value, rtol=1e-6)
        if not decay:
            last = policies[done - done % every]
            assert_bit_equal(jax.device_get(reference), last)


def test_it_has_buffers_of_its_own() -> None:
    params = {"embed": jnp.arange(3.0)}
    for reference in (
        copied(params),
        followed(copied(params), params, ReferenceSettings(every=1), done=1),
    ):
        assert reference["embed"].unsafe_buffer_pointer() != params["embed"].unsafe_buffer_pointer()


def test_a_frozen_one_stays() -> None:
    reference = {"embed": jnp.ones(2)}
    assert followed(reference, {}, ReferenceSettings(), done=5) is reference


def test_a_step_scores_under_it_and_then_moves_it() -> None:
    settings = GRPOSettings(
        steps=9, questions=2, group=2, reference=ReferenceSettings(every=2, decay=0.25)
    )
    seen = canned.Seen()
    with canned.canned(seen):
        phase, state = canned.phase_of(settings, seen, first=3)
        scored = []

        def score(params: dict, tree: object) -> np.ndarray:
            scored.append(float(params["embed"][0, 0]))
            return np.zeros((1, 2, 2, world.LIMITS.completion), np.float32)

        phase = dataclasses.replace(phase, score=score)
        assert phase.reference is None
        begin = float(state.params["embed"][0, 0])
        state = dataclasses.replace(state, reference=copied(state.params))
        for number in range(4, 9):  # an update of `canned` takes 0.5 from everything
            state = phase.step(state, number, tick=lambda note: None).state
    second = 0.25 * begin + 0.75 * (begin - 1.0)
    fourth = 0.25 * second + 0.75 * (begin - 2.0)
    np.testing.assert_allclose(scored, [begin, begin, second, second, fourth], rtol=1e-5)
    assert all(block.ref_logp_NPGC is not None for block in seen.blocks)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return world.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def _spread_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards that differ within a group, which those of random weights do not."""
    monkeypatch.setattr(tasks, "relation_reward", world.some_verdict)


def _reference(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    return checkpoint_params(workdir, step, item="reference")


@pytest.mark.usefixtures("_spread_rewards")
@pytest.mark.parametrize(
    "moves",
    [{"every": 2}, {"every": 1, "decay": 0.5}],
    ids=["synchronised", "averaged"],
)
def test_an_interrupted_run_equals_the_whole(
    inputs: pathlib.Path, tmp_path: pathlib.Path, moves: dict[str, float]
) -> None:
    settings = world.settings(
        inputs,
        sft__steps=1,
        grpo__steps=4,
        grpo__reference=moves,
        grpo__kl_coefficient=5.0,
        model__parity_tokens=0,
    )
    train(settings, tmp_path / "whole")
    assert not (tmp_path / "whole" / "reference").exists(), "it is in the checkpoints"
    stopped = tmp_path / "stopped"
    # In the first GRPO step; and in the fourth, between two moves of the synchronised one.
    for stop, step in ((StopAt("rollout", 1), 1), (StopAt("reference", 3), 3)):
        outcome = train(settings, stopped, poll=stop.poll, progress=stop)
        assert outcome.step == step
    assert train(settings, stopped).step == 5
    assert metrics(stopped) == metrics(tmp_path / "whole")
    for read in (checkpoint_params, _reference):
        assert_bit_equal(read(stopped, 5), read(tmp_path / "whole", 5))
    rows = [json.loads(line) for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    kl = [row["kl"] for row in rows if row["phase"] == "grpo"]
    assert kl[0] == pytest.approx(0, abs=1e-6), "it begins as the policy"
    if moves == {"every": 2}:
        assert kl[1] > 1e-6 and kl[2] == pytest.approx(0, abs=1e-6), "and is the policy again"
        assert_bit_equal(_reference(stopped, 5), checkpoint_params(stopped, 5))


@pytest.mark.usefixtures("_spread_rewards")
def test_the_moves_are_what_changes(
    inputs: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a reference that follows but does not move, a run is that with a frozen one."""
    shared = {"sft__steps": 0, "grpo__steps": 3, "model__parity_tokens": 0}
    train(world.settings(inputs, **shared), tmp_path / "frozen")
    still = lambda reference, params, settings, *, done: reference  # noqa: E731
    monkeypatch.setattr("r1re_jax.train.grpo.followed", still)
    moving = world.settings(inputs, **shared, grpo__reference={"every": 1})
    train(moving, tmp_path / "still")
    assert_bit_equal(*(checkpoint_params(tmp_path / of, 3) for of in ("frozen", "still")))
    monkeypatch.setattr("r1re_jax.train.grpo.followed", reference_module.followed)
    train(moving, tmp_path / "moving")
    rows = [metrics(tmp_path / of)[-1] for of in ("still", "moving")]
    assert rows[0]["kl"] > 1e-6 and rows[1]["kl"] == pytest.approx(0, abs=1e-6)
