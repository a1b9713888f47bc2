"""A small run compiled for TPU slices by the TPU compiler, which needs no TPU.

`run/test.sh --all` installs libtpu beside the environment, where only these tests look.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LIBTPU = ROOT / ".cache" / "tpu"
HAS_LIBTPU = LIBTPU.is_dir() or importlib.util.find_spec("libtpu") is not None

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_LIBTPU, reason="needs libtpu: bash run/test.sh --all installs it"),
]

VOCAB, WIDTH, GUIDE, ROWS = 8192, 512, 192, 32
MODEL = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": VOCAB,
    "num_hidden_layers": 2,
    "hidden_size": WIDTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "intermediate_size": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
CONFIG = f"""
from ml_collections import ConfigDict


def get_config():
    return ConfigDict(dict(
        model=dict(path=PATH, dtype="bfloat16", remat="layer"),
        mesh=dict(fsdp=-1, tensor=1, drawing_tensor=2),
        limits=dict(guide={GUIDE}, question=64, completion=256),
        data=dict(train=dict(kind="jsonl", path="none.jsonl", guide="none.md")),
        grpo=dict(steps=1, trees=1, questions=8, group=4, micro_batch=4, micro_group=2, chunk=16,
                  compaction=1, smallest_batch=16, smallest_cache=128, first_moment="bfloat16"),
        sft=dict(steps=0, trees=1, questions=4),
        evaluate=dict(samples=4, batch=8),
    ))
"""


def compiled(folder: pathlib.Path, topology: str, *flags: str) -> tuple[int, dict[str, Any], str]:
    """Run the command; return its exit status, the JSON it wrote, and what it printed."""
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps(MODEL))
    config, out = folder / "config.py", folder / "out.json"
    config.write_text(CONFIG.replace("PATH", repr(str(folder / "model"))))
    command = [sys.executable, "-m", "run.compile", f"--config={config}", f"--json={out}"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(LIBTPU), "R1RE_KEEP_PROGRAMS": "0"}
    result = subprocess.run(
        [*command, f"--topology={topology}", *flags],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert out.exists(), result.stderr
    return result.returncode, json.loads(out.read_text()), result.stdout + result.stderr


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_all_programs_of_a_run_compile(topology: str, tmp_path: pathlib.Path) -> None:
    status, found, said = compiled(tmp_path, topology)
    assert status == 0, said
    assert found["fits"] is True and found["chips"] == found["devices"] == 4
    programs = {one["name"]: one for one in found["programs"]}
    decoded = [f"decode_{rows}x{slots}" for rows in (32, 16) for slots in (128, 256)]
    assert [name for name in programs if name.startswith("decode")] == decoded
    assert {"relayout", "guide_prefill", "question_prefill", "reference", "update", "evaluate"} <= {
        *programs
    }
    peak = max(one["peak_gib"] + one["resident_gib"] for one in programs.values())
    assert found["peak_gib_per_chip"] == pytest.approx(peak, abs=2e-3)
    assert all(one["predicted_seconds"] > 0 for one in programs.values())
    assert 0 < programs["update"]["predicted_mfu"] < 1
    assert all(one["predicted_mfu"] is None for name, one in programs.items() if name != "update")
    assert programs["update"]["predicted_kernels"] > 0, "attention is computed by kernels"
    for name in decoded:
        use, rows = programs[name], int(name.split("_")[1].split("x")[0])
        # Logits are never gathered whole, nor is a matrix: what is gathered are rows of the stream.
        gathered = use["collectives"].get("all-gather", {"largest_bytes": 0})["largest_bytes"]
        assert gathered <= max(rows * WIDTH * 4, 32 * 256 * 4) < rows * VOCAB * 4
        # And the guide's keys are never copied per row.
        assert use["temporaries_gib"] * 2**30 < rows * GUIDE * 2 * 2 * 128 * 2 * 2


def test_devices_that_share_positions_hold_fewer_of_them(tmp_path: pathlib.Path) -> None:
    """A row of long completions on each device, or half of two."""
    long = {"limits.completion": 8192, "grpo.steps": 0, "sft.steps": 1, "evaluate.samples": 0}
    updates = []
    for more in ({"mesh.fsdp": 4}, {"mesh.fsdp": 2, "mesh.sequence": 2, "sft.questions": 2}):
        flags = [f"--config.{name}={value}" for name, value in {**long, **more}.items()]
        status, found, said = compiled(tmp_path, "v5e:2x2", *flags)
        assert status == 0, said
        (update,) = (one for one in found["programs"] if one["name"] == "update")
        updates.append(update)
    whole, shared = (one["temporaries_gib"] for one in updates)
    assert shared < 0.65 * whole
    # What is gathered are keys and weights: nothing of a row's positions times the width.
    gathered = updates[1]["collectives"]["all-gather"]["largest_bytes"]
    assert gathered <= max(VOCAB * WIDTH * 2, 8192 * 2 * 128 * 2)


def test_what_does_not_fit_is_refused(tmp_path: pathlib.Path) -> None:
    """No traceback, but the memory that the compiler names, and an exit status."""
    flags = ["--config.limits.completion=65536", "--config.grpo.smallest_cache=65536"]
    flags += ["--config.grpo.group=64", "--config.grpo.compaction=0"]
    status, found, said = compiled(tmp_path, "v5e:2x2", *flags)
    assert status == 1 and found["fits"] is False
    assert found["peak_gib_per_chip"] > 15.75 and found["refused"]["program"]
    assert "Traceback" not in said
