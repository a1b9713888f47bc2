"""What a config changes, looked at in ways that need no compilation.

Each look takes settings and returns something to compare: which lessons are given, which blocks an
update gets, the text of a lowered program, or what a run does around its steps.
"""

import dataclasses
import hashlib
import json
import pathlib
import sys
import tempfile
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from jax.sharding import Mesh

from r1re_jax.launch.holdings import held
from r1re_jax.model.tree import Level
from r1re_jax.report.trackers import open_trackers
from r1re_jax.rollout import decode
from r1re_jax.rollout.sampling import SamplingSettings
from r1re_jax.task.prompts import PromptEncoder
from r1re_jax.task.relations import parse_guide
from r1re_jax.task.tasks import TaskKind
from r1re_jax.task.triplets.examples import Entity, Triplet, TripletExample
from r1re_jax.train import grpo as grpo_module
from r1re_jax.train import loop as loop_module
from r1re_jax.train import parity as parity_module
from r1re_jax.train import sft as sft_module
from r1re_jax.train.batch import grpo_blocks
from r1re_jax.train.data import open_mixture, open_sets, phase_source
from r1re_jax.train.grpo import GRPO, GRPOBlock
from r1re_jax.train.reference import copied
from r1re_jax.train.settings import Phase, Settings
from r1re_jax.train.sft import SFTBlock
from r1re_jax.train.start import abstract_model, load_start, run_mesh, run_sampler
from r1re_jax.train.state import (
    Layout,
    TrainState,
    abstract_state,
    model_layout,
    model_state,
    place_params,
)
from r1re_jax.train.update import (
    Gradient,
    Programs,
    SamplerDriftError,
    StepResult,
    compute_gradient,
)
from tests.train import canned, world

STEPS = 4
EXTRACTION = """# Papers

## Entities

- **Method**: a way to do something.
- **Task**: what is to be done.

## Relations

- **Used-For(X = means, Y = end)**: X serves Y.
"""


def sets(settings: Settings) -> Any:
    """The sets to evaluate on."""
    return [
        (one.guide.sha256, [example.question for example in one.examples])
        for one in open_sets(settings.data.eval, task=settings.task_rules).values()
    ]


def verdicts(settings: Settings) -> Any:
    """What completions of an extraction earn: right, of a wrong triplet, of no sense."""
    if settings.task is not TaskKind.TRIPLETS:
        return settings.reward
    task, guide = settings.task_rules, parse_guide(EXTRACTION, source="papers.md")
    ends = (Entity("CRF", 0, 3, "Method"), Entity("NER", 10, 13, "Task"))
    example = TripletExample("p1", "CRF helps NER.", ends, (Triplet(0, 1, "Used-For"),))
    right = task.completion(example)
    texts = (right, right.replace('"head": "CRF"', '"head": "NER"'), right + "!")
    return [task.judge(text, example, task.schema(guide)).reward for text in texts]


def digest(value: Any) -> str:
    """A hash of arrays, tuples, dicts and whatever has a repr."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(value):
        found.update(jax.tree_util.keystr(path).encode())
        found.update(leaf.encode() if isinstance(leaf, str) else np.asarray(leaf).tobytes())
    return found.hexdigest()


def _encoder(settings: Settings) -> PromptEncoder:
    mesh = world.one_device_mesh()
    return load_start(settings, mesh=mesh, guides=(), fresh=False).policy.encoder


def sft_steps(settings: Settings) -> Any:
    """Blocks and figures of the first steps of the warm start, in order."""
    seen: list[str] = []
    layout, params = world.layout_on(world.one_device_mesh())

    def gradient(params: Any, frozen: Any, block: SFTBlock) -> tuple:
        seen.append(digest(block))
        sums = {"tokens": np.float32(1), "entropy": np.float32(0)}
        return {"x": jnp.zeros(())}, (np.float32(0), sums)

    add, norm = lambda one, other: one, lambda grads: 1.0  # noqa: E731
    phase = sft_module.make_sft(
        settings.sft,
        limits=settings.training_limits,
        encoder=_encoder(settings),
        source=phase_source(settings, open_mixture(settings.data, seed=settings.seed), Phase.SFT),
        layout=layout,
    )
    keep = lambda state, grads: state  # noqa: E731
    programs = Programs(frozen={}, gradient=gradient, add=add, norm=norm, apply=keep)
    phase = dataclasses.replace(phase, programs=programs)
    state = TrainState(step=0, params=params, opt_state=())
    for number in range(1, STEPS + 1):
        phase.step(state, number, tick=lambda note: None)
    return seen


def grpo_steps(settings: Settings) -> Any:
    """What the first steps of the reinforcement ask for, are given and report."""
    seen, heard = canned.Seen(), []
    source = phase_source(settings, open_mixture(settings.data, seed=settings.seed), Phase.GRPO)
    with canned.canned(seen):
        phase, state = canned.phase_of(
            settings.grpo,
            seen,
            limits=settings.training_limits,
            encoder=_encoder(settings),
            source=source,
            seed=settings.seed,
            reference={"embed": jnp.zeros((1, 1))},
        )

        def score(params: dict, tree: Any) -> np.ndarray:
            heard.append(f"scored {float(params['embed'][0, 0]):.6f}")
            return np.zeros(tree.completion.tokens.shape, np.float32)

        phase = dataclasses.replace(phase, score=score)
        if settings.grpo.reference.every:
            state = dataclasses.replace(state, reference=copied(state.params))
        try:
            for number in range(1, STEPS + 1):
                result = phase.step(state, number, tick=heard.append)
                state = result.state
                figures = {k: v for k, v in result.metrics.items() if not k.startswith(world.TIMED)}
                heard.append(json.dumps([figures, result.completions], sort_keys=True))
        except SamplerDriftError as error:
            heard.append(str(error))
    for asked in seen.drawn:
        names = "settings", "limit", "chunk", "compaction", "stop_ids"
        names += "smallest_batch", "smallest_cache"
        heard.append(repr([asked[name] for name in names]))
        heard.append(digest(jax.random.key_data(asked["keys"])))
    return heard, [digest(block) for block in seen.blocks]


def grpo_phase(settings: Settings, mesh: Mesh) -> tuple[GRPO, GRPOBlock]:
    """A phase of the config's model, and a block for it."""
    layout = model_layout(abstract_model(settings), mesh)
    of = settings.grpo
    phase = grpo_module.make_grpo(
        of,
        limits=settings.training_limits,
        encoder=None,
        source=None,
        seed=settings.seed,
        first=0,
        layout=layout,
        reference={},
    )
    return phase, block_of(settings, scored=of.kl_coefficient > 0)


