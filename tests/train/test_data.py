"""What a run trains and evaluates on: every kind opened in one place, every limit checked first."""

import dataclasses
import pathlib
from typing import Any

import pytest

from r1re_jax.model.tree import LimitError
from r1re_jax.task.lessons import Lesson
from r1re_jax.task.readers import write_jsonl
from r1re_jax.task.relations import DataError, GuideError
from r1re_jax.train.data import check_prompts, open_mixture, open_sets, open_training
from r1re_jax.train.data_settings import (
    DataKind,
    DataSettings,
    EvalSetSettings,
    ExtraSettings,
    SourceSettings,
)
from tests.tiny import GUIDE, tiny_policy
from tests.train import world


@pytest.fixture
def inputs(tmp_path: pathlib.Path) -> pathlib.Path:
    write_jsonl(tmp_path / "train.jsonl", world.examples())
    write_jsonl(tmp_path / "test.jsonl", world.examples(3))
    (tmp_path / "guide.md").write_text(GUIDE)
    return tmp_path


def _source(inputs: pathlib.Path, **changes: Any) -> SourceSettings:
    return SourceSettings(**{**_files(inputs), **changes})


def _set(inputs: pathlib.Path, **changes: Any) -> EvalSetSettings:
    return EvalSetSettings(**{**_files(inputs), **changes})


def _files(inputs: pathlib.Path) -> dict[str, Any]:
    train, guide = inputs / "train.jsonl", inputs / "guide.md"
    return {"kind": DataKind.JSONL, "path": str(train), "guide": str(guide)}


def test_jsonl_with_a_guide(inputs: pathlib.Path) -> None:
    data = open_training(_source(inputs), seed=1)
    (known,) = data.known
    assert len(known.examples) == 16 and known.guide.title == "Tiny" and data.complete
    lessons = data.source(2, 3).lessons(0)
    assert [len(lesson.examples) for lesson in lessons] == [3, 3]
    assert lessons == data.source(2, 3).lessons(0)
    assert lessons != open_training(_source(inputs), seed=2).source(2, 3).lessons(0)
    assert len(data.sha256) == 2, "data and guide"
    (inputs / "guide.md").write_text(GUIDE.replace("fond", "proud"))
    changed = open_training(_source(inputs), seed=1).sha256
    assert [changed[name] == hash for name, hash in data.sha256.items()].count(False) == 1


def test_sets_are_cut_only_where_asked(inputs: pathlib.Path) -> None:
    sets = open_sets({"all": _set(inputs), "few": _set(inputs, limit=2)})
    assert [len(one.examples) for one in sets.values()] == [16, 2]
    assert sets["few"].examples == sets["all"].examples[:2]
    assert len(sets["all"].sha256) == 64


def test_the_official_text_form_has_a_packaged_guide(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "train.txt"
    path.write_text(
        '1\t"A <e1>flood</e1> after <e2>rain</e2>."\nCause-Effect(e2,e1)\nComment: none\n\n'
    )
    official = _source(tmp_path, kind=DataKind.SEMEVAL2010, path=str(path), guide="")
    data = open_training(official, seed=0)
    (known,) = data.known
    assert known.examples[0].label == "Cause-Effect(e2,e1)"
    assert "Cause-Effect(e2,e1)" in known.guide.schema
    same = dataclasses.replace(official, guide="packaged:semeval2010_short")
    assert open_training(same, seed=0).guides == data.guides


def test_the_hub_is_asked_where_no_path_is_given(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        "r1re_jax.train.data.load_hub_semeval2010",
        lambda split: asked.append(split) or list(world.examples(2)),
    )
    hub = {"kind": DataKind.SEMEVAL2010, "path": "", "guide": ""}
    assert open_training(_source(tmp_path, **hub), seed=0).sha256 == {}
    assert open_sets({"test": _set(tmp_path, **hub)})["test"].sha256 == ""
    assert asked == ["train", "test"]


@pytest.mark.parametrize(
    ("changes", "error", "expected"),
    [
        ({"path": "absent.jsonl"}, DataError, "no data file 'absent.jsonl'"),
        ({"path": ""}, DataError, "needs `path`"),
        ({"guide": ""}, DataError, "needs `guide`, a Markdown file or packaged:NAME"),
        ({"guide": "packaged:absent"}, DataError, "no packaged guide 'absent'"),
        ({"options": {"relations": 3}}, DataError, "has no options"),
    ],
)
def test_what_cannot_be_opened_is_named(
    inputs: pathlib.Path, changes: dict, error: type, expected: str
) -> None:
    with pytest.raises(error, match=expected):
        open_training(_source(inputs, **changes), seed=0)


def test_a_guide_without_relations_and_a_bad_line_are_named(inputs: pathlib.Path) -> None:
    (inputs / "bare.md").write_text("# Bare\n\n## Relations\n")
    with pytest.raises(GuideError, match="bare.md.*no relations"):
        open_training(_source(inputs, guide=str(inputs / "bare.md")), seed=0)
    lines = (inputs / "train.jsonl").read_text().splitlines()
    (inputs / "bad.jsonl").write_text("\n".join([*lines[:3], lines[3].replace("Ann", "Bob", 1)]))
    with pytest.raises(DataError, match="bad.jsonl:4"):
        open_training(_source(inputs, path=str(inputs / "bad.jsonl")), seed=0)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"guide": 20}, "1 of 1 guides"),
        ({"question": 20}, "16 of 16 questions"),
        ({"completion": 20}, "16 of 16 completions"),
    ],
)
def test_every_limit_is_checked_before_the_run(
    inputs: pathlib.Path, limits: dict, expected: str
) -> None:
    settings = world.settings(inputs, **{f"limits__{k}": v for k, v in limits.items()})
    data = open_training(settings.data.train, seed=0)
    with pytest.raises(LimitError, match=expected):
        check_prompts(data, [], encoder=tiny_policy().encoder, settings=settings)


