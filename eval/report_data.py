"""What a report shows: an evaluation, timings, and what stands beside the weights of the checkpoints."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mqa_hf.base.errors import MQAError
from mqa_hf.base.files import REPORT_FILE, TRAINING_FILE, read_json
from mqa_hf.base.records import Record
from mqa_hf.conversion.record import LayerRecord
from mqa_hf.finetune.records import UptrainingRecord

from .benchmark_record import BenchmarkRecord
from .evaluation_record import CheckpointResult, EvaluationRecord

NO_SHAPE = ("_name_or_path", "transformers_version", "dtype", "rope_frequencies")  # fields without effect on speed
OWN_ENGINE = "mqa-hf"
FEW = 20  # documents; intervals over fewer are often too narrow
Cell = tuple[int, int]  # batch and context
# Metrics of generated text: field, name, form of a value, and 1 if less is better, else -1.
QUALITIES = (("bleu", "BLEU", "BLEU {:.1f}", -1), ("word_error_rate", "word errors", "{:.1%} word errors", 1))


class ConversionSummary(Record):
    """What a report shows of `conversion.json`; both fields are missing if the checkpoint was not converted."""

    file = REPORT_FILE

    layers: list[LayerRecord] = []
    command: str | None = None


@dataclass(frozen=True)
class Timing:
    """A line of a benchmark, and the evaluated checkpoint that it timed.

    Attributes:
        record: the line.
        name: name of the checkpoint; `None` if it timed another model.
        keys: how keys of a latent were kept, if the checkpoint was timed both ways.
    """

    record: BenchmarkRecord
    name: str | None
    keys: str | None = None

    @property
    def label(self) -> str:
        """The checkpoint, or shape and model, and the engine if it is not this package's."""
        record = self.record
        if self.name:
            keys = f", {self.keys} keys" if self.keys else ""
            return self.name + keys if record.engine == OWN_ENGINE else f"{self.name}, {record.engine}"
        return f"{Path(record.shape).name}: {record.model}"

    @property
    def compared(self) -> bool:
        """Whether it is the step time of a checkpoint in this package's engine."""
        return self.record.error is None and self.name is not None and self.record.engine == OWN_ENGINE


@dataclass(frozen=True)
class Quality:
    """The number that checkpoints are compared by.

    Attributes:
        values: by checkpoint, the number and the ends of its interval.
        title: name of the number.
        sign: 1 if less is better, else -1.
        form: format of a value in a sentence.
    """

    values: dict[str, tuple[float, float, float]]
    title: str
    sign: int
    form: str

    @property
    def logarithmic(self) -> bool:
        """Whether it is drawn on a logarithmic axis, as losses are."""
        return self.title.startswith("held-out")

    def said(self, name: str) -> str:
        return self.form.format(self.values[name][0])


@dataclass(frozen=True)
class Results:
    """All that a report shows.

    Attributes:
        evaluation: results of `mqa-hf evaluate`.
        timings: results of `mqa-hf benchmark`.
        timed_as: for each checkpoint that was not timed, a timed one of the same shape, by name.
        conversions, trainings: records beside a checkpoint's weights, by its name.
    """

    evaluation: EvaluationRecord
    timings: list[Timing]
    timed_as: dict[str, str]
    conversions: dict[str, ConversionSummary]
    trainings: dict[str, UptrainingRecord]

    @property
    def checkpoints(self) -> list[CheckpointResult]:
        return self.evaluation.checkpoints

    @property
    def names(self) -> list[str]:
        return [found.name for found in self.checkpoints]

    def shared_cells(self) -> list[Cell]:
        """Batch and context of the timings that all checkpoints with timings share, the largest last."""
        by_name: dict[str, set[Cell]] = {}
        for timing in self.timings:
            record = timing.record
            if timing.compared and record.beams == 1 and not record.largest_batch:
                by_name.setdefault(str(timing.name), set()).add((record.batch, record.context))
        shared = set.intersection(*by_name.values()) if by_name else set()
        return sorted(shared, key=lambda cell: (cell[0] * cell[1], cell))

    def step_times(self, cell: Cell) -> dict[str, float]:
        """Milliseconds per step by checkpoint; with latents, those of the faster way to keep their keys."""
        measured: dict[str | None, float] = {}
        for timing in self.timings:
            record, name = timing.record, timing.name
            time = record.time_per_token_ms
            if time and timing.compared and (record.batch, record.context) == cell and record.beams == 1:
                measured[name] = min(time, measured.get(name, time)) if timing.keys else time
        found = {name: measured.get(self.timed_as.get(name, name)) for name in self.names}
        return {name: time for name, time in found.items() if time is not None}

    def quality(self) -> Quality:
        """BLEU with beams for translations, word errors for transcripts, else the loss."""
        first = self.checkpoints[0]
        kind, name, form, better = "next_token", "loss", "{:.3f} nats per token", 1
        title = "held-out loss, nats per token"
        for metric, said, as_text, sign in QUALITIES:
            if getattr(first.beam, metric, None) is not None:
                kind, name, form, better = "beam", metric, as_text, sign
                title = f"{said}, beam {self.evaluation.settings.beams}"
        found = {}
        for checkpoint in self.checkpoints:
            numbers = getattr(checkpoint, kind)
            value = getattr(numbers, name, None)
            if value is None:
                raise MQAError(f"{checkpoint.name} has no {title}, which {first.name} has; evaluate them together")
            low, high = getattr(numbers, f"{name}_interval") or (value, value)
            found[checkpoint.name] = (value, min(low, value), max(high, value))
        return Quality(found, title, better, form)

    def warnings(self) -> list[str]:
        """Sentences about confidence intervals that rest on few documents or texts, or that are missing."""
        said = []
        next_token = [c.next_token for c in self.checkpoints]
        documents, over = min(found.documents for found in next_token), next_token[0].intervals_over
        if any(found.loss_interval is None for found in next_token):
            said.append(f"There are no confidence intervals for the losses, since they rest on {counted(documents)}.")
        elif documents < FEW:
            said.append(f"The confidence intervals of the losses rest on only {counted(documents)}.")
            if over != "documents":
                said.append(f"They are computed over {over}, and {over} of one document are not independent.")
        texts = {
            "generated texts": [c.writing.texts for c in self.checkpoints if c.writing],
            "scored texts": [part.texts for c in self.checkpoints for part in (c.greedy, c.beam) if part],
        }
        for what, counts in texts.items():
            if 0 < min(counts, default=0) < FEW:
                said.append(f"The confidence intervals of {what} rest on only {counted(min(counts), 'text')}.")
        return said


