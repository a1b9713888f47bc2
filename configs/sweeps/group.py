"""Few questions with many completions each, or many with few: as many completions in a step.

command:   python -m run.sweep --config=configs/sweeps/group.py --workdir=runs/group --jobs=2
argument:  miniworld (the default), semeval_nano or semeval_7b, then arguments of that recipe
hardware:  2 CPU cores for miniworld and semeval_nano; a slice for each member of semeval_7b
time:      12 runs of miniworld, over an hour (estimated); 3 of semeval_7b,
           side by side the time of one
score:     not run yet
"""

from ml_collections import ConfigDict

from configs.sweeps.recipes import SEEDS, of_recipe, recipe

# Group size and questions under a guide; the recipes have 8 and 4, 8 and 16, 16 and 32.
VALUES = {
    "miniworld": [(2, 16), (4, 8), (8, 4), (16, 2)],
    "semeval_nano": [(4, 32), (8, 16), (16, 8)],
    "semeval_7b": [(8, 64), (16, 32), (32, 16)],
}


def get_config(arg: str = "") -> ConfigDict:
    """Return the recipe, in micro-batches that cut every group evenly."""
    config = recipe(arg)
    smallest = min(group for group, _ in of_recipe(VALUES, arg))
    config.grpo.micro_group = min(config.grpo.get("micro_group", 0), smallest)
    return config


def sweep(arg: str = "") -> dict:
    """Return pairs of group size and questions."""
    pairs = of_recipe(VALUES, arg)
    return {("grpo.group", "grpo.questions"): pairs, "seed": of_recipe(SEEDS, arg)}
