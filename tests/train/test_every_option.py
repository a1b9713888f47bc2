"""Every key of a config does something: changed, it gives another program, sample, update or file.

A key that `CASES` does not have fails by its name: whoever adds one shows here what it does. Keys
that may change no result have one more test, at the end.
"""

import copy
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from r1re_jax.model.config import PRESETS
from r1re_jax.policy import Policy
from r1re_jax.policy_files import save_policy
from r1re_jax.rollout.keys import Purpose, row_keys
from r1re_jax.rollout.rollout import generate
from r1re_jax.rollout.sampling import SamplingSettings
from r1re_jax.task.miniworld.tokenizer import train_tokenizer
from r1re_jax.task.prompts import PromptEncoder
from r1re_jax.task.readers import write_jsonl
from r1re_jax.task.relations import parse_tagged
from r1re_jax.train.config import SettingsError, flat_keys, read_settings, resolved
from r1re_jax.train.start import run_mesh
from r1re_jax.train.update import Gradient
from tests.tiny import GUIDE, WORDS, random_level, tiny_config, tiny_model
from tests.train import options, world


@dataclasses.dataclass(frozen=True)
class Case:
    """How a key is shown to do something.

    Attributes:
        look: settings -> what to compare; None: any other value is refused.
        change: config changes, by dotted key with __ for a dot.
        base: changes that both configs have, where the key needs company.
    """

    look: Callable[..., Any] | None
    change: dict[str, Any]
    base: dict[str, Any] = dataclasses.field(default_factory=dict)


def _one(look: Callable[..., Any] | None, key: str, value: Any, **base: Any) -> Case:
    return Case(look, {key.replace(".", "__"): value}, base)


EVALUATED = {"evaluate": {"every": 1, "samples": 2, "batch": 8}}
MESHED = {"grpo__questions": 8}
PRESET = {"model": {"path": "", "preset": "tiny"}, "tokenizer": "base", **EVALUATED}
SMALL_WORLD = {"stages": [{"until": 9, "kinds": ["invented"], "fewest": 2, "most": 3}]}
WORLD = {"kind": "miniworld", "options": SMALL_WORLD}
OTHER_WORLD = {"stages": [{"until": 9, "kinds": ["invented"], "fewest": 3, "most": 4}]}
HELD_WORLD = {"kind": "miniworld", "options": {"domain": "medical", "count": 3}}
WIDE = {"limits": {"guide": 900, "question": 140, "completion": 90}}
SHORT = {"guide": 400, "question": 48, "completion": 30}
OPTIMIZER = {
    **{"learning_rate": 0.5, "warmup": 3, "schedule": "cosine", "clip_norm": 0.5, "eps": 1e-3},
    **{"weight_decay": 0.5, "b1": 0.5, "b2": 0.5, "vector_scale": 2.0},
    "first_moment": "bfloat16",
}
EXTRACTS = {"task": "triplets", "data__train": WORLD, "data__extra__more": WORLD}
EXTRACTS |= {
    "data__eval__held": {"kind": "miniworld", "options": {"domain": "medical", "count": 3}}
}
ADAPTED = {"lora": {"rank": 2}}
REFERENCE = {"grpo__reference": {"every": 2}}

