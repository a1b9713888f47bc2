"""The model card of an export: what the folder and its run say, and nothing else.

What is not known is left out, or said to be unknown. Names of local folders are shown without their
path, since a card is published.
"""

import importlib.resources
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import jax
import jinja2
from flax import nnx

from r1re_jax.policy import Policy
from r1re_jax.policy_files import RECIPE
from r1re_jax.policy_source import PolicyError, choose_step, find, is_workdir
from r1re_jax.report.ancestry import Ancestor, Licence, ancestors, licence_of
from r1re_jax.report.history import History, is_number, read_history, section
from r1re_jax.report.summary import TRIPLET_COLUMNS, figure
from r1re_jax.task.readers import HUB_SEMEVAL2010
from r1re_jax.task.tasks import TaskKind
from r1re_jax.train.data_settings import DataKind

TEMPLATE = "model_card.md.jinja"
# What the card shows how to ask about.
MARKED_SENTENCE = "A full <e1>disk</e1> stopped the <e2>queue</e2>."
PLAIN_SENTENCE = "A full disk stopped the queue."
SHOWN_DIGITS = 12  # of a hash
# Key of a phase's section, and how the card says it.
PHASE = (
    ("group", "{} completions of each"),
    ("learning_rate", "learning rate {}"),
    ("schedule", "{} schedule"),
    ("vector_scale", "norms and biases at {} times the rate"),
    ("weight_decay", "weight decay {}"),
    ("temperature", "sampled at temperature {}"),
    ("loss", "loss {}"),
    ("advantage", "advantage {}"),
    ("kl_coefficient", "KL coefficient {}"),
    ("clip_low", "ratio clipped {} below"),
    ("clip_high", "{} above 1"),
    ("dual_clip", "dual clip {}"),
    ("entropy_coefficient", "entropy coefficient {}"),
    ("rewards", "rewards {}"),
    ("overlong_buffer", "penalty on the last {} tokens"),
    ("mask_truncated", "completions that were cut off left out"),
    ("correction", "off-policy correction {}"),
    ("refill", "{} rounds of refilling"),
    ("inner_iterations", "{} updates on the same completions"),
    ("cycle", "lessons repeated after {} steps"),
)
# Values that change nothing and are not worth a word.
NEUTRAL = {
    **{"vector_scale": 1, "weight_decay": 0, "refill": 0, "inner_iterations": 1, "cycle": 0},
    **{"dual_clip": 0, "entropy_coefficient": 0, "rewards": {}, "overlong_buffer": 0},
    **{"mask_truncated": False, "correction": "auto"},
}


def exported_step(source: str | os.PathLike, step: int | None) -> int | None:
    """Return the step that an export of a run takes, None for what is no run.

    Raises:
        PolicyError: no such policy, or no such step.
    """
    where = find(source)
    if is_workdir(where):
        return choose_step(where, step)
    if step is not None:
        raise PolicyError(f"{where} is no work directory, so it has no step {step}")
    return None


def model_card(
    policy: Policy,
    source: str | os.PathLike,
    *,
    name: str,
    step: int | None = None,
    dtype: str = "float32",
    licence: str = "",
) -> str:
    """Return the text of README.md, with the front matter that the Hugging Face hub reads.

    Args:
        policy: what is exported.
        source: what it was loaded from: a work directory, or what else `load_policy` takes.
        name: what the card calls it: ORG/NAME on the hub, or the folder's name.
        step: of a work directory, as `exported_step` gives it.
        dtype: of the exported weights.
        licence: "" takes that of the base model, where its own model card names one.
    """
    text = (importlib.resources.files("r1re_jax.report") / TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML
    )
    environment.filters |= {"words": escaped, "code": code, "python": repr, "shell": shlex.quote}
    where = find(source)
    history = _history(source) if is_workdir(where) else None
    chain = ancestors(source)
    found = licence_of(licence, chain)
    phases = {} if history is None else _phases(history, step)
    extracts = policy.encoder.task.kind is TaskKind.TRIPLETS
    return environment.from_string(text).render(
        front_matter=_front_matter(history, chain, found, phases),
        name=name,
        annotates=is_workdir(where) or (where / RECIPE).is_file(),
        run=history is not None,
        origin=None if is_workdir(where) else chain[0].name,
        facts=_facts(policy, history, chain, step, dtype),
        phases=phases,
        totals={key: _signed(value) for key, value in _totals(policy, history).items()},
        extracts=extracts,
        sentence=PLAIN_SENTENCE if extracts else MARKED_SENTENCE,
        scores=[] if history is None else _scores(history, step),
        step=step,
        limits=policy.limits,
        template=policy.encoder.template,
        licence=found,
    )


