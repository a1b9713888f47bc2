"""The model card: what the work directory says is in it, and nothing that it does not say."""

import dataclasses
import json
import pathlib
from typing import Any

import pytest
from huggingface_hub.repocard import metadata_load
from hypothesis import given
from hypothesis import strategies as st

from r1re_jax.policy_files import load_policy, save_policy, save_words
from r1re_jax.policy_source import PolicyError
from r1re_jax.report.ancestry import ancestors, licence_of
from r1re_jax.report.card import code, escaped, exported_step, model_card
from r1re_jax.task.prompts import PromptEncoder
from r1re_jax.task.templates import GuideInPrompt
from tests.tiny import tiny_policy

GUIDES = {"Tiny *guide*": "ab" * 32}


def card(source: pathlib.Path | str, **given: Any) -> str:
    """The card of a tiny policy."""
    policy = dataclasses.replace(tiny_policy(), guide_sha256=GUIDES)
    return model_card(policy, source, **{"name": "ann/tiny", **given})


def front_matter(text: str, place: pathlib.Path) -> dict[str, Any]:
    """What the hub reads."""
    (place / "card.md").write_text(text)
    return metadata_load(place / "card.md")


def configure(run: pathlib.Path, **sections: Any) -> None:
    """Change sections of a run's configuration."""
    content = json.loads((run / "config.json").read_text())
    content["config"] |= sections
    (run / "config.json").write_text(json.dumps(content))


@pytest.fixture
def run(workdir: pathlib.Path) -> pathlib.Path:
    """Four SFT steps, six of GRPO, evaluated at 0, 4, 7 and 10, with a policy and three steps."""
    save_words(tiny_policy(), workdir / "policy")
    for step in (4, 8, 10):
        (workdir / "checkpoints" / str(step) / "meta").mkdir(parents=True)
    (workdir / "checkpoints/10/meta/metadata").write_text(json.dumps({"scores": {"8": 1.0}}))
    content = json.loads((workdir / "config.json").read_text())
    content |= {
        "versions": {"r1re_jax": "0.1.0", "jax": "0.10.2"},
        "data": {
            str(workdir / "inputs" / "train.jsonl"): "12" * 32,
            "packaged:semeval2010_short": "34" * 32,
        },
    }
    (workdir / "config.json").write_text(json.dumps(content))
    sft = {"steps": 4, "trees": 2, "questions": 8, "learning_rate": 5e-6, "schedule": "constant"}
    grpo = {"steps": 6, "trees": 1, "questions": 32, "group": 16, "learning_rate": 1e-6}
    configure(workdir, sft=sft, grpo={**grpo, "refill": 0, "kl_coefficient": 0.001})
    return workdir


def test_the_front_matter_is_what_the_hub_reads(run: pathlib.Path) -> None:
    configure(run, model={"path": "Qwen/Qwen2.5-7B-Instruct"})
    assert front_matter(card(run, step=10), run) == {
        "license": "unknown",
        "base_model": "Qwen/Qwen2.5-7B-Instruct",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["r1re_jax", "relation-extraction", "sft", "grpo"],
    }
    assert front_matter(card(run, step=4), run)["tags"][-1] == "sft"


def test_data_of_the_hub_is_named_there(run: pathlib.Path) -> None:
    configure(run, data={"train": {"kind": "semeval2010", "path": ""}})
    found = front_matter(card(run, step=10), run)
    assert found["datasets"] == ["SemEvalWorkshop/sem_eval_2010_task_8"]
    configure(run, data={"train": {"kind": "semeval2010", "path": "own.txt"}})
    assert "datasets" not in front_matter(card(run, step=10), run)


