"""Checkpoints: written whole or not at all, the last few and the best kept, restored to any mesh.

A checkpoint is a folder `<step>` with `params` (dotted name -> array, readable alone), `state` (the
optimizer's), `meta` (JSON) and, where it follows the policy, `reference` (as `params`).
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import PolicyCheckpointInfo, PreservationContext

from r1re_jax.files import absolute, place
from r1re_jax.policy_source import is_whole
from r1re_jax.sharding import on_host as in_host_memory
from r1re_jax.train.settings import Phase
from r1re_jax.train.state import Layout, Params, TrainState, abstract_state

FOLDER = "checkpoints"
REFERENCE = "reference"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Meta:
    """What a checkpoint says beside its arrays.

    Attributes:
        step: steps completed.
        phase: of the last completed step; whose optimizer the state is of.
        configuration: hash of all keys that are not safe.
        versions: of the libraries that wrote it.
        scores: step -> value of `checkpoint.best`, of all evaluations so far.
        pending: figures of this step that are not in metrics.jsonl yet, because the run was stopped
            within the evaluation that follows the step; None if all is done.
    """

    step: int
    phase: Phase
    configuration: str
    versions: Mapping[str, str]
    scores: Mapping[int, float]
    pending: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return dataclasses.asdict(self) | {
            "phase": self.phase.value,
            "scores": {str(step): score for step, score in self.scores.items()},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Meta":
        """Return what `to_json` wrote."""
        scores = {int(step): score for step, score in values["scores"].items()}
        return cls(**{**values, "phase": Phase(values["phase"]), "scores": scores})


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the latest ones, and the best of those that have a score.

    Attributes:
        keep: how many of the latest.
        scores: step -> score; grows while the run goes on.
    """

    keep: int
    scores: dict[int, float]

    def should_preserve(
        self, checkpoints: Sequence[PolicyCheckpointInfo], *, context: PreservationContext
    ) -> Sequence[bool]:
        """Orbax's question: which of these (in order of steps) stay?"""
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = best_step(steps, self.scores)
        return [step in steps[-self.keep :] or step == best for step in steps]


def best_step(steps: Sequence[int], scores: Mapping[int, float]) -> int | None:
    """Return the step of the highest score, the earliest of equals; None without scores."""
    scored = [step for step in steps if step in scores]
    return max(scored, key=lambda step: (scores[step], -step), default=None)


class Checkpoints:
    """The checkpoints of a work directory. Close it: saves go on in the background."""

    def __init__(self, workdir: str | os.PathLike, *, keep: int, scores: dict[int, float]):
        """Open or make the folder; remains of interrupted saves are removed.

        Args:
            workdir: of the run.
            keep: how many of the latest stay.
            scores: step -> score, shared with the caller who adds to it before saving.
        """
        self._manager = ocp.CheckpointManager(
            absolute(place(workdir) / FOLDER),
            item_names=("params", "state", "meta", "reference"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=Retention(keep, scores), cleanup_tmp_directories=True
            ),
        )
        self._saved = set(self._manager.all_steps())

    @property
    def steps(self) -> list[int]:
        """Steps that are saved, ascending."""
        return sorted(self._manager.all_steps())

    def holds(self, step: int) -> bool:
        """Whether the step is saved, or is being saved."""
        return step in self._saved

    def meta(self, step: int) -> Meta:
        """Read what a checkpoint says, without its arrays."""
        found = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        return Meta.from_json(found.meta)

    def save(self, state: TrainState, meta: Meta) -> None:
        """Begin to save; returns when the arrays may be donated, not when they are on disk."""
        rest = {"step": state.step, **_named(state.opt_state)}
        moving = {}
        if state.reference is not None:
            moving["reference"] = ocp.args.StandardSave(state.reference)
        self._saved.add(meta.step)
        self._manager.save(
            meta.step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                state=ocp.args.StandardSave(rest),
                meta=ocp.args.JsonSave(meta.to_json()),
                **moving,
            ),
            force=True,
        )

    def restore(
        self,
        step: int,
        *,
        layout: Layout,
        optimizer: optax.GradientTransformation,
        reference: bool = False,
    ) -> TrainState:
        """Read a checkpoint to the shardings of this run's mesh, whatever mesh wrote it.

        Args:
            step: of the checkpoint.
            layout: of the model.
            optimizer: of the phase that wrote it.
            reference: whether it holds a reference that follows the policy.
        """
        target = abstract_state(optimizer, layout)
        names = _named(target.opt_state)
        moving = {"reference": ocp.args.StandardRestore(target.params)} if reference else {}
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(target.params),
                state=ocp.args.StandardRestore({"step": target.step, **names}),
                **moving,
            ),
        )
        leaves = [found.state[name] for name in names]
        opt_state = jax.tree.unflatten(jax.tree.structure(target.opt_state), leaves)
        return TrainState(
            step=found.state["step"],
            params=found.params,
            opt_state=opt_state,
            reference=found.reference if reference else None,
        )

    def wait(self) -> None:
        """Return when everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish saving and release the folder."""
        self._manager.close()


def keep_reference(workdir: str | os.PathLike, params: Params, *, step: int) -> None:
    """Freeze the policy of a step as the reference, unless that step's is kept already."""
    folder = _reference_folder(workdir, step)
    if is_whole(folder):
        return
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, params, force=True)  # a bucket may hold a part of it


def load_reference(
    workdir: str | os.PathLike,
    layout: Layout,
    *,
    step: int,
    dtype: jnp.dtype = jnp.float32,
    on_host: bool = False,
) -> Params:
    """Read the reference of a step, held in `dtype`: it is only read, by a forward in that type.

    With `on_host` it stays in the memory of the host.

    Raises:
        FileNotFoundError: it is not there.
    """
    folder = _reference_folder(workdir, step)
    if not is_whole(folder):
        raise FileNotFoundError(
            f"{folder} is missing: the reference policy of this run, written when GRPO began. Put"
            " it back, or start in a new work directory"
        )
    with ocp.StandardCheckpointer() as checkpointer:
        shapes = {
            name: jax.ShapeDtypeStruct(
                shape.shape,
                dtype,
                sharding=in_host_memory(shape.sharding) if on_host else shape.sharding,
            )
            for name, shape in layout.shapes.items()
        }
        return checkpointer.restore(folder, shapes)


def _reference_folder(workdir: str | os.PathLike, step: int) -> epath.Path:
    return absolute(place(workdir) / REFERENCE / str(step))


def _named(opt_state: optax.OptState) -> dict[str, Any]:
    """Return an optimizer state's leaves by dotted path: a format that outlives Python types."""
    leaves = jax.tree_util.tree_leaves_with_path(opt_state)
    names = (jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves)
    return {f"opt.{name}": leaf for name, (_, leaf) in zip(names, leaves, strict=True)}