def escaped(text: Any) -> str:
    """A text as one line of Markdown that shows it as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(str(text).split()))


def code(text: Any) -> str:
    """A text as a Markdown code span of one line, in a table too."""
    return "`" + " ".join(str(text).split()).replace("`", "'").replace("|", "\\|") + "`"


def _history(source: str | os.PathLike) -> History | None:
    """Return what a work directory says of its run; None where it says nothing."""
    try:
        return read_history(os.fspath(source))
    except FileNotFoundError:
        return None


def _front_matter(
    history: History | None,
    chain: list[Ancestor],
    licence: Licence,
    phases: Mapping[str, str],
) -> str:
    """Return the YAML that the hub reads."""
    from huggingface_hub import ModelCardData

    tags = ["r1re_jax"] + ["relation-extraction"] * (history is not None)
    train = {} if history is None else section(history.config, "data").get("train", {})
    from_hub = train.get("kind") == DataKind.SEMEVAL2010 and not train.get("path")
    hub = next((one.hub for one in chain if one.hub), None)
    data = ModelCardData(
        **licence.fields,
        base_model=hub,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*tags, *(phase.lower() for phase in phases)],
        datasets=[HUB_SEMEVAL2010] if from_hub else None,
    )
    return data.to_yaml()


def _facts(
    policy: Policy, history: History | None, chain: list[Ancestor], step: int | None, dtype: str
) -> list[tuple[str, str]]:
    """Return what is known of the policy: (what, Markdown)."""
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(policy.model, nnx.Param)))
    shape = f"{policy.config.family.name.capitalize()}, {count:,} parameters, weights in {dtype}"
    facts = [("Base model", _base(history, chain)), ("Architecture", shape)]
    if history is not None:
        config = history.config.get("config") or history.config
        facts += [
            ("LoRA", _lora(section(history.config, "lora"))),
            ("Step", f"{step}"),
            ("Training data", ", ".join(_data(history))),
        ]
        if "seed" in config:
            facts.append(("Seed", f"{config['seed']}"))
    guides = [f"{escaped(title)} ({_sha(sha)})" for title, sha in policy.guide_sha256.items()]
    facts.append(("Guide", ", ".join(guides)))
    if history is not None:
        versions = history.config.get("versions") or {}
        facts += [
            ("Configuration", code(history.config["hash"]) if "hash" in history.config else ""),
            ("Versions", ", ".join(f"{name} {number}" for name, number in versions.items())),
        ]
    return [(what, text) for what, text in facts if text]


def _base(history: History | None, chain: list[Ancestor]) -> str:
    """Return what the policy began from, and what that began from."""
    if history is None:
        return ""  # the card's first sentence says it
    if chain:
        return ", which began from ".join(code(one.name) for one in chain)
    preset = section(history.config, "model").get("preset")
    return f"none: random weights of the shape {code(preset)}" if preset else "unknown"


def _lora(given: Mapping[str, Any]) -> str:
    """Return what of the base was adapted; "" where all of it was trained."""
    if not given.get("rank"):
        return ""
    shape = f"rank {given['rank']}, alpha {given.get('alpha', 0):g}"
    # No table, where a bar would have to be escaped.
    targets = code(given.get("targets", "")).replace("\\|", "|")
    return f"{shape}, merged; adapted are {targets}"


def _data(history: History) -> list[str]:
    """Return the files that training read, by name and hash, or what else it was trained on."""
    files = history.config.get("data") or {}
    if files:
        return [f"{code(PurePath(path).name)} ({_sha(sha)})" for path, sha in files.items()]
    kind = section(history.config, "data").get("train", {}).get("kind")
    if kind == DataKind.MINIWORLD:
        return ["miniworld, generated by r1re\\_jax: every example is a function of seed and step"]
    return ["unknown"]


def _phases(history: History, step: int) -> dict[str, str]:
    """Return what SFT and GRPO did up to a step, by the name of the phase."""
    sft, grpo = (section(history.config, name) for name in ("sft", "grpo"))
    planned = [found.get("steps") or 0 for found in (sft, grpo)]
    done = min(step, planned[0]), max(0, step - planned[0])
    return {
        name: ", ".join([f"{steps} of {of} steps", *_settings(found)])
        for name, found, steps, of in zip(("SFT", "GRPO"), (sft, grpo), done, planned, strict=True)
        if steps
    }


def _settings(phase: Mapping[str, Any]) -> list[str]:
    """Return the settings of a phase that are known, in words."""
    found = []
    if is_number(phase.get("questions")):
        found.append(f"{phase['questions'] * phase.get('trees', 1)} questions a step")
    for key, words in PHASE:
        value = phase.get(key)
        if value not in (None, "") and value != NEUTRAL.get(key):
            shown = f"{value:g}" if is_number(value) else code(value)
            found.append(words.format(shown))
    reference = phase.get("reference") or {}
    if reference.get("every") and phase.get("kl_coefficient"):
        found.append(_moving(reference))
    return found


def _moving(reference: Mapping[str, Any]) -> str:
    """Return how the reference of the KL term followed the policy, in words."""
    when = f"every {reference['every']} steps"
    if reference.get("decay"):
        return f"reference a moving average of the policy (decay {reference['decay']:g}, {when})"
    return f"reference copied from the policy {when}"


def _scores(history: History, step: int) -> list[dict[str, str]]:
    """Return a row for each evaluated set, of its last evaluation up to a step."""
    rows = []
    for name in history.sets:
        if earlier := [one for one in history.of_set(name) if one.step <= step]:
            last = earlier[-1]
            interval = "–".join(f"{100 * end:.1f}" for end in last.interval or ())
            of = last.metrics.get
            rows.append(
                {
                    "set": code(name),
                    "step": f"{last.step}",
                    "n": figure(of("n"), ","),
                    "k": figure(of("k"), "d"),
                    "temperature": figure(of("temperature"), "g"),
                    "Avg@k": figure(of("avg_at_k"), ".1%") + (f" ({interval})" if interval else ""),
                    "Pass@k": figure(of("pass_at_k"), ".1%"),
                    "greedy": figure(of("greedy_accuracy"), ".1%"),
                    "format": figure(of("format_rate"), ".1%"),
                    "macro-F1": figure(of("macro_f1"), ".1f"),
                    **_extracted(last.metrics),
                    "protocol": escaped(of("protocol") or "–"),
                    "data": _sha(of("data_sha256")) if of("data_sha256") else "–",
                }
            )
    return rows


def _sha(digest: str) -> str:
    return f"SHA-256 {code(str(digest)[:SHOWN_DIGITS])}"


def _extracted(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return the F1 figures of an extraction; none where marked pairs were classified."""
    return {
        title: figure(metrics[key], style)
        for key, title, style in TRIPLET_COLUMNS
        if key in metrics
    }


def _totals(policy: Policy, history: History | None) -> dict[str, float]:
    """Return what completions earned; runs that were written without it had the defaults."""
    task = policy.encoder.task
    name = "triplets" if task.kind is TaskKind.TRIPLETS else "reward"
    given = {} if history is None else section(history.config, name)
    return vars(task.totals) | {name: of for name, of in given.items() if is_number(of)}


def _signed(value: float) -> str:
    return f"{value:+g}".replace("-", "−")
