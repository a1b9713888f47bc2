"""The commands evaluate, extract, export, report and train: what they print and refuse."""

import importlib
import io
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest

from r1re_jax.model.config import Family
from r1re_jax.policy_files import save_policy
from r1re_jax.task.readers import write_jsonl
from r1re_jax.task.triplets.examples import Entity, Triplet, TripletExample
from r1re_jax.task.triplets.readers import write_triplets
from r1re_jax.train.hooks import Hooks
from r1re_jax.train.loop import Outcome
from r1re_jax.train.parity import BANDS, Gap, Parity, Way
from r1re_jax.train.settings import Dtype
from tests.drawn import drawn_tensors
from tests.fake_hub import TOKEN, FakeHub, Repository
from tests.gguf_files import as_metadata, write_gguf
from tests.saved import make_workdir
from tests.tiny import GUIDE, tiny_examples, tiny_policy
from tests.train.world import config, write_inputs

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIMITS = ("--limits.guide=448", "--limits.question=128", "--limits.completion=10")
TAGGED = "<e1>Ann</e1> likes <e2>tea</e2>."

Command = Callable[..., None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a policy of random weights."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_policy(tiny_policy(), folder)
    return folder


@pytest.fixture(scope="module", params=["folder", "gguf", "base"])
def foreign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A policy that was not exported here: no r1re.json, and where not a base model a template."""
    policy = tiny_policy(family=Family.LLAMA, tied=True, max_position=1024)
    folder = tmp_path_factory.mktemp("foreign") / "tiny"
    save_policy(policy, folder)
    (folder / "r1re.json").unlink()
    template = policy.tokenizer.chat_template
    if request.param == "gguf":
        words = as_metadata(
            folder, "gpt-2", eos="<|im_end|>", pad="<|endoftext|>", chat_template=template
        )
        file = folder.with_suffix(".gguf")
        return str(write_gguf(file, policy.config, drawn_tensors(policy.config), words=words).path)
    if request.param == "base":
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings.pop("chat_template", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    return str(folder)


@pytest.fixture
def inputs(tmp_path: pathlib.Path) -> list[str]:
    """--data and --guide of five examples."""
    write_jsonl(tmp_path / "data.jsonl", tiny_examples(5))
    (tmp_path / "guide.md").write_text(GUIDE)
    return [f"--data={tmp_path / 'data.jsonl'}", f"--guide={tmp_path / 'guide.md'}"]


def test_evaluate_writes_figures_and_prints_them(
    command: Command,
    model: pathlib.Path,
    inputs: list[str],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    args = [f"--model={model}", *inputs, f"--out={out}", *LIMITS]
    command("evaluate", *args, "--samples=2", "--batch=2", "--limit=3", "--protocol=held out")
    metrics = json.loads((out / "metrics.json").read_text())
    expected = {"n": 3, "k": 2, "temperature": 1.0, "protocol": "held out", "model": str(model)}
    assert {key: metrics[key] for key in expected} == expected
    assert len(metrics["data_sha256"]) == 64
    assert len((out / "predictions.jsonl").read_text().splitlines()) == 3
    printed = capsys.readouterr()
    assert "Avg@2" in printed.out
    assert "Likes" in printed.out
    assert "[evaluate" in printed.err  # progress
    with pytest.raises(SystemExit, match=r"run\.evaluate: .*samples is 2 there and 1 here"):
        command("evaluate", *args, "--batch=2", "--limit=3")


def test_policies_from_elsewhere_are_evaluated_and_extract(
    command: Command,
    foreign: str,
    inputs: list[str],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    command("evaluate", f"--model={foreign}", *inputs, f"--out={out}", *LIMITS, "--samples=2")
    assert json.loads((out / "metrics.json").read_text())["model"] == foreign
    assert len((out / "predictions.jsonl").read_text().splitlines()) == 5
    capsys.readouterr()
    command("extract", f"--model={foreign}", inputs[1], *LIMITS, TAGGED)
    row = json.loads(capsys.readouterr().out)
    assert sorted(row) == ["label", "problem", "reasoning", "text"]


def test_evaluate_refuses_bad_input_before_it_loads_the_model(
    command: Command, inputs: list[str], tmp_path: pathlib.Path
) -> None:
    out, data = tmp_path / "out", tmp_path / "data.jsonl"
    args = ["--model=nowhere", *inputs, f"--out={out}"]
    good = data.read_text()
    data.write_text(good.replace("Likes(e2,e1)", "Hates(e2,e1)"))
    with pytest.raises(SystemExit, match=r"run\.evaluate: .*data\.jsonl:2: .*Hates"):
        command("evaluate", *args)
    data.write_text("")
    with pytest.raises(SystemExit, match=r"run\.evaluate: .*data\.jsonl"):
        command("evaluate", *args)
    data.write_text(good)
    with pytest.raises(SystemExit, match=r"run\.evaluate: .*missing\.md"):
        command("evaluate", *args, "--guide=missing.md")
    with pytest.raises(SystemExit, match=r"run\.evaluate: .*nowhere"):
        command("evaluate", *args)
    assert not out.exists()


def test_evaluate_says_how_to_go_on(
    command: Command,
    model: pathlib.Path,
    inputs: list[str],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("r1re_jax.evaluate.evaluate", interrupt)
    with pytest.raises(SystemExit, match="interrupted; the same command goes on"):
        command("evaluate", f"--model={model}", *inputs, f"--out={tmp_path / 'out'}")


def test_extract_prints_a_line_for_each_text(
    command: Command,
    model: pathlib.Path,
    inputs: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = [f"--model={model}", inputs[1], *LIMITS]
    command("extract", TAGGED, *args)
    row = json.loads(capsys.readouterr().out)
    assert list(row) == ["label", "reasoning", "text", "problem"]
    assert row["label"] is None
    assert row["problem"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{TAGGED}\n{TAGGED.replace('tea', 'milk')}\n"))
    command("extract", *args, "-")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2
    assert rows[0] == row


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no marks", r"text:1: expected the marks <e1>.*found none"),
        ("<e2>a</e2> then <e1>b</e1>", r"text:1: .*found <e2> </e2> <e1> </e1>"),
        ("<e1>a</e1> alone", r"text:1: .*found <e1> </e1>"),
    ],
)
def test_extract_refuses_bad_marks(
    command: Command, inputs: list[str], text: str, message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        command("extract", "--model=nowhere", inputs[1], text)


def test_extract_names_the_line_of_standard_input(
    command: Command, inputs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{TAGGED}\nwithout\n"))
    with pytest.raises(SystemExit, match=r"run\.extract: standard input:2: expected the marks"):
        command("extract", "--model=nowhere", inputs[1], "-")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run of which step 2 was best."""
    place = tmp_path_factory.mktemp("run")
    return make_workdir(tiny_policy(), place, {"1": 0.1, "2": 0.5, "10": 0.4})


def test_export_writes_shards_and_a_card_that_name_what_was_exported(
    command: Command,
    workdir: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = [f"--workdir={workdir}", f"--out={tmp_path / 'policy'}", "--dtype=bfloat16"]
    command("export", *args, "--license=mit", "--max_shard_gb=1e-5")
    assert "step 2 to" in capsys.readouterr().out
    assert len(list((tmp_path / "policy").glob("*.safetensors"))) > 2
    card = (tmp_path / "policy" / "README.md").read_text()
    assert "license: mit" in card and "- **Step**: 2\n" in card and "# policy" in card
    assert "weights in bfloat16" in card
    with pytest.raises(SystemExit, match=r"run\.export: .*nothing is overwritten"):
        command("export", *args)


def test_export_pushes_and_says_where_to(
    command: Command,
    workdir: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub = FakeHub().install(monkeypatch)
    args = [f"--workdir={workdir}", f"--out={tmp_path / 'policy'}"]
    command("export", *args, "--step=10", "--push=ann/reader", "--private")
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == "pushed to https://hub.test/ann/reader"
    assert TOKEN not in printed.out + printed.err
    there = hub.repositories["ann/reader"]
    assert there.private and {"model.safetensors", "r1re.json", "README.md"} <= set(there.files)
    assert "# ann/reader" in there.files["README.md"].decode()


def test_export_refuses_a_push_before_it_does_anything(
    command: Command, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub().install(monkeypatch, token=None)
    args = ["--workdir=nowhere", f"--out={tmp_path / 'policy'}"]
    with pytest.raises(SystemExit, match=r"run\.export: nobody is logged in"):
        command("export", *args, "--push=ann/reader")
    with pytest.raises(SystemExit, match=r"run\.export: 'ann' is no name on the hub"):
        command("export", *args, "--push=ann")
    with pytest.raises(SystemExit, match=r"run\.export: --private and --push_overwrite"):
        command("export", *args, "--private")
    FakeHub(repositories={"ann/reader": Repository(files={"a.bin": b""})}).install(monkeypatch)
    with pytest.raises(SystemExit, match="holds what no export wrote"):
        command("export", *args, "--push=ann/reader")
    with pytest.raises(SystemExit, match="no policy 'nowhere'"):
        command("export", *args, "--push=ann/reader", "--push_overwrite")
    assert not (tmp_path / "policy").exists() and hub.calls == []


def test_export_of_a_model_folder_has_a_short_card(
    command: Command, model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    command("export", f"--workdir={model}", f"--out={tmp_path / 'policy'}")
    assert "`tiny`, written anew" in (tmp_path / "policy" / "README.md").read_text()


def test_report_prints_the_path(
    command: Command, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    command("report", f"--workdir={tmp_path}")
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "report.html")
    with pytest.raises(SystemExit, match=r"run\.report: no work directory at"):
        command("report", f"--workdir={tmp_path / 'missing'}")


@pytest.fixture
def plain(tmp_path: pathlib.Path) -> list[str]:
    """--task, --guide and limits of triplets, with three sentences in plain.jsonl."""
    types = "## Entities\n\n- **person**: who.\n- **thing**: what.\n\n## Relations"
    (tmp_path / "types.md").write_text(GUIDE.replace("## Relations", types))
    entities = Entity("Ann", 0, 3, "person"), Entity("tea", 10, 13, "thing")
    likes = (Triplet(0, 1, "Likes"),)
    sentences = [TripletExample(f"e{i}", "Ann likes tea.", entities, likes) for i in range(3)]
    write_triplets(tmp_path / "plain.jsonl", sentences)
    return ["--task=triplets", f"--guide={tmp_path / 'types.md'}", *LIMITS, "--limits.guide=600"]


def test_triplets_are_evaluated(
    command: Command,
    model: pathlib.Path,
    plain: list[str],
    inputs: list[str],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    args = [f"--model={model}", f"--out={out}", "--samples=2", "--batch=4"]
    command("evaluate", *args, *plain, f"--data={tmp_path / 'plain.jsonl'}")
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["triplets"]["n"] == 3 and metrics["entities"]["n"] == 6
    row = json.loads((out / "predictions.jsonl").read_text().splitlines()[0])
    assert row["gold"]["triplets"] == [{"head": "Ann", "relation": "Likes", "tail": "tea"}]
    printed = capsys.readouterr().out
    assert "Triplet F1" in printed and "triplets with the types of both ends" in printed
    with pytest.raises(SystemExit, match=r"run\.evaluate: .*data\.jsonl:1: .*'entities' is miss"):
        command("evaluate", *args, *plain, inputs[0])
    with pytest.raises(SystemExit, match=r"run\.evaluate: .* names no entity types"):
        command("evaluate", *args, "--task=triplets", *inputs)


def test_triplets_are_extracted_from_plain_texts(
    command: Command,
    model: pathlib.Path,
    plain: list[str],
    inputs: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Ann likes tea.\nBob saw a cat.\n"))
    command("extract", f"--model={model}", *plain, "-")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    keys = ["entities", "triplets", "reasoning", "text", "problem"]
    assert [list(row) for row in rows] == [keys] * 2
    assert rows[0]["entities"] is None and rows[0]["problem"]
    with pytest.raises(SystemExit, match=r"run\.extract: text:1: the text is blank"):
        command("extract", "--model=nowhere", *plain, " ")
    with pytest.raises(SystemExit, match=r"run\.extract: .* names no entity types"):
        command("extract", "--model=nowhere", "--task=triplets", inputs[1], "Ann.")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("evaluate", "--samples"),
        ("extract", "--guide"),
        ("export", "--push"),
        ("report", "--workdir"),
        ("doctor", "--json"),
    ],
)
def test_help(name: str, shown: str) -> None:
    process = subprocess.run(
        [sys.executable, "-m", f"run.{name}", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert shown in process.stdout
    assert f"python -m run.{name}" in process.stdout
    assert "Error" not in process.stderr


def test_train_reports_that_sampler_and_trainer_disagree(
    command: Command, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = Gap(mean=0.25, max=float("nan"))
    found = Parity(
        dtype=Dtype.FLOAT32,
        tokens=9,
        gaps={(Way.DECODE, Way.TRAINING): apart},
        band=BANDS[Dtype.FLOAT32],
    )
    monkeypatch.setattr("r1re_jax.train.parity.measure", lambda *args, **more: found)
    values = config(write_inputs(tmp_path), sft__questions=8, grpo__questions=8)
    train = importlib.import_module("run.train").train
    with pytest.raises(SystemExit, match=r"run\.train: (?s:.*)mean 2\.50e-01, max nan"):
        train(values, tmp_path / "run", again="")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("profile", "steps", "told"),
    [(0, 3, "finished"), (1, 1, "nothing was traced: no"), (1, 3, "traced sft-2. To look at it:")],
)
def test_train_says_how_to_look_at_a_trace(
    profile: int,
    steps: int,
    told: str,
    command: Command,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run_training(settings: object, workdir: object, *, hooks: Hooks) -> Outcome:
        for step in range(1, steps + 1):
            hooks.before_step("sft", step)
        return Outcome(step=steps, steps=steps, stopped=None)

    module = importlib.import_module("run.train")
    monkeypatch.setattr(module, "run_training", run_training)
    module.train(config(tmp_path), tmp_path, again="", profile=profile)
    assert capsys.readouterr().out.startswith(told)
    assert any(tmp_path.rglob("profile/sft-2/*.xplane.pb")) == told.startswith("traced")
