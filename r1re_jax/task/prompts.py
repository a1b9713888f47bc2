"""From guides and examples to tokens: a prompt in two levels, and completions.

A prompt is the tokenizer's chat template (a base model has none: then the words alone) around a
system line and one user turn:

    instruction, guide, `Sentence:` | ` the <e1>tagged</e1> <e2>sentence</e2>`, end of turn, start
    of the answer

The guide level ends at `|`, so that all questions of a guide share its tokens; the question level
is the rest. The levels are tokenised apart, which is right only where the parts' tokens are the
whole's: `PromptEncoder.check` refuses a tokenizer or text for which they are not. (The blank
before the sentence belongs to the question because byte-level tokenizers join it to the word that
follows.) Guides, sentences and completions are encoded as text: `<|im_end|>` in a sentence ends
nothing, and the think, answer and e1 tags are ordinary words.
"""

import copy
import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from r1re_jax.task.relations import Guide
from r1re_jax.task.tasks import RELATION, AnyExample, Task
from r1re_jax.task.templates import (
    GuideInPrompt,
    PromptError,
    PromptTemplate,
)

# How a base model is asked, whose tokenizer has no chat template: the words alone.
PLAIN = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token or '' }}{% else %}{{ '\n\n' }}{% endif %}"
    "{% endfor %}"
)
_GUIDE_CACHE = 512
# `check` takes this many prompts whole, and of the others the cue and the sentence.
_WHOLE_CHECKS = 64
# Stands for the user's and the assistant's words while the chat template is taken apart.
_SLOT = "r1re-slot"


class ChatTokenizer(Protocol):
    """What is used of a Hugging Face fast tokenizer."""

    backend_tokenizer: Any
    chat_template: Any
    eos_token_id: int | None
    pad_token_id: int | None

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """Renders messages."""
        ...

    def decode(self, token_ids: Any, **kwargs: Any) -> Any:
        """Tokens to text."""
        ...


