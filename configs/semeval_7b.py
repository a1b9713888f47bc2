"""R1-RE on SemEval-2010 Task 8: the 7B policy, all parameters, on a TPU slice."""

from ml_collections import ConfigDict


def get_config(arg: str = "v5e-16") -> ConfigDict:
    return ConfigDict(
        dict(
            seed=0,
            model=dict(
                path="Qwen/Qwen2.5-7B-Instruct", preset="qwen2.5-7b", dtype="bfloat16", remat="layer"
            ),
            mesh=dict(data=1, fsdp=-1, tensor=1, drawing_tensor=4),
            limits=dict(guide=1088, question=256, completion=3072),
            data=dict(
                train=dict(kind="jsonl", path="semeval2010/train.jsonl", guide="semeval2010/guideline.md"),
                eval=dict(test=dict(kind="jsonl", path="semeval2010/test.jsonl", guide="semeval2010/guideline.md")),
            ),
            grpo=dict(
                steps=400,
                trees=1,
                questions=32,
                group=16,
                learning_rate=1e-6,
                kl_coefficient=0.001,
                micro_batch=16,
                micro_group=1,
                chunk=64,
                compaction=1,
                smallest_batch=64,
                smallest_cache=1024,
                score_chunk=64,
                first_moment="bfloat16",
            ),
            evaluate=dict(every=100, samples=4, temperature=1.0, batch=64),
            checkpoint=dict(every=50, keep=2),
        )
    )