def block_of(settings: Settings, *, scored: bool) -> GRPOBlock:
    """A step's block of canned completions."""
    seen = canned.Seen()
    with canned.canned(seen):
        whole = dataclasses.replace(
            settings.grpo,
            micro_batch=0,
            micro_group=0,
            inner_iterations=1,
            refill=0,
            kl_coefficient=0.0,
        )
        whole = dataclasses.replace(whole, reference=type(whole.reference)())
        phase, state = canned.phase_of(whole, seen, limits=settings.training_limits)
        phase.step(state, 1, tick=lambda note: None)
    (block,) = seen.blocks
    reference = block.sampler_logp_NPGC - np.float32(0.1) if scored else None
    return dataclasses.replace(block, ref_logp_NPGC=reference)


def grpo_gradient(settings: Settings, mesh: Mesh) -> Gradient:
    """The gradient of a step, computed, in the config's micro-batches and on a mesh."""
    phase, whole = grpo_phase(settings, mesh)
    cut = grpo_blocks(settings.grpo)
    parts = [
        dataclasses.replace(
            jax.tree.map(part.of, dataclasses.replace(whole, tree=None)),
            tree=part.of_tree(whole.tree),
        )
        for part in cut
    ]
    return _gradient(phase.programs, parts, phase.layout)


def sft_gradient(settings: Settings, mesh: Mesh) -> Gradient:
    """The same of the warm start."""
    data = open_mixture(settings.data, seed=settings.seed)
    layout = model_layout(abstract_model(settings), mesh)
    phase = sft_module.make_sft(
        settings.sft,
        limits=settings.training_limits,
        encoder=_encoder(settings),
        source=phase_source(settings, data, Phase.SFT),
        layout=layout,
    )
    tree = sft_module.sft_tree(
        phase.source.lessons(0), phase.encoder, phase.limits, taught=settings.sft.taught
    )
    return _gradient(phase.programs, list(phase._blocks(tree)), layout)


def _gradient(programs: Programs, parts: list[Any], layout: Layout) -> Gradient:
    random = np.random.default_rng(0)
    drawn = {
        name: (0.3 * random.normal(size=shape.shape)).astype(np.float32)
        for name, shape in layout.shapes.items()
    }
    found = compute_gradient(programs, place_params(drawn, layout), parts, tick=lambda: None)
    return dataclasses.replace(found, params=jax.device_get(found.params))


def grpo_program(settings: Settings, mesh: Mesh | None = None) -> Any:
    """The text of the gradient's program, on one device unless a mesh is given."""
    phase, block = grpo_phase(settings, mesh or world.one_device_mesh())
    layout = phase.layout
    return phase.programs.gradient.lower(layout.shapes, layout.frozen, block).as_text()


