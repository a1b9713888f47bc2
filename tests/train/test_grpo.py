"""GRPO steps: what they report, what they do not depend on, and when they refuse to update."""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest
from flax import nnx

from r1re_jax.model.qwen import abstract_qwen
from r1re_jax.model.tree import Tree
from r1re_jax.rl.correction import LOGP_DIFFERENCE
from r1re_jax.rl.scoring import completion_logp
from r1re_jax.task import tasks
from r1re_jax.task.lessons import Lesson
from r1re_jax.task.relations import Example
from r1re_jax.task.rewards import Verdict, relation_reward
from r1re_jax.train.drawing import question_ids
from r1re_jax.train.grpo import (
    GRPO,
    GRPOBlock,
    grpo_loss,
    make_grpo,
)
from r1re_jax.train.grpo_settings import GRPOSettings
from r1re_jax.train.optimizer import OptimizerSettings
from r1re_jax.train.state import TrainState, create_state, place_params
from r1re_jax.train.update import NonFiniteError, SamplerDriftError, StepResult
from tests.tiny import random_level, tiny_guide, tiny_model, tiny_policy
from tests.train.world import LIMITS, examples, layout_on, mesh_of, some_verdict, source

SETTINGS = GRPOSettings(
    steps=4,
    trees=2,
    questions=4,
    group=3,
    chunk=8,
    kl_coefficient=0.1,
    optimizer=OptimizerSettings(learning_rate=1e-2),
)
SHORT = dataclasses.replace(LIMITS, completion=12)


@pytest.fixture(autouse=True, scope="module")
def _spread_rewards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "relation_reward", some_verdict)
        yield


def _begin(
    settings: GRPOSettings = SETTINGS,
    *,
    mesh: tuple[int, int, int] = (1, 1, 1),
    first: int = 0,
    dtype: str = "float32",
) -> tuple[GRPO, TrainState]:
    layout, params = layout_on(mesh_of(*mesh), dtype=dtype)
    # A reference that is not the policy, so that the KL term has a gradient.
    other = {name: value * np.float32(1.1) for name, value in params.items()}
    phase = make_grpo(
        settings,
        limits=SHORT,
        encoder=tiny_policy().encoder,
        source=source(trees=settings.trees, questions=settings.questions_drawn),
        seed=5,
        first=first,
        layout=layout,
        reference=place_params(other, layout) if settings.kl_coefficient else None,
    )
    return phase, create_state(place_params(params, layout), phase.optimizer, layout)


def _do(phase: GRPO, state: TrainState, number: int = 1) -> StepResult:
    result = phase.step(state, number, tick=lambda note: None)
    return dataclasses.replace(result, state=jax.device_get(result.state))


@pytest.fixture(scope="module")
def whole() -> StepResult:
    return _do(*_begin())


def test_a_step_reports_itself(whole: StepResult) -> None:
    figures = whole.metrics
    rewards = np.array([[s["reward"] for s in row["samples"]] for row in whole.completions])
    assert rewards.shape == (8, 3)
    np.testing.assert_allclose(figures["reward"], rewards.mean())
    np.testing.assert_allclose(figures["reward_std"], rewards.std(ddof=1), rtol=1e-6)
    of_groups = rewards.std(1, ddof=1).mean()
    np.testing.assert_allclose(figures["reward_group_std"], of_groups, rtol=1e-6)
    np.testing.assert_allclose(figures["frac_reward_zero_std"], (np.ptp(rewards, 1) == 0).mean())
    tokens = np.array([[s["tokens"] for s in row["samples"]] for row in whole.completions])
    for figure in ("mean", "min", "max"):
        length = getattr(tokens, figure)()
        np.testing.assert_allclose(figures[f"completions/{figure}_length"], length)
    cut = np.array([[s["truncated"] for s in row["samples"]] for row in whole.completions])
    np.testing.assert_allclose(figures["completions/clipped_ratio"], cut.mean())
    assert figures["format_rate"] == figures["accuracy"] == 0
    assert figures["kl"] > 0 and figures["entropy"] > 0
    assert figures["clip_ratio/region_mean"] == figures["old_kl"] == 0, "on policy"
    assert figures["ratio"] == pytest.approx(1)
    gap, largest = (figures[f"{LOGP_DIFFERENCE}/{of}"] for of in ("mean", "max"))
    assert gap < largest < 1e-4, "sampler and trainer agree"
    assert figures["learning_rate"] == pytest.approx(1e-2)
    parts = [figures[f"step_time/{of}"] for of in "rollout reward reference update other".split()]
    assert figures["step_time"] == pytest.approx(sum(parts))
    assert figures["tflops"] > 0
    assert not {"mfu", "hbm_use"} & figures.keys(), "nobody states the peak of a CPU"
    assert all(np.isfinite(value) for value in figures.values())


