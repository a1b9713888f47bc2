"""A GRPO step of Tunix, timed when told to. Runs in an environment of its own: see `peer_python`.

    python tunix_step.py --model FOLDER --prompt 768 --completion 96 --group 8 --questions 4

Arguments as of trl_step.py, and `--micro`: questions of a micro-batch, all of them unless told;
gradients are summed up to one update a step. The learner has no hook around a step, so a step is
timed from one call of the reward function to the next, or as many calls as there are micro-batches:
update and reference of one batch, completions of the next.
"""

import argparse
import importlib.metadata
import json
import os
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"

import grain
import jax
import numpy as np
import optax
import transformers
from flax import nnx
from tunix.models.qwen2 import model as qwen2
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout import base_rollout

MARK = "@bench "
STEPS = 10_000


def tell(**message):
    print(MARK + json.dumps(message), flush=True)


class Turns:
    """A reward that waits for its turn after every batch but the first ones, which warm up.

    It is called once for each of a batch's micro-batches, `pieces` of them.
    """

    def __init__(self, warm_up, pieces):
        self.left, self.begin = warm_up, 0.0
        self.pieces, self.calls = pieces, 0
        self.__name__ = "reward"  # the learner logs it

    def __call__(self, prompts, completions, **more):
        self.calls += 1
        if self.calls % self.pieces == 0:
            self.end_of_batch()
        return [float(len(text) % 7) for text in completions]

    def end_of_batch(self):
        if self.left < 0:
            tell(seconds=time.perf_counter() - self.begin)
        elif self.left == 0:
            tell(versions={"google-tunix": importlib.metadata.version("google-tunix")})
        if self.left <= 0 and not sys.stdin.readline():
            os._exit(0)
        self.left -= 1
        self.begin = time.perf_counter()


def make_model(shape):
    """The shape of a Hugging Face config with Tunix's names, and random weights."""
    return qwen2.Qwen2(
        qwen2.ModelConfig(
            num_layers=shape["num_hidden_layers"],
            vocab_size=shape["vocab_size"],
            embed_dim=shape["hidden_size"],
            hidden_dim=shape["intermediate_size"],
            num_heads=shape["num_attention_heads"],
            head_dim=shape["hidden_size"] // shape["num_attention_heads"],
            num_kv_heads=shape["num_key_value_heads"],
            rope_theta=1_000_000,
            norm_eps=1e-6,
            use_tied_embedding=True,
        ),
        rngs=nnx.Rngs(0),
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    for name in ("prompt", "completion", "group", "questions"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--micro", type=int)
    asked = parser.parse_args()
    micro = asked.micro or asked.questions
    with open(os.path.join(asked.model, "config.json")) as file:
        shape = json.load(file)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(asked.model)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    with mesh:
        actor, reference = make_model(shape), make_model(shape)
    words = [" ".join(f"w{(7 * i + j) % 1000}" for j in range(asked.prompt)) for i in range(256)]
    data = grain.MapDataset.source([{"prompts": text} for text in words])
    data = data.repeat().batch(asked.questions)[:STEPS]
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    cluster = rl_cluster.RLCluster(
        actor=actor,
        reference=reference,
        tokenizer=tokenizer,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            rollout_engine="vanilla",
            offload_to_cpu=False,
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.adamw(1e-6),
                eval_every_n_steps=STEPS,
                max_steps=STEPS,
                mini_batch_size=asked.questions,
                train_micro_batch_size=micro,
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=asked.completion,
                max_prompt_length=asked.prompt,
                kv_cache_size=asked.prompt + asked.completion + 8,
                temperature=1.0,
                top_p=1.0,
                top_k=None,
                # No token of the vocabulary, so that nothing ends early.
                eos_tokens=[shape["vocab_size"]],
            ),
        ),
    )
    GRPOLearner(
        rl_cluster=cluster,
        reward_fns=[Turns(warm_up=2, pieces=asked.questions // micro)],
        algo_config=GRPOConfig(
            num_generations=asked.group, num_iterations=1, beta=0.001, epsilon=0.2
        ),
    ).train(data)


if __name__ == "__main__":
    main()
