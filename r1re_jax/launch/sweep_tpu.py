"""A sweep on Cloud TPU: one job of run/tpu.sh for each member."""

import difflib
import itertools
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence

from r1re_jax.launch.sweep import Member, digest

SCRIPT = ("bash", "run/tpu.sh")
# Cloud TPU takes letters in lower case, digits and hyphens, a letter first; run/tpu.sh 62 at most.
LONGEST_NAME = 62
_PREFIX = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
# What must be done before a slice trains, and the options that each takes; of the others none does.
COMMON = ("--project", "--zone")
VERBS = {
    "create": (
        *("--type", "--spot", "--on-demand", "--reserved", "--runtime"),
        *("--valid-until-duration", "--wait"),
    ),
    "setup": ("--commit",),
    "launch": ("--env", "--replace"),
}

Commands = Sequence[tuple[str, ...]]


def slice_name(prefix: str, member: Member) -> str:
    """Return a name for a member's slice: the prefix, its overrides, a hash that tells them apart.

    Raises:
        ValueError: a prefix that no slice can be called by.
    """
    if not _PREFIX.fullmatch(prefix) or len(prefix) > 24:
        raise ValueError(
            f"the name {prefix!r} cannot begin that of a TPU; expected at most 24 letters in lower"
            " case, digits and hyphens, a letter first"
        )
    words = re.sub(r"[^a-z0-9]+", "-", member.name.lower()).strip("-")
    mark = digest(member.overrides)
    room = LONGEST_NAME - len(prefix) - len(mark) - 2
    return f"{prefix}-{words[:room].strip('-')}-{mark}"


def tpu_commands(
    name: str, command: Sequence[str], *, options: Sequence[str] = ()
) -> list[tuple[str, ...]]:
    """Return what creates a slice, sets it up and starts a command there.

    Args:
        name: of the slice.
        command: that trains.
        options: of run/tpu.sh, each for the verbs that take it.

    Raises:
        ValueError: an option that none of them takes.
    """
    known = sorted({*COMMON, *itertools.chain(*VERBS.values())})
    for option in options:
        if _flag(option) not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"run/tpu.sh takes no {option} to create, set up or launch; {hint}")
    found = [
        (
            *(*SCRIPT, verb, f"--name={name}"),
            *(option for option in options if _flag(option) in (*COMMON, *own)),
        )
        for verb, own in VERBS.items()
    ]
    return [*found[:-1], (*found[-1], "--", *command)]


def launch_all(jobs: Mapping[str, Commands], *, say: Callable[[str], None]) -> dict[str, str]:
    """Start jobs one after the other; one that fails does not stop the others.

    Args:
        jobs: commands by the name of the slice, in order; each needs the one before.
        say: hears what is done, and of what was left behind.

    Returns:
        The command that failed by slice.
    """
    failed = {}
    for name, commands in jobs.items():
        for number, command in enumerate(commands):
            say(shlex.join(command))
            code = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
            if code:
                failed[name] = shlex.join(command)
                say(f"{name}: exit status {code}. {_left_behind(name, number, command)}")
                break
    return failed


def _flag(option: str) -> str:
    return option.partition("=")[0]


def _left_behind(name: str, number: int, command: Sequence[str]) -> str:
    """Say what may cost money now, and how to end that."""
    options = [one for one in command[len(SCRIPT) + 1 :] if _flag(one) in COMMON]
    delete = shlex.join([*SCRIPT, "delete", f"--name={name}", *options])
    exists = "may exist" if number == 0 else "exists"
    return f"{name} {exists} and costs money until: {delete}"
