"""The choices that the algorithm offers, by name."""

import enum
from typing import TypeVar

Kind = TypeVar("Kind", bound=enum.StrEnum)


class AdvantageKind(enum.StrEnum):
    """What a completion's reward is compared with; formulas at `group_advantages`."""

    GRPO = "grpo"
    MEAN_ONLY = "mean_only"
    BATCH = "batch"
    RLOO = "rloo"


class LossKind(enum.StrEnum):
    """Policy objective and how its tokens are averaged; formulas at `policy_loss`."""

    GRPO = "grpo"
    TOKEN_MEAN = "token_mean"
    BNPO = "bnpo"
    DR_GRPO = "dr_grpo"
    GSPO = "gspo"
    CISPO = "cispo"


class KlKind(enum.StrEnum):
    """Estimator of KL(policy‖reference); formulas at `token_kl`."""

    K1 = "k1"
    K2 = "k2"
    K3 = "k3"
    K3_PLUS = "k3_plus"


class CorrectionKind(enum.StrEnum):
    """How the loss is corrected where sampler and trainer differ; see `importance_weights`."""

    AUTO = "auto"  # `sequence_mask` where the sampler is another model, else `none`
    NONE = "none"
    TOKEN_TRUNCATE = "token_truncate"
    TOKEN_MASK = "token_mask"
    SEQUENCE_TRUNCATE = "sequence_truncate"
    SEQUENCE_MASK = "sequence_mask"


def pick(choices: type[Kind], kind: str) -> Kind:
    """Return the member of `choices` that `kind` (a member or its string) means.

    Raises:
        ValueError: no such member; the message lists them.
    """
    try:
        return choices(kind)
    except ValueError:
        known = ", ".join(repr(member.value) for member in choices)
        raise ValueError(f"unknown {choices.__name__} {kind!r}; choose one of {known}") from None
