"""Real input: SemEval-2010 Task 8 with the small base policy, SFT, then GRPO, official test set.

command:   R1RE_DATA=FOLDER python -m run.train --config=configs/semeval_nano.py --workdir=W
data:      FOLDER/semeval2010/{train,test}.jsonl, or the official TXT files by
           --config.data.train.kind=semeval2010 --config.data.train.path=TRAIN_FILE.TXT
           and the same of data.eval.test (an empty path reads the Hugging Face hub)
argument:  n=G completions a question; smoke: a run of a minute
hardware:  2 CPU cores
time:      17 minutes for SFT, 37 for GRPO with its evaluation, beside other work
score:     16 % after SFT, 37 % after GRPO (Avg@4 of the 2,717 test sentences, one seed)
"""

from ml_collections import ConfigDict

from configs import arguments

SMOKE = {
    **{"sft.steps": 2, "sft.questions": 8, "grpo.steps": 2, "grpo.questions": 4, "grpo.group": 4},
    **{"data.eval.test.limit": 8, "evaluate.samples": 2},
}


def get_config(arg: str = "") -> ConfigDict:
    """Return the recipe."""
    guide = "packaged:semeval2010_short"
    official = dict(kind="jsonl", guide=guide, protocol="official")
    config = ConfigDict(
        dict(
            seed=0,
            model=dict(path="base:miniworld", dtype="float32", remat="none"),
            limits=dict(guide=480, question=240, completion=72),
            data=dict(
                train=dict(kind="jsonl", path="semeval2010/train.jsonl", guide=guide),
                eval=dict(test=dict(official, path="semeval2010/test.jsonl")),
            ),
            # One pass over the 8,000 sentences; that is when it stops.
            sft=dict(
                steps=250,
                trees=1,
                questions=32,
                learning_rate=5e-4,
                warmup=20,
                schedule="constant",
            ),
            grpo=dict(
                steps=200,
                trees=1,
                questions=16,
                group=8,
                learning_rate=1e-4,
                warmup=10,
                schedule="constant",
                b2=0.99,
                temperature=1.0,
                kl_coefficient=0.001,
                chunk=24,
            ),
            evaluate=dict(every=0, samples=4, greedy=True, batch=64, at_start=False),
            checkpoint=dict(every=50, keep=2, best=""),
            log=dict(every=1, completions=25),
        )
    )
    return arguments.parse(arg).applied(config, smoke=SMOKE)
