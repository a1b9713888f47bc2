"""Settings: what is refused, what survives a round trip, and what a run may change."""

import copy
import pathlib
from typing import Any

import pytest
from ml_collections import ConfigDict

from r1re_jax.train.config import (
    SAFE_KEYS,
    SettingsError,
    configuration_hash,
    differences,
    flat_keys,
    is_safe,
    read_settings,
    resolved,
)
from r1re_jax.train.grpo_settings import GRPOSettings
from r1re_jax.train.settings import Phase, SFTSettings
from tests.train.world import config


def _config(**changes: Any) -> dict[str, Any]:
    return config(pathlib.Path("/inputs"), **changes)


def _problems(values: dict[str, Any]) -> str:
    with pytest.raises(SettingsError) as error:
        read_settings(values)
    return str(error.value)


def test_config_dict_and_dict_give_the_same_and_survive_a_round_trip() -> None:
    settings = read_settings(ConfigDict(_config()))
    assert settings == read_settings(_config())
    assert read_settings(resolved(settings)) == settings
    assert configuration_hash(read_settings(resolved(settings))) == configuration_hash(settings)


def test_defaults_are_those_of_the_paper() -> None:
    grpo = GRPOSettings(steps=400)
    assert (grpo.questions, grpo.group, grpo.optimizer.learning_rate) == (32, 16, 1e-6)
    assert (grpo.kl_coefficient, grpo.clip_low, grpo.clip_high) == (0.001, 0.2, 0.2)
    assert (grpo.temperature, SFTSettings().optimizer.learning_rate) == (1.0, 5e-6)
    assert SFTSettings().trees * SFTSettings().questions == 16


def test_a_phase_keeps_its_own_default_where_only_another_key_is_given() -> None:
    settings = read_settings(_config(sft={"steps": 1, "warmup": 1}))
    assert settings.sft.optimizer.learning_rate == 5e-6
    assert settings.sft.optimizer.warmup == 1


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("grpo__lerning_rate", "unknown key grpo.lerning_rate; did you mean grpo.learning_rate?"),
        ("learning_rate", "unknown key learning_rate; did you mean sft.learning_rate?"),
        ("grpoo", "unknown key grpoo; did you mean grpo?"),
        ("zzz", "unknown key zzz; there are seed, model"),
        ("data__eval__held__limits", "unknown key data.eval.held.limits; did you mean"),
    ],
)
def test_unknown_keys_are_named_with_the_nearest(key: str, expected: str) -> None:
    assert expected in _problems(_config(**{key: 1}))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("seed", "one", "seed is 'one', a str; expected an integer"),
        ("seed", True, "seed is True, a bool; expected an integer"),
        ("limits__guide", 3.0, "limits.guide is 3.0, a float; expected an integer"),
        ("grpo__learning_rate", "1e-6", "expected a number"),
        ("grpo__learning_rate", None, "grpo.learning_rate is None, a NoneType; expected a number"),
        ("evaluate__at_start", 1, "expected True or False"),
        ("grpo__loss", "gspoo", "did you mean 'gspo'?"),
        ("grpo__schedule", 3, "expected one of constant, linear, cosine"),
        ("mesh", 8, "mesh is 8; expected a section with keys"),
        ("data__eval", [], "data.eval is []; expected a section with keys"),
    ],
)
def test_wrong_types_are_refused(key: str, value: object, expected: str) -> None:
    assert expected in _problems(_config(**{key: value}))


def test_an_integer_stands_for_a_number() -> None:
    assert read_settings(_config(grpo__learning_rate=1)).grpo.optimizer.learning_rate == 1.0


