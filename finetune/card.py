"""The model card section on the training of a checkpoint, with a plot of its losses."""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from mqa_hf.base.card import public, public_command, with_section
from mqa_hf.base.figures import can_draw, describe, panels, save

from .records import Line, UptrainingRecord

UNITS = {
    "lm": "cross-entropy, nats per token",
    "kl": "KL to the teacher, nats per token",
    "hidden": "1 - cosine of hidden states",
    "attention": "relative error of attention",
}
PICTURE = "uptraining.png"
HEADING = "## Training after the conversion"


def curves(record: UptrainingRecord) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Points (tokens, value) over all phases, by loss and then "training" or "validation"."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    phases = [max((step_of(line) for line in lines), default=0) for lines in record.log.values()]
    size = record.tokens / max(sum(phases), 1)
    begun = 0.0
    for lines, steps in zip(record.log.values(), phases):
        for line in lines:
            for name in UNITS:
                for key, kind in ((name, "training"), (f"eval_{name}", "validation")):
                    value = line.get(key)
                    if value is not None:
                        points = found.setdefault(name, {"training": [], "validation": []})[kind]
                        points.append((round(begun + step_of(line) * size), value))
        begun += steps * size
    return found


def step_of(line: Line) -> int:
    return int(line["step"] or 0)


def as_text(loss: float | None) -> str:
    """A loss as table text; empty if it was not finite."""
    return "" if loss is None else f"{loss:.3f}"


def draw(record: UptrainingRecord, path: Path) -> bool:
    """Plot the curves to a PNG; returns false if matplotlib is not installed."""
    if not can_draw():
        return False
    found = curves(record)
    figure, rows = panels(len(found), 4.5, 3.4)
    for axes, (name, kinds) in zip(rows, found.items()):
        for kind, points in kinds.items():
            x, y = [tokens / 1e6 for tokens, _ in points], [value for _, value in points]
            if kind == "training":
                axes.plot(x, y, label=kind, lw=1, color="#9aa5b1")
            elif points:
                axes.plot(x, y, label=kind, lw=2, marker="o", ms=4)
        describe(axes, "tokens, millions", UNITS[name])
    save(figure, path)
    return True


def add_training_section(directory: Path, record: UptrainingRecord, place: str | None) -> None:
    """Add how the checkpoint was trained to `README.md`, replacing the section of an earlier training.

    The card's program loads the trained checkpoint from the hub id `place`, if given.
    """
    options = record.options
    goals = ", ".join(f"{name} (weight {weight:g})" for name, weight in options["losses"])
    texts = ", ".join(public(part["source"]) for part in options["dataset"])
    text = [
        f"Trained on {record.tokens:,} tokens of {texts}, in steps of {options['batch_tokens']:,}; loss: {goals}"
        + (f", teacher `{public(options['teacher'])}`" if options.get("teacher") else "")
        + f"; trained: {options['train']}; peak learning rate {options['learning_rate']:g}.",
        "",
    ]
    if options.get("attention_tokens"):
        text += [f"The first {options['attention_tokens']:,} tokens fitted the attention layers to the teacher's.", ""]
    if record.validation:
        before, after = record.validation.before, record.validation.after
        text += ["| on validation text | before | after |", "|---|---|---|"]
        text += [
            f"| {UNITS[name]} | {as_text(before[name])} | {as_text(after[name])} |"
            for name in UNITS
            if name in before and name in after
        ]
        text += [""]
    if draw(record, directory / PICTURE):
        text += [f"![losses over tokens]({PICTURE})", ""]
    if record.command:
        text += ["```bash", public_command(record.command, {}), "```", ""]
    card = directory / "README.md"
    # Bytes of other encodings are kept.
    said = card.read_text(encoding="utf-8", errors="surrogateescape") if card.is_file() else ""
    said = said.replace("No training has followed.", "Training followed.")
    said = re.sub(r'(from_pretrained\(|model=)"[^"]+"', rf'\1"{place or "DIRECTORY_OR_ID"}"', said)
    said = with_datasets(said, [part["source"] for part in options["dataset"]])
    card.write_text(with_section(said, HEADING, "\n".join(text)), encoding="utf-8", errors="surrogateescape")


def with_datasets(said: str, sources: list[str]) -> str:
    """The card with the Hub's data sets among `sources` in its metadata; unchanged if that cannot be read."""
    ids = [source.split(":")[0].split("[")[0] for source in sources if not Path(source).exists()]
    try:
        card: Any = ModelCard(said)
    except (ValueError, yaml.YAMLError):
        return said
    known = card.data.to_dict().get("datasets") or []
    known = [known] if isinstance(known, str) else known
    if not ids or not isinstance(known, list):
        return said
    card.data.datasets = list(dict.fromkeys([*known, *ids]))
    return str(card)
