"""The small base policy that ships with the package, from miniworld lessons alone.

command:   bash run/base.sh     (untrained policy, then the stages below, each from the one before)
argument:  a stage, smoke: two steps
hardware:  2 CPU cores
time:      12 minutes in steps: 2 for short, 10 for full
score:     54 % of medical sentences right, 88 % greedy; 13 % of general ones (docs/base.md)
stages:    short   definitions without meaning, to be quoted, and invented guides of two to four
                   relations with plain sentences
           full    invented guides of up to nine relations and a none label, richer sentences
None sees anything of the general or the medical domain: what is taught is to read a guide.
"""

from ml_collections import ConfigDict

from configs import arguments

STAGES = {
    "short": dict(
        start="build/base/fresh",
        limits=dict(guide=192, question=40, completion=48),
        steps=120,
        decay_steps=0,
        mix=dict(
            kinds=["quoting", "invented", "invented"],
            fewest=2,
            most=4,
            plain=True,
            short=True,
            spelled=0.2,
        ),
    ),
    "full": dict(
        start="build/base/short",
        limits=dict(guide=352, question=64, completion=56),
        steps=480,
        decay_steps=500,
        mix=dict(
            kinds=["invented"],
            fewest=3,
            most=9,
            distractors=0.2,
            none_share=0.1,
            spelled=0.3,
        ),
    ),
}


def get_config(arg: str = "full") -> ConfigDict:
    """Return the config of a stage."""
    asked = arguments.parse(arg, variants=STAGES)
    one = STAGES[asked.variant or "full"]
    schedule = "cosine" if one["decay_steps"] else "constant"
    config = ConfigDict(
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
                # Gently: at 2e-3 the wired heads are forgotten and found again later.
                learning_rate=5e-4,
                warmup=40,
                schedule=schedule,
                decay_steps=one["decay_steps"],
                clip_norm=1.0,
                b2=0.99,
            ),
            evaluate=dict(every=0, samples=0, at_start=False),
            checkpoint=dict(every=25, keep=20, best=""),
            log=dict(every=10, completions=0),
        )
    )
    return asked.applied(config, smoke={"sft.steps": 2})
