"""Runs that extract triplets: trained, evaluated, reported, exported and asked, from files."""

import importlib.util
import itertools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from r1re_jax.annotate import extract
from r1re_jax.evaluate import evaluate
from r1re_jax.policy import Policy
from r1re_jax.policy_files import load_policy, save_policy
from r1re_jax.policy_source import PolicyError
from r1re_jax.report.card import model_card
from r1re_jax.report.html import write_report
from r1re_jax.task.prompts import PromptEncoder
from r1re_jax.task.relations import DataError, Guide, GuideError, parse_guide
from r1re_jax.task.tasks import TRIPLETS, TaskKind, TripletTask
from r1re_jax.task.templates import TRIPLET_TEMPLATE
from r1re_jax.task.triplets.completions import triplet_completion
from r1re_jax.task.triplets.examples import Entity, Triplet, TripletExample
from r1re_jax.task.triplets.readers import write_triplets
from r1re_jax.task.triplets.rewards import TripletTotals
from r1re_jax.train.config import read_settings
from r1re_jax.train.data import open_sets, open_training
from r1re_jax.train.data_settings import DataKind, EvalSetSettings, SourceSettings
from tests.tiny import tiny_policy
from tests.train import world

ROOT = pathlib.Path(__file__).resolve().parents[2]
GUIDE = """# Fond

## Entities

- **person**: who is fond.
- **thing**: what of.

## Relations

- **Likes(X = person, Y = thing)**: X is fond of Y.
"""
LIMITS = {"guide": 560, "question": 40, "completion": 200}


def examples(count: int) -> list[TripletExample]:
    """One sentence again and again, so that a canned answer is as good for each."""
    entities = Entity("Ann", 0, 3, "person"), Entity("tea", 10, 13, "thing")
    triplets = (Triplet(0, 1, "Likes"),)
    return [
        TripletExample(f"e{number}", "Ann likes tea.", entities, triplets, reasoning="so")
        for number in range(count)
    ]


def guide() -> Guide:
    return parse_guide(GUIDE)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """base/ (a policy for marked pairs), train.jsonl, test.jsonl and guide.md."""
    folder = tmp_path_factory.mktemp("triplets")
    save_policy(tiny_policy(tied=True, max_position=1024), folder / "base")
    write_triplets(folder / "train.jsonl", examples(8))
    write_triplets(folder / "test.jsonl", examples(3))
    (folder / "guide.md").write_text(GUIDE)
    return folder


def _config(inputs: pathlib.Path, **changes: Any) -> dict[str, Any]:
    given = {"task": "triplets", "limits": LIMITS, "triplets": {"malformed": -2.0}}
    evaluated = {"every": 0, "samples": 2, "batch": 2, "at_start": False, "greedy": True}
    best = {"every": 1, "keep": 2, "best": "held/triplet_f1"}
    return world.config(inputs, **given, evaluate=evaluated, checkpoint=best, **changes)


def _answers() -> Callable[..., str]:
    """What completions say in place of a random policy's tokens: right, half right, malformed."""
    right = triplet_completion(examples(1)[0])
    wrong = '{"head": "tea", "relation": "Likes", "tail": "Ann"}'
    half = right.replace('"triplets": [', f'"triplets": [{wrong}, ')
    texts = itertools.cycle([right, half, "hm"])
    return lambda self, tokens: next(texts)


@pytest.fixture(scope="module")
def run(inputs: pathlib.Path) -> pathlib.Path:
    """The work directory of two SFT steps and two of GRPO, with canned completions."""
    workdir = inputs / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptEncoder, "decode", _answers())
        outcome = world.train(read_settings(_config(inputs)), workdir)
    assert (outcome.step, outcome.stopped) == (4, None)
    return workdir


