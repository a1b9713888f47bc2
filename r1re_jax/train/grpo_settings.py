"""What a config's `grpo` section says."""

import dataclasses

from r1re_jax.rl.kinds import AdvantageKind, KlKind, LossKind
from r1re_jax.rl.objective import LossSettings
from r1re_jax.train.data_settings import at_least
from r1re_jax.train.fields import check_batch, flat
from r1re_jax.train.optimizer import OptimizerSettings


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
        inner_iterations: updates on the same completions.
        temperature: of sampling; scores are under the same.
        top_k: must be 0; see `top_p`.
        top_p: must be 1: scores are under the whole vocabulary, so truncated sampling would bias
            the ratio of probabilities that the policy gradient rests on.
        min_p: must be 0; see `top_p`.
        advantage: see `r1re_jax.rl.advantages`.
        loss: see `r1re_jax.rl.losses`.
        clip_low: the ratio is clipped from below at 1 - clip_low.
        clip_high: and from above at 1 + clip_high.
        dual_clip: for negative advantages the objective is bounded below by dual_clip times the
            advantage, so that no single token that became much likelier rules the step; above 1,
            0 for off (arXiv 1912.09729, equation 5).
        kl_coefficient: weight of KL(policy‖reference); 0 needs no reference.
        kl: its estimator, see `r1re_jax.rl.kl`.
        chunk: tokens decoded between two looks at signals.
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
    inner_iterations: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    advantage: AdvantageKind = AdvantageKind.GRPO
    loss: LossKind = LossKind.GRPO
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    kl_coefficient: float = 0.001
    kl: KlKind = KlKind.K3_PLUS
    chunk: int = 32
    score_chunk: int = 128
    max_logp_gap: float = 0.25
    optimizer: OptimizerSettings = flat(OptimizerSettings(learning_rate=1e-6))

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit and sampling that scoring does not match."""
        at_least(self, 0, "steps", "micro_batch", "refill")
        at_least(self, 1, "trees", "questions", "inner_iterations", "chunk", "score_chunk")
        if self.group < 2:
            raise ValueError(
                f"group is {self.group}; GRPO compares the completions of a question with each"
                " other, so it must be at least 2"
            )
        if not self.temperature > 0:
            raise ValueError(
                f"temperature is {self.temperature}; training samples, so it must be above 0"
            )
        if not self.max_logp_gap > 0:
            raise ValueError(f"max_logp_gap is {self.max_logp_gap}; it must be above 0")
        for name, neutral in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
            if getattr(self, name) != neutral:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; training scores the whole vocabulary, so"
                    f" sampling from a part of it would bias the gradient: leave it at {neutral}"
                )
        check_batch(self.trees, self.questions, self.micro_batch)
        self.objective  # noqa: B018  refuses what the loss refuses
        object.__setattr__(self, "optimizer", self.optimizer.resolved(self.steps))

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
        )