def test_a_step_reports_each_relation(whole: StepResult) -> None:
    by_relation: dict[str, list[float]] = {}
    for row in whole.completions:
        rewards = [sample["reward"] for sample in row["samples"]]
        by_relation.setdefault(row["gold"].split("(")[0], []).extend(rewards)
    assert len(by_relation) > 1
    for relation, rewards in by_relation.items():
        figure = whole.metrics[f"relations/{relation}/reward"]
        np.testing.assert_allclose(figure, np.mean(rewards), rtol=1e-6)
        assert whole.metrics[f"relations/{relation}/accuracy"] == 0


def test_completions_are_written_as_predictions_are(whole: StepResult) -> None:
    row = whole.completions[0]
    lesson = source(trees=2, questions=4).lessons(0)[0]
    assert (row["id"], row["gold"]) == (lesson.examples[0].id, lesson.examples[0].label)
    assert row["samples"][0].keys() == {
        *("text", "predicted", "correct", "format_ok", "reward", "tokens", "truncated"),
        "advantage",
    }
    sums = [sum(sample["advantage"] for sample in row["samples"]) for row in whole.completions]
    np.testing.assert_allclose(sums, 0, atol=1e-5)


@pytest.mark.parametrize("micro_batch", [2, 4])
def test_micro_batches_change_nothing(whole: StepResult, micro_batch: int) -> None:
    result = _do(*_begin(dataclasses.replace(SETTINGS, micro_batch=micro_batch)))
    _same(result, whole)


def test_a_mesh_changes_nothing(whole: StepResult) -> None:
    _same(_do(*_begin(mesh=(2, 2, 2))), whole)


def test_several_updates_on_the_same_completions() -> None:
    settings = dataclasses.replace(SETTINGS, inner_iterations=3, clip_low=0.01, clip_high=0.01)
    phase, state = _begin(settings)
    before = jax.device_get(state.params)
    first = phase.step(state, 1, tick=lambda note: None)
    assert first.metrics["clip_ratio/region_mean"] > 0, "later ones are off policy"
    assert first.metrics["old_kl"] > 0
    assert first.metrics[f"{LOGP_DIFFERENCE}/max"] < 1e-4, "of the first update"
    second = phase.step(first.state, 2, tick=lambda note: None)
    assert int(second.state.opt_state[1][0].count) == 6
    assert not np.array_equal(before["embed"], second.state.params["embed"])
    programs = phase.programs
    assert programs.gradient._cache_size() == programs.apply._cache_size() == 1
    assert phase.score._cache_size() == 1, "policy and reference are scored by one program"


def test_on_policy_the_updates_own_forward_gives_the_old_log_probabilities() -> None:
    random = np.random.default_rng(0)
    tree = Tree(
        random_level(random, (1, 9), least=1),
        random_level(random, (1, 2, 5), least=1),
        random_level(random, (1, 2, 3, 6)),
    )
    model = tiny_model()
    logp = completion_logp(model, tree).logp_NPGC
    block = GRPOBlock(
        tree=tree,
        advantage_NPG=random.normal(size=(1, 2, 3)).astype(np.float32),
        weight_NPGC=np.full((1, 2, 3, 6), 0.1, np.float32),
        sampler_logp_NPGC=logp,
        ref_logp_NPGC=logp - 0.1,
    )
    graph, params = nnx.split(model)
    gradient = jax.jit(jax.grad(lambda p, b: grpo_loss(nnx.merge(graph, p), b, SETTINGS)[0]))
    both = [gradient(params, b) for b in (block, dataclasses.replace(block, old_logp_NPGC=logp))]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *both)