class PromptEncoder:
    """Guides, examples and completions to tokens, and back.

    Attributes:
      task: what is asked under a guide.
      template: the words around guide and sentence.
      chat_template: the tokenizer's, or `PLAIN` where it has none.
      stop_ids: the tokens that end a completion, the one used for training first.
      pad_id: fills arrays; may be one of `stop_ids`, so masks must come from lengths.
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        *,
        task: Task = RELATION,
        template: PromptTemplate | None = None,
        stop_tokens: Sequence[str | int] = (),
    ) -> None:
        """Takes the chat template apart.

        Args:
          tokenizer: a fast tokenizer with a chat template.
          task: what is asked under a guide.
          template: the words around guide and sentence; None takes the task's.
          stop_tokens: further stop tokens, by id or by text, such as `eos_token_id` of a
            generation config.

        Raises:
          PromptError: a tokenizer for which the parts of a prompt cannot be told apart.
        """
        self.task = task
        self.template = template or task.template
        self.chat_template: str = getattr(tokenizer, "chat_template", None) or PLAIN
        self._tokenizer = tokenizer
        self._parsing = _backend(tokenizer)
        # A copy, because the setting belongs to the tokenizer's owner.
        self._literal = copy.deepcopy(self._parsing)
        self._literal.encode_special_tokens = True
        before, between, after_answer = self._take_apart()
        self._head, self._lead = self._split_after_last_special(before)
        self._trail, self._tail = self._split_before_first_special(between)
        self.stop_ids = self._find_stops(after_answer, stop_tokens)
        pad = tokenizer.pad_token_id
        self.pad_id: int = self.stop_ids[-1] if pad is None else pad
        self._check_literal()
        self._guide_level = functools.lru_cache(maxsize=_GUIDE_CACHE)(self._encode_guide)

    def for_task(self, task: Task) -> "PromptEncoder":
        """An encoder of another task's prompts; of the same task it keeps its own words."""
        if task == self.task:
            return self
        return PromptEncoder(
            self._tokenizer,
            task=task,
            template=self.template if task.kind is self.task.kind else None,
            stop_tokens=self.stop_ids,
        )

    def guide_tokens(self, guide: Guide) -> list[int]:
        """The level that all questions of a guide share; the guide's text is stripped."""
        return list(self._guide_level(guide.text))

    def question_tokens(self, example: AnyExample) -> list[int]:
        """The level of one sentence, up to where the policy begins to write."""
        return self._text_tokens(self._question_text(example)) + self._tail

    def prompt_tokens(self, guide: Guide, example: AnyExample) -> list[int]:
        """Both levels, one behind the other."""
        return self.guide_tokens(guide) + self.question_tokens(example)

    def completion_tokens(self, text: str) -> list[int]:
        """A completion to train on; ends with the stop token."""
        return [*self._text_tokens(text), self.stop_ids[0]]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of a completion up to its first stop token, without padding."""
        kept: list[int] = []
        for token in map(int, tokens):
            if token in self.stop_ids:
                break
            if token != self.pad_id:
                kept.append(token)
        return self._tokenizer.decode(
            kept, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def check(self, guide: Guide, examples: Iterable[AnyExample]) -> None:
        """Compares the levels' tokens with those of whole prompts.

        Some prompts, evenly spread, are taken whole; of the others only the end of the guide level
        and the sentence, since a tokenizer that joins words across the boundary does it there.

        Raises:
          PromptError: names the first example whose prompt has other tokens as a whole.
        """
        examples = list(examples)
        whole = self._lead + self._guide_text(guide.text)
        some = examples[:: max(1, len(examples) // _WHOLE_CHECKS)]
        self._compare(whole, self.guide_tokens(guide)[len(self._head) :], guide, some)
        end = f"\n\n{self.template.cue}"
        self._compare(end, self._text_tokens(end), guide, examples)

    def _compare(
        self, start: str, start_tokens: list[int], guide: Guide, examples: list[AnyExample]
    ) -> None:
        """Raises where `start` and a question have other tokens together than apart."""
        questions = [self._question_text(example) for example in examples]
        together = self._literal.encode_batch_fast(
            [start + question for question in questions], add_special_tokens=False
        )
        for example, question, whole in zip(examples, questions, together, strict=True):
            apart = start_tokens + self._text_tokens(question)
            if apart != whole.ids:
                raise PromptError(_difference(example, guide, apart, whole.ids))

    def _guide_text(self, text: str) -> str:
        shown = [text.strip()] if self.template.guide is GuideInPrompt.WHOLE else []
        return "\n\n".join([self.template.instruction, *shown, self.template.cue])

    def _question_text(self, example: AnyExample) -> str:
        return f" {example.question}{self._trail}"

    def _encode_guide(self, text: str) -> tuple[int, ...]:
        return tuple(self._head + self._text_tokens(self._lead + self._guide_text(text)))

    def _text_tokens(self, text: str) -> list[int]:
        return self._literal.encode(text, add_special_tokens=False).ids

    def _template_tokens(self, text: str) -> list[int]:
        return self._parsing.encode(text, add_special_tokens=False).ids

    def _take_apart(self) -> tuple[str, str, str]:
        """The template's text before and behind the user's words, and behind the assistant's."""
        system = (
            [{"role": "system", "content": self.template.system}] if self.template.system else []
        )
        user = [*system, {"role": "user", "content": _SLOT}]
        answered = [*user, {"role": "assistant", "content": _SLOT}]
        render = functools.partial(
            self._tokenizer.apply_chat_template, tokenize=False, chat_template=self.chat_template
        )
        asked = render(user, add_generation_prompt=True)
        whole = render(answered, add_generation_prompt=False)
        if asked.count(_SLOT) != 1 or whole.count(_SLOT) != 2:
            raise PromptError(
                "the chat template must show the user's and the assistant's words once each and "
                "as they are"
            )
        before, _, between = asked.partition(_SLOT)
        return before, between, whole.rpartition(_SLOT)[2]

    @functools.cached_property
    def _special(self) -> re.Pattern[str]:
        added = self._parsing.get_added_tokens_decoder().values()
        contents = sorted(
            (token.content for token in added if token.special), key=len, reverse=True
        )
        return re.compile("|".join(map(re.escape, contents)) or r"(?!)")

    def _split_after_last_special(self, text: str) -> tuple[list[int], str]:
        """Tokens up to the last special token, and the plain text from there on."""
        end = max((match.end() for match in self._special.finditer(text)), default=0)
        return self._checked_split(text, self._template_tokens(text[:end]), text[end:]), text[end:]

    def _split_before_first_special(self, text: str) -> tuple[str, list[int]]:
        """The plain text before the first special token, and the tokens from there on."""
        match = self._special.search(text)
        start = len(text) if match is None else match.start()
        return text[:start], self._template_tokens(text[start:])

    def _checked_split(self, text: str, head: list[int], plain: str) -> list[int]:
        if head + self._text_tokens(plain) != self._template_tokens(text):
            raise PromptError(
                f"the chat template's start {text!r} has other tokens as a whole than cut behind "
                "its last special token; use a tokenizer whose special tokens take no white space"
            )
        return head

    def _find_stops(self, after_answer: str, given: Sequence[str | int]) -> tuple[int, ...]:
        """End of turn, the tokenizer's own end, `<|endoftext|>`, the given ones; each once."""
        turn_end = self._special.search(after_answer)
        found: list[int | None] = [
            None if turn_end is None else self._parsing.token_to_id(turn_end.group()),
            self._tokenizer.eos_token_id,
        ]
        if self._special.fullmatch("<|endoftext|>"):
            found.append(self._parsing.token_to_id("<|endoftext|>"))
        for token in given:
            id = self._parsing.token_to_id(token) if isinstance(token, str) else token
            if id is None or self._parsing.id_to_token(id) is None:
                raise PromptError(f"the stop token {token!r} is not in the tokenizer's vocabulary")
            found.append(id)
        stops = tuple(dict.fromkeys(id for id in found if id is not None))
        if not stops:
            raise PromptError(
                "no stop token: the tokenizer has none, its chat template neither; give stop_tokens"
            )
        return stops

    def _check_literal(self) -> None:
        """Refuses a tokenizer in which text of a data set could end a turn."""
        for id in self.stop_ids:
            token = self._parsing.id_to_token(id)
            if id in self._text_tokens(f"a {token} b"):
                raise PromptError(
                    f"{token!r} in a text becomes the stop token {id}: mark it as special in the "
                    "tokenizer, or data could end a prompt"
                )


def _backend(tokenizer: ChatTokenizer) -> Any:
    """An own copy of the fast tokenizer, without padding or truncation."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "encode_batch_fast"):
        raise PromptError(
            f"expected a fast tokenizer (tokenizer.json), found {type(tokenizer).__name__}"
        )
    backend = copy.deepcopy(backend)
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = False
    return backend


def _difference(example: AnyExample, guide: Guide, levels: list[int], whole: list[int]) -> str:
    """Says where two rows of tokens part."""
    pairs = zip(levels, whole, strict=False)
    place = next(
        (place for place, pair in enumerate(pairs) if pair[0] != pair[1]),
        min(len(levels), len(whole)),
    )
    return (
        f"example {example.id} under guide {guide.title!r}: its prompt has other tokens in levels "
        f"than as a whole, from token {place} of the text on ({levels[place : place + 4]} against "
        f"{whole[place : place + 4]}); this tokenizer joins the template's cue and the sentence: "
        "use another tokenizer or another cue"
    )
