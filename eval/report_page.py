"""The page of a report, which needs no network and no other file, and sections of model cards."""

import json
import shutil
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.errors import HFValidationError
from jinja2 import Environment

from mqa_hf.base.card import with_section
from mqa_hf.base.errors import MQAError
from mqa_hf.base.files import read_json, write_whole

from .evaluation_record import CheckpointResult
from .report import PAGE
from .report_charts import PICTURES, draw_pictures
from .report_data import FEW, Results
from .report_series import COLOURS
from .report_table import Table, table_of

CONTENT = "report.json"
MARK = b'<script type="application/json" id="data">'  # in every page of this command
CARD_HEADING = "## Quality and speed"
CARD_PICTURES = ("quality-time", "quality-cache")


def write_page(results: Results, output: Path, title: str | None, cards: bool) -> Path:
    """Write the page, its pictures and its data to a directory; those of an earlier report are replaced.

    Args:
        results: the results to show.
        output: the directory.
        title: title of the page.
        cards: whether the model cards of converted checkpoints get the table and pictures, too.

    Raises:
        MQAError: if `output` holds something other than a report, or cannot be written.
    """
    try:
        check_output(output)
        table = table_of(results)
        content = json.dumps(content_of(results), indent=1, ensure_ascii=False)
        with TemporaryDirectory() as drawn:
            page = render(results, table, Path(drawn), title)
            # First, because it identifies the directory as a report's if this process is killed.
            write_whole(output / CONTENT, content + "\n")
            for name, *_ in PICTURES:
                (output / f"{name}.png").unlink(missing_ok=True)
            for picture in Path(drawn).iterdir():
                shutil.copyfile(picture, output / picture.name)
            write_whole(output / PAGE, page)
        if cards:
            for found in results.checkpoints:
                card = Path(found.checkpoint) / "README.md"
                if found.name in results.conversions and card.is_file():
                    add_to_card(card, found, results, table, output)
    except OSError as error:
        raise MQAError(f"the report cannot be written: {error}") from error
    return output / PAGE


def check_output(output: Path) -> None:
    """Raise MQAError for a directory with files that are not a report's."""
    if output.exists() and not output.is_dir():
        raise MQAError(f"{output} is a file; give a directory")
    page, content = output / PAGE, output / CONTENT
    if page.exists():
        if not (page.is_file() and MARK in page.read_bytes()):
            raise MQAError(f"{output} has a page ({PAGE}) that is no report of mqa-hf; give another `output`")
        return
    found = [path.name for path in output.iterdir() if path.name != f".{CONTENT}.partial"] if output.is_dir() else []
    if found and not is_ours(content):
        raise MQAError(f"{output} has files in it and no report of mqa-hf; give another `output`")


def is_ours(content: Path) -> bool:
    """Whether a file is the content of a report, which is all that remains of an interrupted one."""
    try:
        return {"evaluation", "benchmark"} <= read_json(content).keys()
    except MQAError:
        return False


def content_of(results: Results) -> dict[str, Any]:
    """The content of the page, as JSON."""
    timings = [{**t.record.model_dump(mode="json", exclude_none=True), "name": t.name} for t in results.timings]
    return {"evaluation": json.loads(results.evaluation.to_json()), "benchmark": timings}


def commands_of(results: Results) -> dict[str, str]:
    """The commands that made the results, by title."""
    commands: dict[str, str | None] = {"Evaluate": results.evaluation.command}
    for name in results.names:
        converted = results.conversions[name].command if name in results.conversions else None
        if converted not in commands.values():  # a trained checkpoint has its student's
            commands[f"Convert {name}"] = converted
        if name in results.trainings:
            commands[f"Uptrain {name}"] = results.trainings[name].command
    timed = dict.fromkeys(t.record.command for t in results.timings if t.record.command)
    commands |= {f"Benchmark {i}" if len(timed) > 1 else "Benchmark": line for i, line in enumerate(timed, 1)}
    return {name: command for name, command in commands.items() if command}


def render(results: Results, table: Table, output: Path, title: str | None) -> str:
    """The page; its pictures are also drawn to `output`."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("mqa_hf.eval").joinpath("report.html.jinja").read_text(encoding="utf-8"))
    others = dict.fromkeys(results.timed_as.values())
    return template.render(
        title=title or f"{results.names[0]} and its converted checkpoints",
        table=table,
        series=COLOURS,
        pictures=draw_pictures(results, output),
        evaluation=results.evaluation,
        settings=results.evaluation.settings,
        next_token=results.checkpoints[0].next_token,
        warnings=results.warnings(),
        few=FEW,
        translated=results.checkpoints[0].greedy is not None,
        samples=[(found.name, found.samples) for found in results.checkpoints],
        commands=commands_of(results),
        device=", ".join(sorted({timing.record.device for timing in results.timings})),
        timed_as=[([n for n, o in results.timed_as.items() if o == other], other) for other in others],
        copied=table.tabbed(),
        # Without "<": in a script, a browser would read tags, and a comment up to the end of the page.
        data=json.dumps(content_of(results), indent=1, ensure_ascii=False).replace("<", "\\u003c"),
    )


def add_to_card(path: Path, found: CheckpointResult, results: Results, table: Table, shown: Path) -> None:
    """Put the table, two pictures and `model-index` into a converted checkpoint's model card; those of an earlier
    report are replaced.

    Args:
        path: path of the card.
        found: the checkpoint's results.
        results, table: those of the report.
        shown: directory of the pictures.

    Raises:
        MQAError: if the card cannot be read.
    """
    try:
        card = ModelCard.load(path)
    except (ValueError, HFValidationError, yaml.YAMLError) as error:
        raise MQAError(f"{path} is no model card that can be read: {error}") from error
    text = Path(results.evaluation.settings.text or "Python's manual").name
    kind = "translation" if found.greedy is not None else "text-generation"
    metrics = [("loss", found.next_token.loss), ("perplexity", found.next_token.perplexity)]
    for name in ("bleu", "chrf", "word_error_rate"):
        value = getattr(found.beam, name, None)
        metrics += [] if value is None else [(name, value)]
    card.data.model_name = card.data.to_dict().get("model_name") or found.name
    card.data.eval_results = [
        EvalResult(task_type=kind, dataset_type="text", dataset_name=text, metric_type=metric, metric_value=value)
        for metric, value in metrics
    ]
    lines = table.markdown(found.name)
    over = found.next_token.intervals_over
    lines += [
        "",
        f"Held-out text: {text}. In brackets: 95% intervals over {over}, and costs compared with the original's.",
        *results.warnings(),
        "",
    ]
    for picture in CARD_PICTURES:
        if (shown / f"{picture}.png").is_file():
            shutil.copyfile(shown / f"{picture}.png", path.with_name(f"{picture}.png"))
            lines += [f"![{picture.replace('-', ' against ')}]({picture}.png)", ""]
    card.text = with_section(card.text, CARD_HEADING, "\n".join(lines))
    card.save(path)
