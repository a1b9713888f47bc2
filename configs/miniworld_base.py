"""The small base policy that ships with the package, from miniworld lessons alone.

command:   bash run/base.sh     (untrained policy, then the stages below, each from the one before)
hardware:  2 CPU cores
stages:    quote   long definitions without meaning, to be quoted
           short   invented guides of two to four relations, plain sentences
           full    invented guides of up to nine relations, and names that lie
None sees the general domain's guide or anything medical: what is taught is to read a guide.
"""

from ml_collections import ConfigDict

STAGES = {
    "quote": dict(
        start="build/base/fresh",
        limits=dict(guide=128, question=32, completion=48),
        steps=60,
        learning_rate=2e-3,
        decay_steps=0,
        mix=dict(kinds=["quoting"], fewest=2, most=2, plain=True),
    ),
    "short": dict(
        start="build/base/quote",
        limits=dict(guide=144, question=32, completion=36),
        steps=240,
        learning_rate=2e-3,
        decay_steps=1000,
        mix=dict(kinds=["invented"], fewest=2, most=4, plain=True, short=True),
    ),
    "full": dict(
        start="build/base/short",
        limits=dict(guide=432, question=64, completion=60),
        steps=300,
        learning_rate=1.5e-3,
        decay_steps=330,
        mix=dict(
            kinds=["invented", "invented", "permuted"],
            fewest=3,
            most=9,
            distractors=0.1,
            none_share=0.05,
            spelled=0.2,
        ),
    ),
}


def get_config(stage: str = "full") -> ConfigDict:
    """Return the config of a stage."""
    one = STAGES[stage]
    schedule = "cosine" if one["decay_steps"] else "constant"
    return ConfigDict(
        dict(
            seed=0,
            model=dict(path=one["start"], dtype="float32", remat="none"),
            limits=one["limits"],
            data=dict(
                train=dict(
                    kind="miniworld", options=dict(stages=[dict(until=one["steps"], **one["mix"])])
                )
            ),
            sft=dict(
                steps=one["steps"],
                trees=4,
                questions=12,
                learning_rate=one["learning_rate"],
                warmup=40,
                schedule=schedule,
                decay_steps=one["decay_steps"],
                clip_norm=1.0,
                b2=0.99,
            ),
            evaluate=dict(every=0, samples=0, at_start=False),
            checkpoint=dict(every=200, keep=1, best=""),
            log=dict(every=10, completions=0),
        )
    )
