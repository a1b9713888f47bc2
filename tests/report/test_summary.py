"""The table of a run: stages, sets, figures, and how it looks in a terminal."""

import io
import json
import pathlib
import shutil

from rich.console import Console

from r1re_jax.report.history import read_history
from r1re_jax.report.summary import headline, print_metrics, print_summary, stages, summary


def test_rows_are_the_stages_and_columns_the_sets(workdir: pathlib.Path) -> None:
    history = read_history(workdir)
    assert stages(history) == {0: "before SFT", 4: "after SFT", 10: "after GRPO"}
    table = summary(history)
    assert [head["name"] for head in table["sets"]] == ["in_domain", "ood"]
    assert table["sets"][0]["columns"] == ["Avg@2", "Greedy", "Pass@2", "Format", "Reward"]
    assert table["sets"][0]["note"] == "3 examples, majority label 25.0%, held out"
    stage, step, cells = table["rows"][1]
    assert (stage, step) == ("after SFT", 4)
    assert cells[:5] == [
        ("40.0%", "35.0–45.0"),
        ("41.0%", ""),
        ("60.0%", ""),
        ("87.5%", ""),
        ("−0.25", ""),
    ]
    assert len(summary(history, milestones=False)["rows"]) == 4


def test_headline_compares_with_the_start_of_grpo(workdir: pathlib.Path) -> None:
    first, second = headline(read_history(workdir))
    assert first == {
        "name": "in_domain",
        "value": "70.0%",
        "note": "+30.0 points over the start of GRPO",
    }
    assert second["value"] == "35.0%"


def test_unfinished_run_says_so(workdir: pathlib.Path) -> None:
    shutil.rmtree(workdir / "eval" / "10-in_domain")
    shutil.rmtree(workdir / "eval" / "10-ood")
    assert stages(read_history(workdir))[7] == "GRPO so far (step 7)"


def test_a_run_without_warm_start(workdir: pathlib.Path) -> None:
    config = {"config": {"sft": {"steps": 0}, "grpo": {"steps": 10}}}
    (workdir / "config.json").write_text(json.dumps(config))
    assert stages(read_history(workdir)) == {0: "before GRPO", 10: "after GRPO"}


def test_a_run_of_the_warm_start_alone(workdir: pathlib.Path) -> None:
    config = {"config": {"sft": {"steps": 10}, "grpo": {"steps": 0}}}
    (workdir / "config.json").write_text(json.dumps(config))
    assert stages(read_history(workdir)) == {0: "before SFT", 10: "after SFT"}
    shutil.rmtree(workdir / "eval" / "10-in_domain")
    shutil.rmtree(workdir / "eval" / "10-ood")
    assert stages(read_history(workdir)) == {0: "before SFT", 7: "SFT so far (step 7)"}


def test_without_config_the_phases_come_from_the_metrics(workdir: pathlib.Path) -> None:
    (workdir / "config.json").unlink()
    assert stages(read_history(workdir)) == {0: "before SFT", 4: "after SFT", 10: "after GRPO"}


def test_tables_in_the_terminal(workdir: pathlib.Path) -> None:
    console = Console(file=io.StringIO(), width=120)
    with console.capture() as capture:
        print_summary(read_history(workdir), console)
    lines = [line for line in capture.get().splitlines() if "%" in line]
    assert len(lines) == 6
    for shown in ("after SFT, step 4", "in_domain", "40.0% (35.0–45.0)", "41.0%", "−0.25"):
        assert shown in lines[2]
    assert "ood" in lines[3]
    metrics = json.loads((workdir / "eval" / "10-ood" / "metrics.json").read_text())
    with console.capture() as capture:
        print_metrics(metrics, console)
    for shown in ("Avg@2", "35.0% (30.0–40.0)", "Cause-Effect", "44.4", "61.2, 63.0"):
        assert shown in capture.get()
