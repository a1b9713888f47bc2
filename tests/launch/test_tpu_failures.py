"""run/tpu.sh where gcloud fails: at any point it ends with what exists and what costs money."""

import dataclasses
import pathlib
from typing import Any

import pytest

from tests.launch.slice import COMMAND, SECRETS, Slice
from tests.launch.test_tpu_script import CREATE, DELETE, TO_DELETE

QUOTA = "ERROR: RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPreemptibleLitepod' has been exceeded"
PAYING = "node r1re in state READY: costs money now"
LAUNCH = ["launch", "--", *COMMAND]
VERBS = [["create"], ["setup"], LAUNCH, ["logs"], ["watch"], ["delete", "--yes"]]
NOTHING = "nothing named r1re: nothing costs money"


def fault(on: str, *, times: int = -1, said: str = "ERROR: it failed", **change: Any) -> dict:
    """A call that fails."""
    return {"on": on, "times": times, "stderr": said, "set": change}


@dataclasses.dataclass(frozen=True)
class Case:
    """One failure: the verb that meets it, the world it meets, and what is said then."""

    name: str
    arguments: tuple[str, ...]
    world: dict[str, Any]
    said: tuple[str, ...]


CREATING = [
    Case("no quota", ("create",), {"faults": [fault("create", said=QUOTA)]}, (QUOTA, NOTHING)),
    Case(
        "no quota, but it is queued",
        ("create",),
        {"faults": [fault("create", said=QUOTA, queued="FAILED", waiting=["FAILED"] * 9)]},
        ("queued resource r1re in state FAILED", "node r1re: none", TO_DELETE),
    ),
    Case(
        "refused in the queue",
        ("create",),
        {"queue": ["FAILED"] * 9},
        ("FAILED: no capacity in the zone", "gets nothing more", TO_DELETE),
    ),
    Case(
        "it stays in the queue",
        ("create", "--wait=1"),
        {"queue": ["PROVISIONING"] * 999},
        ("waited 1 s in vain", "costs nothing yet, and money as soon as it is granted", TO_DELETE),
    ),
    Case(
        "states cannot be asked",
        ("create",),
        {"faults": [fault("describe")]},
        ("gcloud does not say; it may exist and cost money", "queued-resources list", TO_DELETE),
    ),
]
RUNNING = [
    Case("ssh is not ready", ("setup",), {"faults": [fault("mkdir -p -m")]}, ("ssh-add", PAYING)),
    Case("the copy fails", ("setup",), {"faults": [fault("scp")]}, ("set-up failed", PAYING)),
    Case(
        "one worker's set-up fails",
        ("setup",),
        {"faults": [fault("tpu_worker.sh setup", said="##### worker 2 failed")]},
        ("##### worker 2 failed", "it may be repeated", PAYING),
    ),
    Case(
        "preempted while setting up",
        ("setup",),
        {"faults": [fault("mkdir", times=1, queued="SUSPENDED", node="PREEMPTED")]},
        ("the slice is lost", "state PREEMPTED: its chips are gone", TO_DELETE),
    ),
    Case("one worker dead", ("launch", "--", *COMMAND), {"dead": [3]}, ("worker 3", PAYING)),
    Case("no variables", ("launch", "--", *COMMAND), {"faults": [fault("scp")]}, (PAYING,)),
    Case("no log", ("logs",), {"dead": [0]}, (PAYING,)),
    Case(
        "the run fails",
        ("watch",),
        {"run": ["running", "ended 1"]},
        ("failed in 2 looks: t1v-w-0 ended 1", PAYING, TO_DELETE),
    ),
    Case(
        "a worker falls silent",
        ("watch",),
        {"dead": [2]},
        ("silent in 2 looks: 1 of 4 workers do not answer (t1v-w-0", PAYING),
    ),
    Case(
        "preempted too often",
        ("watch", "--max-recreations=2"),
        {"preempt_at": [0, 1, 2, 3]},
        ("lost again after 2 re-creations", "state PREEMPTED: its chips are gone", TO_DELETE),
    ),
    Case(
        "never granted again",
        ("watch", "--max-recreations=2"),
        {"preempt_at": [0], "faults": [fault("queued-resources create", said=QUOTA)]},
        (QUOTA, "lost again after 2 re-creations", NOTHING),
    ),
    Case(
        "the old slice stays",
        ("watch",),
        {"preempt_at": [0], "faults": [fault("queued-resources delete")]},
        ("could not be deleted", "queued resource r1re in state SUSPENDED", TO_DELETE),
    ),
    Case(
        "the new slice cannot be set up",
        ("watch",),
        {"preempt_at": [0], "faults": [fault("tpu_worker.sh setup")]},
        ("the set-up failed", PAYING),
    ),
    Case("deleted elsewhere", ("watch",), {"queued": "NONE"}, ("nothing is left to watch",)),
    Case("delete asks", ("delete",), {}, ("without a terminal give --yes", PAYING)),
    Case("delete fails", ("delete", "--yes"), {"faults": [fault("delete")]}, (PAYING, TO_DELETE)),
    Case(
        "the node stays",
        ("delete", "--yes"),
        {"queued": "NONE", "faults": [fault("tpu-vm delete")]},
        ("queued resource r1re: none", PAYING, "gcloud compute tpus tpu-vm delete r1re"),
    ),
]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Slice]:
    """What a verb finds: a slice after those before it."""
    slice_ = Slice(tmp_path_factory.mktemp("new"), variables=dict(SECRETS))
    found = {}
    for verb, *arguments in VERBS:
        found[verb] = slice_.copy(tmp_path_factory.mktemp(verb))
        if verb not in ("logs", "watch", "delete"):
            slice_.done(verb, *arguments)
            slice_.calls()
    return found


