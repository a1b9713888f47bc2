"""Evaluation: figures by hand, files, resuming, independence of batches."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator

import numpy as np
import pytest
from flax import nnx

from r1re_jax import evaluate as evaluate_module
from r1re_jax.annotate import Completion, Draw, annotate, extract, read_prompts
from r1re_jax.evaluate import evaluate, majority_accuracy, weights_fingerprint
from r1re_jax.model.tree import LimitError
from r1re_jax.policy import Limits, Policy
from r1re_jax.policy_files import load_policy, save_policy
from r1re_jax.predictions import EvaluationError
from r1re_jax.rollout import decode
from r1re_jax.sharding import make_mesh
from r1re_jax.task.relations import DataError
from tests.tiny import tiny_examples, tiny_guide, tiny_policy

LIMITS = Limits(guide=448, question=128, completion=10)


@pytest.fixture(scope="module")
def policy() -> Policy:
    """Random weights: every completion is malformed, no two samples are alike."""
    return tiny_policy()


def _texts(folder: pathlib.Path) -> dict[str, list[str]]:
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["id"]: [sample["text"] for sample in row["samples"]] for row in rows}


def _run(policy: Policy, out: pathlib.Path, **settings: object) -> dict:
    count = settings.pop("count", 5)
    fixed = {"name": "tiny", "samples": 2, "batch": 2, "limits": LIMITS}
    return evaluate(policy, tiny_examples(count), tiny_guide(), out=out, **{**fixed, **settings})


def test_files_are_as_documented(policy: Policy, tmp_path: pathlib.Path) -> None:
    seen: list[tuple[int, int]] = []
    chunks: list[int] = []
    metrics = _run(
        policy,
        tmp_path,
        model="M",
        protocol="held out",
        data_sha256="abc",
        chunk=4,
        on_batch=lambda done, total: seen.append((done, total)),
        on_chunk=lambda progress: chunks.append(progress.tokens),
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert len(chunks) >= 3
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["e0", "e1", "e2", "e3", "e4"]
    assert [row["gold"] for row in rows] == [example.label for example in tiny_examples(5)]
    for row in rows:
        assert set(row) == {"id", "gold", "samples"}
        assert len(row["samples"]) == 2
        for sample in row["samples"]:
            keys = "text predicted correct format_ok reward tokens truncated".split()
            assert list(sample) == keys
            assert 1 <= sample["tokens"] <= 10
    given = {"n": 5, "k": 2, "temperature": 1.0, "protocol": "held out", "model": "M"}
    given |= {"data_sha256": "abc", "name": "tiny", "step": 0, "seed": 0, "majority_accuracy": 0.4}
    assert {key: metrics[key] for key in given} == given
    note = json.loads((tmp_path / "evaluate.json").read_text())
    assert note["sentences"]["e0"] == "<e1>Ann</e1> likes <e2>tea</e2>."


def test_figures_by_hand(
    policy: Policy, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = "<think>so</think><answer>{}</answer>"
    answers = {  # of e0 … e3: samples, then the greedy one
        "e0": (["Likes(e1,e2)", "Likes(e1,e2)"], "Likes(e1,e2)"),
        "e1": (["Likes(e1,e2)", "Likes(e2,e1)"], "Likes(e2,e1)"),
        "e2": (["Other", "Near"], "Near"),
        "e3": ([None, "Near"], "Near"),
    }

    def canned(policy, prompts, draw, *, first=0) -> Iterator:
        for example in prompts.examples[first:]:
            sampled, once = answers[example.id]
            given = sampled if draw.samples == 2 else [once]
            assert draw.temperature == (1.0 if draw.samples == 2 else 0.0)
            texts = ["lost" if label is None else right.format(label) for label in given]
            yield [(example, [Completion(text, 7, False) for text in texts])]

    monkeypatch.setattr(evaluate_module, "annotate", canned)
    metrics = _run(policy, tmp_path, count=4, greedy=True)
    assert metrics["accuracy"] == 0.25
    assert metrics["avg_at_k"] == 0.5
    assert metrics["pass_at_k"] == 0.75
    assert metrics["greedy_accuracy"] == 0.75
    assert metrics["format_rate"] == 7 / 8
    assert metrics["mean_reward"] == pytest.approx((4 * 3 - 3 * 0.5 - 3) / 8)
    assert metrics["majority_accuracy"] == 0.25
    assert metrics["confusion"]["Other"] == {"malformed": 1}
    low, high = metrics["ci95"]
    assert 0 <= low < 0.5 < high <= 1
    assert len(_texts(tmp_path / "greedy")) == 4
    once = _run(policy, tmp_path / "once", count=4, samples=1, greedy=True)
    assert once["greedy_accuracy"] == once["accuracy"] == 0.75
    assert not (tmp_path / "once" / "greedy").exists()


def test_batch_size_and_order_change_no_sample(policy: Policy, tmp_path: pathlib.Path) -> None:
    _run(policy, tmp_path / "by 2")
    _run(policy, tmp_path / "by 3", batch=3, chunk=3)
    assert _texts(tmp_path / "by 2") == _texts(tmp_path / "by 3")
    back = tiny_examples(5)[::-1]
    settings = {"name": "tiny", "samples": 2, "batch": 2, "limits": LIMITS}
    evaluate(policy, back, tiny_guide(), out=tmp_path / "back", **settings)
    assert _texts(tmp_path / "by 2") == _texts(tmp_path / "back")


def test_seed_step_and_name_change_samples(policy: Policy, tmp_path: pathlib.Path) -> None:
    _run(policy, tmp_path / "base")
    for name, change in (("seed", {"seed": 1}), ("step", {"step": 1}), ("name", {"name": "b"})):
        _run(policy, tmp_path / name, **change)
        assert _texts(tmp_path / name) != _texts(tmp_path / "base")


def test_more_samples_keep_the_first(policy: Policy, tmp_path: pathlib.Path) -> None:
    _run(policy, tmp_path / "2")
    _run(policy, tmp_path / "3", samples=3)
    both = zip(_texts(tmp_path / "2").values(), _texts(tmp_path / "3").values(), strict=True)
    assert all(two == three[:2] for two, three in both)


def test_greedy_takes_no_random_numbers(policy: Policy, tmp_path: pathlib.Path) -> None:
    for seed in (0, 1):
        metrics = _run(policy, tmp_path / str(seed), samples=1, seed=seed)
        assert metrics["temperature"] == 0.0
    assert _texts(tmp_path / "0") == _texts(tmp_path / "1")


@pytest.mark.parametrize("torn", [b"", b'{"id": "e2", "go'])
def test_an_interrupted_evaluation_goes_on_to_the_same_end(
    policy: Policy, tmp_path: pathlib.Path, torn: bytes
) -> None:
    whole = _run(policy, tmp_path / "whole", greedy=True)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _run(policy, tmp_path / "parts", greedy=True, on_batch=stop)
    path = tmp_path / "parts" / "predictions.jsonl"
    assert path.read_bytes().count(b"\n") == 2
    path.write_bytes(path.read_bytes() + torn)
    seen: list[int] = []
    resumed = _run(
        policy, tmp_path / "parts", greedy=True, on_batch=lambda done, total: seen.append(done)
    )
    assert seen == [4, 5, 2, 4, 5]  # what was left of the samples, and the greedy ones
    assert resumed == whole
    assert path.read_bytes() == (tmp_path / "whole" / "predictions.jsonl").read_bytes()
    again = _run(policy, tmp_path / "parts", greedy=True, on_batch=stop)  # nothing left to draw
    assert again == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 3}, r"seed is 0 there and 3 here"),
        ({"temperature": 0.5}, r"temperature is 1\.0 there and 0\.5 here"),
        ({"samples": 3}, r"samples is 2 there and 3 here"),
        ({"count": 4}, r"examples is \w{12}… there"),
        ({"limits": dataclasses.replace(LIMITS, completion=9)}, r"completion_limit is 10 there"),
    ],
)
def test_a_folder_of_other_settings_is_refused_untouched(
    policy: Policy, tmp_path: pathlib.Path, change: dict, message: str
) -> None:
    _run(policy, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(EvaluationError, match=message):
        _run(policy, tmp_path, **change)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_of_another_policy_is_refused(policy: Policy, tmp_path: pathlib.Path) -> None:
    _run(policy, tmp_path)
    with pytest.raises(EvaluationError, match=r"weights is \w{12}… there and \w{12}… here"):
        _run(tiny_policy(seed=1), tmp_path)


def test_other_batches_may_go_on(policy: Policy, tmp_path: pathlib.Path) -> None:
    metrics = _run(policy, tmp_path)
    assert _run(policy, tmp_path, batch=4, chunk=5) == metrics


def test_predictions_of_unknown_origin_are_refused(policy: Policy, tmp_path: pathlib.Path) -> None:
    (tmp_path / "predictions.jsonl").write_text("{}\n")
    with pytest.raises(EvaluationError, match=r"without evaluate\.json"):
        _run(policy, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]


@pytest.mark.parametrize("line", ["oops\n", '{"id": "e9", "samples": [{}, {}]}\n', "[1]\n"])
def test_foreign_lines_are_refused_by_number(
    policy: Policy, tmp_path: pathlib.Path, line: str
) -> None:
    _run(policy, tmp_path)
    path = tmp_path / "predictions.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], line, *lines[2:]]))
    with pytest.raises(EvaluationError, match=r"predictions\.jsonl:2: expected 2 samples of .*e1"):
        _run(policy, tmp_path)


def test_what_cannot_be_evaluated_is_refused(policy: Policy, tmp_path: pathlib.Path) -> None:
    out, guide, examples = tmp_path / "out", tiny_guide(), tiny_examples(2)
    blank = dataclasses.replace(examples[0], label="")
    strange = dataclasses.replace(examples[0], label="Hates(e1,e2)")
    for given, settings, error, message in (
        ([], {}, EvaluationError, "no examples"),
        (examples, {"samples": 0}, EvaluationError, "at least 1"),
        (examples, {"samples": 2, "temperature": 0.0}, EvaluationError, "all be equal"),
        ([*examples, examples[0]], {}, EvaluationError, "1 ids occur more than once.*'e0'"),
        ([blank], {}, EvaluationError, "example e0 has no gold label"),
        ([strange], {}, DataError, "Hates"),
    ):
        with pytest.raises(error, match=message):
            evaluate(policy, given, guide, name="tiny", out=out, **settings)
    assert not out.exists()


def test_prompts_over_a_limit_are_counted_and_nothing_is_written(
    policy: Policy, tmp_path: pathlib.Path
) -> None:
    lengths = [len(policy.encoder.question_tokens(example)) for example in tiny_examples(5)]
    limits = Limits(guide=448, question=sorted(lengths)[-3], completion=10)
    with pytest.raises(LimitError, match=rf"2 of 5 questions .* \(e4\) has {max(lengths)}"):
        _run(policy, tmp_path / "out", limits=limits)
    with pytest.raises(LimitError, match=r"1 of 1 guides .* \(Tiny\)"):
        _run(policy, tmp_path / "out", limits=dataclasses.replace(limits, guide=5))
    assert not (tmp_path / "out").exists()


def test_the_guide_is_computed_once_and_one_program_serves_all_batches(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels: list[int] = []

    def prefill(*args: object, **kwargs: object) -> object:
        levels.append(1)
        return decode.prefill(*args, **kwargs)

    monkeypatch.setattr("r1re_jax.annotate.prefill", prefill)
    before = decode.start_state._cache_size()
    prompts = read_prompts(policy, tiny_examples(5), tiny_guide(), limits=LIMITS)
    draw = Draw(dataset="tiny", samples=3, temperature=0.7, batch=2)
    rows = [row for batch in annotate(policy, prompts, draw) for row in batch]
    assert [example.id for example, _ in rows] == ["e0", "e1", "e2", "e3", "e4"]
    assert levels == [1]
    assert decode.start_state._cache_size() == before + 1


def test_fingerprint_follows_every_parameter(policy: Policy) -> None:
    params = nnx.state(policy.model)
    whole = weights_fingerprint(params)
    assert weights_fingerprint(nnx.state(tiny_policy().model)) == whole
    model = tiny_policy().model
    model.norm.weight[...] = model.norm.weight[...] * np.float32(1 + 1e-6)
    assert weights_fingerprint(nnx.state(model)) != whole


def test_a_mesh_changes_neither_samples_nor_fingerprint(
    policy: Policy, tmp_path: pathlib.Path
) -> None:
    whole = _run(policy, tmp_path / "whole", batch=8)
    save_policy(policy, tmp_path / "policy")
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    spread = load_policy(tmp_path / "policy", mesh=mesh)
    _run(spread, tmp_path / "spread", batch=8, mesh=mesh)
    assert _texts(tmp_path / "spread") == _texts(tmp_path / "whole")
    assert _run(spread, tmp_path / "whole", batch=8, mesh=mesh) == whole  # goes on in its folder


def test_majority_counts_every_accepted_label() -> None:
    examples = tiny_examples(4)
    assert majority_accuracy(examples) == 0.25
    examples[0] = dataclasses.replace(examples[0], labels=("Near",))
    assert majority_accuracy(examples) == 0.5


def test_extract_reads_labels_in_order(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = iter(
        [
            "<think>fond of it</think><answer>Likes(e1, e2)</answer>",
            "<think>hm</think><answer>Hates(e1,e2)</answer>",
            "no idea",
        ]
    )
    monkeypatch.setattr(type(policy.encoder), "decode", lambda self, tokens: next(texts))
    found = list(extract(policy, tiny_examples(3), tiny_guide(), batch=2, limits=LIMITS))
    assert [row["label"] for row in found] == ["Likes(e1,e2)", None, None]
    assert [row["problem"] for row in found] == [None, "unknown_relation", "no_think"]
    assert [row["reasoning"] for row in found] == ["fond of it", "hm", None]
    assert found[2]["text"] == "no idea"
    assert list(found[0]) == ["label", "reasoning", "text", "problem"]
