"""What a right label, another label and a malformed answer earn.

GRPO normalises rewards over a group, so that only their proportions count. Settings are compared by
accuracy: mean rewards under different totals do not compare.

command:   python -m run.sweep --config=configs/sweeps/rewards.py --workdir=runs/rewards --jobs=2
argument:  miniworld (the default), semeval_nano or semeval_7b, then arguments of that recipe
hardware:  2 CPU cores for miniworld and semeval_nano; a slice for each member of semeval_7b
time:      15 runs of miniworld, an hour and a half (estimated); 5 of semeval_7b, side
           by side the time of one
score:     not run yet
"""

from ml_collections import ConfigDict

from configs.sweeps.recipes import SEEDS, of_recipe, recipe

# A right label, another one, a malformed answer.
TOTALS = [
    (3.0, -0.5, -3.0),  # the paper's
    (3.0, -3.0, -3.0),  # the label alone: a form earns nothing
    (3.0, -0.5, -0.5),  # the same, with the paper's other label
    (3.0, 1.0, -3.0),  # the format counts for more than the label
    (1.0, 0.0, -1.0),  # even steps
]


def get_config(arg: str = "") -> ConfigDict:
    """Return the recipe."""
    return recipe(arg)


def sweep(arg: str = "") -> dict:
    """Return the totals."""
    keys = ("reward.correct", "reward.wrong", "reward.malformed")
    return {keys: TOTALS, "seed": of_recipe(SEEDS, arg)}