def test_without_a_kl_term_there_is_no_reference() -> None:
    phase, state = _begin(dataclasses.replace(SETTINGS, kl_coefficient=0.0))
    result = _do(phase, state)
    assert phase.reference is None and "kl" not in result.metrics
    with pytest.raises(ValueError, match="there is no reference"):
        make_grpo(
            SETTINGS,
            limits=SHORT,
            encoder=phase.drawing.encoder,
            source=phase.source,
            seed=0,
            first=0,
            layout=phase.layout,
            reference=None,
        )


def test_equal_rewards_update_nothing_but_by_the_kl_term(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "relation_reward", relation_reward)
    phase, state = _begin(dataclasses.replace(SETTINGS, kl_coefficient=0.0))
    before = jax.device_get(state.params)
    result = _do(phase, state)
    assert result.metrics["frac_reward_zero_std"] == 1 and result.metrics["grad_norm"] == 0
    np.testing.assert_array_equal(result.state.params["embed"], before["embed"])


def _flat_unless(named: set[str]) -> Callable[..., Verdict]:
    """Rewards that differ within the groups of the named examples only."""

    def judge(text: str, example: Example, schema: object, **_: object) -> Verdict:
        real = some_verdict(text, example, schema)
        return real if example.id in named else dataclasses.replace(real, reward=1.0)

    return judge


def _asked(settings: GRPOSettings) -> list[list[str]]:
    lessons = source(trees=settings.trees, questions=settings.questions_drawn).lessons(0)
    return [[example.id for example in lesson.examples] for lesson in lessons]


def test_groups_without_signal_give_their_place_to_fresh_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = dataclasses.replace(SETTINGS, trees=1, questions=2, refill=2, group=4)
    (names,) = _asked(settings)
    monkeypatch.setattr(tasks, "relation_reward", _flat_unless({names[1], names[2]}))
    result = _do(*_begin(settings))
    assert [row["id"] for row in result.completions] == [names[1], names[2]]
    figures = result.metrics
    assert figures["draws"] == 2, "the third round is not needed"
    assert (figures["groups_drawn"], figures["groups_dropped"]) == (4, 2)
    assert figures["groups_refilled"] == 1, "names[2] stands where names[0] was"
    assert figures["frac_reward_zero_std"] == 0.5, "of the four that were drawn"
    assert figures["frac_kept_zero_std"] == 0
    # The same as a step that was asked these two questions alone: keys follow the example.
    alone, state = _begin(dataclasses.replace(settings, refill=0))
    lesson = source(trees=1, questions=settings.questions_drawn).lessons(0)[0]
    fixed = _Fixed(Lesson(lesson.guide, lesson.examples[1:3]))
    _same(
        _do(
            dataclasses.replace(alone, drawing=dataclasses.replace(alone.drawing, source=fixed)),
            state,
        ),
        result,
        drawn=False,
    )


