"""A start for small policies trained from nothing: attention that already looks things up.

Quoting from the prompt takes two heads in a row (Olsson et al., arXiv 2209.11895): one that brings
each token the one before it, and one that looks for the token whose predecessor equals the current
one and says it. Naming the line that a quotation stands in takes two more: one that tells every
token how its line began, and one that goes from the quotation to its place in the guide. From
random weights these form late, and all that a guide's reader has to learn waits for them: measured
in docs/decisions.md. As in mimetic initialization (Trockman and Kolter, arXiv 2305.09828) they are
put in place before training, which may change them as it likes.

Heads are wired along random orthonormal directions: `content` and `copied` read a token's
embedding, `back` (the tokens one to four places before it) and `line` are where its surroundings
are written. Content is compared in the slow rotary pairs, which hardly turn over a whole prompt;
positions are told apart by constant biases in the fast and middle ones. Two things are compared in
the same pairs, the second of them with its coordinates in reverse, so that it meets the first only
by chance.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from r1re_jax.model.config import ModelConfig
from r1re_jax.model.qwen import Qwen

# Gains, chosen so that at the start a match outweighs chance overlaps and position outweighs
# content.
_POSITION_GAIN = 6.3
_DISTANCE_GAIN = 4.5
_MATCH_GAIN = 1.7
# Of the second thing that is compared: it decides between places where the first is the same.
_CONTEXT_GAIN = 1.2
_BACK_GAIN = 0.3
_COPY_GAIN = 0.3
_RESIDUAL_SCALE = 0.1
# Rotary pairs by use, as parts of half a head: neighbours, tens of tokens, content.
_FAST, _MIDDLE = 0.2, 0.45


@dataclasses.dataclass(frozen=True)
class _Wires:
    """Weights to change, as NumPy arrays [L, in, out], and the directions along which to wire."""

    config: ModelConfig
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    output: np.ndarray
    query_bias: np.ndarray
    key_bias: np.ndarray
    content: np.ndarray
    back: tuple[np.ndarray, ...]
    line: np.ndarray
    copied: tuple[np.ndarray, ...]

    def head(self, number: int) -> slice:
        """Columns of query head (or rows of its output) `number`; of a key head likewise."""
        size = self.config.head_size
        return slice(number * size, (number + 1) * size)

    def pairs(self, low: float, high: float) -> np.ndarray:
        """Rotary pairs between two parts of half a head."""
        half = self.config.head_size // 2
        return np.arange(int(low * half), int(high * half))

    def slow(self) -> np.ndarray:
        """Both halves' dimensions of the slow pairs."""
        return _slow(self.config)

    def clear(self, layer: int, number: int) -> None:
        """Forget what a query head asks and writes."""
        self.query[layer, :, self.head(number)] = 0
        self.output[layer, self.head(number)] = 0

    def place(self, layer: int, head: int, pairs: np.ndarray, *, gain: float, shift: float) -> None:
        """Give a query head and its key head the bias whose scores peak `shift` tokens back.

        k = (s, 0) and q = s·(cos θ_f d, −sin θ_f d) in pairs f give the score
        s² Σ_f cos(θ_f (i − j − d)).
        """
        half = self.config.head_size // 2
        angle = shift * self.config.rope_frequencies[pairs]
        self.key_bias[layer, self.head(head // self.group).start + pairs] = gain
        start = self.head(head).start
        self.query_bias[layer, start + pairs] = gain * np.cos(angle)
        self.query_bias[layer, start + half + pairs] = -gain * np.sin(angle)

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.config.query_heads // self.config.kv_heads

    def compare(
        self, layer: int, head: int, query: tuple[np.ndarray, ...], key: tuple[np.ndarray, ...]
    ) -> None:
        """Let a query head score by what it reads along `query` and its key head along `key`."""
        slow, gains = self.slow(), (_MATCH_GAIN, _CONTEXT_GAIN)
        for weight, number, read in (
            (self.query, head, query),
            (self.key, head // self.group, key),
        ):
            weight[layer, :, self.head(number)] = 0
            orders = (slice(None), slice(None, None, -1))
            weight[layer][:, self.head(number).start + slow] = sum(
                gain * one[:, : len(slow)][:, order]
                for gain, one, order in zip(gains, read, orders, strict=True)
            )


def wire_reading(model: Qwen, *, anchor: int, seed: int = 0) -> None:
    """Rewire the first three layers of a randomly drawn model in place.

    Args:
        model: at least three layers, two key-value heads with two query heads each, and a tied
            head, whose rows the copied tokens are read by.
        anchor: the token that begins a line of the guide, before the name of its relation.
        seed: of the random directions.

    Raises:
        ValueError: a model of another form.
    """
    config = model.config
    group = config.query_heads // config.kv_heads
    notes = 4 * len(_slow(config)) + config.kv_heads * config.head_size
    small = int(_FAST * (config.head_size // 2)) < 2 or notes >= config.width
    if config.layers < 3 or not config.tied or group < 2 or config.kv_heads < 2 or small:
        raise ValueError(
            "wiring needs three layers, a tied head, two key-value heads with two query heads each,"
            f" a head_size of at least {int(4 / _FAST)} and a width above {notes}; found {config}"
        )
    wires = _take(model, seed=seed)
    _tell_neighbours(wires)
    _quote(wires)
    _tell_line(wires, np.array(model.embed[...][anchor]))
    _name_line(wires)
    _quote_line(wires)
    for name in ("query", "key", "value", "output"):
        getattr(model.layers, name).weight[...] = jnp.asarray(getattr(wires, name))
    model.layers.query.bias[...] = jnp.asarray(wires.query_bias)
    model.layers.key.bias[...] = jnp.asarray(wires.key_bias)
    model.layers.down.weight[...] = model.layers.down.weight[...] * _RESIDUAL_SCALE


def _take(model: Qwen, *, seed: int) -> _Wires:
    config, blocks = model.config, model.layers
    rng = np.random.default_rng(seed)
    slow, size = len(_slow(config)), config.head_size
    # What is written lies along directions of one basis, so that no note disturbs another.
    basis, used = _orthonormal(rng, config.width, config.width), 0
    written = []
    for wanted in (*[slow] * 4, *[size] * config.kv_heads, size):
        written.append(basis[:, used : used + wanted])
        used += wanted
    back, copied, line = written[:4], written[4:-1], written[-1]
    line = np.pad(line, ((0, 0), (0, size - line.shape[1])))
    return _Wires(
        config=config,
        query=np.array(blocks.query.weight[...]),
        key=np.array(blocks.key.weight[...]),
        value=np.array(blocks.value.weight[...]),
        # A token must still be recognisable behind a layer: branches start small.
        output=np.array(blocks.output.weight[...]) * _RESIDUAL_SCALE,
        query_bias=np.array(blocks.query.bias[...]),
        key_bias=np.array(blocks.key.bias[...]),
        # What is read must not lie along the notes; nothing is written along `copied` before it is.
        content=copied[0][:, :slow],
        back=tuple(back),
        line=line,
        copied=tuple(copied),
    )


def _tell_neighbours(wires: _Wires) -> None:
    """Layer 0: two heads of the first two groups each write the tokens one to four places back."""
    slow, fast = wires.slow(), wires.pairs(0, _FAST)
    for place, written in enumerate(wires.back):
        kv_head = place // 2
        head = kv_head * wires.group + place % 2
        wires.key[0, :, wires.head(kv_head)] = wires.value[0, :, wires.head(kv_head)] = 0
        wires.value[0][:, wires.head(kv_head).start + slow] = wires.content
        wires.clear(0, head)
        wires.place(0, head, fast, gain=_POSITION_GAIN, shift=place + 1)
        wires.output[0, wires.head(head).start + slow] = _BACK_GAIN * written.T


def _quote(wires: _Wires) -> None:
    """Layer 1: the first head of each group says what followed the last two tokens before."""
    for kv_head, copied in enumerate(wires.copied):
        head = kv_head * wires.group
        wires.clear(1, head)
        wires.compare(1, head, (wires.content, wires.back[0]), wires.back[:2])
        wires.value[1, :, wires.head(kv_head)] = copied
        wires.output[1, wires.head(head)] = _COPY_GAIN * copied.T


def _tell_line(wires: _Wires, anchor: np.ndarray) -> None:
    """Layer 1: the second head notes the nearest token behind an anchor as the token's line."""
    middle, slow, start = wires.pairs(_FAST, _MIDDLE), wires.slow(), wires.head(1).start
    wires.clear(1, 1)
    wires.place(1, 1, middle, gain=_DISTANCE_GAIN, shift=0)
    seen = anchor / np.sqrt(np.mean(np.square(anchor)))
    wires.query_bias[1, start + slow] = _MATCH_GAIN * (seen @ wires.content)
    wires.output[1, wires.head(1)] = _COPY_GAIN * wires.line.T


def _name_line(wires: _Wires) -> None:
    """Layer 2: the first head finds where the tokens three and four back stand, and names the line.

    Distance counts against near places, since the sentence and the thought hold the same words.
    """
    wires.clear(2, 0)
    wires.compare(2, 0, wires.back[2:], wires.back[2:])
    wires.place(2, 0, wires.pairs(_FAST, _MIDDLE)[1:], gain=_DISTANCE_GAIN, shift=0)
    wires.query_bias[2, wires.head(0)] *= -1
    wires.value[2, :, wires.head(0)] = wires.line
    wires.output[2, wires.head(0)] = 2 * _COPY_GAIN * wires.copied[0].T


def _quote_line(wires: _Wires) -> None:
    """Layer 2: the second group's first head quotes as in layer 1, from the same line rather.

    Lines share words and pieces of words: what follows one of them is told by the line.
    """
    head = wires.group
    wires.clear(2, head)
    wires.compare(2, head, (wires.content, wires.line), (wires.back[0], wires.line))
    wires.value[2, :, wires.head(1)] = wires.copied[1]
    wires.output[2, wires.head(head)] = _COPY_GAIN * wires.copied[1].T


def _slow(config: ModelConfig) -> np.ndarray:
    half = config.head_size // 2
    slow = np.arange(int(_MIDDLE * half), half)
    return np.concatenate([slow, slow + half])


def _orthonormal(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Draw a [rows, columns] matrix of orthonormal columns."""
    return np.linalg.qr(rng.normal(size=(rows, columns)))[0].astype(np.float32)