def test_all_problems_are_told_at_once() -> None:
    values = _config(sed=1, grpo__grop=2)
    del values["limits"], values["data"]["train"]["kind"]
    text = _problems(values)
    assert text.startswith("4 problem(s)")
    assert "limits is missing; expected a section" in text
    assert "data.train.kind is missing; expected one of jsonl, semeval2010, miniworld" in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"grpo__group": 1}, "it must be at least 2"),
        ({"grpo__refill": -1}, "refill is -1; it must be at least 0"),
        ({"sft__cycle": -1}, "cycle is -1; it must be at least 0"),
        ({"grpo__top_p": 0.9}, "would bias the gradient"),
        ({"grpo__top_k": 5}, "would bias the gradient"),
        ({"grpo__min_p": 0.1}, "would bias the gradient"),
        ({"grpo__temperature": 0}, "it must be above 0"),
        ({"grpo__questions": 6, "grpo__micro_batch": 4}, "it must divide 6"),
        ({"grpo__questions": 6, "grpo__micro_batch": 9}, "a multiple of 6 that divides 6"),
        ({"sft__trees": 4, "sft__questions": 2, "sft__micro_batch": 6}, "that divides 8"),
        ({"grpo__clip_low": 1.5}, "clip_low"),
        ({"grpo__dual_clip": 0.5}, "dual_clip is 0.5"),
        ({"grpo__correction_limit": 0.5}, "correction_limit is 0.5"),
        ({"grpo__correction": "tis"}, "expected one of auto, none, token_truncate"),
        ({"grpo__reference": {"every": -1}}, "every is -1"),
        ({"grpo__reference": {"decay": 0.9}}, "give every=1 for a moving average"),
        ({"grpo__reference": {"every": 1, "decay": 1.0}}, "decay is 1.0; it must be in [0, 1)"),
        ({"grpo__reference": {"every": 1}, "grpo__kl_coefficient": 0.0}, "there is no reference"),
        ({"grpo__rewards": {"fomat": 1}}, "the parts are total, format, answer, length"),
        (
            {"grpo__rewards": {"format": "1"}},
            "grpo.rewards.format is '1', a str; expected a number",
        ),
        ({"grpo__overlong_buffer": 57}, "a completion has 56 at most"),
        ({"grpo__learning_rate": -1.0}, "learning_rate is -1.0; it must be at least 0"),
        ({"grpo__b1": 1.0}, "b1 is 1.0; it must be in [0, 1)"),
        ({"grpo__warmup": -1}, "warmup is -1"),
        ({"grpo__decay_steps": 5}, "the schedule is constant"),
        ({"grpo__schedule": "linear", "grpo__warmup": 9, "grpo__decay_steps": 5}, "must exceed"),
        ({"grpo__max_logp_gap": 0}, "max_logp_gap"),
        ({"sft__steps": 0, "grpo__steps": 0}, "nothing to train"),
        ({"sft__steps": -1}, "steps is -1"),
        ({"model": {}}, "give model.path"),
        ({"model__parity_tokens": -1}, "parity_tokens is -1; it must be at least 0"),
        ({"tokenizer": "somewhere"}, "model.path brings its own"),
        ({"model": {"preset": "nano"}}, "give `tokenizer`"),
        ({"limits__guide": 0}, "limits.guide is 0"),
        ({"evaluate__samples": 2, "evaluate__temperature": 0}, "all are equal"),
        ({"evaluate__batch": 0}, "batch is 0"),
        ({"checkpoint__keep": 0}, "keep is 0"),
        ({"checkpoint__best": "held/loss"}, "expected SET/METRIC"),
        ({"checkpoint__best": "other/accuracy"}, "expected SET/METRIC"),
        ({"checkpoint__best": "held/greedy_accuracy"}, "evaluate.greedy"),
        ({"log__every": 0}, "every is 0"),
        ({"reward": {"wrong": 4.0}}, "a right label must earn the most"),
        ({"data__guide_in_prompt": "half"}, "expected one of whole, none"),
        ({"data__extra": {"more": {"kind": "jsonl", "weight": 0}}}, "weight is 0.0"),
        ({"data__extra": {"more": {"kind": "jsonl", "limits": None}}}, "unknown key"),
        ({"data__eval": {"a/b": {"kind": "jsonl"}}}, "eval set 'a/b'"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], expected: str) -> None:
    assert expected in _problems(_config(**changes))


@pytest.mark.parametrize("micro_batch", [0, 1, 2, 4, 8, 16])
def test_micro_batches_that_tile_a_step_are_taken(micro_batch: int) -> None:
    assert SFTSettings(trees=4, questions=4, micro_batch=micro_batch).micro_batch == micro_batch


def _other(value: Any) -> Any:
    """A value of the same type."""
    if isinstance(value, bool):
        return not value
    if value is None:
        return {"guide": 9}
    return {str: f"{value}x", int: 7, float: 0.375, dict: {"relations": 3}}[type(value)]


