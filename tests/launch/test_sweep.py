"""What sweep() may return, the members that come of it, and their names."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1re_jax.launch.sweep import (
    LONGEST_NAME,
    Member,
    SweepError,
    expand,
    flags_of,
    member_name,
    member_settings,
    with_overrides,
)
from tests.train.world import config

KEYS = st.from_regex(r"[a-z]{1,8}(\.[a-z_]{1,12}){0,3}", fullmatch=True)
SCALARS = st.one_of(
    st.integers(-1000, 1000),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.text(max_size=12),
)
LISTS = st.lists(SCALARS, min_size=1, max_size=4, unique_by=repr)


def overrides_of(given: object) -> list[dict[str, object]]:
    return [dict(member.overrides) for member in expand(given).members]


def test_the_examples_of_the_module() -> None:
    assert overrides_of({"grpo.group": [8, 16], "seed": [0, 1]}) == [
        {"grpo.group": 8, "seed": 0},
        {"grpo.group": 8, "seed": 1},
        {"grpo.group": 16, "seed": 0},
        {"grpo.group": 16, "seed": 1},
    ]
    zipped = {("grpo.group", "grpo.questions"): [(8, 64), (16, 32)]}
    assert overrides_of(zipped) == [
        {"grpo.group": 8, "grpo.questions": 64},
        {"grpo.group": 16, "grpo.questions": 32},
    ]
    listed = [{"grpo.loss": ["grpo", "gspo"]}, {"grpo.dual_clip": 3.0}]
    assert overrides_of(listed) == [
        {"grpo.loss": "grpo"},
        {"grpo.loss": "gspo"},
        {"grpo.dual_clip": 3.0},
    ]
    fixed = expand({"grpo.loss": "gspo", "grpo.clip_high": [0.2, 0.3]})
    assert [one.overrides["grpo.loss"] for one in fixed.members] == ["gspo", "gspo"]
    assert fixed.axes == (("grpo.clip_high",),), "what holds for all does not vary"


def test_axes_are_the_keys_that_vary_and_zips_stay_together() -> None:
    sweep = expand({("a.x", "a.y"): [(1, 2), (3, 4)], "b": [5], "seed": [0, 1]})
    assert sweep.axes == (("a.x", "a.y"), ("seed",))
    assert expand([{}, {"a.x": 1}, {"a.x": 2}]).axes == (("a.x",),)
    assert [one.name for one in expand([{}, {"a.x": 1}]).members] == ["recipe", "a.x=1"]


@given(st.dictionaries(KEYS, LISTS, min_size=1, max_size=3))
def test_a_product_has_every_combination_once_under_a_name_of_its_own(values) -> None:
    try:
        members = expand(values).members
    except SweepError as error:  # two values that a file system does not tell apart
        assert "twice" in str(error)
        return
    expected = [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]
    assert list(map(repr, (dict(one.overrides) for one in members))) == list(map(repr, expected))
    names = [one.name for one in members]
    assert len({name.casefold() for name in names}) == len(names)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9._+=,-]+", name) and len(name) <= LONGEST_NAME
        assert name[0] not in ".-"


@given(st.dictionaries(KEYS, SCALARS, min_size=1, max_size=4))
def test_a_name_depends_on_its_overrides_alone_and_not_on_their_order(overrides) -> None:
    name = member_name(overrides)
    assert name == member_name(dict(reversed(overrides.items())))
    changed = {key: f"{value}x" for key, value in overrides.items()}
    assert name != member_name(changed)


def test_names_are_read_as_the_flags_are() -> None:
    assert member_name({"seed": 1, "grpo.kl_coefficient": 1e-3}) == (
        "grpo.kl_coefficient=0.001,seed=1"
    )
    assert member_name({"model.path": "a/b"}).startswith("model.path=a_b-")
    assert member_name({"model.path": "a/b"}) != member_name({"model.path": "a_b"})
    long = {f"data.eval.set{i}.path": "x" * 30 for i in range(9)}
    assert len(member_name(long)) <= LONGEST_NAME
    assert flags_of({"grpo.loss": "gspo", "seed": 1}) == [
        "--config.grpo.loss=gspo",
        "--config.seed=1",
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "expected a mapping of dotted keys"),
        ([], "expected a mapping of dotted keys"),
        ([3], "has 3 in its list"),
        ({"a": []}, "gives a an empty list"),
        ({3: [1]}, "has the key 3"),
        ({"a b": [1]}, "has the key 'a b'"),
        ({("a", "b"): [(1, 2, 3)]}, "zips a, b and has (1, 2, 3); expected 2 values"),
        ({"a": [1], ("a", "b"): [(1, 2)]}, "gives a twice"),
        ({"a": [1, 1]}, "yields a=1 twice"),
        ({"a": ["x", "X"]}, "yields a=X twice"),
        ([{"a": 1}, {"a": [1, 2]}], "yields a=1 twice"),
    ],
)
def test_other_forms_are_refused(given: object, message: str) -> None:
    with pytest.raises(SweepError, match=re.escape(message)):
        expand(given)


def test_every_members_problems_are_told_once_with_the_nearest_match(tmp_path) -> None:
    def read(member: Member) -> dict[str, object]:
        return with_overrides(config(tmp_path), member.overrides)

    members = expand({"grpo.kl_coeficient": [0.0, 0.1], "seed": [0, 1]}).members
    with pytest.raises(SweepError) as caught:
        member_settings(members, read)
    text = str(caught.value)
    assert text.count("did you mean grpo.kl_coefficient?") == 1
    assert "and 3 more" in text
    members = expand({"grpo.kl_coefficient": [0.0, 0.1]}).members
    found = member_settings(members, read)
    assert [one.grpo.kl_coefficient for one in found.values()] == [0.0, 0.1]


def test_two_members_that_are_one_run_are_refused(tmp_path) -> None:
    def read(member: Member) -> dict[str, object]:
        return with_overrides(config(tmp_path), member.overrides)

    default = 0.2
    with pytest.raises(SweepError, match="recipe and grpo.clip_low=0.2 are the same run"):
        member_settings(expand([{}, {"grpo.clip_low": default}]).members, read)


def test_a_value_that_the_command_line_changes_is_refused(tmp_path) -> None:
    members = expand({"grpo.group": [4]}).members
    with pytest.raises(SweepError, match="grpo.group=4 comes to 2"):
        member_settings(members, lambda member: config(tmp_path))


def test_overrides_leave_the_recipe_as_it_was() -> None:
    recipe = {"grpo": {"group": 8}}
    assert with_overrides(recipe, {"grpo.group": 4, "reward.wrong": 0.0}) == {
        "grpo": {"group": 4},
        "reward": {"wrong": 0.0},
    }
    assert recipe == {"grpo": {"group": 8}}
    with pytest.raises(ValueError, match="group is a value and no section"):
        with_overrides(recipe, {"grpo.group.size": 4})