CASES = {
    "seed": _one(options.grpo_steps, "seed", 4),
    "model.path": _one(options.around, "model.path", "again", **EVALUATED, **WIDE),
    "model.preset": _one(options.around, "model.preset", "wider", **PRESET),
    "model.dtype": _one(options.grpo_program, "model.dtype", "bfloat16"),
    "model.remat": _one(options.grpo_program, "model.remat", "layer"),
    "model.attention": _one(options.grpo_program, "model.attention", "kernels"),
    "model.parity_tokens": _one(options.around, "model.parity_tokens", 3),
    "tokenizer": _one(options.around, "tokenizer", "again", **PRESET, **WIDE),
    "mesh.data": _one(options.meshed_program, "mesh", {"data": 2}, **MESHED),
    "mesh.fsdp": _one(
        options.meshed_program,
        "mesh",
        {"data": -1, "fsdp": 4},
        **MESHED,
        mesh={"data": -1, "fsdp": 1},
    ),
    "mesh.sequence": _one(options.meshed_program, "mesh", {"sequence": 2}, **MESHED),
    "mesh.tensor": _one(options.meshed_program, "mesh", {"tensor": 2}, **MESHED),
    "mesh.drawing_tensor": _one(options.copy, "mesh", {"drawing_tensor": 2}, **MESHED),
    "mesh.moments_on_host": _one(options.lies, "mesh", {"moments_on_host": True}),
    "mesh.reference_on_host": _one(options.lies, "mesh", {"reference_on_host": True}),
    "limits.guide": _one(options.grpo_steps, "limits.guide", 410),
    "limits.question": _one(options.grpo_steps, "limits.question", 49),
    "limits.completion": _one(options.grpo_steps, "limits.completion", 40),
    "data.train.kind": _one(options.grpo_steps, "data.train", WORLD, **WIDE),
    "data.train.path": _one(options.grpo_steps, "data.train.path", "test.jsonl", grpo__questions=1),
    "data.train.guide": _one(options.grpo_steps, "data.train.guide", "third.md"),
    "data.train.limits": _one(options.grpo_steps, "data.train.limits", SHORT),
    "data.train.options": _one(
        options.grpo_steps, "data.train.options", OTHER_WORLD, data__train=WORLD, **WIDE
    ),
    "data.extra.more.kind": _one(options.grpo_steps, "data.extra.more", WORLD, **WIDE),
    "data.extra.more.path": _one(
        options.grpo_steps, "data.extra.more.path", "test.jsonl", grpo__questions=1
    ),
    "data.extra.more.guide": _one(options.grpo_steps, "data.extra.more.guide", "third.md"),
    "data.extra.more.options": _one(
        options.grpo_steps, "data.extra.more.options", OTHER_WORLD, data__extra__more=WORLD, **WIDE
    ),
    "data.extra.more.weight": _one(options.grpo_steps, "data.extra.more.weight", 0.001),
    "data.guide_in_prompt": _one(options.grpo_steps, "data.guide_in_prompt", "none"),
    "data.eval.held.kind": _one(options.sets, "data.eval.held", HELD_WORLD),
    "data.eval.held.path": _one(options.sets, "data.eval.held.path", "train.jsonl"),
    "data.eval.held.guide": _one(options.sets, "data.eval.held.guide", "third.md"),
    "data.eval.held.limit": _one(options.sets, "data.eval.held.limit", 2),
    "data.eval.held.protocol": _one(options.around, "data.eval.held.protocol", "mine", **EVALUATED),
    "data.eval.held.options": _one(
        options.sets,
        "data.eval.held.options",
        {"domain": "general", "count": 3},
        data__eval__held=HELD_WORLD,
    ),
    "reward.correct": _one(options.grpo_steps, "reward", {"correct": 2.0}),
    "reward.wrong": _one(options.grpo_steps, "reward", {"wrong": -1.0}),
    "reward.malformed": _one(options.around, "reward", {"malformed": -1.0}, **EVALUATED),
    "task": _one(options.sets, "task", "triplets", data__eval__held=HELD_WORLD),
    **{
        f"triplets.{name}": _one(options.verdicts, "triplets", {name: value}, **EXTRACTS)
        for name, value in {
            **{"highest": 2.0, "lowest": -1.0, "malformed": -1.0},
            **{"entity_weight": 0.5, "triplet_weight": 0.5},
        }.items()
    },
    "lora.rank": _one(options.grpo_program, "lora", {"rank": 3}, **ADAPTED),
    "lora.alpha": _one(options.grpo_program, "lora", {"alpha": 4.0}, **ADAPTED),
    "lora.targets": _one(
        options.grpo_program, "lora", {"targets": r"layers\.up\.weight"}, **ADAPTED
    ),
    "sft.steps": _one(options.around, "sft.steps", 3),
    "sft.trees": _one(options.sft_steps, "sft.trees", 2),
    "sft.questions": _one(options.sft_steps, "sft.questions", 3),
    "sft.micro_batch": _one(options.sft_steps, "sft.micro_batch", 1),
    "sft.cycle": _one(options.sft_steps, "sft.cycle", 2),
    "sft.thoughts": _one(options.sft_steps, "sft.thoughts", "none"),
    "sft.between_words": _one(
        options.sft_steps, "sft.between_words", 1, data__train__path="silent.jsonl"
    ),
    "sft.decay_steps": _one(options.updates, "sft.decay_steps", 9, sft__schedule="linear"),
    **{
        f"{phase}.{name}": _one(options.updates, f"{phase}.{name}", value)
        for phase in ("sft", "grpo")
        for name, value in OPTIMIZER.items()
    },
    "grpo.decay_steps": _one(options.updates, "grpo.decay_steps", 9, grpo__schedule="linear"),
    "grpo.steps": _one(options.around, "grpo.steps", 3),
    "grpo.trees": _one(options.grpo_steps, "grpo.trees", 2),
    "grpo.questions": _one(options.grpo_steps, "grpo.questions", 3),
    "grpo.group": _one(options.grpo_steps, "grpo.group", 3),
    "grpo.refill": _one(options.grpo_steps, "grpo.refill", 1, grpo__questions=4),
    "grpo.micro_batch": _one(options.grpo_steps, "grpo.micro_batch", 1),
    "grpo.micro_group": _one(options.grpo_steps, "grpo.micro_group", 1),
    "grpo.inner_iterations": _one(options.grpo_steps, "grpo.inner_iterations", 2),
    "grpo.temperature": _one(options.grpo_steps, "grpo.temperature", 0.5),
    "grpo.top_k": _one(None, "grpo.top_k", 5),
    "grpo.top_p": _one(None, "grpo.top_p", 0.5),
    "grpo.min_p": _one(None, "grpo.min_p", 0.5),
    "grpo.rewards": _one(options.grpo_steps, "grpo.rewards", {"format": 1.0, "answer": 1.0}),
    "grpo.overlong_buffer": _one(options.grpo_steps, "grpo.overlong_buffer", 20),
    "grpo.overlong_weight": _one(
        options.grpo_steps, "grpo.overlong_weight", 2.0, grpo__overlong_buffer=20
    ),
    "grpo.mask_truncated": _one(options.grpo_steps, "grpo.mask_truncated", True, grpo__questions=4),
    "grpo.advantage": _one(options.grpo_steps, "grpo.advantage", "rloo"),
    "grpo.loss": _one(options.grpo_steps, "grpo.loss", "token_mean"),
    "grpo.clip_low": _one(options.grpo_program, "grpo.clip_low", 0.125),
    "grpo.clip_high": _one(options.grpo_program, "grpo.clip_high", 0.125),
    "grpo.dual_clip": _one(options.grpo_program, "grpo.dual_clip", 3.0),
    "grpo.kl_coefficient": _one(options.grpo_program, "grpo.kl_coefficient", 0.5),
    "grpo.kl": _one(options.grpo_program, "grpo.kl", "k2"),
    "grpo.reference.every": _one(options.grpo_steps, "grpo.reference", {"every": 1}, **REFERENCE),
    "grpo.reference.decay": _one(
        options.grpo_steps, "grpo.reference", {"every": 2, "decay": 0.5}, **REFERENCE
    ),
    "grpo.entropy_coefficient": _one(options.grpo_program, "grpo.entropy_coefficient", 0.5),
    "grpo.correction": _one(options.grpo_program, "grpo.correction", "token_truncate"),
    "grpo.correction_limit": _one(
        options.grpo_program, "grpo.correction_limit", 2.0, grpo__correction="token_truncate"
    ),
    "grpo.quantise.weights": _one(options.sampler_program, "grpo.quantise", {"weights": "int8"}),
    "grpo.quantise.cache": _one(options.sampler_program, "grpo.quantise", {"cache": "int8"}),
    "grpo.chunk": _one(options.grpo_steps, "grpo.chunk", 5),
    "grpo.compaction": _one(options.grpo_steps, "grpo.compaction", 1),
    "grpo.smallest_batch": _one(options.grpo_steps, "grpo.smallest_batch", 2),
    "grpo.smallest_cache": _one(options.grpo_steps, "grpo.smallest_cache", 16),
    "grpo.score_chunk": _one(options.grpo_program, "grpo.score_chunk", 7),
    "grpo.max_logp_gap": _one(options.grpo_steps, "grpo.max_logp_gap", 0.01),
    "evaluate.every": _one(options.around, "evaluate.every", 2, **EVALUATED),
    "evaluate.samples": _one(options.around, "evaluate.samples", 3, **EVALUATED),
    "evaluate.temperature": _one(options.around, "evaluate.temperature", 0.5, **EVALUATED),
    "evaluate.batch": _one(options.around, "evaluate.batch", 16, **EVALUATED),
    "evaluate.at_start": _one(options.around, "evaluate.at_start", False, **EVALUATED),
    "evaluate.greedy": _one(options.around, "evaluate.greedy", True, **EVALUATED),
    "checkpoint.every": _one(options.around, "checkpoint.every", 3),
    "checkpoint.keep": _one(options.around, "checkpoint.keep", 1),
    "checkpoint.best": _one(options.around, "checkpoint.best", "held/accuracy", **EVALUATED),
    "log.every": _one(options.around, "log.every", 3),
    "log.completions": _one(options.around, "log.completions", 2),
    "log.tensorboard": _one(options.shown, "log.tensorboard", False),
    "log.wandb": _one(options.shown, "log.wandb", True),
    "log.trackio": _one(options.shown, "log.trackio", True),
    "log.project": _one(options.shown, "log.project", "other", log__wandb=True),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """Everything that a case names: policies, presets, guides and data."""
    folder = world.write_inputs(tmp_path_factory.mktemp("inputs"))
    tokenizer = train_tokenizer([GUIDE, WORDS], vocab=280)
    model = tiny_model(1, vocab=len(tokenizer), tied=True)
    encoder = PromptEncoder(tokenizer)
    save_policy(Policy(model=model, tokenizer=tokenizer, encoder=encoder), folder / "again")
    wordy = (f"<e1>Ann</e1> likes the old <e2>tea {i}</e2>." for i in range(9))
    silent = [parse_tagged(text, id=f"s{i}", label="Near") for i, text in enumerate(wordy)]
    write_jsonl(folder / "silent.jsonl", silent)
    for name in ("other", "third"):
        (folder / f"{name}.md").write_text(GUIDE.replace("# Tiny", f"# The {name}"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", tiny_config(vocab=300))
        patch.setitem(PRESETS, "wider", tiny_config(vocab=301))
        yield folder


def _values(inputs: pathlib.Path, *changes: dict[str, Any]) -> dict[str, Any]:
    """The config with changes; names of files stand for those in the folder."""
    values = world.config(inputs)
    guide = str(inputs / "other.md")
    values["data"]["extra"] = {"more": {**values["data"]["train"], "guide": guide}}
    for change in changes:
        for key, value in copy.deepcopy(change).items():
            *path, last = key.split("__")
            section = values
            for name in path:
                section = section.setdefault(name, {})
            whole = isinstance(value, dict) and last in ("train", "more", "held", "options")
            merged = isinstance(value, dict) and not whole
            section[last] = {**section.get(last, {}), **value} if merged else value
    files = {path.name: str(path) for path in inputs.iterdir()}
    return _with_paths(values, files)


def _with_paths(value: Any, files: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {name: _with_paths(inner, files) for name, inner in value.items()}
    return files.get(value, value) if isinstance(value, str) else value


@functools.cache
def _looked(look: Callable[..., Any], config: str, place: Callable[[], pathlib.Path]) -> Any:
    """A look at a config, once for all cases that start from it."""
    settings = read_settings(json.loads(config))
    return look(settings, place()) if look is options.around else look(settings)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], pathlib.Path]:
    """Makes work directories of one name's length: paths are in what is compared."""
    return lambda: tmp_path_factory.mktemp("run") / "w"


def test_every_key_has_a_case(inputs: pathlib.Path) -> None:
    keys = {key for key, _ in flat_keys(resolved(read_settings(_values(inputs))))}
    assert sorted(keys - CASES.keys()) == [], "keys that nothing is known to read"
    assert sorted(CASES.keys() - keys) == [], "cases of keys that are no more"


@pytest.mark.parametrize("key", CASES)
def test_a_changed_key_changes_something(
    key: str, inputs: pathlib.Path, place: Callable[[], pathlib.Path]
) -> None:
    case = CASES[key]
    before = json.dumps(_values(inputs, case.base))
    after = json.dumps(_values(inputs, case.base, case.change))
    if case.look is None:
        with pytest.raises(SettingsError, match=key.rpartition(".")[2]):
            read_settings(json.loads(after))
        return
    assert _looked(case.look, before, place) != _looked(case.look, after, place)


@pytest.mark.parametrize("look", sorted({case.look for case in CASES.values()} - {None}, key=repr))
def test_the_same_key_changes_nothing(
    look: Callable[..., Any], inputs: pathlib.Path, place: Callable[[], pathlib.Path]
) -> None:
    config = json.dumps(_values(inputs, MESHED))
    once, again = (_looked.__wrapped__(look, config, place) for _ in range(2))
    assert once == again


# Keys of memory and time alone, and what they are changed to: other programs, the same sums.
MEMORY = {
    "grpo.micro_batch": {"grpo__micro_batch": 1},
    "grpo.micro_group": {"grpo__micro_group": 1},
    "grpo.score_chunk": {"grpo__score_chunk": 7},
    "model.attention": {"model__attention": "kernels"},
    "model.remat": {"model__remat": "layer"},
    "mesh": {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}},
    "sft.micro_batch": {"sft__micro_batch": 2},
}
NARROW = {"grpo__questions": 4, "grpo__kl_coefficient": 0.5, "sft__questions": 4}
NARROW |= {"limits": {"completion": 40}}


@functools.cache
def _gradient(config: str, *, sft: bool = False) -> Gradient:
    settings = read_settings(json.loads(config))
    meshed = settings.mesh.data > 1
    mesh = run_mesh(settings) if meshed else world.one_device_mesh()
    if sft:
        return options.sft_gradient(settings, mesh)
    return options.grpo_gradient(settings, mesh)


@pytest.mark.parametrize("key", MEMORY)
def test_keys_of_memory_alone_change_no_result(key: str, inputs: pathlib.Path) -> None:
    with jax.default_matmul_precision("highest"):
        one, other = (
            _gradient(json.dumps(_values(inputs, NARROW, change)), sft=key.startswith("sft"))
            for change in ({}, MEMORY[key])
        )
    np.testing.assert_allclose(other.loss, one.loss, rtol=1e-5)
    np.testing.assert_allclose(other.norm, one.norm, rtol=1e-4)
    for name, gradient in one.params.items():
        scale = float(np.abs(gradient).max())
        np.testing.assert_allclose(other.params[name], gradient, atol=1e-4 * scale, err_msg=name)


def test_looking_for_signals_more_often_changes_no_sample() -> None:
    """`grpo.chunk`: other calls (see its case above), the same tokens."""
    graph, params = nnx.split(tiny_model())
    question = random_level(np.random.default_rng(0), (2, 6), least=1)
    ids = np.arange(4, dtype=np.uint32).reshape(2, 2)
    drawn = [
        generate(
            graph,
            params,
            (question,),
            keys=row_keys(0, Purpose.TRAIN, 1, ids, range(3)),
            settings=SamplingSettings(),
            limit=12,
            stop_ids=(1,),
            pad_id=0,
            chunk=chunk,
        )
        for chunk in (12, 5)
    ]
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get(drawn))