def counted(number: int, what: str = "document") -> str:
    return f"{number:,} {what}" + "s" * (number != 1)


def read_results(evaluation: Path, benchmarks: Sequence[Path]) -> Results:
    """Everything that is known of the checkpoints of an evaluation.

    Args:
        evaluation: `evaluation.json`, or the directory that holds it.
        benchmarks: files of `mqa-hf benchmark --output`.

    Raises:
        MQAError: where there are no such results.
    """
    found = read_evaluation(evaluation)
    names = {Path(c.checkpoint): c.name for c in found.checkpoints}
    given = {c.given: c.name for c in found.checkpoints}
    timings: list[Timing] = []
    for file in benchmarks:
        for record in BenchmarkRecord.read_lines(file):
            # A model with fewer heads than the checkpoint is not the checkpoint.
            name = names.get(Path(record.shape).resolve()) or given.get(record.shape)
            timings.append(Timing(record, name if record.original else None))
    ways: dict[str | None, set[str | None]] = {}
    for timing in timings:
        if timing.compared and timing.record.keys:
            ways.setdefault(timing.name, set()).add(timing.record.keys)
    timings = [replace(t, keys=t.record.keys) if len(ways.get(t.name, ())) > 1 else t for t in timings]
    conversions, trainings = {}, {}
    for directory, name in names.items():
        if (directory / REPORT_FILE).is_file():
            conversions[name] = ConversionSummary.read(directory)
        if (directory / TRAINING_FILE).is_file():
            trainings[name] = UptrainingRecord.read(directory)
            if any(line.get("step") is None for lines in trainings[name].log.values() for line in lines):
                raise MQAError(f"{directory / TRAINING_FILE}: a line of its log has no step")
    timed = {timing.name for timing in timings if timing.compared}
    shapes = {name: shape_of(directory) for directory, name in names.items()}
    measured = {shape: name for name, shape in shapes.items() if name in timed}
    timed_as = {n: measured[shape] for n, shape in shapes.items() if n not in timed and shape in measured}
    return Results(found, timings, timed_as, conversions, trainings)


def read_evaluation(place: Path) -> EvaluationRecord:
    """The results in a file or directory; raises MQAError where there are none, or not yet."""
    path = place / EvaluationRecord.file if place.is_dir() else place
    if place.is_dir() and not path.exists() and any(place.glob("*/key.json")):
        raise MQAError(
            f"{place} holds measurements but no {path.name}: the evaluation is not finished; give the same "
            "mqa-hf evaluate command again, and it goes on"
        )
    return EvaluationRecord.read(path)


def shape_of(directory: Path) -> str:
    """The fields of the configuration that determine the time of a step, as JSON."""
    path = directory / "config.json"
    said = read_json(path) if path.is_file() else {"directory": str(directory)}
    return json.dumps({name: value for name, value in said.items() if name not in NO_SHAPE}, sort_keys=True)
