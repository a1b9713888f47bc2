"""The embedded default: SFT, then GRPO, on miniworld; what run/quickstart.sh runs.

command:   bash run/quickstart.sh, or
           python -m run.train --config=configs/miniworld.py --workdir=runs/miniworld
argument:  sft_only   the same start, supervised on as many examples as GRPO sees
hardware:  2 CPU cores
"""

from ml_collections import ConfigDict

# Of SFT and GRPO: steps, and questions of each of a step's two guides.
SFT_STEPS, SFT_QUESTIONS = 32, 8
GRPO_STEPS, GRPO_QUESTIONS = 80, 4


def get_config(variant: str = "") -> ConfigDict:
    """Return the recipe, or its supervised counterpart."""
    lessons = dict(until=1, fewest=7, most=9, distractors=0.2, none_share=0.2, spelled=0.2)
    stages = [dict(lessons, kinds=["general", "general", "permuted", "invented"])]
    sft_only = variant == "sft_only"
    return ConfigDict(
        dict(
            seed=0,
            model=dict(path="base:miniworld", dtype="float32", remat="none"),
            limits=dict(guide=352, question=64, completion=56),
            data=dict(
                train=dict(kind="miniworld", options=dict(stages=stages)),
                eval=dict(
                    in_domain=dict(kind="miniworld", options=dict(domain="general", count=400)),
                    ood=dict(kind="miniworld", options=dict(domain="medical", count=400)),
                    ood_shuffled=dict(
                        kind="miniworld", options=dict(domain="medical", count=200, shuffled=True)
                    ),
                ),
            ),
            sft=dict(
                steps=SFT_STEPS + (GRPO_STEPS * GRPO_QUESTIONS // SFT_QUESTIONS if sft_only else 0),
                trees=2,
                questions=SFT_QUESTIONS,
                learning_rate=1e-4,
                warmup=5,
                schedule="constant",
            ),
            grpo=dict(
                steps=0 if sft_only else GRPO_STEPS,
                trees=2,
                questions=GRPO_QUESTIONS,
                group=8,
                # Few samples a step: the norms' weights alone, whose gradient is hardly noise.
                trainable=".*norm.*",
                learning_rate=1e-2,
                warmup=5,
                schedule="constant",
                temperature=1.0,
                kl_coefficient=0.001,
                chunk=20,
            ),
            evaluate=dict(
                every=0,
                samples=4,
                temperature=1.0,
                greedy=True,
                batch=50,
                at_start=not sft_only,
            ),
            checkpoint=dict(every=40, keep=2, best=""),
            log=dict(every=1, completions=10),
        )
    )
