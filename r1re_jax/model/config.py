"""Shapes of the policy: one frozen dataclass, and presets by name."""

import dataclasses
import difflib
import enum

import numpy as np


class Family(enum.StrEnum):
    """Decoders that differ in little; the value is Hugging Face's `model_type`."""

    QWEN2 = "qwen2"  # bias on q, k, v (Qwen2 and 2.5; arXiv 2407.10671)
    QWEN3 = "qwen3"  # RMSNorm of every head's q and k, no bias (arXiv 2505.09388, section 2)
    LLAMA = "llama"  # neither (Llama 3, SmolLM2; arXiv 2407.21783)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretching of the slow rotary frequencies to a longer context.

    Attributes:
        factor: by which slow frequencies are divided.
        low_freq_factor: a frequency is slow if it turns fewer times than this in the old context.
        high_freq_factor: and fast, hence kept, if it turns more often than this.
        original_context: the old context, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if not (self.factor > 0 and 0 < self.low_freq_factor < self.high_freq_factor):
            raise ValueError(
                f"rotary scaling needs factor > 0 and 0 < low_freq_factor < high_freq_factor,"
                f" found {self}"
            )

    def __call__(self, frequency: np.ndarray) -> np.ndarray:
        """Divide slow frequencies by the factor, keep fast ones, blend between (radians a token).

        As in Llama 3.1's reference code: with t the turns in the old context and s = (t - low) /
        (high - low) in [0, 1], the result is frequency · (s + (1 - s) / factor).
        """
        turns = self.original_context * frequency / (2 * np.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return frequency * (kept + (1 - kept) / self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder of Qwen's and Llama's kind.

    Attributes:
        family: which of them; says where there are biases and norms.
        vocab: V, rows of the embedding (at least the tokenizer's size).
        layers: L.
        width: D.
        query_heads: H.
        kv_heads: K; divides H (grouped-query attention, arXiv 2305.13245).
        head_size: A; even, since RoPE turns pairs.
        mlp_width: F of the SwiGLU MLP.
        rope_theta: base of the rotary frequencies.
        rope_scaling: Llama 3.1's; None leaves the frequencies as they are.
        norm_eps: epsilon of RMSNorm.
        tied: whether the output head is the embedding.
        max_position: longest sequence that the weights were trained for; carried to exports.
    """

    family: Family = Family.QWEN2
    vocab: int
    layers: int
    width: int
    query_heads: int
    kv_heads: int
    head_size: int
    mlp_width: int
    rope_theta: float = 1e6
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tied: bool = False
    max_position: int = 32_768

    def __post_init__(self) -> None:
        """Refuse shapes that cannot be built."""
        for field in (
            "vocab",
            "layers",
            "width",
            "query_heads",
            "kv_heads",
            "head_size",
            "mlp_width",
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"model {field} is {getattr(self, field)}; it must be at least 1")
        if self.query_heads % self.kv_heads:
            raise ValueError(
                f"{self.query_heads} query heads cannot share {self.kv_heads} key-value heads"
                " evenly"
            )
        if self.head_size % 2:
            raise ValueError(f"head_size is {self.head_size}; rotary embedding needs an even one")

    @property
    def qkv_bias(self) -> bool:
        """Whether the projections to query, key and value have biases."""
        return self.family is Family.QWEN2

    @property
    def qk_norm(self) -> bool:
        """Whether every head's query and key are normalised before they are rotated."""
        return self.family is Family.QWEN3

    @property
    def rope_frequencies(self) -> np.ndarray:
        """[A/2] float64, radians a token: θ_i = theta^(−2i/A) (arXiv 2104.09864, 3.3), scaled.

        In float64, since at position 30,000 an ulp of an fp32 frequency is 2e-3 radians.
        """
        half = self.head_size // 2
        frequency = self.rope_theta ** (-np.arange(half) / half)
        return frequency if self.rope_scaling is None else self.rope_scaling(frequency)


def _qwen25(
    layers: int, width: int, heads: tuple[int, int], mlp: int, **more: object
) -> ModelConfig:
    query_heads, kv_heads = heads
    head_size = 64 if width == 896 else 128
    return ModelConfig(
        layers=layers,
        width=width,
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_size=head_size,
        mlp_width=mlp,
        **{"vocab": 152_064, "norm_eps": 1e-6, **more},
    )


# Figures of the published config.json files (Qwen2.5 technical report, arXiv 2412.15115, table 1).
PRESETS: dict[str, ModelConfig] = {
    "nano": ModelConfig(
        vocab=2048,
        layers=4,
        width=256,
        query_heads=4,
        kv_heads=2,
        head_size=48,
        mlp_width=384,
        rope_theta=1e6,
        tied=True,
        max_position=4096,
    ),
    "qwen2.5-0.5b": _qwen25(24, 896, (14, 2), 4864, vocab=151_936, tied=True),
    "qwen2.5-1.5b": _qwen25(28, 1536, (12, 2), 8960, vocab=151_936, tied=True),
    "qwen2.5-3b": _qwen25(36, 2048, (16, 2), 11_008, vocab=151_936, tied=True),
    "qwen2.5-7b": _qwen25(28, 3584, (28, 4), 18_944),
    "qwen2.5-14b": _qwen25(48, 5120, (40, 8), 13_824),
    "qwen2.5-32b": _qwen25(64, 5120, (40, 8), 27_648),
}


def preset(name: str, **overrides: object) -> ModelConfig:
    """Return the preset `name` with some fields replaced.

    Raises:
        ValueError: no such preset (the message names the nearest) or no such field.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"no model preset {name!r}; did you mean {near!r}? There are {sorted(PRESETS)}"
        )
    return dataclasses.replace(PRESETS[name], **overrides)