@pytest.mark.parametrize(("refill", "first"), [(0, "score"), (1, "judge")])
def test_the_device_scores_while_the_host_judges(
    refill: int, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores are asked for before completions are read, unless others may take their place."""
    heard = []

    def judge(*args: object, **more: object) -> Verdict:
        heard.append("judge")
        return some_verdict(*args, **more)

    monkeypatch.setattr(tasks, "relation_reward", judge)
    phase, state = _begin(dataclasses.replace(SETTINGS, refill=refill))

    def score(*args: object) -> jax.Array:
        heard.append("score")
        return phase.score(*args)

    dataclasses.replace(phase, score=score).step(state, 1, tick=lambda note: None)
    assert set(heard) == {"score", "judge"}
    assert heard[0] == first


def test_refilling_ends_with_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dataclasses.replace(SETTINGS, trees=2, questions=2, refill=1)
    names = _asked(settings)
    monkeypatch.setattr(tasks, "relation_reward", _flat_unless({names[0][3]}))
    result = _do(*_begin(settings))
    kept = [row["id"] for row in result.completions]
    assert kept == [names[0][0], names[0][3], names[1][0], names[1][1]]
    assert result.metrics["draws"] == 2
    assert [result.metrics[f"groups_{of}"] for of in ("drawn", "dropped", "refilled")] == [8, 4, 1]
    assert result.metrics["frac_kept_zero_std"] == 0.75


@dataclasses.dataclass(frozen=True)
class _Fixed:
    """One lesson for ever."""

    lesson: Lesson

    def lessons(self, step: int) -> tuple[Lesson, ...]:
        return (self.lesson,)


def test_a_loss_that_is_not_finite_stops_before_the_update(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad = Verdict(float("nan"), False, False, None, None)
    monkeypatch.setattr(tasks, "relation_reward", lambda *_, **__: bad)
    phase, state = _begin()
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        phase.step(state, 1, tick=lambda note: None)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_a_sampler_that_drifts_from_the_trainer_stops_the_run() -> None:
    phase, state = _begin(dataclasses.replace(SETTINGS, max_logp_gap=1e-12))
    with pytest.raises(SamplerDriftError, match="max_logp_gap = 1e-12"):
        phase.step(state, 1, tick=lambda note: None)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_a_step_can_be_given_up_at_every_part() -> None:
    phase, state = _begin(dataclasses.replace(SETTINGS, micro_batch=4))
    notes = []
    phase.step(_copy(state), 1, tick=notes.append)
    kinds = [note.split()[0] for note in notes]
    assert kinds == ["rollout"] * 3 + ["reference"] * 2 + ["reward"] * 8 + ["update"] * 2
    for place in (0, 4, 6, 11, 14):
        left = [place]

        def tick(note: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            phase.step(state, 1, tick=tick)
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_a_bfloat16_sampler_is_measured_against_the_trainer(whole: StepResult) -> None:
    phase, state = _begin(dtype="bfloat16")
    figures = _do(phase, state).metrics
    # Both round (see below) and, in a policy this small, to the same numbers: rounding hides the
    # order of their sums.
    assert 0 < figures[f"{LOGP_DIFFERENCE}/mean"] < figures[f"{LOGP_DIFFERENCE}/max"] < 0.5
    assert all(np.isfinite(value) for value in figures.values())
    assert state.params["embed"].dtype == np.float32


def test_the_compiled_bfloat16_forward_rounds() -> None:
    random = np.random.default_rng(0)
    tree = Tree(
        random_level(random, (1, 9), least=1),
        random_level(random, (1, 2, 5), least=1),
        random_level(random, (1, 2, 3, 6), least=6),
    )
    exact = tiny_model()
    params = nnx.split(exact)[1]
    logp = {}
    for dtype in ("float32", "bfloat16"):
        graph = nnx.split(abstract_qwen(exact.config, dtype=dtype))[0]
        scored = jax.jit(lambda p, t, g=graph: completion_logp(nnx.merge(g, p), t).logp_NPGC)
        logp[dtype] = np.asarray(scored(params, tree))
    gap = np.abs(logp["bfloat16"] - logp["float32"])
    assert 1e-3 < gap.mean() < gap.max() < 0.1, "2^-9, the rounding of bfloat16, is 2e-3"


def test_a_question_that_occurs_twice_in_a_step_is_refused() -> None:
    lesson = Lesson(tiny_guide(), examples(2))
    assert question_ids([lesson]).shape == (1, 2, 2)
    with pytest.raises(ValueError, match="2 questions occur twice in one step, 'e0' of 'Tiny'"):
        question_ids([lesson, lesson])


def test_the_learning_rate_starts_with_the_phase() -> None:
    warming = dataclasses.replace(SETTINGS.optimizer, warmup=4)
    phase, state = _begin(dataclasses.replace(SETTINGS, optimizer=warming), first=10)
    assert _do(phase, state, 11).metrics["learning_rate"] == pytest.approx(1e-2 / 4)


def _copy(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: x + 0, state)


def _same(result: StepResult, expected: StepResult, *, drawn: bool = True) -> None:
    """The same completions, and figures and parameters equal to rounding.

    Without `drawn`, figures of all that was drawn may differ: only what was kept is compared.
    """
    texts = [[s["text"] for s in row["samples"]] for row in result.completions]
    assert texts == [[s["text"] for s in row["samples"]] for row in expected.completions]
    for name in ("loss", "grad_norm", "kl", "entropy", *(["reward"] if drawn else [])):
        np.testing.assert_allclose(
            result.metrics[name], expected.metrics[name], rtol=2e-4, atol=1e-6, err_msg=name
        )
    for name, value in expected.state.params.items():
        np.testing.assert_allclose(result.state.params[name], value, atol=1e-4, err_msg=name)
