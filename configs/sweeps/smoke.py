"""Six runs of miniworld of a few steps: whether a sweep works here, not what is good.

command:   python -m run.sweep --config=configs/sweeps/smoke.py --workdir=runs/smoke --jobs=2
argument:  smoke, which changes nothing
hardware:  2 CPU cores
time:      two minutes, less where its programs have been compiled before
score:     nothing is learned in three steps
"""

from ml_collections import ConfigDict

from configs import miniworld


def get_config(arg: str = "") -> ConfigDict:
    """Return miniworld's recipe, cut short."""
    if arg not in ("", "smoke"):
        raise ValueError(f"{arg!r}: expected smoke or nothing")
    config = miniworld.get_config()
    del config.data.eval.ood_shuffled
    for one in config.data.eval.values():
        one.options.count = 8
    config.model.parity_tokens = 0
    config.sft.steps = 0
    config.grpo.update(
        dict(steps=3, trees=1, questions=2, group=4, refill=0, warmup=0, learning_rate=1e-3)
    )
    config.evaluate.update(dict(samples=2, greedy=False, batch=8, at_start=False))
    config.checkpoint.every = 1
    return config


def sweep() -> dict:
    """Return two coefficients of the KL term, each with three seeds."""
    return {"grpo.kl_coefficient": [0.0, 0.1], "seed": [0, 1, 2]}
