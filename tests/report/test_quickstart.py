"""The quickstart's tables and its one line of JSON, from work directories as runs leave them."""

import io
import json
import pathlib
from types import SimpleNamespace

import pytest
from rich.console import Console

from r1re_jax.policy_files import save_policy
from r1re_jax.report import quickstart
from r1re_jax.report.history import read_history
from tests.tiny import tiny_policy

PRODUCTS = quickstart.Products(
    report=pathlib.Path("/r/report.html"), curves=(), export=pathlib.Path("/r/export")
)
STEPS = {"before_sft": 0, "after_sft": 4, "after_grpo": 10}


def test_result_has_a_row_for_every_stage(workdir: pathlib.Path) -> None:
    history = read_history(workdir)
    found = quickstart.result(history, steps=STEPS, products=PRODUCTS, seconds=12.34)
    assert found["seconds"] == 12.3
    assert (found["report"], found["export"]) == ("/r/report.html", "/r/export")
    assert found["after_sft"] == {
        "accuracy": 0.4,
        "ood_accuracy": 0.2,
        "format_rate": 0.875,
        "mean_reward": -0.25,
    }
    assert found["after_grpo"]["accuracy"] == 0.7
    assert json.loads(json.dumps(found)) == found


def test_result_needs_every_stage(workdir: pathlib.Path) -> None:
    steps = STEPS | {"after_grpo": 11}
    with pytest.raises(KeyError):
        quickstart.result(read_history(workdir), steps=steps, products=PRODUCTS, seconds=0)


def test_stage_steps_come_from_the_settings() -> None:
    settings = SimpleNamespace(sft=SimpleNamespace(steps=4), steps=10)
    assert quickstart.stage_steps(settings) == STEPS


def test_show_prints_both_tables_and_completions(workdir: pathlib.Path) -> None:
    out = io.StringIO()
    history = read_history(workdir)
    quickstart.show(history, history, Console(file=out, width=120))
    text = out.getvalue()
    assert "SFT, then GRPO" in text and "SFT alone" in text
    assert "after GRPO, step 10" in text
    assert "completions, ood" in text
    assert "ex0: <think><script>alert(1)</script></think>" in text
    assert "right, gold Cause-Effect(e1,e2), reward +3" in text


def test_finish_writes_report_and_curves_and_keeps_an_export(workdir: pathlib.Path) -> None:
    export = workdir.parent / "export"
    save_policy(tiny_policy(), export)
    before = (export / "model.safetensors").stat().st_mtime_ns
    products = quickstart.finish(workdir, export=export)
    assert products.report.is_absolute() and "after GRPO" in products.report.read_text()
    assert products.curves and all(path.suffix == ".png" for path in products.curves)
    assert products.export == export.absolute()
    assert (export / "model.safetensors").stat().st_mtime_ns == before


def test_finish_exports_with_a_card(workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "exported_step", lambda *_: 10)
    monkeypatch.setattr(quickstart, "load_policy", lambda *_, step: tiny_policy())
    (workdir / "policy").mkdir()
    quickstart.finish(workdir, export=workdir / "export")
    assert "| `in_domain` | 10 |" in (workdir / "export" / "README.md").read_text()
