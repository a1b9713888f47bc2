"""A gcloud that knows one TPU slice: it notes every call, and fails as the test's world says.

Run as a program. The folder in FAKE_GCLOUD holds world.json, calls.jsonl (one list of arguments a
line) and what workers were sent. No third-party imports: it starts some hundred times.
"""

import json
import os
import pathlib
import shutil
import sys
from typing import Any

NEW = {
    "workers": 4,
    "queued": "NONE",  # state of the queued resource
    "node": "NONE",
    "queue": ["WAITING_FOR_RESOURCES"],  # what comes before ACTIVE, a look each
    "run": ["running", "ended 0"],  # of all workers, a look each; the last stays
    "preempt_at": [],  # looks at the run, counted over all slices, that find a slice preempted
    "dead": [],  # workers that ssh does not reach
    "faults": [],  # {"on": part of the call, "times": -1 for ever, "stderr": …, "set": {…}}
    "outage_from": None,  # number of the first call that gets no answer
    "outage_calls": -1,  # how many do not, -1 for ever
    "calls": 0,
    "looks": 0,
    "copies": 0,
}
DETAIL = {"FAILED": "\tno capacity in the zone"}


def main(arguments: list[str]) -> int:
    """Do what a call asks for, in the world's folder."""
    folder = pathlib.Path(os.environ["FAKE_GCLOUD"])
    with (folder / "calls.jsonl").open("a") as file:
        file.write(json.dumps(arguments) + "\n")
    world = json.loads((folder / "world.json").read_text())
    status = answer(arguments, world, folder)
    (folder / "world.json").write_text(json.dumps(world))
    return status


def answer(arguments: list[str], world: dict[str, Any], folder: pathlib.Path) -> int:
    """Return the exit status of a call, and change the world."""
    line, number = " ".join(arguments), world["calls"]
    world["calls"] += 1
    if (first := world["outage_from"]) is not None and number >= first:
        if world["outage_calls"] < 0 or number < first + world["outage_calls"]:
            return wrong("ERROR: (gcloud) There was a problem: Network is unreachable")
    for fault in world["faults"]:
        if fault["on"] in line and fault["times"]:
            fault["times"] -= 1
            world.update(fault.get("set", {}))
            return wrong(fault["stderr"])
    what, verb = arguments[2:4]
    if (what, verb) == ("queued-resources", "create"):
        world["queued"], world["waiting"] = "CREATING", list(world["queue"])
        return 0
    if verb == "describe":
        return describe(what, world)
    if verb == "delete":
        return delete(what, arguments, world)
    if world["node"] != "READY":
        return wrong(f"ERROR: (gcloud) TPU is in state {world['node']}")
    if verb == "scp":
        world["copies"] += 1
        shutil.copy(arguments[4], folder / f"{world['copies']}-{pathlib.Path(arguments[4]).name}")
        return 0
    return ssh(line, world)


def describe(what: str, world: dict[str, Any]) -> int:
    """Print a state. A queue moves on by being looked at."""
    if what == "queued-resources" and world["queued"] not in ("NONE", "ACTIVE", "SUSPENDED"):
        world["queued"] = world["waiting"].pop(0) if world["waiting"] else "ACTIVE"
        if world["queued"] == "ACTIVE":
            world["node"] = "READY"
    state = world["queued" if what == "queued-resources" else "node"]
    if state == "NONE":
        return wrong("ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource was not found")
    rest = DETAIL.get(state, "") if what == "queued-resources" else f"\t{world['workers']}"
    print(state + rest)
    return 0


def delete(what: str, arguments: list[str], world: dict[str, Any]) -> int:
    """Delete; a queued resource keeps its node unless it is forced to let go."""
    if what == "tpu-vm":
        world["node"] = "NONE"
    elif world["node"] != "NONE" and "--force" not in arguments:
        return wrong("ERROR: FAILED_PRECONDITION: the queued resource has nodes")
    else:
        world["queued"] = world["node"] = "NONE"
    return 0


def ssh(line: str, world: dict[str, Any]) -> int:
    """Answer for the workers; one that is dead makes the whole call fail, as gcloud has it."""
    if "tpu_worker.sh state" in line:
        if world["looks"] in world["preempt_at"]:
            world.update(looks=world["looks"] + 1, queued="SUSPENDED", node="PREEMPTED")
            return wrong("ssh: connect to host: Connection timed out")
        # Of this slice: each begins with the first state.
        step = world["looks"] - max([-1, *(n for n in world["preempt_at"] if n < world["looks"])])
        state = world["run"][min(step - 1, len(world["run"]) - 1)]
        world["looks"] += 1
        for worker in range(world["workers"]):
            if worker not in world["dead"]:
                print(f"r1re-worker t1v-w-{worker} {state}")
    if world["dead"]:
        return wrong(f"##### Command execution on worker {world['dead'][0]} failed", 255)
    return 0


def wrong(message: str, status: int = 1) -> int:
    """Say what went wrong; return the status."""
    print(message, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
