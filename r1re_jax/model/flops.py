"""How much arithmetic the tree needs, and how many bytes decoding must move: counted, not measured.

Counted are the products of matrices, a multiplication and an addition as two operations: the
layers' projections and MLP, adapters beside them, scores and weighted values of attention, and the
output head. Norms, softmax, sampling and the optimizer are left out: together they are thousandths.

Counts are of what is necessary, by true lengths: every distinct token of the tree once through all
layers, a causal row of T tokens as T (T + 1) / 2 pairs of query and key. Padding, masked scores and
whatever is computed a second time (rematerialisation, a guide for each micro-batch) are time but no
count. Divided by what the devices could do, this is the model FLOPs utilisation of PaLM (arXiv
2204.02311, appendix B).
"""

import dataclasses
from typing import Any

import numpy as np

from r1re_jax.model.config import ModelConfig
from r1re_jax.model.tree import Tree


@dataclasses.dataclass(frozen=True)
class Load:
    """How much passes through the model.

    Attributes:
        tokens: that pass through the layers.
        pairs: of a token and a key that it attends to; its own key is one of them.
        logits: positions whose logits are computed.
    """

    tokens: int = 0
    pairs: int = 0
    logits: int = 0

    def __add__(self, other: "Load") -> "Load":
        """Add what passes one after the other."""
        return Load(
            self.tokens + other.tokens, self.pairs + other.pairs, self.logits + other.logits
        )


@dataclasses.dataclass(frozen=True)
class Lengths:
    """True tokens of every row of a forest, int64.

    Attributes:
        guide: [N].
        question: [N, P].
        completion: [N, P, G].
    """

    guide: np.ndarray
    question: np.ndarray
    completion: np.ndarray

    def __post_init__(self) -> None:
        """Count in 64 bits: a step's pairs do not fit into 32."""
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, np.asarray(getattr(self, field.name), np.int64))

    @classmethod
    def of(cls, tree: Tree) -> "Lengths":
        """Read them from a tree."""
        return cls(tree.guide.length, tree.question.length, tree.completion.length)

    @classmethod
    def even(
        cls, *, guide: int, question: int, completion: int, questions: int, group: int
    ) -> "Lengths":
        """One tree whose rows are all as long: S, Q and C tokens, P questions, G completions."""
        one = np.ones((1, questions, group), np.int64)
        return cls(one[:, 0, 0] * guide, one[:, :, 0] * question, one * completion)

    @property
    def above_completion(self) -> np.ndarray:
        """[N, P, 1], keys above a completion: its guide's and its question's."""
        return (self.guide[:, None] + self.question)[..., None]


def level_load(length: Any, *, above: Any = 0) -> Load:
    """Return what the rows of one level need, without logits.

    Args:
        length: [*B] true tokens of each row.
        above: keys that every token of a row sees above it; broadcast to [*B].
    """
    length_B = np.asarray(length, np.int64)
    pairs_B = length_B * above + length_B * (length_B + 1) // 2
    return Load(tokens=int(length_B.sum()), pairs=int(pairs_B.sum()))


def tree_load(lengths: Lengths) -> Load:
    """Return what scoring all completions needs: every token once, logits of completion tokens."""
    return (
        _prompt_load(lengths)
        + level_load(lengths.completion, above=lengths.above_completion)
        + Load(logits=int(lengths.completion.sum()))
    )


def drawing_load(lengths: Lengths) -> Load:
    """Return what drawing completions of these lengths needs.

    The first token of a group comes from its question's last one, so that its logits are computed
    once for all; the last token of a completion is drawn and never goes in.
    """
    fed = np.maximum(lengths.completion - 1, 0)
    return (
        _prompt_load(lengths)
        + level_load(fed, above=lengths.above_completion)
        + Load(logits=lengths.question.size + int(fed.sum()))
    )


def _prompt_load(lengths: Lengths) -> Load:
    question = level_load(lengths.question, above=lengths.guide[:, None])
    return level_load(lengths.guide) + question


def matrix_size(config: ModelConfig) -> int:
    """Return the elements of all layers' matrices, L · (D (2H + 2K) A + 3 D F); a token's factor.

    Embedding and output head are not among them.
    """
    attention = (2 * config.query_heads + 2 * config.kv_heads) * config.head_size
    return config.layers * config.width * (attention + 3 * config.mlp_width)


