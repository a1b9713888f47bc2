"""What stands behind a recipe's file name: --config=configs/semeval_7b.py:v5p-8,n=8,smoke.

In any order and parted by commas: one of the recipe's variants, n=G for G completions a question,
and smoke for a run of minutes on a CPU that shows that the recipe works, not how well.
"""

import dataclasses
import difflib
import math
from collections.abc import Collection, Mapping

from ml_collections import ConfigDict

GROUP = "grpo.group"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What was asked for.

    Attributes:
        variant: of the recipe; "" for none.
        group: completions of a question; 0 leaves the recipe's.
        smoke: whether a short run is meant.
    """

    variant: str = ""
    group: int = 0
    smoke: bool = False

    def applied(self, config: ConfigDict, *, smoke: Mapping[str, object]) -> ConfigDict:
        """Change a recipe accordingly.

        Args:
            config: the recipe; changed.
            smoke: dotted keys of a short run, with their values.
        """
        if self.smoke:
            put(config, smoke)
        if self.group:
            if "grpo" not in config:
                raise ValueError(f"n={self.group}: this recipe has no grpo")
            put(config, {GROUP: self.group})
            # Micro-batches must cut the group evenly.
            few = config.grpo.get("micro_group", 0)
            put(config, {"grpo.micro_group": math.gcd(few, self.group) if few else 0})
        return config


def put(config: ConfigDict, values: Mapping[str, object]) -> None:
    """Set dotted keys, those that a recipe leaves at their defaults too."""
    for key, value in values.items():
        *above, name = key.split(".")
        section = config
        for part in above:
            if part not in section:
                section[part] = ConfigDict()
            section = section[part]
        section[name] = value


def parse(text: str, *, variants: Collection[str] = ()) -> Arguments:
    """Read the text behind the colon.

    Raises:
        ValueError: says what was found, and what was expected.
    """
    found: dict[str, object] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = part.partition("=")
        if part in variants and "variant" not in found:
            found["variant"] = part
        elif part == "smoke":
            found["smoke"] = True
        elif key == "n" and value.isdigit() and int(value) > 1:
            found["group"] = int(value)
        else:
            expected = [*variants, "n=2 or more", "smoke"]
            near = difflib.get_close_matches(part, [*variants, "smoke"], n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{part!r} in {text!r}: expected one of {', '.join(expected)}{meant}")
    return Arguments(**found)