def test_the_facts_are_the_runs(run: pathlib.Path) -> None:
    configure(run, model={"path": "base:miniworld"})
    lines = card(run, step=8, dtype="bfloat16").splitlines()
    expected = [
        "# ann/tiny",
        "- **Base model**: `base:miniworld`",
        "- **Architecture**: Qwen2, 15,952 parameters, weights in bfloat16",
        "- **Step**: 8",
        "- **Training data**: `train.jsonl` (SHA-256 `121212121212`), `packaged:semeval2010_short`"
        " (SHA-256 `343434343434`)",
        "- **Seed**: 5",
        r"- **Guide**: Tiny \*guide\* (SHA-256 `abababababab`)",
        "- **Configuration**: `0123456789abcdef`",
        "- **Versions**: r1re_jax 0.1.0, jax 0.10.2",
        "- **SFT**: 4 of 4 steps, 16 questions a step, learning rate 5e-06, `constant` schedule",
        "- **GRPO**: 4 of 6 steps, 32 questions a step, 16 completions of each, learning rate"
        " 1e-06, KL coefficient 0.001",
    ]
    assert [line for line in expected if line not in lines] == []
    assert str(run.parent) not in "\n".join(lines), "a path of this machine"


def test_the_reward_is_told_where_it_taught(run: pathlib.Path) -> None:
    assert "+3 for a right label, −0.5 for another one, −3 for a" in card(run, step=8)
    early = card(run, step=4)
    assert "A rule judges" not in early and "**GRPO**" not in early
    assert "None: these are the weights that the run began from." in card(run, step=0)


def test_the_reward_is_the_runs_own(run: pathlib.Path) -> None:
    configure(run, reward={"correct": 3.0, "wrong": -1.0, "malformed": -3.0})
    assert "+3 for a right label, −1 for another one, −3 for a" in card(run, step=8)


def test_options_of_the_algorithm_are_told_where_they_are_on(run: pathlib.Path) -> None:
    plain = card(run, step=8)
    off = {"dual_clip": 0.0, "entropy_coefficient": 0.0, "correction": "auto", "rewards": {}}
    off |= {"overlong_buffer": 0, "mask_truncated": False}
    grpo = json.loads((run / "config.json").read_text())["config"]["grpo"]
    configure(run, grpo=grpo | off)
    assert card(run, step=8) == plain
    on = {"dual_clip": 3.0, "entropy_coefficient": 0.01, "correction": "token_mask"}
    on |= {"overlong_buffer": 9, "mask_truncated": True, "rewards": {"format": 0.5}}
    configure(run, grpo=grpo | on)
    expected = (
        "dual clip 3, entropy coefficient 0.01, rewards `{'format': 0.5}`, penalty on the last 9"
        " tokens, completions that were cut off left out, off-policy correction `token_mask`"
    )
    assert expected in card(run, step=8)
    for reference, words in (
        ({"every": 5, "decay": 0.0}, "reference copied from the policy every 5 steps"),
        (
            {"every": 5, "decay": 0.9},
            "reference a moving average of the policy (decay 0.9, every 5 steps)",
        ),
    ):
        configure(run, grpo=grpo | off | {"reference": reference})
        assert words in card(run, step=8)
    configure(run, grpo=grpo | {"reference": reference, "kl_coefficient": 0.0})
    assert "moving average" not in card(run, step=8), "there was no KL term"


def test_a_card_shows_the_prompt_that_the_policy_knows(run: pathlib.Path) -> None:
    assert "guide = Path" in card(run, step=8) and ", guide, 'Sentence:'" in card(run, step=8)
    policy = tiny_policy()
    template = dataclasses.replace(policy.encoder.template, guide=GuideInPrompt.NONE)
    encoder = PromptEncoder(policy.tokenizer, template=template)
    text = model_card(dataclasses.replace(policy, encoder=encoder), run, name="ann/tiny", step=8)
    assert "guide = Path" not in text and ", guide," not in text


def test_scores_are_of_the_last_evaluation_up_to_the_step(run: pathlib.Path) -> None:
    text = card(run, step=10)
    assert (
        "| `in_domain` | 10 | 3 | 2 | – | 70.0% (65.0–75.0) | 90.0% | 71.0% | 87.5% | 61.2 |"
        " held out | – |"
    ) in text
    assert "| `ood` | 10 | 3 | 2 | – | 35.0% (30.0–40.0) |" in text
    assert "earlier weights" not in text
    earlier = card(run, step=8)
    assert "| `in_domain` | 7 | 3 | 2 | – | 55.0% (50.0–60.0) |" in earlier
    assert "Where the step is not 8, the figures are of earlier weights" in earlier


