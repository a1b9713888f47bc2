"""R1-RE on SemEval-2010 Task 8: all parameters of Qwen2.5-Instruct by GRPO, on a TPU slice.

Hyper-parameters of the paper (arXiv 2507.04642): 32 prompts of 16 completions a step, responses of
3,072 tokens at most, 400 steps, learning rate 1e-6; clip, KL coefficient and temperature are the
defaults of the framework that it used.

command:   R1RE_DATA=FOLDER python -m run.train --config=configs/semeval_7b.py[:SLICE] --workdir=W
argument:  SLICE, n=G completions a question, smoke: the small base policy in place of Qwen, two
           steps on a CPU with the same data
check:     python -m run.compile --config=configs/semeval_7b.py:SLICE --topology=TOPOLOGY
data:      FOLDER/semeval2010/{train.jsonl,test.jsonl,guideline.md}, the guide being yours
           (docs/tpu.md); or the official TXT files, as in semeval_nano.py
hardware:  by SLICE: v5e-16 (topology v5e:4x4, the default), v5p-8 (v5p:2x2x1), v6e-8 (v6e:2x4),
           14b (v5p:2x2x2), 32b (v5p:4x4x4)
memory:    GiB a chip as compiled (docs/tpu.md): v5e-16 13.3 of 16, with a first moment in bfloat16
           and micro-batches of one completion of 16 questions; v6e-8 27.4 of 32; v5p-8 70.8 of 95;
           14b 69.3 of 95; 32b 34.5 of 95
time:      a step at most, predicted: v5e-16 126 s, v6e-8 104 s, v5p-8 158 s, 14b 206 s, 32b 64 s
score:     not run: no slice was at hand
"""

import dataclasses

from ml_collections import ConfigDict

from configs import arguments


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
    """What changes with the slice.

    Attributes:
        size: of the model.
        mesh: sizes of its axes.
        micro_batch: questions whose gradient is computed at a time.
        micro_group: completions of each.
        first_moment: what Adam's first moment is held in.
    """

    size: str = "7b"
    mesh: dict[str, int]
    micro_batch: int
    micro_group: int
    first_moment: str = "float32"


SLICES = {
    "v5e-16": Slice(
        mesh=dict(fsdp=-1, drawing_tensor=4),
        micro_batch=16,
        micro_group=1,
        first_moment="bfloat16",
    ),
    "v5p-8": Slice(mesh=dict(fsdp=-1, drawing_tensor=4), micro_batch=4, micro_group=16),
    "v6e-8": Slice(mesh=dict(fsdp=-1, drawing_tensor=4), micro_batch=8, micro_group=2),
    "14b": Slice(size="14b", mesh=dict(fsdp=-1, drawing_tensor=8), micro_batch=8, micro_group=4),
    "32b": Slice(
        size="32b", mesh=dict(fsdp=-1, tensor=4, drawing_tensor=8), micro_batch=16, micro_group=8
    ),
}


# With the base policy, its tokens and its speed.
SMOKE = {
    **{"model.path": "base:miniworld", "model.preset": "", "model.dtype": "float32"},
    **{"limits.guide": 2048, "limits.question": 256, "limits.completion": 32},
    **{"grpo.steps": 2, "grpo.questions": 2, "grpo.group": 2, "grpo.chunk": 16},
    **{"grpo.micro_batch": 0, "grpo.micro_group": 0, "grpo.smallest_batch": 1},
    **{"grpo.smallest_cache": 0, "mesh.fsdp": 1, "mesh.drawing_tensor": 0},
    **{"evaluate.samples": 1, "evaluate.batch": 4, "data.eval.test.limit": 4},
}


def get_config(arg: str = "") -> ConfigDict:
    """Return the recipe for a slice."""
    asked = arguments.parse(arg, variants=SLICES)
    of, guide = SLICES[asked.variant or "v5e-16"], "semeval2010/guideline.md"
    official = dict(kind="jsonl", guide=guide, protocol="official")
    config = ConfigDict(
        dict(
            seed=0,
            model=dict(
                path=f"Qwen/Qwen2.5-{of.size.upper()}-Instruct",
                preset=f"qwen2.5-{of.size}",
                dtype="bfloat16",
                remat="layer",
            ),
            mesh=of.mesh,
            limits=dict(guide=1216, question=256, completion=3072),
            data=dict(
                train=dict(kind="jsonl", path="semeval2010/train.jsonl", guide=guide),
                eval=dict(test=dict(official, path="semeval2010/test.jsonl")),
            ),
            grpo=dict(
                steps=400,
                trees=1,
                questions=32,
                group=16,
                learning_rate=1e-6,
                first_moment=of.first_moment,
                clip_low=0.2,
                clip_high=0.2,
                kl_coefficient=0.001,
                temperature=1.0,
                micro_batch=of.micro_batch,
                micro_group=of.micro_group,
                score_chunk=64,
                # Twelve shapes of the decoded batch: four numbers of rows, three widths.
                chunk=64,
                compaction=1,
                smallest_batch=64,
                smallest_cache=1024,
            ),
            evaluate=dict(every=100, samples=4, batch=128),
            checkpoint=dict(every=25, keep=2),
            log=dict(completions=10),
        )
    )
    return asked.applied(config, smoke=SMOKE)
