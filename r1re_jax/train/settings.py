"""What a training run can be told: one frozen dataclass for each section of a config.

A field's name is the config's key. Fields made by `r1re_jax.train.fields.flat` hold settings whose
keys stand in the config beside the others (`sft.learning_rate`, not `sft.optimizer.learning_rate`).
Values that contradict each other are refused here; types and unknown keys in
`r1re_jax.train.config`.
"""

import dataclasses
import enum

from r1re_jax.model.lora import Lora
from r1re_jax.model.qwen import Remat
from r1re_jax.model.spread import Attention
from r1re_jax.policy import Limits
from r1re_jax.task.completions import TAUGHT, Taught, Thoughts
from r1re_jax.task.rewards import RewardTotals
from r1re_jax.task.tasks import Task, TaskKind, make_task
from r1re_jax.task.triplets.rewards import TripletTotals
from r1re_jax.train.data_settings import DataSettings, at_least
from r1re_jax.train.fields import Dtype, check_batch, flat
from r1re_jax.train.grpo_settings import GRPOSettings
from r1re_jax.train.optimizer import OptimizerSettings

# Figures of an evaluation that go into metrics.jsonl and that `checkpoint.best` can name.
EVAL_METRICS = (
    *("accuracy", "avg_at_k", "pass_at_k", "greedy_accuracy", "format_rate"),
    *("macro_f1", "micro_f1", "mean_reward", "mean_tokens"),
)
# Further ones where the task is the extraction of triplets.
TRIPLET_METRICS = ("entity_f1", "triplet_f1", "strict_triplet_f1")