def test_a_table_keeps_its_columns_whatever_a_protocol_says(run: pathlib.Path) -> None:
    path = run / "eval/10-ood/metrics.json"
    metrics = json.loads(path.read_text())
    odd = {"protocol": "a|b\n\n# c <script>", "temperature": 1.0, "data_sha256": "f" * 64}
    path.write_text(json.dumps(metrics | odd))
    table = [line for line in card(run, step=10).splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert {line.replace(r"\|", "").count("|") for line in table} == {13}
    assert table[-1].endswith(r"| a\|b \# c \<script\> | SHA-256 `ffffffffffff` |")
    assert " | 2 | 1 | 35.0% " in table[-1]


def test_what_a_run_does_not_say_is_not_made_up(run: pathlib.Path) -> None:
    (run / "config.json").write_text("{}")
    (run / "eval").rename(run / "elsewhere")
    text = model_card(tiny_policy(), run, name="tiny", step=10)
    assert "- **Base model**: unknown" in text and "- **Training data**: unknown" in text
    assert "No evaluation of these weights or earlier ones" in text
    assert not [word for word in ("Seed", "Versions", "Guide**", "None**", "|--") if word in text]


def test_a_generated_world_and_random_weights_are_named(run: pathlib.Path) -> None:
    content = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**content, "data": {}}))
    configure(run, model={"preset": "nano"}, data={"train": {"kind": "miniworld"}})
    text = card(run, step=10)
    assert "- **Base model**: none: random weights of the shape `nano`" in text
    assert "- **Training data**: miniworld, generated" in text


def test_a_folder_without_a_run_has_a_short_card(tmp_path: pathlib.Path) -> None:
    save_policy(tiny_policy(), tmp_path / "plain", card="---\nlicense: mit\n---\n")
    text = model_card(load_policy(tmp_path / "plain"), tmp_path / "plain", name="again")
    assert front_matter(text, tmp_path) == {
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["r1re_jax"],
    }
    assert "`plain`, written anew by r1re_jax" in text
    assert "python -m run.extract --model=again" in text
    assert "## Training" not in text and "## Evaluation" not in text
    (tmp_path / "plain" / "r1re.json").unlink()
    text = model_card(load_policy(tmp_path / "plain"), tmp_path / "plain", name="again")
    assert "run.extract" not in text and "pipeline(" in text


