"""The supervised baseline on SemEval-2010 Task 8: the same prompts, the label alone as completion.

Hyper-parameters of the paper (arXiv 2507.04642): learning rate 5e-6, batches of 16, 600 steps.

command:   R1RE_DATA=FOLDER python -m run.train --config=configs/sft_7b.py[:SLICE] --workdir=W
argument:  SLICE, smoke: as semeval_7b.py
check:     python -m run.compile --config=configs/sft_7b.py:SLICE --topology=TOPOLOGY
data:      as semeval_7b.py
hardware:  as semeval_7b.py
memory:    GiB a chip as compiled (docs/tpu.md): v5e-16 12.4 of 16; other slices not compiled
time:      a step, predicted: v5e-16 2.1 s, so 21 minutes for all; evaluations come on top
score:     not run: no slice was at hand
"""

from ml_collections import ConfigDict

from configs import arguments, semeval_7b

SMOKE = {"sft.steps": 2, "sft.questions": 2}


def get_config(arg: str = "") -> ConfigDict:
    """Return the recipe for a slice of semeval_7b.py."""
    config = semeval_7b.get_config(arg)
    config.sft = ConfigDict(
        dict(
            steps=600,
            trees=1,
            questions=16,
            learning_rate=5e-6,
            thoughts="none",
            first_moment=config.grpo.first_moment,
        )
    )
    del config.grpo
    return arguments.parse(arg, variants=semeval_7b.SLICES).applied(config, smoke=SMOKE)
