"""What a config's `grpo` section says."""

import dataclasses
from collections.abc import Mapping

from r1re_jax.model.int8 import Quantisation
from r1re_jax.rl.kinds import AdvantageKind, CorrectionKind, KlKind, LossKind
from r1re_jax.rl.objective import LossSettings
from r1re_jax.task.rewards import RewardPart
from r1re_jax.train.data_settings import at_least
from r1re_jax.train.fields import check_batch, flat
from r1re_jax.train.optimizer import OptimizerSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceSettings:
    """How the reference of the KL term follows the policy (`r1re_jax.train.reference`).

    Attributes:
        every: steps between its moves; 0 freezes the policy at the phase's start.
        decay: share of the old reference that a move keeps; 0 makes it the policy of that step. An
            exponential moving average has every=1 and a decay close to 1.
    """

    every: int = 0
    decay: float = 0.0

    def __post_init__(self) -> None:
        """Refuse moves that do not move."""
        at_least(self, 0, "every")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay is {self.decay}; it must be in [0, 1)")
        if self.decay and not self.every:
            raise ValueError(
                f"decay is {self.decay} but every is 0, a frozen reference: give every=1 for a"
                " moving average"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantiseSettings:
    """What the model that draws stores as int8 (`r1re_jax.model.quantise`); training does not.

    Attributes:
        weights: the layers' matrices, made anew from the policy for every step.
        cache: keys and values of completions while they are drawn; those of guides and questions
            are shared, and few.
    """

    weights: Quantisation = Quantisation.NONE
    cache: Quantisation = Quantisation.NONE

    def __post_init__(self) -> None:
        """Turn strings into what they name."""
        for name in ("weights", "cache"):
            object.__setattr__(self, name, Quantisation(getattr(self, name)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPOSettings:
    """Group relative policy optimization (arXiv 2402.03300); defaults of R1-RE (arXiv 2507.04642).

    Attributes:
        steps: how many; 0 for none.
        trees: N, guides of a step.
        questions: P, questions under each.
        group: G, completions of each.
        refill: most further rounds of drawing P fresh questions under each guide, while groups
            whose rewards are all equal are among the P: those say nothing of what is better, and
            give their place to groups that do (dynamic sampling, DAPO, arXiv 2503.14476, 3.2).
        micro_batch: questions whose gradient is computed at a time; 0 takes them all. The result
            does not depend on it.
        micro_group: completions of each of these questions that are taken at a time; 0 for all.
        inner_iterations: updates on the same completions.
        temperature: of sampling; scores are under the same.
        top_k: must be 0; see `top_p`.
        top_p: must be 1: scores are under the whole vocabulary, so truncated sampling would bias
            the ratio of probabilities that the policy gradient rests on.
        min_p: must be 0; see `top_p`.
        rewards: parts of the reward and their weights (`r1re_jax.task.rewards.RewardPart`); each
            part is normalised over its group, and the advantage is their weighted sum. Empty: one
            reward, the rule's total (and the penalty of `overlong_buffer`, if there is one).
        overlong_buffer: so many tokens below the limit of a completion a penalty begins that grows
            linearly to 1 at the limit, where it stays for a completion that was cut off (DAPO,
            arXiv 2503.14476, equation 13); 0 for none.
        overlong_weight: what the penalty is multiplied by before it is taken from the total; where
            `rewards` names parts, the weight of its part `length` stands there instead.
        mask_truncated: whether completions that were cut off are left out of the loss and the KL
            term (overlong filtering, DAPO, 3.4); their rewards still count in their groups.
        advantage: see `r1re_jax.rl.advantages`.
        loss: see `r1re_jax.rl.losses`.
        clip_low: the ratio is clipped from below at 1 - clip_low.
        clip_high: and from above at 1 + clip_high.
        dual_clip: for negative advantages the objective is bounded below by dual_clip times the
            advantage, so that no single token that became much likelier rules the step; above 1,
            0 for off (arXiv 1912.09729, equation 5).
        kl_coefficient: weight of KL(policy‖reference); 0 needs no reference.
        kl: its estimator, see `r1re_jax.rl.kl`.
        reference: how the reference follows the policy, see `ReferenceSettings`.
        entropy_coefficient: weight of the entropy bonus, which is taken from the loss: a policy is
            paid for staying undecided; 0 for none (PPO, arXiv 1707.06347, equation 9).
        correction: how the loss is weighted where sampler and trainer differ, see
            `r1re_jax.rl.correction`; `auto` corrects where the sampler is another model.
        correction_limit: the largest ratio of the trainer's probability to the sampler's.
        quantise: what the sampler stores as int8, see `QuantiseSettings`; `correction` is then on
            by default.
        chunk: tokens decoded between two looks at signals.
        compaction: how many sizes of the decoded batch there are from one to its half; finished
            completions are dropped between chunks where a smaller size holds the others. Each size
            is a program to compile; 0 keeps the batch whole.
        smallest_batch: completions of a tree that the decoded batch has at least.
        smallest_cache: tokens of a completion that the cache has room for at first, before it
            doubles; each size is a program to compile. 0 for 64.
        score_chunk: completion positions whose logits exist at a time.
        max_logp_gap: the run stops when sampler and trainer differ by more than this in the mean
            log-probability of a sampled token, in nats.
        optimizer: see `OptimizerSettings`.
    """

    steps: int = 0
    trees: int = 1
    questions: int = 32
    group: int = 16
    refill: int = 0
    micro_batch: int = 0
    micro_group: int = 0
    inner_iterations: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    rewards: Mapping[str, float] = dataclasses.field(default_factory=dict)
    overlong_buffer: int = 0
    overlong_weight: float = 1.0
    mask_truncated: bool = False
    advantage: AdvantageKind = AdvantageKind.GRPO
    loss: LossKind = LossKind.GRPO
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    kl_coefficient: float = 0.001
    kl: KlKind = KlKind.K3_PLUS
    reference: ReferenceSettings = ReferenceSettings()
    entropy_coefficient: float = 0.0
    correction: CorrectionKind = CorrectionKind.AUTO
    correction_limit: float = 3.0
    quantise: QuantiseSettings = QuantiseSettings()
    chunk: int = 32
    compaction: int = 3
    smallest_batch: int = 1
    smallest_cache: int = 0
    score_chunk: int = 128
    max_logp_gap: float = 0.25
    optimizer: OptimizerSettings = flat(OptimizerSettings(learning_rate=1e-6))

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit and sampling that scoring does not match."""
        at_least(self, 0, "steps", "micro_batch", "refill", "overlong_buffer", "compaction")
        at_least(self, 0, "smallest_cache")
        at_least(self, 1, "trees", "questions", "inner_iterations", "chunk", "score_chunk")
        at_least(self, 1, "smallest_batch")
        if self.group < 2:
            raise ValueError(
                f"group is {self.group}; GRPO compares the completions of a question with each"
                " other, so it must be at least 2"
            )
        if not self.temperature > 0:
            raise ValueError(
                f"temperature is {self.temperature}; training samples, so it must be above 0"
            )
        if not self.correction_limit >= 1:
            raise ValueError(
                f"correction_limit is {self.correction_limit}; where sampler and trainer agree the"
                " ratio is 1, so it must be at least 1"
            )
        if not self.max_logp_gap > 0:
            raise ValueError(f"max_logp_gap is {self.max_logp_gap}; it must be above 0")
        for name, neutral in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
            if getattr(self, name) != neutral:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; training scores the whole vocabulary, so"
                    f" sampling from a part of it would bias the gradient: leave it at {neutral}"
                )
        if self.reference.every and not self.kl_coefficient:
            raise ValueError(
                f"reference.every is {self.reference.every}, but with kl_coefficient=0 there is no"
                " reference"
            )
        check_batch(self.trees, self.questions, self.micro_batch)
        if self.micro_group < 0 or self.group % (self.micro_group or self.group):
            raise ValueError(
                f"micro_group is {self.micro_group}; it must divide the {self.group} completions of"
                " a group"
            )
        self._check_rewards()
        self.objective  # noqa: B018  refuses what the loss refuses
        object.__setattr__(self, "optimizer", self.optimizer.resolved(self.steps))

    def _check_rewards(self) -> None:
        """Refuse parts that do not exist, and penalties that nothing would read."""
        known = [part.value for part in RewardPart]
        for name, weight in self.rewards.items():
            if name not in known:
                raise ValueError(f"rewards has {name!r}; the parts are {', '.join(known)}")
            if not weight > 0:
                raise ValueError(f"rewards.{name} is {weight}; a weight must be above 0")
        if not self.overlong_weight > 0:
            raise ValueError(
                f"overlong_weight is {self.overlong_weight}; it must be above 0 (overlong_buffer=0"
                " switches the penalty off)"
            )
        if not self.overlong_buffer and self.overlong_weight != 1:
            raise ValueError("overlong_weight is given, but there is no penalty: overlong_buffer=0")
        if self.rewards and self.overlong_weight != 1:
            raise ValueError("where rewards names parts, give the weight as rewards.length")
        if self.rewards and bool(self.overlong_buffer) != (RewardPart.LENGTH in self.rewards):
            raise ValueError(
                "rewards.length is the penalty of overlong_buffer: where rewards names parts, give"
                " both or neither"
            )

    @property
    def questions_drawn(self) -> int:
        """The most questions that a step draws under each guide."""
        return self.questions * (1 + self.refill)

    @property
    def objective(self) -> LossSettings:
        """The settings of the loss."""
        return LossSettings(
            kind=self.loss,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
            kl_coefficient=self.kl_coefficient,
            kl_kind=self.kl,
            entropy_coefficient=self.entropy_coefficient,
        )
