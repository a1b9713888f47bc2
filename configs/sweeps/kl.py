"""How near to its reference the policy is kept: the coefficient of the KL term.

command:   python -m run.sweep --config=configs/sweeps/kl.py --workdir=runs/kl --jobs=2
argument:  miniworld (the default), semeval_nano or semeval_7b, then arguments of that recipe
hardware:  2 CPU cores for miniworld and semeval_nano; a slice for each member of semeval_7b
time:      15 runs of miniworld, an hour and a half (estimated); 4 of semeval_7b, side
           by side the time of one
score:     not run yet
"""

from ml_collections import ConfigDict

from configs.sweeps.recipes import SEEDS, of_recipe, recipe

VALUES = {
    "miniworld": [0.0, 0.0001, 0.001, 0.01, 0.1],
    "semeval_nano": [0.0, 0.0001, 0.001, 0.01, 0.1],
    "semeval_7b": [0.0, 0.0001, 0.001, 0.01],
}


def get_config(arg: str = "") -> ConfigDict:
    """Return the recipe."""
    return recipe(arg)


def sweep(arg: str = "") -> dict:
    """Return the coefficients; 0 needs no reference."""
    return {"grpo.kl_coefficient": of_recipe(VALUES, arg), "seed": of_recipe(SEEDS, arg)}