def test_the_step_is_chosen_once(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert exported_step(run, None) == 8, "the best"
    assert exported_step(run, 4) == 4
    with pytest.raises(PolicyError, match=r"no checkpoint of step 5; there are \[4, 8, 10\]"):
        exported_step(run, 5)
    assert exported_step("base:miniworld", None) is None
    with pytest.raises(PolicyError, match="is no work directory, so it has no step 4"):
        exported_step("base:miniworld", 4)


# Licences.


def licence(source: pathlib.Path | str) -> tuple[Any, str]:
    """What is found without a flag."""
    found = licence_of("", ancestors(source))
    return found.fields["license"], found.origin


def run_from(place: pathlib.Path, path: str) -> pathlib.Path:
    """A work directory that began from something."""
    (place / "policy").mkdir(parents=True)
    (place / "config.json").write_text(json.dumps({"config": {"model": {"path": path}}}))
    return place


def hf_folder(place: pathlib.Path, metadata: str, *, ours: bool = False) -> str:
    """A model folder with a card."""
    place.mkdir()
    (place / "README.md").write_text(f"---\n{metadata}\n---\n# It\n")
    if ours:
        (place / "r1re.json").write_text("{}")
    return str(place)


def test_a_flag_wins(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    configure(run, model={"path": "base:miniworld"})
    text = card(run, step=10, licence="cc-by-4.0")
    assert front_matter(text, tmp_path)["license"] == "cc-by-4.0"
    assert text.endswith("## Licence\n\ncc-by-4.0, as given at the export.\n")
    text = card(run, step=10)
    assert text.endswith("apache-2.0, that of base:miniworld, by its model card.\n")


def test_the_base_models_own_terms_come_along(tmp_path: pathlib.Path) -> None:
    terms = "license: other\nlicense_name: qwen-research\nlicense_link: https://x.test/LICENSE"
    base = hf_folder(tmp_path / "base", terms)
    found = licence_of("", ancestors(run_from(tmp_path / "run", base)))
    assert found.name == "other (qwen-research, https://x.test/LICENSE)"
    text = card(tmp_path / "run", step=1)
    assert front_matter(text, tmp_path)["license_link"] == "https://x.test/LICENSE"
    assert r"other (qwen-research, https://x.test/LICENSE), that of base, by its" in text


def test_runs_lead_back_to_what_the_first_began_from(tmp_path: pathlib.Path) -> None:
    base = hf_folder(tmp_path / "base", "license: [mit, apache-2.0]\nbase_model: other/model")
    first = run_from(tmp_path / "first", base)
    second = run_from(tmp_path / "second", str(first))
    assert licence(second) == (["mit", "apache-2.0"], "that of base, by its model card")
    assert "- **Base model**: `run first`, which began from `base`" in card(second, step=1)
    # What a foreign folder calls its base is not what we trained; what an export of ours does, is.
    assert [one.hub for one in ancestors(second)] == ["", ""]
    ours = hf_folder(tmp_path / "ours", "base_model: other/model", ours=True)
    assert ancestors(run_from(tmp_path / "third", ours))[-1].hub == "other/model"


def test_runs_that_began_from_each_other_end(tmp_path: pathlib.Path) -> None:
    run_from(tmp_path / "a", str(tmp_path / "b"))
    run_from(tmp_path / "b", str(tmp_path / "a"))
    assert licence(tmp_path / "a") == ("unknown", "")


@pytest.mark.parametrize("metadata", ["license: [", "- a", "tags: []", "license: ''"])
def test_a_card_that_says_nothing_leaves_it_unknown(metadata: str, tmp_path: pathlib.Path) -> None:
    base = hf_folder(tmp_path / "base", metadata)
    assert licence(run_from(tmp_path / "run", base)) == ("unknown", "")
    assert "Unknown: none was given" in card(tmp_path / "run", step=1)


def test_a_hub_models_card_is_asked(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = hf_folder(tmp_path / "there", "license: apache-2.0")

    def download(name: str, file: str) -> str:
        if name != "some/model":
            raise OSError("offline")
        return f"{there}/{file}"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    known = run_from(tmp_path / "known", "some/model")
    assert licence(known) == ("apache-2.0", "that of some/model, by its model card")
    unknown = run_from(tmp_path / "unknown", "other/model")
    assert licence(unknown) == ("unknown", "")
    assert ancestors(unknown)[0].hub == "other/model"


@pytest.mark.parametrize("path", ["/gone/with/it", "base:gone", "gone", "../up/gone"])
def test_a_base_that_is_gone_is_named_without_its_path(path: str, tmp_path: pathlib.Path) -> None:
    found = ancestors(run_from(tmp_path / "run", path))
    assert [(one.name, one.hub) for one in found] == [(path.split("/")[-1], "")]


# Text.


@given(st.text())
def test_any_text_stays_on_its_line(text: str) -> None:
    for shown in (escaped(text), code(text)):
        assert len(shown.splitlines()) <= 1
        assert "|" not in shown.replace(r"\|", "")


@given(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1))
def test_any_licence_is_read_as_it_was_given(
    tmp_path_factory: pytest.TempPathFactory, licence: str
) -> None:
    text = model_card(tiny_policy(), "base:miniworld", name="tiny", licence=licence)
    assert front_matter(text, tmp_path_factory.getbasetemp())["license"] == licence
