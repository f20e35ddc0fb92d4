"""What a trained checkpoint's model card says of the training, with a picture of its curves."""

from pathlib import Path
from typing import Any

from mqa_hf.base.figures import can_draw, describe, panels, save

UNITS = {
    "lm": "cross-entropy, nats a token",
    "kl": "KL to the teacher, nats a token",
    "hidden": "1 - cosine of hidden states",
    "attention": "relative error of attention",
}
PICTURE = "uptraining.png"
HEADING = "## Training after the conversion"


def curves(report: dict[str, Any]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """By loss, "training" and "validation" as points (tokens, value), over all phases."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    steps = sum(max((int(line["step"]) for line in lines), default=0) for lines in report["log"].values())
    size = report["tokens"] / max(steps, 1)
    begun = 0.0
    for lines in report["log"].values():
        for line in lines:
            for name in UNITS:
                for key, kind in ((name, "training"), (f"eval_{name}", "validation")):
                    if key in line:
                        points = found.setdefault(name, {"training": [], "validation": []})[kind]
                        points.append((round(begun + int(line["step"]) * size), line[key]))
        begun += max((int(line["step"]) for line in lines), default=0) * size
    return found


def draw(report: dict[str, Any], path: Path) -> bool:
    """The curves as a PNG; false where matplotlib is not installed."""
    if not can_draw():
        return False
    found = curves(report)
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


def add_training_section(directory: Path, report: dict[str, Any]) -> None:
    """Append to `README.md` how the checkpoint was trained; a section from an earlier training makes room."""
    options = report["options"]
    goals = ", ".join(f"{name} (weight {weight:g})" for name, weight in options["losses"])
    text = [
        HEADING,
        "",
        f"{report['tokens']:,} tokens of {', '.join(part['source'] for part in options['dataset'])}, in steps of "
        f"{options['batch_tokens']:,}; loss: {goals}"
        + (f", teacher `{options['teacher']}`" if options.get("teacher") else "")
        + f"; trained: {options['train']}; peak learning rate {options['learning_rate']:g}.",
        "",
    ]
    if options.get("attention_tokens"):
        text += [f"The first {options['attention_tokens']:,} tokens fitted attention layers to the teacher's.", ""]
    if report["validation"]:
        before, after = report["validation"]["before"], report["validation"]["after"]
        text += ["| on validation text | before | after |", "|---|---|---|"]
        text += [
            f"| {UNITS[name]} | {before[name]:.3f} | {after[name]:.3f} |"
            for name in UNITS
            if name in before and name in after
        ]
        text += [""]
    if draw(report, directory / PICTURE):
        text += [f"![losses over tokens]({PICTURE})", ""]
    if report["command"]:
        text += ["```bash", report["command"], "```", ""]
    card = directory / "README.md"
    before_it = card.read_text(encoding="utf-8") if card.is_file() else ""
    before_it = before_it.split(HEADING)[0].replace("No training has followed.", "Training followed.").rstrip()
    card.write_text(f"{before_it}\n\n" + "\n".join(text), encoding="utf-8")