def _rows(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_both_phases_say_what_was_extracted(run: pathlib.Path) -> None:
    rows = world.metrics(run)
    assert [row["phase"] for row in rows] == ["sft", "sft", "grpo", "grpo"]
    for row in rows[2:]:
        assert 0 < row["entity_f1"] < 100 and 0 < row["triplet_f1"] < 100
        assert -2.0 < row["reward"] < 3.0
    figures = {"eval/held/triplet_f1", "eval/held/entity_f1", "eval/held/strict_triplet_f1"}
    assert figures <= set(rows[-1])
    assert rows[-1]["eval/held/greedy_accuracy"] <= 1.0


def test_completions_and_predictions_have_one_frame(run: pathlib.Path) -> None:
    keys = {"text", "predicted", "correct", "format_ok", "reward", "tokens", "truncated"}
    gold = {example.id: example.answer for example in examples(8)}
    rewards = []
    files = {"completions/4.jsonl": {"advantage"}, "eval/4-held/predictions.jsonl": set()}
    for path, more in files.items():
        rows = _rows(run / path)
        assert rows and all(row["gold"] == gold[row["id"]] for row in rows)
        for sample in (sample for row in rows for sample in row["samples"]):
            assert set(sample) == keys | more
            assert (sample["predicted"] is None) == (not sample["format_ok"])
            rewards.append(sample["reward"])
    assert {-2.0, 3.0} < set(rewards)
    asked = json.loads((run / "eval/4-held/evaluate.json").read_text())
    assert asked["sentences"]["e0"] == "Ann likes tea."
    assert asked["asked"]["rewards"]["malformed"] == -2.0
    metrics = json.loads((run / "eval/4-held/metrics.json").read_text())
    assert metrics["entities"]["n"] == 6 and metrics["triplets"]["n"] == 3
    assert metrics["majority_accuracy"] == 1.0


def test_the_policy_knows_its_task(run: pathlib.Path, inputs: pathlib.Path) -> None:
    policy = load_policy(run)
    assert policy.encoder.task.kind is TaskKind.TRIPLETS
    assert policy.encoder.template == TRIPLET_TEMPLATE
    save_policy(policy, inputs / "exported")
    recipe = json.loads((inputs / "exported" / "r1re.json").read_text())
    assert recipe["task"] == "triplets"
    again = load_policy(inputs / "exported")
    assert again.encoder.task == policy.encoder.task
    assert again.encoder.template == TRIPLET_TEMPLATE
    totals = TripletTotals(malformed=-2.0)
    assert again.encoder.task == TripletTask(totals), "what the run's completions earned"
    (inputs / "exported" / "r1re.json").write_text(json.dumps(recipe | {"task": "poems"}))
    with pytest.raises(PolicyError, match="poems"):
        load_policy(inputs / "exported")


def test_a_report_shows_the_figures(run: pathlib.Path) -> None:
    page = write_report(run).read_text()
    for shown in ("Entity F1", "Triplet F1", "triplets with the types of both ends", "thing"):
        assert shown in page
    assert "{&#34;entities&#34;: [{&#34;text&#34;: &#34;Ann&#34;" in page
    assert "Confusion" not in page
    assert (run / "curves" / "triplet_f1.png").is_file()


def test_a_model_card_says_what_is_extracted(run: pathlib.Path) -> None:
    text = model_card(load_policy(run), run, name="ann/tiny", step=4)
    assert "extracts entities and relations" in text and "marked pair" not in text
    assert "−2 for a malformed answer" in text
    assert "−0.5 (nothing right) to +3 (all right)" in text
    assert "weighted 1 and 2" in text
    assert "| Entity F1 | Triplet F1 | Strict F1 |" in text
    assert '--task=triplets "A full disk stopped the queue."' in text
    assert "<e1>" not in text


def test_the_run_goes_on_and_refuses_another_task(
    run: pathlib.Path, inputs: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PromptEncoder, "decode", _answers())
    assert world.train(read_settings(_config(inputs)), run).step == 4
    other = _config(inputs) | {"triplets": {"malformed": -1.0}}
    with pytest.raises(ValueError, match=r"triplets\.malformed"):
        world.train(read_settings(other), run)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy(tied=True, max_position=1024).for_task(TRIPLETS)


def _say(monkeypatch: pytest.MonkeyPatch, texts: Sequence[str]) -> None:
    said = iter(texts)
    monkeypatch.setattr(PromptEncoder, "decode", lambda self, tokens: next(said))


def test_extract_lists_entities_and_triplets(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    (right,) = map(triplet_completion, examples(1))
    _say(monkeypatch, [right, "hm"])
    asked = [TRIPLETS.asked("Ann likes tea.", id=str(number)) for number in range(2)]
    limits = world.Limits(**{**LIMITS, "completion": 4})
    first, second = extract(policy, asked, guide(), batch=2, limits=limits)
    assert list(first) == ["entities", "triplets", "reasoning", "text", "problem"]
    assert {key: first[key] for key in ("entities", "triplets")} == examples(1)[0].answer
    assert (first["reasoning"], first["text"], first["problem"]) == ("so", right, None)
    assert (second["entities"], second["problem"]) == (None, "no_think")
    with pytest.raises(GuideError, match="names no entity types"):
        next(extract(policy, asked, parse_guide("# T\n" + GUIDE[GUIDE.index("## Rel") :])))


def test_evaluation_refuses_what_the_guide_lacks(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = parse_guide(GUIDE.replace("**thing**", "**object**"))
    with pytest.raises(DataError, match="example e0: the guide has no entity type 'thing'"):
        evaluate(policy, examples(2), other, name="t")


def _source(inputs: pathlib.Path, **changes: Any) -> SourceSettings:
    files = {"path": str(inputs / "train.jsonl"), "guide": str(inputs / "guide.md")}
    return SourceSettings(**{"kind": DataKind.JSONL, **files, **changes})


def test_sources_follow_the_task(inputs: pathlib.Path) -> None:
    data = open_training(_source(inputs), seed=0, task=TRIPLETS)
    (known,) = data.known
    assert list(known.examples) == examples(8)
    drawn = open_training(
        SourceSettings(kind=DataKind.MINIWORLD, options={}), seed=4, task=TRIPLETS
    )
    lesson = drawn.source(1, 2).lessons(0)[0]
    assert isinstance(lesson.examples[0], TripletExample)
    options = {"domain": "medical", "count": 3}
    held = EvalSetSettings(kind=DataKind.MINIWORLD, options=options)
    assert len(open_sets({"held": held}, task=TRIPLETS)["held"].examples) == 3
    with pytest.raises(DataError, match="semeval2010 has marked pairs, which the task triplets"):
        open_training(_source(inputs, kind=DataKind.SEMEVAL2010), seed=0, task=TRIPLETS)
    with pytest.raises(DataError, match=r"train\.jsonl:1: .*'head' is missing"):
        open_training(_source(inputs), seed=0)


def test_the_recipe_runs_from_the_base_policy(tmp_path: pathlib.Path) -> None:
    path = ROOT / "configs" / "miniworld_triplets.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    read_settings(config)  # as it stands
    # The same with little to compute: short guides, plain sentences, few of everything.
    stage = config.data.train.options.stages[0]
    stage.update(fewest=2, most=2, distractors=0.0, none_share=0.0, spelled=0.0, plain=True)
    config.data.train.limits.update(guide=400, question=32, completion=160)
    config.limits.completion = 32
    config.sft.update(steps=2, warmup=1, trees=1, questions=2)
    config.grpo.update(steps=2, warmup=1, trees=1, questions=2, group=2)
    for name in config.data.eval:
        config.data.eval[name].limit = 2
    config.evaluate.batch = 2
    config.log.completions = 1
    assert world.train(read_settings(config), tmp_path / "run").step == 4
    rows = world.metrics(tmp_path / "run")
    assert [row["phase"] for row in rows] == ["sft", "sft", "grpo", "grpo"]
    assert rows[1]["loss"] < rows[0]["loss"]
    assert "eval/ood/triplet_f1" in rows[-1]
    assert len(_rows(tmp_path / "run" / "completions" / "4.jsonl")) == 2
