"""Run what a config's sweep() yields, each member a run of its own, and put them into one table.

python -m run.sweep --config=configs/sweeps/F.py --workdir=W [--jobs=2] [--config.key=value ...]

Each member trains in W/<member>, with what it says in W/<member>/train.log; W/sweep.csv, W/sweep.md
and W/sweep.png compare them. The same command goes on where it was interrupted and repeats nothing
that is done. One that fails does not stop the others; the exit status is 1 then. SIGTERM and SIGINT
are passed on: members save, and the status is 143 or 130; a second signal kills.

--launch=tpu starts a TPU job for each member by run/tpu.sh instead, --launch=none only makes the
table of what is there; --dry_run prints the commands and runs none.
"""

import dataclasses
import pathlib
import re
import shlex
import sys
from collections.abc import Mapping, Sequence

from absl import app, flags

from r1re_jax.launch import sweep_folder, sweep_tpu
from r1re_jax.launch.members import Job, run_jobs
from r1re_jax.launch.sweep import Sweep, SweepError, expand, flags_of, member_settings
from r1re_jax.report.sweep import DONE, Entry
from r1re_jax.report.sweep_files import write_sweep
from r1re_jax.report.sweep_lines import SweepLines
from r1re_jax.train.settings import Settings
from r1re_jax.train.signals import Stopped, StopSignals
from run.members import read_recipe, read_sweep
from run.recipe import define_config, parse

CONFIG = define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the sweep", required=True)
JOBS = flags.DEFINE_integer("jobs", 1, "members that run at a time", lower_bound=1)
SCORE = flags.DEFINE_string(
    "score", "", "SET/METRIC that members are judged by; empty for Avg@k of the first set"
)
LAUNCH = flags.DEFINE_enum("launch", "local", ["local", "tpu", "none"], "where members run")
DRY_RUN = flags.DEFINE_boolean("dry_run", False, "print the commands and run none")
NAME = flags.DEFINE_string("name", "sweep", "what the names of TPU slices begin with")
TPU = flags.DEFINE_multi_string("tpu", [], "option of run/tpu.sh, as --tpu=--zone=us-east5-a")
flags.DEFINE_alias("dry-run", "dry_run")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be run: settings and command of every member, by name."""

    sweep: Sweep
    settings: Mapping[str, Settings]
    commands: Mapping[str, Sequence[str]]

    def entry(self, name: str, folder: pathlib.Path, codes: Mapping[str, int]) -> Entry:
        """What the table says of a member; `codes` are exit statuses of those that failed."""
        workdir, settings = folder / name, self.settings[name]
        state = "unfinished" if sweep_folder.steps_done(workdir) else "not begun"
        if codes.get(name):
            state = f"failed ({codes[name]})"
        if sweep_folder.is_done(workdir, settings):
            state = DONE
        (overrides,) = (one.overrides for one in self.sweep.members if one.name == name)
        return Entry(
            name=name, overrides=overrides, workdir=workdir, state=state, steps=settings.steps
        )


def main(argv: list[str]) -> None:
    """Run the sweep as the flags say."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    try:
        plan = _plan(flags.FLAGS["config"].config_filename, _given(sys.argv[1:]))
        status = _on_tpus(plan) if LAUNCH.value == "tpu" else _here(plan)
    except (ValueError, OSError, sweep_folder.LockedError) as error:
        sys.exit(f"run.sweep: {error}")
    sys.exit(status)


def _plan(path: str, given: Sequence[str]) -> Plan:
    """Expand the sweep and check all of its members."""
    sweep = expand(read_sweep(path))
    swept = {key for member in sweep.members for key in member.overrides}
    for flag in given:
        key = flag.partition("=")[0].removeprefix("--config.")
        if key in swept:
            raise SweepError(f"{flag}: the sweep sets {key} itself")
    settings = member_settings(
        sweep.members, lambda member: read_recipe(path, given, member.overrides)
    )
    for one in settings.values():
        of, _, metric = SCORE.value.partition("/")
        if SCORE.value and not (of in one.data.eval and metric in one.eval_metrics):
            raise SweepError(
                f"--score={SCORE.value}: expected SET/METRIC, one of the sets"
                f" {', '.join(sorted(one.data.eval))} and one of {', '.join(one.eval_metrics)}"
            )
    commands = {
        member.name: (
            *("-m", "run.train", f"--config={path}"),
            f"--workdir={WORKDIR.value.rstrip('/')}/{member.name}",
            *given,
            *flags_of(member.overrides),
        )
        for member in sweep.members
    }
    return Plan(sweep=sweep, settings=settings, commands=commands)