def pair_flops(config: ModelConfig) -> int:
    """Return the operations of one query token at one key: score and value, in all heads, layers.

    That is L · H · 4 A.
    """
    return 4 * config.layers * config.query_heads * config.head_size


def forward_flops(config: ModelConfig, load: Load, *, adapter: int = 0) -> int:
    """Return the operations of a forward pass.

    Args:
        config: shape of the model.
        load: what passes through.
        adapter: elements of all matrices of adapters, of which a token meets each once.
    """
    return (
        2 * (matrix_size(config) + adapter) * load.tokens
        + pair_flops(config) * load.pairs
        + 2 * config.width * config.vocab * load.logits
    )


def update_flops(config: ModelConfig, load: Load, *, adapter: int = 0) -> int:
    """Return the operations of a forward and a backward pass, three times those of the forward.

    A product has two gradients that cost as much as it does, with regard to either factor. The
    second is not needed where an adapter is trained and the matrix is not: products with those
    count twice.
    """
    whole = 3 * forward_flops(config, load, adapter=adapter)
    if not adapter:
        return whole
    frozen = matrix_size(config) * load.tokens + config.width * config.vocab * load.logits
    return whole - 2 * frozen


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepFlops:
    """Operations of a GRPO step by its parts.

    Attributes:
        rollout: prompts once, and every token that is drawn.
        reference: forward passes under frozen policies.
        update: forward and backward passes.
    """

    rollout: int
    reference: int
    update: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.rollout + self.reference + self.update


def step_flops(
    config: ModelConfig,
    *,
    drawn: Lengths,
    kept: Lengths,
    scored: int = 1,
    updates: int = 1,
    adapter: int = 0,
) -> StepFlops:
    """Count a GRPO step.

    Args:
        config: shape of the model.
        drawn: all rows that were drawn.
        kept: those that are trained on.
        scored: frozen policies that score them: the reference, the policy that sampled.
        updates: inner iterations.
        adapter: see `forward_flops`.
    """
    load = tree_load(kept)
    return StepFlops(
        rollout=forward_flops(config, drawing_load(drawn), adapter=adapter),
        reference=scored * forward_flops(config, load, adapter=adapter),
        update=updates * update_flops(config, load, adapter=adapter),
    )


def tree_flops(
    config: ModelConfig, *, guide: int, question: int, completion: int, questions: int, group: int
) -> int:
    """Return the operations of one forward pass over one tree whose rows are all as long.

    Args:
        config: shape of the model.
        guide: S, tokens.
        question: Q, tokens of each.
        completion: C, tokens of each; logits are computed of these.
        questions: P.
        group: G.
    """
    lengths = Lengths.even(
        guide=guide, question=question, completion=completion, questions=questions, group=group
    )
    return forward_flops(config, tree_load(lengths))


def key_bytes(config: ModelConfig, *, itemsize: int) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    return 2 * config.layers * config.kv_heads * config.head_size * itemsize


def decode_bytes(
    config: ModelConfig,
    lengths: Lengths,
    *,
    weights: int,
    itemsize: int,
    own_itemsize: int = 0,
    copies: int = 1,
) -> int:
    """Return the bytes that must be read while these completions are decoded side by side.

    At every token all weights are read once, the keys of a guide and of a question once for all
    rows below it that still run, and a row's own keys once. So many tokens as the longest
    completion has, less the first, which comes from the prompt. Activations are left out.

    Args:
        config: shape of the model.
        lengths: of what is drawn in one go.
        weights: bytes that all devices together read of the weights at every token.
        itemsize: bytes of an element of the keys.
        own_itemsize: of those of the completions, where it is another; 0 for the same.
        copies: devices, or groups of them, that share the questions: each reads the guides.
    """
    fed = np.maximum(lengths.completion - 1, 0)
    above = copies * int((fed.max(axis=(1, 2), initial=0) * lengths.guide).sum())
    above += int((fed.max(axis=2, initial=0) * lengths.question).sum())
    own = level_load(fed).pairs * key_bytes(config, itemsize=own_itemsize or itemsize)
    keys = above * key_bytes(config, itemsize=itemsize) + own
    return int(fed.max(initial=0)) * weights + keys