# Keys whose values come from a list or depend on each other.
_PAIRED = {
    "model.dtype": {"model__dtype": "bfloat16"},
    "model.remat": {"model": {"path": "/inputs/base", "remat": "layer"}},
    "grpo.advantage": {"grpo__advantage": "rloo"},
    "grpo.loss": {"grpo__loss": "gspo"},
    "grpo.kl": {"grpo__kl": "k2"},
    "grpo.dual_clip": {"grpo__dual_clip": 3.0},
    "grpo.correction_limit": {"grpo__correction_limit": 7.0},
    "grpo.correction": {"grpo__correction": "token_mask"},
    "grpo.rewards": {"grpo__rewards": {"format": 1.0}},
    "sft.thoughts": {"sft__thoughts": "none"},
    "sft.schedule": {"sft__schedule": "cosine"},
    "grpo.schedule": {"grpo__schedule": "cosine"},
    "checkpoint.best": {"checkpoint__best": "held/accuracy"},
    "data.guide_in_prompt": {"data__guide_in_prompt": "none"},
    "data.extra": {"data__extra": {"more": {"kind": "jsonl", "path": "/inputs/more.jsonl"}}},
    "reward.correct": {"reward": {"correct": 7.0}},
    "reward.wrong": {"reward": {"wrong": -1.0}},
    "reward.malformed": {"reward": {"malformed": -7.0}},
    "data.train.kind": {"data__train__kind": "semeval2010"},
    "data.eval.held.kind": {"data__eval__held__kind": "semeval2010"},
    "sft.micro_batch": {"sft__micro_batch": 1},
    "grpo.micro_batch": {"grpo__micro_batch": 1},
    "grpo.micro_group": {"grpo__micro_group": 1},
    "model.attention": {"model__attention": "xla"},
    **{f"{of}.first_moment": {f"{of}__first_moment": "bfloat16"} for of in ("sft", "grpo")},
    **{f"grpo.quantise.{of}": {"grpo__quantise": {of: "int8"}} for of in ("weights", "cache")},
    "data.train.options": {"data__train__options": {"relations": 3}},
    "data.eval.held.options": {"data__eval__held__options": {"relations": 3}},
    "task": {"task": "triplets"},
    **{
        f"triplets.{name}": {"task": "triplets", "triplets": {name: value}}
        for name, value in (
            *(("highest", 1.0), ("lowest", 0.0), ("malformed", -1.0)),
            *(("entity_weight", 0.5), ("triplet_weight", 0.5)),
        )
    },
}
_NEUTRAL = {"grpo.top_k", "grpo.top_p", "grpo.min_p"}
# Set with what they belong to, in `_WITH` or below.
_LENGTHS = {"sft.decay_steps", "grpo.decay_steps"}
_KEYS = sorted(dict(flat_keys(resolved(read_settings(_config())))).keys() - _NEUTRAL - _LENGTHS)
# Keys that have a meaning beside another one alone.
_WITH = {
    "grpo.overlong_weight": {"grpo__overlong_buffer": 7},
    "grpo.reference.decay": {"grpo__reference": {"every": 7}},
}


@pytest.mark.parametrize("key", _KEYS)
def test_every_key_is_in_the_hash_unless_it_is_safe(key: str) -> None:
    base = read_settings(_config(**_WITH.get(key, {})))
    values = copy.deepcopy(resolved(base))
    changes = _PAIRED.get(key)
    if changes is None:
        *path, last = key.split(".")
        section = values
        for name in path:
            section = section[name]
        section[last] = _other(section[last])
        if key == "tokenizer":
            values["model"] = {**values["model"], "path": "", "preset": "nano"}
        changed = read_settings(values)
    else:
        changed = read_settings(_config(**changes))
    assert changed != base
    same = configuration_hash(changed) == configuration_hash(base)
    assert same == is_safe(key), f"{key}: safe is {is_safe(key)}"
    told = differences(resolved(base), resolved(changed))
    assert any(name == key or name.startswith(f"{key}.") for name in told)


def test_the_safe_keys_are_keys() -> None:
    known = [key for key, _ in flat_keys(resolved(read_settings(_config())))]
    for safe in SAFE_KEYS:
        assert any(key == safe or key.startswith(safe + ".") for key in known), safe


def test_a_schedule_has_a_length_that_extending_a_run_does_not_change() -> None:
    short = read_settings(_config(grpo__schedule="cosine", grpo__steps=4))
    longer = read_settings(_config(grpo__schedule="cosine", grpo__steps=8))
    kept = read_settings(_config(grpo__schedule="cosine", grpo__steps=8, grpo__decay_steps=4))
    assert short.grpo.optimizer.decay_steps == 4
    assert configuration_hash(short) != configuration_hash(longer)
    assert configuration_hash(short) == configuration_hash(kept)
    tried = read_settings(_config(grpo__schedule="cosine", grpo__steps=4, grpo__warmup=9))
    assert tried.grpo.optimizer.decay_steps == 10, "a phase cut short by flag still runs"
    constant = read_settings(_config(grpo__steps=8))
    assert configuration_hash(constant) == configuration_hash(read_settings(_config()))


def test_steps_are_counted_through_both_phases() -> None:
    settings = read_settings(_config(sft__steps=2, grpo__steps=3))
    assert settings.steps == 5
    assert [settings.phase_of(step) for step in range(1, 6)] == [Phase.SFT] * 2 + [Phase.GRPO] * 3
    assert settings.phases == {Phase.SFT: settings.sft, Phase.GRPO: settings.grpo}
    assert [*read_settings(_config(sft__steps=0)).phases] == [Phase.GRPO]


def test_what_is_of_triplets_needs_the_task() -> None:
    totals = {"triplets": {"entity_weight": 0.0}}
    settings = read_settings(_config(task="triplets", **totals))
    assert settings.task_rules.totals.entity_weight == 0.0
    assert settings.task_rules.totals.triplet_weight == 2.0
    assert "the section triplets is of task=triplets; remove it" in _problems(_config(**totals))
    assert "triplets: entity_weight and triplet_weight are -1.0" in _problems(
        _config(task="triplets", triplets={"entity_weight": -1})
    )
    assert "did you mean 'triplets'?" in _problems(_config(task="triplet"))
    best = {"checkpoint__best": "held/triplet_f1"}
    assert read_settings(_config(task="triplets", **best)).checkpoint.best == "held/triplet_f1"
    assert "checkpoint.best is 'held/triplet_f1'" in _problems(_config(**best))