def _given(arguments: Sequence[str]) -> list[str]:
    """The overrides of the command line, which all members get."""
    found = [re.sub("^--?", "--", one) for one in arguments if re.match(r"--?(no)?config\.", one)]
    for flag in found:
        if "=" not in flag:
            raise SweepError(f"{flag}: write --config.key=value, which every member is given")
    return found


def _here(plan: Plan) -> int:
    """Run members on this machine, or only collect what they did; returns the exit status."""
    if _remote():
        raise SweepError(f"{WORKDIR.value} is no local folder: copy it here and give --launch=none")
    folder = pathlib.Path(WORKDIR.value)
    todo = _unfinished(plan, folder)
    if DRY_RUN.value:
        print("\n".join(shlex.join(["python", *plan.commands[name]]) for name in todo))
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    lines = SweepLines(sys.stderr, total=len(plan.commands))
    with StopSignals() as signals:

        def wait() -> None:
            signals.poll()
            lines.wait("members of a sweep that was killed still save")

        try:
            with sweep_folder.locked(folder, wait=wait) as shared:
                codes = _run(plan, folder, signals=signals, lines=lines, shared=shared)
            signals.poll()
        except Stopped as stopped:
            again = shlex.join([sys.executable, "-m", "run.sweep", *sys.argv[1:]])
            print(f"{stopped}: stopped. Resume with: {again}", file=sys.stderr)
            return stopped.exit_code
    print((folder / "sweep.md").read_text("utf-8"), end="")
    failed = [name for name, code in codes.items() if code]
    if failed:
        found = f"{len(failed)} of {len(plan.commands)} failed: {', '.join(failed)}"
        print(found, file=sys.stderr)
    return 1 if failed else 0


def _run(
    plan: Plan, folder: pathlib.Path, *, signals: StopSignals, lines: SweepLines, shared: int
) -> dict[str, int]:
    """Run what is unfinished, bringing the table up to date; returns exit statuses by name."""
    todo, codes = _unfinished(plan, folder), {}
    sweep_folder.write_record(folder, plan.sweep.members)
    if LAUNCH.value == "local":
        lines.begin(todo=len(todo))
    else:
        todo = []
    endings = run_jobs(
        _jobs(plan, folder, todo),
        at_once=JOBS.value,
        asked=lambda: signals.requested,
        watcher=lines,
        keep_open=(shared,),
    )
    for name, code in endings:
        codes[name] = code
        _collect(plan, folder, {} if signals.requested else codes)
    _collect(plan, folder, {} if signals.requested else codes)
    return codes


def _remote() -> bool:
    return re.match(r"\w+://", WORKDIR.value) is not None


def _unfinished(plan: Plan, folder: pathlib.Path) -> list[str]:
    """Names of the members that have something left to do; refuses a folder of another sweep."""
    sweep_folder.check_record(folder, plan.sweep.members)
    sweep_folder.check_members(folder, plan.settings)
    return [
        name
        for name, settings in plan.settings.items()
        if not sweep_folder.is_done(folder / name, settings)
    ]


def _jobs(plan: Plan, folder: pathlib.Path, names: Sequence[str]) -> list[Job]:
    return [
        Job(
            name=name,
            command=(sys.executable, *plan.commands[name]),
            log=folder / name / "train.log",
        )
        for name in names
    ]


def _collect(plan: Plan, folder: pathlib.Path, codes: Mapping[str, int]) -> None:
    """Write table and picture of what is there."""
    entries = [plan.entry(member.name, folder, codes) for member in plan.sweep.members]
    write_sweep(
        folder, entries, axes=plan.sweep.axes, title=f"Sweep {folder.name}", score=SCORE.value
    )


def _on_tpus(plan: Plan) -> int:
    """Start a TPU job for each member, or print how; returns the exit status.

    What is done is left out where the folder can be read here; in a bucket run.train finds it done.
    """
    todo = plan.commands if _remote() else _unfinished(plan, pathlib.Path(WORKDIR.value))
    jobs = {}
    for member in plan.sweep.members:
        if member.name not in todo:
            continue
        name = sweep_tpu.slice_name(NAME.value, member)
        command = ("python", *plan.commands[member.name])
        jobs[name] = sweep_tpu.tpu_commands(name, command, options=TPU.value)
    if DRY_RUN.value:
        for commands in jobs.values():
            print("\n".join(shlex.join(command) for command in commands))
        return 0
    failed = sweep_tpu.launch_all(jobs, say=lambda text: print(text, file=sys.stderr, flush=True))
    print(f"{len(jobs) - len(failed)} of {len(jobs)} jobs were launched", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
