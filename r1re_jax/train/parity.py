"""Sampler, trainer and plain forward, compared on the same tokens before the first update.

Three kinds of programs compute a run's log-probabilities, and GRPO's gradient is wrong where they
disagree: the sampler (prefill, then one token at a time into a cache of its own), scoring over the
tree, and, where nothing is shared, one forward over a whole row. They differ by rounding; a wrong
position, mask, cache or sharding in one of them differs by much more.
"""

import dataclasses
import enum
import functools
import itertools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from r1re_jax import hosts
from r1re_jax.model.tree import Level, Tree
from r1re_jax.policy import Limits
from r1re_jax.rl.masks import length_mask
from r1re_jax.rl.scoring import completion_logp
from r1re_jax.rollout.keys import Purpose, row_keys
from r1re_jax.rollout.rollout import generate
from r1re_jax.rollout.sampling import SamplingSettings
from r1re_jax.sharding import question_ways
from r1re_jax.task.lessons import Lesson
from r1re_jax.task.prompts import PromptEncoder
from r1re_jax.train.batch import prompt_levels, spread, spread_tree
from r1re_jax.train.data import TrainingData, phase_source
from r1re_jax.train.drawing import question_ids
from r1re_jax.train.grpo_settings import QuantiseSettings
from r1re_jax.train.sampler import Sampler, make_sampler
from r1re_jax.train.settings import Dtype, Settings
from r1re_jax.train.start import Start
from r1re_jax.train.state import Layout, Params, model_state

# Fewest questions, and completions of each: every token costs little, every program a compilation.
QUESTIONS, SAMPLES = 2, 2


class ParityError(RuntimeError):
    """Ways to compute the same log-probabilities differ by more than rounding."""


class Way(enum.StrEnum):
    """How the log-probability of a sampled token was computed."""

    DECODE = "decode"  # by the sampler: the first token from prefill, the others from decode
    TRAINING = "training"  # by scoring over the tree
    PREFILL = "prefill"  # by one forward over the whole row, from position 0


@dataclasses.dataclass(frozen=True)
class Gap:
    """Absolute differences of log-probabilities over tokens, in nats."""

    mean: float
    max: float

    def within(self, band: "Gap") -> bool:
        """Whether both are finite and no larger than the band's."""
        numbers = (self.mean, self.max)
        return all(map(math.isfinite, numbers)) and self.mean <= band.mean and self.max <= band.max


# The most that rounding does, by what matrix products are computed in: in float32 some 20 times the
# largest gaps that were measured, in bfloat16 2.5 times (docs/decisions.md).
BANDS: dict[Dtype, Gap] = {
    Dtype.FLOAT32: Gap(mean=1e-4, max=1e-3),
    Dtype.BFLOAT16: Gap(mean=0.1, max=1.0),
}
# Values of jax_default_matmul_precision for which products of float32 are float32 everywhere.
EXACT = ("float32", "highest")


def band_of(dtype: Dtype, *, platform: str) -> Gap:
    """Return the band of a forward.

    Args:
        dtype: what it computes in. Unless jax_default_matmul_precision forbids it, TPUs multiply
            float32 in bfloat16, and GPUs in TF32, whatever the dtype of the arrays.
        platform: of the devices.
    """
    exact = platform == "cpu" or jax.config.jax_default_matmul_precision in EXACT
    return BANDS[dtype if exact else Dtype.BFLOAT16]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parity:
    """What was compared and how far apart it is.

    Attributes:
        dtype: what the forward computes in.
        tokens: completion tokens that were compared.
        gaps: each pair of ways -> how they differ.
        band: the largest gap that counts as rounding.
    """

    dtype: Dtype
    tokens: int
    gaps: Mapping[tuple[Way, Way], Gap]
    band: Gap

    @property
    def ok(self) -> bool:
        """Whether all pairs are within the band."""
        return all(gap.within(self.band) for gap in self.gaps.values())

    def facts(self) -> dict[str, str]:
        """Return the numbers as people see them."""
        pairs = {", ".join(pair): _shown(gap) for pair, gap in self.gaps.items()}
        return {"tokens": f"{self.tokens}, {self.dtype}", **pairs, "band": _shown(self.band)}

    def require(self) -> None:
        """Refuse to go on with what is not within the band.

        Raises:
            ParityError: with all numbers, and what to do.
        """
        if not self.ok:
            listed = "\n  ".join(f"{name}: {shown}" for name, shown in self.facts().items())
            raise ParityError(
                "the log-probabilities of the same sampled tokens, computed in different ways,"
                f" differ by more than rounding (in nats):\n  {listed}\nWhat is sampled would not"
                " be what is trained. Try model.dtype=float32, on an accelerator with"
                " JAX_DEFAULT_MATMUL_PRECISION=float32, or another mesh; nan is of weights that"
                " are not finite. model.parity_tokens=0 switches this check off"
            )


