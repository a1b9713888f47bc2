"""Lessons are a pure function of the step, and every epoch is a shuffle without repeats."""

import pytest

from r1re_jax.task.lessons import DatasetSource, Lesson, MixedSource
from r1re_jax.task.relations import Example, Mention, parse_guide

GUIDE = parse_guide("# T\n## Relations\n- **R(X = a, Y = b)**: d\n")
EXAMPLES = tuple(
    Example(str(number), "a b", Mention("a", 0, 1), Mention("b", 2, 3)) for number in range(11)
)


def _ids(lessons: tuple[Lesson, ...]) -> list[list[str]]:
    return [[example.id for example in lesson.examples] for lesson in lessons]


def test_lessons_have_their_shape_and_guide() -> None:
    lessons = DatasetSource(GUIDE, EXAMPLES, questions=2, trees=3).lessons(5)
    assert [len(lesson.examples) for lesson in lessons] == [2, 2, 2]
    assert {lesson.guide.title for lesson in lessons} == {"T"}


def test_lessons_depend_on_step_and_seed_alone() -> None:
    source = DatasetSource(GUIDE, EXAMPLES, questions=2, trees=2, seed=3)
    forward = [_ids(source.lessons(step)) for step in range(7)]
    fresh = DatasetSource(GUIDE, EXAMPLES, questions=2, trees=2, seed=3)
    assert [_ids(fresh.lessons(step)) for step in reversed(range(7))] == forward[::-1]
    other = DatasetSource(GUIDE, EXAMPLES, questions=2, trees=2, seed=4)
    assert [_ids(other.lessons(step)) for step in range(7)] != forward


def test_no_epoch_repeats_an_example_and_epochs_differ() -> None:
    source = DatasetSource(GUIDE, EXAMPLES, questions=5, seed=1)
    assert source.steps_per_epoch == 2
    epochs = [
        [id for step in (2 * epoch, 2 * epoch + 1) for id in _ids(source.lessons(step))[0]]
        for epoch in range(30)
    ]
    assert all(len(set(epoch)) == 10 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 25
    assert {id for epoch in epochs for id in epoch} == {example.id for example in EXAMPLES}


def test_examples_may_come_as_a_list() -> None:
    assert DatasetSource(GUIDE, list(EXAMPLES), questions=1).examples == EXAMPLES


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="takes 3 x 4 = 12 examples, found 11"):
        DatasetSource(GUIDE, EXAMPLES, questions=4, trees=3)
    with pytest.raises(ValueError, match="questions >= 1 and trees >= 1, found 0 and 1"):
        DatasetSource(GUIDE, EXAMPLES, questions=0)
    with pytest.raises(ValueError, match="step >= 0, found -1"):
        DatasetSource(GUIDE, EXAMPLES, questions=1).lessons(-1)


def _mixed(seed: int = 0, weights: tuple[float, ...] = (1.0, 1.0)) -> MixedSource:
    other = parse_guide("# U\n## Relations\n- **R(X = a, Y = b)**: d\n")
    parts = (DatasetSource(guide, EXAMPLES, questions=2, trees=3) for guide in (GUIDE, other))
    return MixedSource(sources=tuple(parts), weights=weights, trees=3, seed=seed)


def test_a_mixture_is_a_pure_function_of_the_step() -> None:
    forward = [_mixed().lessons(step) for step in range(9)]
    source = _mixed()
    assert [source.lessons(step) for step in reversed(range(9))] == forward[::-1]
    titles = [[lesson.guide.title for lesson in lessons] for lessons in forward]
    assert titles != [[one.guide.title for one in _mixed(1).lessons(step)] for step in range(9)]
    for step, lessons in enumerate(forward):
        for tree, lesson in enumerate(lessons):
            own = source.sources["TU".index(lesson.guide.title)]
            assert lesson == own.lessons(step)[tree], "the lesson of its own place"


def test_within_a_step_a_mixture_repeats_nothing() -> None:
    for step in range(20):
        lessons = _mixed().lessons(step)
        names = [(one.guide.title, example.id) for one in lessons for example in one.examples]
        assert len(set(names)) == 6


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0), (1.0, -1.0)])
def test_weights_of_a_mixture_are_checked(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="expected 2 weights above 0"):
        _mixed(weights=weights)
