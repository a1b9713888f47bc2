"""Cases for both libraries, our answers to them, and TRL's from a process of its own.

R1RE_TRL_PYTHON=… python -m tests.parity.trl_cases      prints the table of differences
"""

import configparser
import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import tempfile
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from r1re_jax.rl.advantages import group_advantages
from r1re_jax.rl.losses import token_weights
from r1re_jax.rl.objective import LossSettings, objective

ROOT = pathlib.Path(__file__).resolve().parents[2]
PYTHON = "R1RE_TRL_PYTHON"
DTYPES = ("float32", "float64")  # that TRL computes in; we always compute in fp32
BETA = 0.04
GROUP = 4  # of all loss cases; TRL asks for it, and does not read it in the loss

# Our loss kind and TRL's settings for it.
LOSSES = {
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "token_mean": {"loss_type": "dapo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo"},
}
KLS = {
    "": {"beta": 0.0},
    "k3": {"beta": BETA, "use_bias_correction_kl": False},
    "k3_plus": {"beta": BETA, "use_bias_correction_kl": True},
}
# TRL weights the KL term of a sequence ratio with that ratio: no kind of ours, see test_trl.py.
VARIANTS = [pair for pair in itertools.product(LOSSES, KLS) if pair != ("gspo", "k3_plus")]
ADVANTAGES = {
    "grpo": ("grpo", {"scale_rewards": "group"}),
    "batch": ("grpo", {"scale_rewards": "batch"}),
    "mean_only": ("grpo", {"scale_rewards": "none"}),
    "rloo": ("rloo", {"normalize_advantages": False}),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One batch of rows [B, C] under one variant, in `parts` micro-batches."""

    kind: str
    kl: str = ""
    low: float
    high: float
    parts: int = 1
    arrays: dict[str, np.ndarray]

    def trl(self, dtype: str) -> dict:
        """Return what `trl_side.py` is asked."""
        cispo = self.kind == "cispo"  # there epsilon_high is the bound itself
        settings = {
            **LOSSES[self.kind],
            **KLS[self.kl],
            "epsilon": self.low,
            "epsilon_high": 1 + self.high if cispo else self.high,
            "max_completion_length": self.arrays["logp"].shape[1],  # what dr_grpo divides by
        }
        return dict(what="loss", dtype=dtype, parts=self.parts, group=GROUP, settings=settings)


def batch(seed: int, rows: int, limit: int, *, on_policy: bool = False) -> dict[str, np.ndarray]:
    """Ragged rows of fp32, one empty, whose ratios lie on both sides of every clip."""
    rng = np.random.default_rng(seed)
    logp = -rng.exponential(1.5, (rows, limit))
    length = rng.integers(1, limit + 1, rows)
    length[rng.integers(rows)], length[rng.integers(rows)] = 0, limit
    arrays = {
        "logp": logp,
        "old": logp if on_policy else logp + rng.normal(scale=0.4, size=logp.shape),
        "ref": logp + rng.normal(scale=0.4, size=logp.shape),
        "advantage": rng.normal(size=rows),
    }
    arrays = {name: x.astype(np.float32) for name, x in arrays.items()}
    return arrays | {"mask": np.arange(limit) < length[:, None]}


def loss_cases() -> dict[tuple[str, str], list[Case]]:
    """Return all cases by variant."""
    batches = [batch(0, 8, 5), batch(1, 8, 5, on_policy=True), batch(2, 16, 64)]
    choices = list(itertools.product(batches, [(0.2, 0.2), (0.1, 0.4)], [1, 2]))
    return {
        (kind, kl): [
            # TRL's cispo has no lower bound, as with clip_low = 1: ratios are above 0.
            Case(
                kind=kind,
                kl=kl,
                low=1.0 if kind == "cispo" else low,
                high=high,
                parts=parts,
                arrays=arrays,
            )
            for arrays, (low, high), parts in choices
        ]
        for kind, kl in VARIANTS
    }


def ours(case: Case) -> tuple[float, np.ndarray]:
    """Return loss and gradient, summed over micro-batches as training sums them."""
    arrays, rows = case.arrays, len(case.arrays["mask"])
    length = arrays["logp"].shape[1] if case.kind == "dr_grpo" else None
    settings = LossSettings(
        kind=case.kind,
        clip_low=case.low,
        clip_high=case.high,
        length=length,
        kl_coefficient=BETA if case.kl else 0.0,
        kl_kind=case.kl or "k3",
    )
    pieces = np.split(np.arange(rows), case.parts)
    weights = lambda mask: np.asarray(token_weights(mask, kind=case.kind, length=length))  # noqa: E731
    if case.kind == "bnpo":  # by its definition the mean of the micro-batches' token means
        weight = np.concatenate([weights(arrays["mask"][piece]) / case.parts for piece in pieces])
    else:
        weight = weights(arrays["mask"])

    def loss(logp: jax.Array, piece: np.ndarray) -> jax.Array:
        value, _ = objective(
            logp,
            old_logp_PGC=arrays["old"][piece],
            ref_logp_PGC=arrays["ref"][piece],
            advantage_PG=arrays["advantage"][piece],
            mask_PGC=arrays["mask"][piece],
            weight_PGC=weight[piece],
            settings=settings,
        )
        return value

    answers = [
        jax.value_and_grad(loss)(jnp.asarray(arrays["logp"][piece]), piece) for piece in pieces
    ]
    return sum(float(v) for v, _ in answers), np.concatenate([np.asarray(g) for _, g in answers])


def reward_cases() -> list[np.ndarray]:
    """Rewards [P, G] of the task and others; one group without spread that fp32 holds exactly."""
    rng = np.random.default_rng(0)
    task = rng.choice([3.0, -0.5, -3.0], (4, 8))
    task[0] = 3.0
    return [task, *(rng.normal(size=(3, group)).astype(np.float32) for group in (2, 4, 16))]


def ask_trl(
    cases: dict[str, dict], arrays: dict[str, dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Run `trl_side.py` under the interpreter that R1RE_TRL_PYTHON names."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = pathlib.Path(folder, "in.npz"), pathlib.Path(folder, "out.npz")
        flat = {f"{name}/{key}": x for name, xs in arrays.items() for key, x in xs.items()}
        np.savez(source, allow_pickle=False, cases=np.array(json.dumps(cases)), **flat)
        script = ROOT / "tests" / "parity" / "trl_side.py"
        command = [os.environ[PYTHON], "-W", "ignore", str(script), str(source), str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"trl_side.py ended with {done.returncode}:\n{done.stderr[-4000:]}")
        with np.load(target, allow_pickle=False) as answers:
            return dict(answers)


def missing_trl() -> str | None:
    """Say why TRL cannot be asked, or None if it can."""
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / "setup.cfg")
    wanted = settings["options.extras_require"]["peers"].strip().removeprefix("trl==")
    python = os.environ.get(PYTHON)
    if not python:
        return f"{PYTHON} names no interpreter that has trl {wanted} (see CONTRIBUTING.md)"
    code = "import importlib.metadata as m; print(m.version('trl'))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{PYTHON} is no interpreter: {error}"
    found = done.stdout.strip() or "none"
    return None if found == wanted else f"{PYTHON} has trl {found}; the parity is with {wanted}"


def ask_all(more: dict[str, dict], arrays: dict[str, dict]) -> dict[str, np.ndarray]:
    """Ask all loss and advantage cases and, in the same process, `more`."""
    cases, arrays = dict(more), dict(arrays)
    for (kind, kl), group in loss_cases().items():
        for (i, case), dtype in itertools.product(enumerate(group), DTYPES):
            name = f"{kind}+{kl}+{i}+{dtype}"
            cases[name], arrays[name] = case.trl(dtype), case.arrays
    for (kind, (trainer, settings)), (i, reward) in itertools.product(
        ADVANTAGES.items(), enumerate(reward_cases())
    ):
        name = f"advantage+{kind}+{i}"
        cases[name] = dict(what="advantage", trainer=trainer, settings=settings)
        arrays[name] = {"reward": reward}
    return ask_trl(cases, arrays)


def loss_differences(
    answers: dict[str, np.ndarray], kind: str, kl: str
) -> Iterable[tuple[str, float, float]]:
    """Yield, by TRL's dtype, |Δ loss| and max |Δ gradient|, in units of the largest gradient."""
    for i, case in enumerate(loss_cases()[kind, kl]):
        value, gradient = ours(case)
        for dtype in DTYPES:
            name = f"{kind}+{kl}+{i}+{dtype}"
            theirs = answers[f"{name}/gradient"]
            scale = np.abs(theirs).max()
            worst = np.abs(gradient - theirs).max() / scale
            yield dtype, abs(value - float(answers[f"{name}/loss"])), float(worst)


def advantage_difference(answers: dict[str, np.ndarray], kind: str) -> float:
    """Return max |Δ advantage| over all reward cases."""
    return max(
        float(np.abs(np.asarray(group_advantages(reward, kind=kind)) - answers[name]).max())
        for i, reward in enumerate(reward_cases())
        for name in [f"advantage+{kind}+{i}/advantage"]
    )


def table(answers: dict[str, np.ndarray]) -> Iterable[str]:
    """Yield the rows of the tables in docs/results/peer_parity."""
    for kind, kl in VARIANTS:
        found = list(loss_differences(answers, kind, kl))
        cells = [kind, kl or "none", str(len(found) // len(DTYPES))]
        for dtype in DTYPES:
            cells += [f"{max(row[i] for row in found if row[0] == dtype):.1e}" for i in (1, 2)]
        yield f"| {' | '.join(cells)} |"
    for kind in ADVANTAGES:
        yield f"| {kind} | {advantage_difference(answers, kind):.1e} |"


if __name__ == "__main__":
    jax.config.update("jax_numpy_rank_promotion", "raise")
    reason = missing_trl()
    if reason:
        raise SystemExit(reason)
    answered = ask_all({}, {})
    print(str(answered["versions"]))
    print("\n".join(table(answered)))
