"""What the sweeps beside this file run on: a recipe by its name, its own arguments behind a comma.

kl.py runs on miniworld, kl.py:smoke on miniworld.py:smoke, and kl.py:semeval_7b,v5p-8 on
semeval_7b.py:v5p-8.
"""

from ml_collections import ConfigDict

from configs import miniworld, semeval_7b, semeval_nano

RECIPES = {
    "miniworld": miniworld.get_config,
    "semeval_nano": semeval_nano.get_config,
    "semeval_7b": semeval_7b.get_config,
}
DEFAULT = "miniworld"
# Minutes of a run on miniworld are cheap, hours of a TPU slice are not.
SEEDS = {"miniworld": [0, 1, 2], "semeval_nano": [0, 1, 2], "semeval_7b": [0]}


def recipe(arg: str = "") -> ConfigDict:
    """Return a recipe by its name."""
    name, argument = _split(arg)
    return RECIPES[name](argument) if argument else RECIPES[name]()


def of_recipe(values: dict[str, list], arg: str) -> list:
    """Return the values for a recipe, of those for each by its name."""
    return values[_split(arg)[0]]


def _split(arg: str) -> tuple[str, str]:
    name, _, argument = arg.partition(",")
    return (name, argument) if name in RECIPES else (DEFAULT, arg)
