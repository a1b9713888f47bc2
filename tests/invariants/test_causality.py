"""Who can influence whom, proven by gradients that are exactly zero.

Every position of the forest, padding too, holds a token of its own, and the head is not the
embedding: the gradient of a log-probability with respect to a token's embedding row is then the
gradient with respect to that position's input and nothing else.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from r1re_jax.model.qwen import Cache
from tests.drawn import drawn_model, small_config

N, P, G, S, Q, C = 2, 2, 2, 3, 3, 3
SIZES = ((N, S), (N, P, Q), (N, P, G, C))
GUIDE, QUESTION, COMPLETION = (
    np.arange(np.prod(size), dtype=np.int32).reshape(size) + offset
    for size, offset in zip(SIZES, (0, N * S, N * S + N * P * Q), strict=True)
)
VOCAB = int(COMPLETION.max()) + 1
GUIDE_LENGTH = np.array([3, 2], np.int32)
QUESTION_LENGTH = np.array([[1, 3], [2, 2]], np.int32)
START = GUIDE_LENGTH[:, None] + QUESTION_LENGTH


def completion_logp(model: nnx.Module) -> jax.Array:
    """Log-probability [N, P, G, C] of every completion token, padding included."""
    _, level = model.extend(GUIDE, start=jnp.zeros(N, jnp.int32))
    guide = Cache(level.key, level.value, GUIDE_LENGTH)
    question_start = np.repeat(GUIDE_LENGTH[:, None], P, 1)
    hidden_NPQD, level = model.extend(QUESTION, start=question_start, ancestors=(guide,))
    question = Cache(level.key, level.value, QUESTION_LENGTH)
    start = np.repeat(START[..., None], G, 2)
    hidden_NPGCD, _ = model.extend(COMPLETION, start=start, ancestors=(guide, question))
    # The question's last true token predicts the first of each completion.
    first_NPD = jnp.take_along_axis(hidden_NPQD, (QUESTION_LENGTH - 1)[..., None, None], 2)[:, :, 0]
    first_NPGD = jnp.repeat(first_NPD[:, :, None], G, 2)
    before = jnp.concatenate([first_NPGD[..., None, :], hidden_NPGCD[..., :-1, :]], -2)
    logp = jax.nn.log_softmax(model.logits(before))
    return jnp.take_along_axis(logp, COMPLETION[..., None], -1)[..., 0]


@pytest.fixture(scope="module")
def influence() -> np.ndarray:
    """Return [N, P, G, C, V]: size of the gradient of each log-probability at each position."""
    model = drawn_model(small_config(vocab=VOCAB))
    graph, params = nnx.split(model)

    flat = dict(nnx.to_flat_state(params))

    def of_embedding(embed: jax.Array) -> jax.Array:
        changed = {**flat, ("embed",): flat["embed",].replace(embed)}
        return completion_logp(nnx.merge(graph, nnx.from_flat_state(changed.items())))

    jacobian = jax.jit(jax.jacrev(of_embedding))(model.embed[...])
    assert jacobian.shape == (N, P, G, C, *model.embed[...].shape)
    return np.abs(np.asarray(jacobian)).max(-1)


def allowed(n: int, p: int, g: int, t: int) -> set[int]:
    """Tokens before token t on its path from the root: what it may depend on."""
    guide = GUIDE[n, : GUIDE_LENGTH[n]]
    question = QUESTION[n, p, : QUESTION_LENGTH[n, p]]
    return {int(token) for token in (*guide, *question, *COMPLETION[n, p, g, :t])}


def test_a_token_depends_on_its_whole_past_and_on_nothing_else(influence: np.ndarray) -> None:
    for n, p, g, t in np.ndindex(N, P, G, C):
        seen = set(np.flatnonzero(influence[n, p, g, t]).tolist())
        assert seen == allowed(n, p, g, t), (n, p, g, t)


# The same, said one by one, so that a failure says what leaks.


def test_nothing_depends_on_later_tokens_or_on_itself(influence: np.ndarray) -> None:
    for n, p, g, t in np.ndindex(N, P, G, C):
        assert not influence[n, p, g, t, COMPLETION[n, p, g, t:]].any()


def test_nothing_depends_on_sibling_completions(influence: np.ndarray) -> None:
    for n, p, g in np.ndindex(N, P, G):
        assert not influence[n, p, g][:, COMPLETION[n, p, 1 - g]].any()


def test_nothing_depends_on_other_questions(influence: np.ndarray) -> None:
    for n, p in np.ndindex(N, P):
        others = [*QUESTION[n, 1 - p], *COMPLETION[n, 1 - p].ravel()]
        assert not influence[n, p][..., others].any()


def test_nothing_depends_on_other_trees(influence: np.ndarray) -> None:
    for n in range(N):
        others = [*GUIDE[1 - n], *QUESTION[1 - n].ravel(), *COMPLETION[1 - n].ravel()]
        assert not influence[n][..., others].any()


def test_nothing_depends_on_padding(influence: np.ndarray) -> None:
    behind_guide = GUIDE[np.arange(S) >= GUIDE_LENGTH[:, None]]
    behind_question = QUESTION[np.arange(Q) >= QUESTION_LENGTH[..., None]]
    assert behind_guide.size and behind_question.size
    assert not influence[..., [*behind_guide, *behind_question]].any()
