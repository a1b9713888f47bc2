"""Makes the untrained policy that miniworld's base policy grows from: tokenizer and weights."""

import itertools
import os
from collections.abc import Iterator

from flax import nnx

from r1re_jax.model.config import preset
from r1re_jax.model.initial import wire_reading
from r1re_jax.model.qwen import Qwen
from r1re_jax.policy import Limits, Policy
from r1re_jax.policy_files import save_policy
from r1re_jax.task import miniworld
from r1re_jax.task.completions import sft_completion
from r1re_jax.task.miniworld.tokenizer import train_tokenizer
from r1re_jax.task.prompts import PromptEncoder
from r1re_jax.task.templates import PromptTemplate

# Short, since every guide of a step is computed with it.
TEMPLATE = PromptTemplate(
    system="You annotate relations.",
    instruction="Read the guide, then label the pair in the sentence.",
)
LIMITS = Limits(guide=352, question=64, completion=56)
# What a guide's line begins with; a unit of the tokenizer.
LINE_MARK = "- **"
# Of the tokenizer's corpus: every kind of lesson, with the words in the order of a prompt.
CORPUS_STEPS = 150


def corpus(*, seed: int, steps: int = CORPUS_STEPS) -> Iterator[str]:
    """Yield the texts that the tokenizer is trained on: lessons, never the medical domain.

    Args:
        seed: another seed gives other lessons.
        steps: steps of the source that are written out, in order.
    """
    kinds = [str(kind) for kind in miniworld.Kind]
    stage = {"until": 1, "kinds": kinds, "distractors": 0.2, "none_share": 0.1, "spelled": 0.1}
    source = miniworld.source(trees=8, questions=8, seed=seed, stages=[stage])
    for lesson in itertools.chain.from_iterable(map(source.lessons, range(steps))):
        yield f"{TEMPLATE.system}\n{TEMPLATE.instruction}\n\n{lesson.guide.text}\n\n{TEMPLATE.cue}"
        for example in lesson.examples:
            yield f" {example.tagged}\nassistant\n{sft_completion(example)}"


def fresh_policy(
    out: str | os.PathLike[str], *, name: str = "nano", seed: int = 0, steps: int = CORPUS_STEPS
) -> Policy:
    """Train the tokenizer, draw and wire the weights, and save both as a Hugging Face folder.

    Args:
        out: folder to write; absent, empty or an earlier policy, which is replaced.
        name: preset of the model's shape, with a tied head.
        seed: of corpus and weights.
        steps: of the tokenizer's corpus.

    Returns:
        The policy that was saved.

    Raises:
        WeightsError: the folder holds something else.
    """
    config = preset(name)
    tokenizer = train_tokenizer(corpus(seed=seed, steps=steps), vocab=config.vocab)
    model = Qwen(config, rngs=nnx.Rngs(seed))
    (anchor,) = tokenizer.encode(LINE_MARK, add_special_tokens=False)
    wire_reading(model, anchor=anchor, seed=seed)
    policy = Policy(
        model=model,
        tokenizer=tokenizer,
        encoder=PromptEncoder(tokenizer, template=TEMPLATE),
        limits=LIMITS,
        provenance=f"fresh {name}, seed {seed}",
    )
    save_policy(policy, out)
    return policy
