"""A real pretrained policy on real input: SmolLM2-135M-Instruct on SemEval-2010 Task 8, on the CPU.

command:   python -m run.fetch smollm2-135m
           R1RE_DATA=FOLDER python -m run.train --config=configs/smollm2_semeval.py --workdir=W
data:      FOLDER/semeval2010/{train,test}.jsonl, or the official TXT files, as in semeval_nano.py
argument:  n=G completions a question; smoke: a run of some minutes
hardware:  2 CPU cores, 12 GiB of memory (9.1 GiB were used)
time:      beside tests a GRPO step took 83 s: 16 s of rollout, 12 s of reference, 55 s of update
score:     not run to the end; docs/results/smollm2_semeval has a short run
"""

from ml_collections import ConfigDict

from configs import arguments

SMOKE = {
    **{"sft.steps": 1, "grpo.steps": 1, "grpo.questions": 2, "grpo.group": 2},
    **{"data.eval.test.limit": 4, "evaluate.samples": 1, "evaluate.greedy": False},
}


def get_config(arg: str = "") -> ConfigDict:
    """Return the recipe."""
    guide = "packaged:semeval2010_short"
    config = ConfigDict(
        dict(
            seed=0,
            model=dict(path="smollm2-135m", dtype="float32", remat="none"),
            limits=dict(guide=488, question=144, completion=64),
            data=dict(
                train=dict(kind="jsonl", path="semeval2010/train.jsonl", guide=guide),
                eval=dict(
                    test=dict(
                        kind="jsonl",
                        path="semeval2010/test.jsonl",
                        guide=guide,
                        protocol="official, first 100 sentences",
                        limit=100,
                    )
                ),
            ),
            sft=dict(
                steps=60,
                questions=8,
                micro_batch=4,
                between_words=8,
                learning_rate=1e-4,
                warmup=5,
                schedule="constant",
            ),
            grpo=dict(
                steps=60,
                questions=4,
                group=8,
                # Whole, the 3,112 positions of a step would take 16 GiB.
                micro_batch=2,
                learning_rate=1e-5,
                warmup=5,
                schedule="constant",
                kl_coefficient=0.001,
                score_chunk=16,
                chunk=16,
            ),
            evaluate=dict(every=0, samples=4, batch=25, at_start=False, greedy=True),
            checkpoint=dict(every=10, keep=1, best=""),
            log=dict(every=1, completions=1),
        )
    )
    return arguments.parse(arg).applied(config, smoke=SMOKE)
