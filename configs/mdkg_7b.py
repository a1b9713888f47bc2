"""R1-RE on MDKG, mental-health abstracts with nine relations: as semeval_7b.py, with other data.

The paper trains on it and tests on SemEval-2010, and the other way round (arXiv 2507.04642): the
guide of the other set has never been seen.

command:   R1RE_DATA=FOLDER python -m run.train --config=configs/mdkg_7b.py[:SLICE] --workdir=W
argument:  as semeval_7b.py
check:     python -m run.compile --config=configs/mdkg_7b.py:SLICE --topology=TOPOLOGY
data:      FOLDER/mdkg/{train.jsonl,test.jsonl,guideline.md}, and semeval2010 as in semeval_7b.py
hardware:  as semeval_7b.py
memory:    as semeval_7b.py: the programs are the same
time:      as semeval_7b.py
score:     not run: no slice was at hand
"""

from ml_collections import ConfigDict

from configs import semeval_7b


def get_config(arg: str = "") -> ConfigDict:
    """Return the recipe for a slice of semeval_7b.py."""
    config, guide = semeval_7b.get_config(arg), "mdkg/guideline.md"
    ood = config.data.eval.test
    few = ood.get("limit", 0)  # of a short run
    config.data = ConfigDict(
        dict(
            train=dict(kind="jsonl", path="mdkg/train.jsonl", guide=guide),
            eval=dict(
                test=dict(kind="jsonl", path="mdkg/test.jsonl", guide=guide, limit=few), ood=ood
            ),
        )
    )
    return config
