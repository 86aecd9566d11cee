"""The model card of a checkpoint, README.md: what it was made from and how, what it scores, how to load it and how to undo it.

A comment in its last line has the digest of the text above. So a card that somebody edited, or wrote, is recognised and left alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from adept_fast.checkpoints.adept_config import AdeptConfig
from adept_fast.checkpoints.checkpoint import ModelFolder
from adept_fast.checkpoints.settings import PRESERVING
from adept_fast.errors import InputError
from adept_fast.runtime.atomic_files import write_text
from adept_fast.runtime.input_files import read_text
from adept_fast.runtime.yaml_text import parse_yaml

FILE = "README.md"
LICENCE = ("license", "license_name", "license_link")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
SIGNATURE = "<!-- adept_fast wrote this card and renews it after evaluation, unless it was edited: {} -->"
SCORES, LOADING = "## Scores\n\n", "## Load it"
RATES = {"tune.learning_rate": "learning rate", "tune.lr_scheduler_type": "schedule", "tune.block_size": "tokens of a block"}
MERGED = {"average": "averaged", "stack": "one set after the other"}
BASELINES = {
    "full": "every parameter was trained",
    "replay": "every parameter was trained, on general documents too",
    "lora": "LoRA matrices of all linear layers were trained, and merged into the weights",
}


@dataclass(frozen=True)
class Training:
    """What a run trained on.

    data: a line for each source, with no path of the machine
    datasets: those on the hub
    steps, tokens: of the run; None if they are not known
    """

    data: Sequence[str]
    datasets: Sequence[str] = ()
    steps: int | None = None
    tokens: int | None = None


def model_card(
    base: str,
    origin: ModelFolder,
    record: AdeptConfig | Mapping[str, Any] | None,
    training: Training | None = None,
) -> str:
    """Return the text of a card.

    base: name or path of the model that was adapted. origin: the checkpoint that this one was made from, whose card or config states the
    licence. record: of the copies, or the content of baseline.json; None where all copies were removed.
    """
    from huggingface_hub import ModelCardData

    copies = isinstance(record, AdeptConfig)
    name = base if HUB_NAME.fullmatch(base) and not os.path.isdir(base) else re.sub(r"[^\w.-]+", "-", Path(base).name) or "base"
    metadata = ModelCardData(
        base_model=name,
        library_name="transformers",
        pipeline_tag="text-generation",
        datasets=list(training.datasets) if training and training.datasets else None,
        tags=["adept_fast", *(["continual-pretraining"] if training else []), *(["layer-expansion"] if copies else [])],
        **licence(origin),
    )
    short = name.rpartition("/")[2]
    title, summary = _summary(short, record, training)
    facts = {"base": f"`{name}`", **_facts(record, training)}
    rows = [(key, " ".join(str(value).split()).replace("|", "/")) for key, value in facts.items()]
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {title}",
        summary,
        "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]),
        f"{SCORES}It was not evaluated yet.",
        LOADING,
        '```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\npath = "."  # this folder, or its name on the hub\n'
        "model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)\n```",
        *(_undoing(record) if isinstance(record, AdeptConfig) else []),
        "## Limits",
        _limits(record),
    ]
    return _signed("\n\n".join(parts) + "\n")


def with_scores(card: str, scores: Sequence[str]) -> str:
    """Return a card that `model_card` made with these lines of Markdown as its scores."""
    before, _, rest = card.partition(SCORES)
    _, _, after = rest.partition(LOADING)
    text, _, _ = f"{before}{SCORES}{chr(10).join(scores)}\n\n{LOADING}{after}".rstrip("\n").rpartition("\n")
    return _signed(text)


def data_of(folder: Path) -> Training | None:
    """Return the data that the card of a tuned checkpoint names; None where there is no card as adept_fast wrote it, or it names none."""
    if is_edited(folder / FILE) or not (folder / FILE).is_file():
        return None
    text = read_text(folder / FILE)
    row, front = re.search(r"^\| data \| (.+) \|$", text, re.MULTILINE), re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    metadata = parse_yaml(front[1], FILE) if front else {}
    return Training(row[1].split("; "), metadata.get("datasets") or ()) if row else None


def licence(model: ModelFolder) -> dict[str, Any]:
    """Return the licence that the card or the config of a checkpoint states; nothing where neither does."""
    stated: Mapping[str, Any] = {}
    if (model.path / FILE).is_file():
        try:
            front = re.match(r"---\n(.*?)\n---", read_text(model.path / FILE), re.DOTALL)
            content = parse_yaml(front[1], FILE) if front else None
        except InputError:  # a card of others, whose faults are not this model's
            content = None
        stated = content if isinstance(content, Mapping) else {}
    if "license" not in stated:
        stated = model.config
    return {key: stated[key] for key in LICENCE if isinstance(stated.get(key), str)}


def is_edited(path: Path) -> bool:
    """Return whether something is at `path` that is no card as adept_fast wrote it."""
    if not path.is_file():
        return os.path.lexists(path)
    text, _, signature = path.read_bytes().decode(errors="replace").rstrip("\n").rpartition("\n")
    return signature != _signature(text)


def write_card(folder: Path, text: str, earlier: Path | None = None) -> bool:
    """Write the card of a checkpoint, and return whether it is in place: an edited card stays as it is.

    earlier: the checkpoint that `folder` will replace, whose edited card is kept.
    """
    path = folder / FILE
    if earlier is not None and is_edited(earlier / FILE) and (earlier / FILE).is_file():
        write_text(path, (earlier / FILE).read_text(encoding="utf-8", errors="replace"))
        return False
    if is_edited(path):
        return False
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
    return True


def _signed(text: str) -> str:
    return f"{text}\n{_signature(text)}\n"


def _signature(text: str) -> str:
    return SIGNATURE.format(xxhash.xxh3_64(text.rstrip("\n").encode()).hexdigest())


def _summary(base: str, record: AdeptConfig | Mapping[str, Any] | None, training: Training | None) -> tuple[str, str]:
    """Return title and first sentences."""
    on = f" on {', '.join(training.data)}" if training else ""
    if record is None:
        return f"{base}, restored", f"The copies of an adapted model were removed. These are the tensors of {base}."
    if not isinstance(record, AdeptConfig):
        return f"{base}, trained", f"{base} after continual pretraining{on}: {BASELINES.get(str(record['method']), record['method'])}."
    earlier = len(record.copies) - len(record.trained)
    added = f" on top of {earlier} earlier ones" if earlier else ""
    copies = f"Copies of {len(record.trained)} of its {record.source.get('num_hidden_layers')} layers were inserted{added}"
    intact = f"Every tensor of {base} is in it unchanged, bit for bit."
    if (merged := record.selection.get("merged")) is not None:
        both = f"The copies of two models adapted from {base}, {MERGED.get(merged['how'])}."
        return f"{base} with the copies of two models", f"{both} {intact}"
    if "domain" in record.inputs or training:
        alpha = record.selection.get("alpha", 1.0)
        dialled = "" if alpha == 1 else f" They act with {alpha:g} of the strength that training gave them."
        return f"{base}, adapted", f"{base} after continual pretraining{on}. {copies} and trained, and nothing else.{dialled} {intact}"
    silent = " They are silent: until they are trained, the model computes what its base computes." * PRESERVING[record.initialisation]
    return f"{base}, expanded", f"{base} before continual pretraining. {copies}.{silent} {intact}"


def _facts(record: AdeptConfig | Mapping[str, Any] | None, training: Training | None) -> dict[str, Any]:
    """Return the rows of the table: what was done, with what."""
    if record is None:
        return {}
    facts: dict[str, Any] = {}
    if isinstance(record, AdeptConfig):
        inputs, made_with = record.inputs, record.versions
        chosen = record.selection
        facts["base's digest"] = record.source.get("identity")
        facts["layers copied"] = ", ".join(str(entry.copied_from) for entry in record.inserted)
        facts["copies, as layers of this model"] = ", ".join(map(str, record.copies))
        if "method" in chosen:
            facts["chosen by"] = f"{chosen['method']} ({chosen.get('loss')}), {chosen.get('placement')}"
        if record.parameters:
            facts["parameters"] = "{total:,}, of which {trainable:,} are trained".format(**record.parameters)
    else:
        inputs, made_with = record["inputs"], record["versions"]
        facts["base's digest"] = inputs.get("model")
        facts["parameters trained"] = f"{record['trained']:,}" if isinstance(record.get("trained"), int) else None
    facts["method"] = inputs.get("method")
    if training:
        facts["data"] = "; ".join(training.data)
        facts["digest of the documents"] = inputs.get("domain")
        facts["training"] = None if training.tokens is None else f"{training.steps:,} steps, {training.tokens:,} tokens"
    facts |= {label: inputs.get(key) for key, label in RATES.items()}
    if "tune.rate_map" in inputs:
        units, steps = inputs.get("tune.units"), inputs.get("tune.refresh_steps")
        facts["rates of units"] = f"by {units}, {inputs['tune.rate_map']}, renewed every {steps} steps"
    facts["versions"] = ", ".join(f"{package} {version}" for package, version in made_with.items())
    return {key: value for key, value in facts.items() if value is not None}


def _undoing(record: AdeptConfig) -> list[str]:
    commands = [
        "adept-fast copies remove source=. target=../base            # the base again, bit for bit",
        "adept-fast copies dial source=. target=../half alpha=0.5    # half of what training made of the copies",
        "adept-fast copies extract source=. target=../copies         # the copies alone",
    ]
    return ["## Remove, dial or extract the copies", "\n".join(["```bash", *commands, "```"])]


def _limits(record: AdeptConfig | Mapping[str, Any] | None) -> str:
    lines = [
        "Nothing was checked but what is stated above.",
        "The loss on text says little about what a chat model answers: read some of its answers before you use it.",
        "Whether the licence of the data allows your use is for you to check.",
    ]
    if isinstance(record, AdeptConfig):
        lines += [f"When it was made: {note}." for note in record.selection.get("notes", ())]
    return "\n".join(f"- {line}" for line in lines)