def check_run(settings: Settings, data: TrainingData, start: Start) -> Parity | None:
    """Compare on the first questions of a run's first step; None where that is switched off.

    Called where a run begins and not where it goes on: the same programs have passed then, every
    GRPO step compares sampler and trainer again (`grpo.max_logp_gap`), and a run that goes well
    must not be refused after an interruption because its trained weights round more coarsely.

    What is compared draws from the policy's own numbers, whatever `grpo.quantise` says: int8 moves
    log-probabilities by as much as some faults do, and a band that lets it pass would let those
    pass too. What it does to a run's own tokens, every step reports and `grpo.max_logp_gap` bounds.

    Raises:
        ParityError: the ways differ by more than rounding.
        LimitError: a guide or question that is too long.
    """
    if not settings.model.parity_tokens:
        return None
    lesson = phase_source(settings, data, next(iter(settings.phases))).lessons(0)[0]
    ways = math.lcm(question_ways(start.layout.mesh), question_ways(start.sampler.layout.mesh))
    # A multiple of what the mesh shares them over, as is the lesson's own number.
    questions = lesson.examples[: ways * math.ceil(QUESTIONS / ways)]
    parity = measure(
        start.layout,
        start.whole(start.params),
        Lesson(lesson.guide, questions),
        sampler=start.sampler,
        encoder=start.policy.encoder,
        limits=settings.training_limits,
        tokens=settings.model.parity_tokens,
        seed=settings.seed,
    )
    parity.require()
    return parity


def measure(
    layout: Layout,
    params: Params,
    lesson: Lesson,
    *,
    encoder: PromptEncoder,
    limits: Limits,
    tokens: int,
    seed: int,
    sampler: Sampler | None = None,
) -> Parity:
    """Compare the ways on sampled completions; arguments as of `in_three_ways`."""
    tree, logp = in_three_ways(
        layout,
        params,
        lesson,
        encoder=encoder,
        limits=limits,
        tokens=tokens,
        seed=seed,
        sampler=sampler,
    )
    dtype = Dtype(nnx.merge(layout.graph, model_state(params)).dtype.name)
    mask = np.asarray(length_mask(tree.completion.length, tree.completion.tokens.shape[-1]))
    return Parity(
        dtype=dtype,
        tokens=int(mask.sum()),
        gaps={
            (one, other): _gap(logp[one][mask], logp[other][mask])
            for one, other in itertools.combinations(Way, 2)
        },
        band=band_of(dtype, platform=layout.mesh.devices.flat[0].platform),
    )


