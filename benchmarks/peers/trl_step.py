"""A GRPO step of TRL, timed when told to. Runs in an environment of its own: see `peer_python`.

    python trl_step.py --model FOLDER --prompt 768 --completion 96 --group 8 --questions 4

FOLDER is where `benchmarks.tiny_step.write_model` put the shape and the tokenizer. A step is what
the trainer calls one: completions, rewards, log-probabilities of policy and reference, one update.
"""

import argparse
import json
import sys
import tempfile
import time

import datasets
import torch
import transformers
import trl

MARK = "@bench "


class Turns(transformers.TrainerCallback):
    """Waits for its turn before every step; the first ones only warm up."""

    def __init__(self, warm_up: int):
        self.left, self.begin = warm_up, 0.0

    def on_step_begin(self, *args, **more):
        if self.left == 0:
            tell(
                versions={"trl": trl.__version__, "torch": torch.__version__},
                threads=torch.get_num_threads(),
            )
        if self.left <= 0 and not sys.stdin.readline():
            sys.exit()
        self.begin = time.perf_counter()

    def on_step_end(self, *args, **more):
        if self.left <= 0:
            tell(seconds=time.perf_counter() - self.begin)
        self.left -= 1


def tell(**message):
    print(MARK + json.dumps(message), flush=True)


def reward(completions, **more):
    return [float(len(text) % 7) for text in completions]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    for name in ("prompt", "completion", "group", "questions"):
        parser.add_argument(f"--{name}", type=int)
    asked = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(asked.model)
    config = transformers.AutoConfig.from_pretrained(asked.model)
    model = transformers.AutoModelForCausalLM.from_config(config)
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    words = [" ".join(f"w{(7 * i + j) % 1000}" for j in range(asked.prompt)) for i in range(256)]
    trainer = trl.GRPOTrainer(
        model=folder,
        reward_funcs=reward,
        train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in words]),
        processing_class=tokenizer,
        args=trl.GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=asked.group * asked.questions,
            num_generations=asked.group,
            max_completion_length=asked.completion,
            # Nothing ends early, so that all sides draw the same number of tokens.
            generation_kwargs={"min_new_tokens": asked.completion},
            mask_truncated_completions=False,
            max_steps=10_000,
            num_iterations=1,
            beta=0.001,
            temperature=1.0,
            learning_rate=1e-6,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
    )
    trainer.add_callback(Turns(warm_up=1))
    trainer.train()


if __name__ == "__main__":
    main()