@pytest.mark.parametrize("case", CREATING + RUNNING, ids=lambda case: case.name)
def test_a_failure_says_what_exists_and_costs_money(
    stages: dict[str, Slice], tmp_path: pathlib.Path, case: Case
) -> None:
    slice_ = stages["logs" if case in RUNNING else "create"].copy(tmp_path)
    slice_.change(**case.world)
    result = slice_.run(*case.arguments)
    assert result.returncode > 0, result.stderr
    assert "what exists now in project p1, zone z1:" in result.stderr
    for part in case.said:
        assert part in result.stderr
    if NOTHING not in result.stderr:
        assert "bash run/tpu.sh delete --name=r1re --project=p1 --zone=z1 --yes" in result.stderr
    assert not any(word in result.stderr + result.stdout for word in ("s3cret", "k3y"))
    assert not list((slice_.folder / "tmp").iterdir())


def test_without_gcloud_it_may_exist(stages: dict[str, Slice], tmp_path: pathlib.Path) -> None:
    slice_ = stages["create"].copy(tmp_path)
    tools = slice_.folder / "tools"
    tools.mkdir()
    slice_.variables["PATH"] = str(tools)
    for name in ("bash", "mktemp", "rm", "grep", "tail"):
        target = next(p for p in map(pathlib.Path, ("/usr/bin", "/bin")) if (p / name).exists())
        (tools / name).symlink_to(target / name)
    result = slice_.run("create")
    assert result.returncode == 1 and "gcloud is not on the PATH" in result.stderr
    assert "it may exist and cost money" in result.stderr


@pytest.mark.parametrize("calls", [1, -1], ids=["once", "for ever"])
@pytest.mark.parametrize("arguments", VERBS, ids=lambda arguments: arguments[0])
def test_an_outage_at_any_call_is_survived_or_reported(
    stages: dict[str, Slice], tmp_path: pathlib.Path, arguments: list[str], calls: int
) -> None:
    found = stages[arguments[0]]
    world = found.world | {"preempt_at": [0], "run": ["ended 0"], "queue": []}
    first = number = world["calls"]
    while True:
        slice_ = found.copy(tmp_path / str(number))
        slice_.change(**world | {"outage_from": number, "outage_calls": calls})
        slice_.variables["R1RE_TPU_PATIENCE"] = "1" if calls < 0 else "2"
        result = slice_.run(*arguments)
        if slice_.world["calls"] <= number:
            break  # the verb makes no such call: all have been tried
        assert calls > 0 or result.returncode or "the run has finished" in result.stderr
        if result.returncode:
            assert "what exists now in project p1" in result.stderr
        if calls < 0:
            assert "it may exist and cost money. To look: gcloud compute tpus" in result.stderr
        number += 3 if calls > 0 and arguments == ["watch"] else 1  # it makes many, and takes long
    assert number > first


def test_a_recreated_slice_may_be_lost_while_it_is_set_up(
    stages: dict[str, Slice], tmp_path: pathlib.Path
) -> None:
    slice_ = stages["watch"].copy(tmp_path)
    lost = fault("tpu_worker.sh setup", times=1, queued="SUSPENDED", node="PREEMPTED")
    slice_.change(preempt_at=[0], faults=[lost])
    said = slice_.done("watch")
    assert "re-creation 2 of 20" in said and "finished on all workers" in said
    calls = slice_.calls()
    assert calls.count(CREATE) == calls.count(DELETE) == 2


def test_a_deletion_is_tried_again(stages: dict[str, Slice], tmp_path: pathlib.Path) -> None:
    slice_ = stages["watch"].copy(tmp_path)
    slice_.change(faults=[fault("queued-resources delete", times=2)])
    slice_.done("delete", "--yes")
    assert slice_.calls().count(DELETE) == 3
    assert slice_.world["node"] == "NONE"
