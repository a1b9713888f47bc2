"""Run TRL's own loss and advantage code on given tensors. For TRL's interpreter, not the project's.

    python trl_side.py in.npz out.npz

`in.npz` holds `cases`, a JSON list of settings by case name, and each case's arrays as NAME/ARRAY.
`out.npz` gets NAME/loss and NAME/gradient, or NAME/advantage, and `versions`. No pickle either way.

The trainers are made without `__init__`, which wants a model and data, and are given what it would
take from a real `GRPOConfig`. The methods called are TRL's, unchanged: `_compute_loss`, and
`_generate_and_score_completions` with `_calculate_rewards`. Tensors stand for the network alone.
"""

import collections
import json
import sys
import tempfile
from types import SimpleNamespace

import accelerate
import numpy as np
import torch
import transformers
import trl


def config(kind: type, settings: dict, *, rows: int, group: int, parts: int) -> object:
    """Make a real GRPOConfig or RLOOConfig, so that all its other values are TRL's defaults."""
    return kind(
        output_dir=tempfile.gettempdir(),
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=rows // parts,
        gradient_accumulation_steps=parts,
        num_generations=group,
        **settings,
    )


def trainer(kind: type, args: object) -> object:
    """Make a trainer without a model; every attribute is what `__init__` takes from `args`."""
    self = object.__new__(kind)
    self.args = args
    self.accelerator = accelerate.Accelerator(cpu=True)
    self.model = torch.nn.Module().train()
    self.model.is_gradient_checkpointing = False
    self.use_vllm = self.aux_loss_enabled = self.log_multimodal = self._is_vlm = False
    self._metrics = collections.defaultdict(lambda: collections.defaultdict(list))
    self.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    for name in vars(args):  # beta, loss_type, scale_rewards, num_iterations, …
        if name.islower() and not name.startswith("_") and not hasattr(kind, name):
            self.__dict__.setdefault(name, getattr(args, name))
    self.epsilon_low = args.epsilon
    self.epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    self._entropy_bonus_enabled = False
    return self


def loss_and_gradient(case: dict, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Add up `_compute_loss` over the micro-batches of one accumulation, and its gradient."""
    dtype, parts = getattr(torch, case["dtype"]), case["parts"]
    tensors = {name: torch.tensor(x) for name, x in arrays.items()}
    tensors = {name: x if name == "mask" else x.to(dtype) for name, x in tensors.items()}
    logp, mask = tensors.pop("logp").requires_grad_(), tensors.pop("mask").long()
    names = {"old": "old_per_token_logps", "ref": "ref_per_token_logps", "advantage": "advantages"}
    rows = len(mask)
    args = config(trl.GRPOConfig, case["settings"], rows=rows, group=case["group"], parts=parts)
    self = trainer(trl.GRPOTrainer, args)
    total = 0.0
    for part in torch.arange(rows).chunk(parts):
        answer = (logp[part], torch.zeros_like(logp[part]), None)
        self._get_per_token_logps_and_entropies = lambda *a, answer=answer, **k: answer
        loss = self._compute_loss(
            self.model,
            {
                "prompt_ids": torch.zeros(len(part), 1, dtype=torch.long),
                "prompt_mask": torch.ones(len(part), 1, dtype=torch.long),
                "completion_ids": torch.zeros_like(mask[part]),
                "completion_mask": mask[part],
                "num_items_in_batch": mask.sum(),
                **{names[name]: x[part] for name, x in tensors.items()},
            },
        )
        loss.backward()
        total += loss.item()
    return {"loss": np.array(total), "gradient": logp.grad.double().numpy()}


def advantage(case: dict, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Score a batch whose reward function returns the given rewards; TRL computes in fp32."""
    reward = arrays["reward"]
    groups, group = reward.shape
    kinds = {"grpo": (trl.GRPOConfig, trl.GRPOTrainer), "rloo": (trl.RLOOConfig, trl.RLOOTrainer)}
    config_kind, trainer_kind = kinds[case["trainer"]]
    settings = {"beta": 0.0} | case["settings"]
    args = config(config_kind, settings, rows=reward.size, group=group, parts=1)
    self = trainer(trainer_kind, args)
    completions = [[0]] * reward.size
    generated = [completions, completions, ["0"] * reward.size]
    if case["trainer"] == "grpo":
        generated[2:2] = [None]  # tool masks
        generated += [None, {}, None, None]  # sampler's log-probabilities, fields, images
    self._generate = lambda prompts: generated
    self._get_per_token_logps_and_entropies = lambda *a, **k: (torch.zeros(reward.size, 1),) * 3
    self._tokenizer = SimpleNamespace(pad_token_id=0)
    self.environment_factories = self.environments = self.tools = None
    self.state = SimpleNamespace(global_step=0)  # its timers ask for it
    self.reward_funcs = [lambda **_: reward.ravel().tolist()]
    self.reward_processing_classes, self.reward_func_names = [None], ["reward"]
    self.reward_weights = torch.ones(1)
    self._logs = collections.defaultdict(list, rewards=collections.defaultdict(list))
    self._pending_extra_logs, self._pending_metrics = {}, {}
    inputs = [{"prompt": str(i // group)} for i in range(reward.size)]
    got = self._generate_and_score_completions(inputs)["advantages"]
    return {"advantage": got.double().numpy().reshape(groups, group)}


def main(source: str, target: str) -> None:
    """Answer every case of `source`."""
    asked, answers = np.load(source, allow_pickle=False), {}
    for name, case in json.loads(str(asked["cases"])).items():
        arrays = {
            key.removeprefix(f"{name}/"): asked[key]
            for key in asked.files
            if key.startswith(f"{name}/")
        }
        compute = {"loss": loss_and_gradient, "advantage": advantage}[case["what"]]
        answers |= {f"{name}/{key}": value for key, value in compute(case, arrays).items()}
    packages = (trl, torch, transformers, accelerate)
    versions = {package.__name__: package.__version__ for package in packages}
    np.savez(target, allow_pickle=False, versions=np.array(json.dumps(versions)), **answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