def sampler_program(settings: Settings) -> Any:
    """The text of the program that decodes."""
    phase, _ = grpo_phase(settings, world.one_device_mesh())
    sampler, limit = phase.drawing.sampler, settings.training_limits.completion
    params = jax.eval_shape(sampler.params, phase.layout.shapes)
    graph, params = sampler.layout.graph, model_state(params)
    program = decode.Program(
        settings=SamplingSettings(), stop_ids=(1,), pad_id=0, limit=limit, chunk=settings.grpo.chunk
    )
    level = Level(np.zeros((1, 2, 5), np.int32), np.zeros((1, 2), np.int32))
    keys = jax.random.split(jax.random.key(0), (1, 2, 3))

    def begun(params: Any) -> Any:
        hidden, above = decode.prefill(graph, params, (level,))
        of = {"width": 64, "program": program}
        return above, decode.start_state(graph, params, hidden, above, keys, **of)

    above, state = jax.eval_shape(begun, params)
    return decode.decode_chunk.lower(graph, params, state, above, program=program).as_text()


def meshed_program(settings: Settings) -> Any:
    """The same on the config's own mesh."""
    return grpo_program(settings, run_mesh(settings))


def copy(settings: Settings) -> Any:
    """Where the copy lies that completions are drawn with."""
    layout = model_layout(abstract_model(settings), run_mesh(settings))
    found = run_sampler(settings, layout, settings.grpo.quantise).layout
    return {name: str(shape.sharding) for name, shape in found.shapes.items()}


def updates(settings: Settings) -> Any:
    """The texts of the programs that apply an update, of both phases."""
    layout = model_layout(abstract_model(settings), world.one_device_mesh())
    rest = {"limits": settings.training_limits, "encoder": None, "source": None, "layout": layout}
    phases = (
        sft_module.make_sft(settings.sft, **rest),
        grpo_module.make_grpo(settings.grpo, seed=0, first=0, reference={}, **rest),
    )
    return [
        phase.programs.apply.lower(
            abstract_state(phase.optimizer, layout), dict(layout.shapes)
        ).as_text()
        for phase in phases
    ]


def lies(settings: Settings) -> Any:
    """What a device holds."""
    return held(settings, world.one_device_mesh())


def shown(settings: Settings) -> Any:
    """The services that hear of the run, and what they are told at its start."""
    told: list[Any] = []
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        for name in ("wandb", "trackio"):
            service = types.ModuleType(name)
            service.init = lambda name=name, **asked: told.append((name, asked["project"]))
            service.log = service.finish = lambda *_, **__: None
            patch.setitem(sys.modules, name, service)
        opened = open_trackers(settings.log, epath.Path(folder), config={}, resume_step=-1)
        for writer in opened:
            writer.close()
    return told, len(opened)


@dataclasses.dataclass
class _Trainer:
    """Trains nothing."""

    source: Any
    optimizer: Any = dataclasses.field(default_factory=optax.identity)

    def step(self, state: TrainState, number: int, *, tick: Any) -> StepResult:
        return StepResult(state, {"loss": float(number)}, ({"id": f"{number}"},))


def around(settings: Settings, workdir: pathlib.Path) -> Any:
    """What a run does around its steps: evaluations, checkpoints, lines and files."""
    heard: list[str] = []

    class Saved:
        """In place of checkpoints."""

        def __init__(self, workdir: pathlib.Path, *, keep: int, scores: dict[int, float]):
            heard.append(f"keep {keep}")

        def holds(self, step: int) -> bool:
            return f"saved {step}" in heard

        def save(self, state: TrainState, meta: Any) -> None:
            heard.extend([f"saved {meta.step}", f"{meta.phase} {sorted(meta.scores.items())}"])

        def wait(self) -> None:
            pass

        close = wait

    def evaluate(policy: Any, examples: Any, guide: Any, **asked: Any) -> dict[str, float]:
        words = (policy.config, len(policy.tokenizer), policy.limits, policy.encoder.template)
        words = (*words, policy.encoder.task.totals)
        asked = {k: v for k, v in asked.items() if k not in ("out", "mesh") and k[:3] != "on_"}
        heard.append(repr((words, len(examples), guide.title, sorted(asked.items()))))
        return {"accuracy": 1 / (1 + asked["step"]), "mean_reward": 0.0, "greedy_accuracy": 0.0}

    class Agreed:
        """A parity that is within its band."""

        def require(self) -> None:
            pass

    def measure(*args: Any, **asked: Any) -> Agreed:
        heard.append(f"compared {asked['tokens']} tokens")
        return Agreed()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module, "Checkpoints", Saved)
        patch.setattr(loop_module, "evaluate", evaluate)
        patch.setattr(loop_module, "keep_reference", lambda *args, **more: None)
        patch.setattr(loop_module, "load_reference", lambda *args, **more: {})
        patch.setattr(parity_module, "measure", measure)
        patch.setattr(sft_module, "make_sft", lambda *args, source, **more: _Trainer(source))
        patch.setattr(grpo_module, "make_grpo", lambda *args, source, **more: _Trainer(source))
        outcome = world.train(settings, workdir)
    files = sorted(str(path.relative_to(workdir)) for path in workdir.rglob("*"))
    return outcome, heard, files, world.metrics(workdir)