class Phase(enum.StrEnum):
    """What a step trains with."""

    SFT = "sft"
    GRPO = "grpo"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The policy that training starts from.

    Attributes:
        path: a Hugging Face folder, a work directory, or `base:NAME` for a policy that the package
            ships.
        preset: name of a shape: with a path the shape that must be found there, so that what is
            known without the weights (run.compile, run.show) needs none; without one random weights
            of it, which need `tokenizer`.
        dtype: what the forward computes in; parameters are float32 whatever it is.
        remat: what the backward pass computes again.
        attention: what computes attention, see `r1re_jax.model.spread.Attention`.
        parity_tokens: most completion tokens on which sampler and trainer are compared before the
            first step, see `r1re_jax.train.parity`; 0 switches that off.
    """

    path: str = ""
    preset: str = ""
    dtype: Dtype = Dtype.FLOAT32
    remat: Remat = Remat.NONE
    attention: Attention = Attention.AUTO
    parity_tokens: int = 16

    def __post_init__(self) -> None:
        """Refuse a negative number of tokens."""
        at_least(self, 0, "parity_tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSettings:
    """Sizes of the mesh axes; one may be -1 and takes the devices that are left.

    Attributes:
        data: copies of the parameters, one in each slice.
        fsdp: devices that share parameters and questions.
        sequence: devices that share parameters and the positions of a row in training, for long
            completions; completions are drawn as if they were `fsdp`.
        tensor: devices that share the heads and the MLP of a question.
        drawing_tensor: `tensor` while completions are drawn: the devices of fsdp, sequence and
            tensor are shared out anew then. 0 for as in training.
        moments_on_host: keep the optimizer's moments in the host's memory between updates.
        reference_on_host: keep a frozen reference there between its scorings.
    """

    data: int = 1
    fsdp: int = -1
    sequence: int = 1
    tensor: int = 1
    drawing_tensor: int = 0
    moments_on_host: bool = False
    reference_on_host: bool = False

    def __post_init__(self) -> None:
        """Refuse a negative number of devices."""
        at_least(self, 0, "drawing_tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTSettings:
    """The supervised warm start.

    Attributes:
        steps: how many; 0 for none.
        trees: N, guides of a step.
        questions: P, examples under each.
        micro_batch: questions whose gradient is computed at a time; 0 takes them all. The result
            does not depend on it.
        cycle: lessons repeat after this many steps; 0 for never. For where few examples come with
            a completion to learn: cycle · trees · questions of them are used, again and again.
        thoughts: of the completions to learn; none teaches the answer alone.
        between_words: where an example comes without reasoning, a thought is made that quotes at
            most so many of the words between its mentions.
        optimizer: see `OptimizerSettings`.
    """

    steps: int = 0
    trees: int = 1
    questions: int = 16
    micro_batch: int = 0
    cycle: int = 0
    thoughts: Thoughts = TAUGHT.thoughts
    between_words: int = TAUGHT.between_words
    optimizer: OptimizerSettings = flat(OptimizerSettings(learning_rate=5e-6))

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit."""
        at_least(self, 0, "steps", "micro_batch", "cycle")
        at_least(self, 1, "trees", "questions", "between_words")
        check_batch(self.trees, self.questions, self.micro_batch)
        object.__setattr__(self, "optimizer", self.optimizer.resolved(self.steps))

    @property
    def taught(self) -> Taught:
        """What completions to learn hold beside the answer."""
        return Taught(thoughts=self.thoughts, between_words=self.between_words)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """When and how to evaluate.

    Attributes:
        every: steps between evaluations; 0 for at the end of a phase only.
        samples: completions of each example; 0 switches evaluation off.
        temperature: of sampling; 0 is greedy.
        batch: examples at a time.
        at_start: whether to evaluate before the first step too.
        greedy: whether to draw one completion at temperature 0 as well.
    """

    every: int = 50
    samples: int = 4
    temperature: float = 1.0
    batch: int = 32
    at_start: bool = True
    greedy: bool = False

    def __post_init__(self) -> None:
        """Refuse negative sizes, and several samples that would all be the same."""
        at_least(self, 0, "every", "samples", "temperature")
        at_least(self, 1, "batch")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                f"samples is {self.samples} at temperature 0, where all are equal; set it to 1"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """When to save.

    Attributes:
        every: steps between checkpoints; 0 for at the end of a phase only.
        keep: how many of the latest to keep.
        best: metric of an evaluation, `SET/METRIC`, whose best checkpoint is kept too; empty for
            none.
    """

    every: int = 50
    keep: int = 2
    best: str = ""

    def __post_init__(self) -> None:
        """Refuse to keep nothing."""
        at_least(self, 0, "every")
        at_least(self, 1, "keep")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogSettings:
    """What to write down.

    Attributes:
        every: steps between lines of metrics.jsonl; steps with an evaluation have one always.
        completions: steps between files of completions; 0 for none.
        tensorboard: write TensorBoard's files beside metrics.jsonl.
        wandb: report to Weights & Biases, see `r1re_jax.report.trackers`.
        trackio: report to trackio.
        project: what wandb and trackio gather the run under.
    """

    every: int = 1
    completions: int = 10
    tensorboard: bool = True
    wandb: bool = False
    trackio: bool = False
    project: str = "r1re_jax"

    def __post_init__(self) -> None:
        """Refuse negative intervals."""
        at_least(self, 1, "every")
        at_least(self, 0, "completions")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A whole run: SFT steps are numbered 1 … sft.steps, GRPO goes on counting.

    Attributes:
        seed: of data order, sampling and random weights.
        model: where the policy comes from.
        lora: what is trained beside its matrices, in place of all of its parameters.
        tokenizer: folder of the tokenizer; only with `model.preset`.
        mesh: the devices.
        limits: widths of the tree's levels, in training too unless `data.train.limits` says else.
        data: what to train and evaluate on.
        task: what the policy learns under a guide.
        reward: what each outcome earns, in training and in evaluation, where a pair is labelled.
        triplets: what completions earn where the task is the extraction of triplets.
        sft: the supervised warm start.
        grpo: the reinforcement.
        evaluate: when and how to evaluate.
        checkpoint: when to save.
        log: what to write down.
    """

    seed: int = 0
    model: ModelSettings
    lora: Lora = Lora()
    tokenizer: str = ""
    mesh: MeshSettings = MeshSettings()
    limits: Limits
    data: DataSettings
    task: TaskKind = TaskKind.RELATION
    reward: RewardTotals = RewardTotals()
    triplets: TripletTotals = TripletTotals()
    sft: SFTSettings = SFTSettings()
    grpo: GRPOSettings = GRPOSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    log: LogSettings = LogSettings()

    def __post_init__(self) -> None:
        """Refuse sections that do not fit each other."""
        if not self.steps:
            raise ValueError("sft.steps and grpo.steps are both 0: there is nothing to train")
        if not self.model.path and not self.model.preset:
            raise ValueError("give model.path, a Hugging Face folder, or model.preset, a shape")
        if bool(self.tokenizer) == bool(self.model.path):
            raise ValueError(
                "give `tokenizer`, a folder, with model.preset and only then: model.path brings its"
                " own"
            )
        if self.task is not TaskKind.TRIPLETS and self.triplets != TripletTotals():
            raise ValueError(f"the section triplets is of task={TaskKind.TRIPLETS}; remove it")
        if self.task is not TaskKind.RELATION and self.reward != RewardTotals():
            raise ValueError(f"the section reward is of task={TaskKind.RELATION}; remove it")
        if self.lora.rank and self.grpo.reference.decay:
            raise ValueError(
                f"grpo.reference.decay is {self.grpo.reference.decay} with lora.rank"
                f" {self.lora.rank}: the mean of two adapters is not that of the policies they"
                " make. Set it to 0, and the reference becomes the policy every so many steps"
            )
        if self.mesh.reference_on_host and (self.lora.rank or self.grpo.reference.every):
            raise ValueError(
                "mesh.reference_on_host is for a frozen reference of its own; with lora.rank it is"
                " the policy's base, with grpo.reference.every it moves: set it to False"
            )
        name, _, metric = self.checkpoint.best.partition("/")
        known = self.eval_metrics
        if self.checkpoint.best and not (name in self.data.eval and metric in known):
            raise ValueError(
                f"checkpoint.best is {self.checkpoint.best!r}; expected SET/METRIC, one of the sets"
                f" of data.eval, {sorted(self.data.eval)}, and one of {', '.join(known)}"
            )
        if self.grpo.overlong_buffer > self.training_limits.completion:
            raise ValueError(
                f"grpo.overlong_buffer is {self.grpo.overlong_buffer} tokens and a completion has"
                f" {self.training_limits.completion} at most; it must be no more than these"
            )
        if metric == "greedy_accuracy" and not self.evaluate.greedy:
            raise ValueError("checkpoint.best asks for greedy_accuracy; set evaluate.greedy=True")

    @property
    def task_rules(self) -> Task:
        """What the task gives: examples, prompts, verdicts, figures."""
        return make_task(self.task, reward=self.reward, triplets=self.triplets)

    @property
    def eval_metrics(self) -> tuple[str, ...]:
        """Figures of an evaluation that go into metrics.jsonl."""
        return EVAL_METRICS + (TRIPLET_METRICS if self.task is TaskKind.TRIPLETS else ())

    @property
    def training_limits(self) -> Limits:
        """Widths of the levels in training."""
        return self.data.train.limits or self.limits

    @property
    def steps(self) -> int:
        """Steps of both phases."""
        return self.sft.steps + self.grpo.steps

    @property
    def phases(self) -> dict[Phase, SFTSettings | GRPOSettings]:
        """The phases that have steps, in order, with their settings."""
        sections = {Phase.SFT: self.sft, Phase.GRPO: self.grpo}
        return {phase: section for phase, section in sections.items() if section.steps}

    def phase_of(self, step: int) -> Phase:
        """Return what step number `step` (from 1) trains with."""
        return Phase.SFT if step <= self.sft.steps else Phase.GRPO
