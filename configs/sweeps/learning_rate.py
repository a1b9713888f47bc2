"""The learning rate of GRPO, by factors of two around the recipe's.

command:   python -m run.sweep --config=configs/sweeps/learning_rate.py --workdir=runs/lr --jobs=2
argument:  miniworld (the default), semeval_nano or semeval_7b, then arguments of that recipe
hardware:  2 CPU cores for miniworld and semeval_nano; a slice for each member of semeval_7b
time:      15 runs of miniworld, an hour and a half (estimated); 4 of semeval_7b, side
           by side the time of one
score:     not run yet at full length; docs/sweeps.md has a short one
"""

from ml_collections import ConfigDict

from configs.sweeps.recipes import SEEDS, of_recipe, recipe

VALUES = {
    "miniworld": [0.00001, 0.00002, 0.00004, 0.00008, 0.00016],
    "semeval_nano": [0.000025, 0.00005, 0.0001, 0.0002],
    "semeval_7b": [0.0000005, 0.000001, 0.000002, 0.000004],
}


def get_config(arg: str = "") -> ConfigDict:
    """Return the recipe."""
    return recipe(arg)


def sweep(arg: str = "") -> dict:
    """Return the rates."""
    return {"grpo.learning_rate": of_recipe(VALUES, arg), "seed": of_recipe(SEEDS, arg)}