def test_training_may_have_narrower_levels_of_its_own(inputs: pathlib.Path) -> None:
    wide = world.settings(inputs)
    narrow = dataclasses.asdict(wide.limits) | {"question": 20}
    settings = world.settings(inputs, data__train__limits=narrow)
    assert (wide.training_limits, settings.training_limits.question) == (wide.limits, 20)
    assert settings.limits == wide.limits
    encoder = tiny_policy().encoder
    data = open_training(settings.data.train, seed=0)
    with pytest.raises(LimitError, match="16 of 16 questions"):
        check_prompts(data, [], encoder=encoder, settings=settings)
    sets = [*open_sets(settings.data.eval).values()]
    check_prompts(dataclasses.replace(data, known=()), sets, encoder=encoder, settings=settings)


def test_evaluation_sets_are_checked_too(inputs: pathlib.Path) -> None:
    settings = world.settings(inputs, limits__question=40)
    sets = open_sets(settings.data.eval)
    data = dataclasses.replace(open_training(settings.data.train, seed=0), known=())
    with pytest.raises(LimitError, match="of 3 questions"):
        check_prompts(data, [*sets.values()], encoder=tiny_policy().encoder, settings=settings)


def test_training_examples_need_labels(inputs: pathlib.Path) -> None:
    settings = world.settings(inputs)
    data = open_training(settings.data.train, seed=0)
    (known,) = data.known
    blank = dataclasses.replace(known.examples[1], label="")
    data = dataclasses.replace(data, known=(Lesson(known.guide, (known.examples[0], blank)),))
    with pytest.raises(DataError, match="1 of 2 training examples have no label, e1 first"):
        check_prompts(data, [], encoder=tiny_policy().encoder, settings=settings)


def test_miniworld_makes_lessons_as_they_are_asked_for() -> None:
    stages = [{"until": 5, "kinds": ["invented"], "fewest": 2, "most": 3}]
    settings = SourceSettings(kind=DataKind.MINIWORLD, options={"stages": stages})
    data = open_training(settings, seed=4)
    lessons = data.source(2, 3).lessons(1)
    assert [len(lesson.examples) for lesson in lessons] == [3, 3]
    assert data.known == () and not data.complete
    sets = open_sets(
        {
            name: EvalSetSettings(
                kind=DataKind.MINIWORLD, limit=5, options={"domain": name, "count": 7}
            )
            for name in ("general", "medical")
        }
    )
    assert [len(one.examples) for one in sets.values()] == [5, 5]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"stage": []}, "unknown option 'stage' of miniworld; did you mean 'stages'?"),
        ({"seed": 3}, "unknown option 'seed' of miniworld"),
        ({"stages": [{"untl": 3, "kinds": []}]}, "untl"),
    ],
)
def test_options_of_miniworld_are_checked(options: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        open_training(SourceSettings(kind=DataKind.MINIWORLD, options=options), seed=0)


def _other(inputs: pathlib.Path, *, title: str = "Other guide") -> dict[str, Any]:
    """The same examples under a guide of another title."""
    (inputs / "other.md").write_text(GUIDE.replace("# Tiny", f"# {title}"))
    return _files(inputs) | {"guide": str(inputs / "other.md")}


def test_without_extra_sets_the_mixture_is_the_training_set(inputs: pathlib.Path) -> None:
    one = open_mixture(DataSettings(train=_source(inputs)), seed=1)
    alone = open_training(_source(inputs), seed=1)
    assert one.source(2, 3) == alone.source(2, 3) and one.sha256 == alone.sha256


def test_every_tree_draws_its_data_set(inputs: pathlib.Path) -> None:
    extra = {"other": ExtraSettings(**_other(inputs), weight=3.0)}
    data = open_mixture(DataSettings(train=_source(inputs), extra=extra), seed=1)
    assert [guide.title for guide in data.guides] == ["Tiny", "Other guide"]
    assert data.complete and len(data.sha256) == 3, "data, and two guides"
    source = data.source(2, 3)
    titles = [tuple(lesson.guide.title for lesson in source.lessons(step)) for step in range(200)]
    assert len(set(titles)) == 4, "both, and the same, in one forest"
    share = sum(title == "Other guide" for pair in titles for title in pair) / 400
    assert 0.68 < share < 0.82, "three of four"
    settings = world.settings(inputs, model__path="absent")
    check_prompts(data, [], encoder=tiny_policy().encoder, settings=settings)
    narrow = world.settings(inputs, model__path="absent", limits__guide=20)
    with pytest.raises(LimitError, match="1 of 1 guides"):
        check_prompts(data, [], encoder=tiny_policy().encoder, settings=narrow)


def test_miniworld_can_be_mixed_in(inputs: pathlib.Path) -> None:
    stages = [{"until": 5, "kinds": ["invented"], "fewest": 2, "most": 3}]
    world_settings = ExtraSettings(kind=DataKind.MINIWORLD, options={"stages": stages})
    data = open_mixture(
        DataSettings(train=_source(inputs), extra={"world": world_settings}), seed=1
    )
    assert len(data.known) == 1 and not data.complete
    titles = {lesson.guide.title for step in range(9) for lesson in data.source(1, 2).lessons(step)}
    assert "Tiny" in titles and len(titles) > 1


def test_examples_that_cannot_be_told_apart_are_refused(inputs: pathlib.Path) -> None:
    extra = {"twin": ExtraSettings(**_other(inputs, title="Tiny"))}
    with pytest.raises(DataError, match="16 examples of different data sets .* 'e0' of 'Tiny'"):
        open_mixture(DataSettings(train=_source(inputs), extra=extra), seed=1)
