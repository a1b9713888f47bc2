"""Train a policy: a supervised warm start if the config asks for one, then GRPO.

python -m run.train --config=configs/F.py --workdir=W [--config.grpo.steps=200 ...]

W, a folder or gs://BUCKET/NAME, gets config.json, metrics.jsonl, completions/, eval/ and
checkpoints/. The same command goes on where the run was interrupted. SIGTERM and SIGINT save and
end with 143 and 130; a second kills. --profile=3 traces three steps of each phase into W/profile,
or into a folder of this machine where W is in a bucket.
"""

import contextlib
import pathlib
import shlex
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from absl import app, flags, logging
from etils import epath

from r1re_jax import hosts
from r1re_jax.files import PlaceError, is_remote, place
from r1re_jax.report.progress import open_progress
from r1re_jax.report.trackers import check_trackers, open_trackers
from r1re_jax.report.writers import JsonlWriter
from r1re_jax.train.config import read_settings, resolved
from r1re_jax.train.hooks import Hooks, Writer
from r1re_jax.train.loop import Outcome, run_training
from r1re_jax.train.parity import ParityError
from r1re_jax.train.profile import StepProfiler
from r1re_jax.train.settings import Settings
from r1re_jax.train.signals import Stopped, StopSignals
from r1re_jax.train.update import NonFiniteError, SamplerDriftError
from run.programs import keep_programs
from run.recipe import define_config, parse

CONFIG = define_config()
WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder of the run, new or to go on in", required=True
)
PROFILE = flags.DEFINE_integer(
    "profile",
    0,
    "steps of each phase to trace, from its second on, into WORKDIR/profile (of a bucket's: into a"
    " folder of this machine, which is printed)",
    lower_bound=0,
)


def train(
    config: Mapping[str, Any], workdir: epath.Path, *, again: str, profile: int = 0
) -> Settings:
    """Train until the last step; a signal or a problem ends the process.

    Args:
        config: as a recipe returns it.
        workdir: folder of the run.
        again: command that goes on after a signal.
        profile: steps of each phase to trace.
    """
    keep_programs()
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every save in a dozen lines
    profiler = StepProfiler(_profile_folder(workdir, profile), steps=profile)
    with StopSignals() as signals, contextlib.closing(open_progress(sys.stderr)) as progress:

        def writers(resume_step: int) -> tuple[Writer, ...]:
            if not hosts.is_first():  # process 0 writes; each says in its own log that it works
                return (progress,)
            numbers = JsonlWriter(workdir / "metrics.jsonl", resume_step=resume_step)
            shown = open_trackers(
                settings.log, workdir, config=resolved(settings), resume_step=resume_step
            )
            return numbers, *shown, progress

        def poll() -> None:
            number = hosts.agreed(signals.requested or 0)
            if number:
                raise Stopped(number)

        hooks = Hooks(
            poll=poll,
            writers=writers,
            progress=progress,
            before_step=profiler.before_step,
        )
        try:
            settings = read_settings(config)
            check_trackers(settings.log)
            with contextlib.closing(profiler):
                outcome = run_training(settings, workdir, hooks=hooks)
        except (ValueError, OSError, NonFiniteError, ParityError, SamplerDriftError) as error:
            sys.exit(f"run.train: {error}")
    if profile:
        print(_traced(profiler))
    _farewell(outcome, workdir, again)
    return settings


def main(argv: list[str]) -> None:
    """Train as the flags say."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    try:
        hosts.join()
        workdir = place(WORKDIR.value)
    except (hosts.HostsError, PlaceError) as error:
        sys.exit(f"run.train: {error}")
    again = shlex.join([sys.executable, "-m", "run.train", *sys.argv[1:]])
    train(CONFIG.value, workdir, again=again, profile=PROFILE.value)


def _profile_folder(workdir: epath.Path, steps: int) -> pathlib.Path:
    """Where traces go: XLA's profiler writes to this machine alone."""
    if not steps or not is_remote(workdir):
        return pathlib.Path(workdir) / "profile"
    return pathlib.Path(tempfile.mkdtemp(prefix="r1re-profile-"))


def _traced(profiler: StepProfiler) -> str:
    if not profiler.traces:
        return "nothing was traced: no phase had a second step, and its first one compiles"
    look = f"pip install xprof; xprof server --logdir={shlex.quote(str(profiler.folder))}"
    return f"traced {', '.join(profiler.traces)}. To look at it: {look}"


def _farewell(outcome: Outcome, workdir: epath.Path, again: str) -> None:
    done = f"step {outcome.step} of {outcome.steps}"
    if outcome.stopped is None:
        print(f"finished at {done}, in {workdir}")
        return
    print(f"{outcome.stopped}: stopped after {done}. Resume with: {again}", file=sys.stderr)
    sys.exit(outcome.stopped.exit_code)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