def in_three_ways(
    layout: Layout,
    params: Params,
    lesson: Lesson,
    *,
    encoder: PromptEncoder,
    limits: Limits,
    tokens: int,
    seed: int,
    sampler: Sampler | None = None,
) -> tuple[Tree, dict[Way, np.ndarray]]:
    """Sample completions at temperature 1 and compute their log-probabilities in three ways.

    Args:
        layout: the model without its arrays, on its mesh.
        params: only read.
        lesson: a guide and its questions, a multiple of what the mesh spreads them over.
        encoder: words to tokens.
        limits: widths of the levels; guide and question are padded as in training.
        tokens: most tokens of a completion.
        seed: of the sampling, which has keys of its own.
        sampler: what draws; None for the model itself.

    Returns:
        The tree with the completions, and for each way fp32 [1, P, G, C].

    Raises:
        LimitError: the guide or a question is too long.
    """
    model = layout.graph, model_state(params)
    sampler = sampler or make_sampler(layout, QuantiseSettings())
    guide, question = prompt_levels([lesson], encoder, limits)
    limit = min(tokens, limits.completion)
    rollout = generate(
        sampler.layout.graph,
        model_state(sampler.params(params)),
        (guide, question),
        keys=row_keys(seed, Purpose.PARITY, 0, question_ids([lesson]), range(SAMPLES)),
        settings=SamplingSettings(),
        limit=limit,
        stop_ids=encoder.stop_ids,
        pad_id=encoder.pad_id,
        chunk=limit,
        mesh=sampler.layout.mesh,
    )
    rollout = hosts.on_host(rollout)
    tree = Tree(guide, question, Level(rollout.tokens, rollout.length))
    logp = {
        Way.DECODE: rollout.logp,
        Way.TRAINING: _tree_logp(*model, tree, mesh=layout.mesh),
        Way.PREFILL: _row_logp(*model, *_rows(tree), rollout.tokens, mesh=layout.mesh),
    }
    return tree, hosts.on_host(logp)


def _shown(gap: Gap) -> str:
    return f"mean {gap.mean:.2e}, max {gap.max:.2e}"


def _gap(one: np.ndarray, other: np.ndarray) -> Gap:
    with np.errstate(invalid="ignore"):  # of two infinities; the result is no number and fails
        difference = np.abs(one.astype(np.float64) - other.astype(np.float64))
    return Gap(mean=float(difference.mean()), max=float(difference.max()))


def _rows(tree: Tree) -> tuple[np.ndarray, np.ndarray]:
    """Write every row out whole: guide, question and completion without padding between them.

    Returns:
        tokens [N, P, G, S + Q + C], and [N, P, G] int32, where each row's completion begins.
    """
    shape = tree.completion.length.shape
    width = sum(level.tokens.shape[-1] for level in (tree.guide, tree.question, tree.completion))
    tokens, first = np.zeros((*shape, width), np.int32), np.zeros(shape, np.int32)
    for place in np.ndindex(shape):
        levels = (tree.guide, place[:1]), (tree.question, place[:2]), (tree.completion, place)
        parts = [level.tokens[of][: level.length[of]] for level, of in levels]
        row = np.concatenate(parts)
        tokens[place][: len(row)] = row
        first[place] = len(row) - len(parts[-1])
    return tokens, first


@functools.partial(jax.jit, static_argnames=("graph", "mesh"))
def _tree_logp(graph: nnx.GraphDef, params: nnx.State, tree: Tree, *, mesh: Mesh) -> jax.Array:
    """Return [N, P, G, C] as training scores it."""
    return completion_logp(nnx.merge(graph, params), spread_tree(tree, mesh)).logp_NPGC


@functools.partial(jax.jit, static_argnames=("graph", "mesh"))
def _row_logp(
    graph: nnx.GraphDef,
    params: nnx.State,
    row_NPGT: jax.Array,
    first_NPG: jax.Array,
    token_NPGC: jax.Array,
    *,
    mesh: Mesh,
) -> jax.Array:
    """Return [N, P, G, C] from rows without ancestors; the row's padding is behind all of it."""
    model = nnx.merge(graph, params)
    row_NPGT, first_NPG, token_NPGC = spread((row_NPGT, first_NPG, token_NPGC), mesh)
    hidden_NPGTD, _ = model.extend(row_NPGT, start=jnp.zeros_like(first_NPG))
    column = jax.lax.broadcasted_iota(jnp.int32, token_NPGC.shape, token_NPGC.ndim - 1)
    predicting = (first_NPG[..., None] + column - 1)[..., None]
    hidden_NPGCD = jnp.take_along_axis(hidden_NPGTD, predicting, axis=-2, mode="clip")
    logp_NPGCV = jax.nn.log_softmax(model.logits(hidden_NPGCD), axis=-1)
    # A sum under a comparison, not a gather: the vocabulary axis may be sharded.
    ids = jax.lax.broadcasted_iota(jnp.int32, logp_NPGCV.shape, logp_NPGCV.ndim - 1)
    return jnp.sum(jnp.where(ids == token_NPGC[..., None], logp_NPGCV, 0.0), axis=-1)
