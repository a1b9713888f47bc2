"""Two tasks behind one protocol: what each gives, and how an encoder changes between them."""

import dataclasses
import json

import pytest

from r1re_jax.task.prompts import PromptEncoder
from r1re_jax.task.relations import DataError, GuideError, parse_guide
from r1re_jax.task.tasks import RELATION, TRIPLETS, Task, TaskKind, TripletTask, make_task
from r1re_jax.task.templates import DEFAULT_TEMPLATE, TRIPLET_TEMPLATE, PromptTemplate
from r1re_jax.task.triplets.rewards import TripletTotals
from tests.tiny import tiny_examples, tiny_guide, tiny_tokenizer

GUIDE = tiny_guide().text.replace(
    "## Relations", "## Entities\n\n- **person**: who.\n- **thing**: what.\n\n## Relations"
)
TEXTS = {
    TaskKind.RELATION: "<e1>Ann</e1> likes <e2>tea</e2>.",
    TaskKind.TRIPLETS: "Ann likes tea.",
}


@pytest.mark.parametrize("task", [RELATION, TRIPLETS], ids=lambda task: task.kind.value)
def test_a_typed_text_is_asked_and_what_comes_back_is_read(task: Task) -> None:
    schema = task.schema(parse_guide(GUIDE))
    example = task.asked(TEXTS[task.kind], id="1")
    assert example.question == TEXTS[task.kind]
    row = task.extract("hm", example, schema)
    assert list(row)[-3:] == ["reasoning", "text", "problem"]
    assert (row["text"], row["problem"]) == ("hm", "no_think")
    verdict = task.judge("hm", example, schema)
    assert (verdict.reward, verdict.format_ok, verdict.predicted) == (-3.0, False, None)
    assert json.dumps(row) and make_task(task.kind) == task


def test_extractions_are_lists_or_null() -> None:
    schema = TRIPLETS.schema(parse_guide(GUIDE))
    example = TRIPLETS.asked("Ann likes tea.", id="1")
    said = {
        "entities": [{"text": "Ann", "type": "person"}, {"text": "milk", "type": "thing"}],
        "triplets": [{"head": "Ann", "relation": "Likes", "tail": "milk"}],
    }
    text = f"<think>so</think><answer>{json.dumps(said)}</answer>"
    assert TRIPLETS.extract(text, example, schema) == said | {
        "reasoning": "so",
        "text": text,
        "problem": "span_not_in_text",
    }
    lost = TRIPLETS.extract("<think>so</think><answer>Ann</answer>", example, schema)
    assert (lost["entities"], lost["triplets"], lost["problem"]) == (None, None, "not_json")
    assert lost["reasoning"] == "so"


def test_a_guide_must_have_what_the_task_needs() -> None:
    assert RELATION.schema(tiny_guide()).labels
    with pytest.raises(GuideError, match="'Tiny' names no entity types"):
        TRIPLETS.schema(tiny_guide())
    with pytest.raises(DataError, match="expected the marks"):
        RELATION.asked("Ann likes tea.", id="1")
    with pytest.raises(DataError, match="the text is blank"):
        TRIPLETS.asked(" ", id="1")


def test_totals_are_the_tasks_own() -> None:
    totals = TripletTotals(malformed=-7.0)
    task = make_task(TaskKind.TRIPLETS, triplets=totals)
    assert task == TripletTask(totals) != TRIPLETS
    example = task.asked("Ann.", id="1")
    assert task.judge("", example, task.schema(parse_guide(GUIDE))).reward == -7.0
    assert make_task(TaskKind.RELATION, triplets=totals) == RELATION


def test_an_encoder_asks_as_its_task_does() -> None:
    pairs = PromptEncoder(tiny_tokenizer(), stop_tokens=["<|im_start|>"])
    assert (pairs.task, pairs.template) == (RELATION, DEFAULT_TEMPLATE)
    triplets = pairs.for_task(TRIPLETS)
    assert (triplets.task, triplets.template) == (TRIPLETS, TRIPLET_TEMPLATE)
    assert triplets.stop_ids == pairs.stop_ids
    guide, example = parse_guide(GUIDE), TRIPLETS.asked("Ann <likes> tea.", id="1")
    triplets.check(guide, [example])
    prompt = triplets.decode(triplets.prompt_tokens(guide, example)[1:])
    shown = tiny_tokenizer().decode(triplets.prompt_tokens(guide, example))
    assert TRIPLET_TEMPLATE.instruction in shown and "Sentence: Ann <likes> tea." in shown
    assert prompt.startswith("system")
    same = triplets.for_task(RELATION).prompt_tokens(guide, tiny_examples(1)[0])
    assert same == pairs.prompt_tokens(guide, tiny_examples(1)[0])


def test_other_totals_change_no_words() -> None:
    words = PromptTemplate(system="", instruction="Find them.")
    encoder = PromptEncoder(tiny_tokenizer(), task=TRIPLETS, template=words)
    other = make_task(TaskKind.TRIPLETS, triplets=dataclasses.replace(TRIPLETS.totals, highest=1.0))
    assert encoder.for_task(TRIPLETS) is encoder
    changed = encoder.for_task(other)
    assert (changed.task, changed.template) == (other, words)
