"""The one table of parameter names: ours, Hugging Face's and GGUF's, used in every direction."""

import dataclasses
import enum


class Form(enum.StrEnum):
    """Whose names; the value is the table's column."""

    HF = "hf"
    GGUF = "gguf"


@dataclasses.dataclass(frozen=True)
class Name:
    """One row of the table: a parameter here and there.

    Attributes:
        ours: dotted path in the Qwen module; `layers.…` are stacked [L, …].
        hf: tensor name in Hugging Face's files; `{}` stands for the layer's number.
        gguf: tensor name in GGUF files; as `hf`.
        transposed: whether their tensor is [out, in] where ours is [in, out].
    """

    ours: str
    hf: str
    gguf: str
    transposed: bool = False

    @property
    def stacked(self) -> bool:
        """Whether there is a tensor for each layer there, and one for all here."""
        return "{}" in self.hf

    def theirs(self, form: Form, layer: int = 0) -> str:
        """Return the tensor's name there; of one layer where they are stacked here."""
        return str(getattr(self, form.value)).format(layer)

    def tensors(self, form: Form, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
        """Return names and shapes of the tensors there that make up our parameter of this shape."""
        inner = shape[1:] if self.stacked else shape
        inner = inner[::-1] if self.transposed else inner
        layers = shape[0] if self.stacked else 1
        return [(self.theirs(form, layer), inner) for layer in range(layers)]


# A family has the rows whose parameters its config makes (biases, norms of q and k, a head).
# torch keeps a linear layer's weight as [out, in], we as [in, out].
_LAYER = "model.layers.{}."
_ATTENTION = f"{_LAYER}self_attn."
NAMES: tuple[Name, ...] = (
    Name("embed", "model.embed_tokens.weight", "token_embd.weight"),
    Name(
        "layers.attention_norm.weight",
        f"{_LAYER}input_layernorm.weight",
        "blk.{}.attn_norm.weight",
    ),
    Name("layers.query.weight", f"{_ATTENTION}q_proj.weight", "blk.{}.attn_q.weight", True),
    Name("layers.query.bias", f"{_ATTENTION}q_proj.bias", "blk.{}.attn_q.bias"),
    Name("layers.key.weight", f"{_ATTENTION}k_proj.weight", "blk.{}.attn_k.weight", True),
    Name("layers.key.bias", f"{_ATTENTION}k_proj.bias", "blk.{}.attn_k.bias"),
    Name("layers.value.weight", f"{_ATTENTION}v_proj.weight", "blk.{}.attn_v.weight", True),
    Name("layers.value.bias", f"{_ATTENTION}v_proj.bias", "blk.{}.attn_v.bias"),
    Name("layers.query_norm.weight", f"{_ATTENTION}q_norm.weight", "blk.{}.attn_q_norm.weight"),
    Name("layers.key_norm.weight", f"{_ATTENTION}k_norm.weight", "blk.{}.attn_k_norm.weight"),
    Name("layers.output.weight", f"{_ATTENTION}o_proj.weight", "blk.{}.attn_output.weight", True),
    Name(
        "layers.mlp_norm.weight",
        f"{_LAYER}post_attention_layernorm.weight",
        "blk.{}.ffn_norm.weight",
    ),
    Name("layers.gate.weight", f"{_LAYER}mlp.gate_proj.weight", "blk.{}.ffn_gate.weight", True),
    Name("layers.up.weight", f"{_LAYER}mlp.up_proj.weight", "blk.{}.ffn_up.weight", True),
    Name("layers.down.weight", f"{_LAYER}mlp.down_proj.weight", "blk.{}.ffn_down.weight", True),
    Name("norm.weight", "model.norm.weight", "output_norm.weight"),
    Name("head", "lm_head.weight", "output.weight", True),  # absent where the head is tied
)
BY_OURS = {name.ours: name for name in NAMES}
