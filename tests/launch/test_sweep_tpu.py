"""A sweep as TPU jobs: names that Cloud TPU takes, commands, and what a failure says."""

import itertools
import pathlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1re_jax.launch import sweep_tpu
from r1re_jax.launch.sweep import Member, expand
from r1re_jax.launch.sweep_tpu import COMMON, VERBS

ROOT = pathlib.Path(__file__).resolve().parents[2]


def member(**overrides: object) -> Member:
    (found,) = expand({key.replace("__", "."): value for key, value in overrides.items()}).members
    return found


@given(st.lists(st.floats(allow_nan=False), min_size=1, unique_by=repr))
def test_names_are_ones_that_cloud_tpu_takes_and_differ(values: list[float]) -> None:
    members = [member(grpo__kl_coefficient=value, seed=1) for value in values]
    names = [sweep_tpu.slice_name("sweep", one) for one in members]
    assert len(set(names)) == len(names)
    for name in names:
        assert re.fullmatch(r"[a-z][a-z0-9-]*[a-z0-9]", name) and len(name) <= 62
        assert "--" not in name


@pytest.mark.parametrize("prefix", ["", "My", "a-", "9a", "a" * 25])
def test_a_prefix_that_no_slice_can_have_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match="cannot begin that of a TPU"):
        sweep_tpu.slice_name(prefix, member(seed=1))


def test_a_slice_is_created_set_up_and_given_the_command() -> None:
    command = ("python", "-m", "run.train", "--config=F")
    options = ("--spot", "--zone=z", "--commit=abc", "--env=HF_HOME")
    assert sweep_tpu.tpu_commands("s-1", command, options=options) == [
        ("bash", "run/tpu.sh", "create", "--name=s-1", "--spot", "--zone=z"),
        ("bash", "run/tpu.sh", "setup", "--name=s-1", "--zone=z", "--commit=abc"),
        ("bash", "run/tpu.sh", "launch", "--name=s-1", "--zone=z", "--env=HF_HOME", "--", *command),
    ]
    with pytest.raises(ValueError, match="takes no --spott.*did you mean --spot"):
        sweep_tpu.tpu_commands("s-1", command, options=("--spott",))


def test_a_failure_says_what_costs_money_and_the_others_go_on(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, calls = tmp_path / "tpu.sh", tmp_path / "calls"
    script.write_text(f'echo "$*" >> {calls}\ncase "$*" in "setup --name=b"*) exit 4;; esac\n')
    monkeypatch.setattr(sweep_tpu, "SCRIPT", ("bash", str(script)))
    command = ("python", "-m", "run.train")
    jobs = {n: sweep_tpu.tpu_commands(n, command, options=("--zone=z",)) for n in "abc"}
    said: list[str] = []
    failed = sweep_tpu.launch_all(jobs, say=said.append)
    assert list(failed) == ["b"] and " setup --name=b" in failed["b"]
    verbs = [line.split()[:2] for line in calls.read_text().splitlines()]
    assert verbs == [
        *(["create", "--name=a"], ["setup", "--name=a"], ["launch", "--name=a"]),
        *(["create", "--name=b"], ["setup", "--name=b"]),
        *(["create", "--name=c"], ["setup", "--name=c"], ["launch", "--name=c"]),
    ]
    (message,) = [line for line in said if "costs money" in line]
    assert message.startswith("b: exit status 4. b exists and costs money until: bash ")
    assert message.endswith("delete --name=b --zone=z")


def test_every_option_is_one_of_the_script() -> None:
    scripts = "".join(path.read_text("utf-8") for path in (ROOT / "run").glob("tpu*.sh"))
    for option in {*COMMON, *itertools.chain(*VERBS.values())}:
        assert option in scripts, option
