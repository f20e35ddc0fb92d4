"""Turn a recipe into chains of jobs: pretraining, conversion, further training and measurement, in order."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mqa_hf.base.errors import MQAError
from mqa_hf.base.files import REPORT_FILE
from mqa_hf.base.options import Job
from mqa_hf.base.steps import Step, unfinished
from mqa_hf.conversion.convert import Conversion
from mqa_hf.eval.benchmark import ORIGINAL, Benchmark
from mqa_hf.eval.benchmark_record import BenchmarkRecord
from mqa_hf.eval.evaluate import Evaluation
from mqa_hf.eval.evaluation_record import EvaluationRecord
from mqa_hf.eval.evaluator import cached
from mqa_hf.finetune.pretrain import Pretraining
from mqa_hf.finetune.records import PretrainingRecord, UptrainingRecord
from mqa_hf.finetune.uptrain import NO_TEACHER, Uptraining

from .recipe import FIRST, Recipe, configured, read_recipe

TIMES = "times.json"  # experiments that have been timed
RECORD = "steps.json"  # finished steps, in a chain's directory
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
SHOWN = ("batch", "context", "source", "beams", "time_per_token_ms", "bytes_per_step", "floor_ms", "device")

J = TypeVar("J", bound=Job[Any])


@dataclass(frozen=True)
class Measured:
    """A checkpoint of a chain, and the files with its results.

    Attributes:
        said: fields that describe it.
        checkpoint: its directory.
        training: the report of `mqa-hf pretrain` or `mqa-hf uptrain` with its loss.
        command: the command that made the report.
        after: whether to take the loss after the training, or before it.
        evaluations: results of `mqa-hf evaluate` by split, for models that translate.
    """

    said: dict[str, Any]
    checkpoint: Path
    training: Path
    command: str
    after: bool = True
    evaluations: dict[str, Path] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The results."""
        found = dict(self.said)
        # With pairs, one more token of the target and one more of the source.
        kept = cached(self.checkpoint)
        size = {"cache_bytes": sum(kept.get(f"{name}kv_bytes_per_token", 0) for name in ("", "cross_"))}
        if self.training.name == PretrainingRecord.file:
            made = PretrainingRecord.read(self.training)
            found |= {"tokens": made.tokens, **size, "parameters": made.parameters}
            found["intermediate_size"] = made.config.get("decoder", made.config)["intermediate_size"]
            found["loss"] = made.loss
        else:
            trained = UptrainingRecord.read(self.training)
            assert trained.validation is not None, "every recipe has validation text"
            losses = trained.validation.after if self.after else trained.validation.before
            found |= {"tokens": trained.tokens if self.after else 0, **size, "loss": losses["lm"]}
        for split, path in self.evaluations.items():
            (checkpoint,) = EvaluationRecord.read(path).checkpoints
            for kind, written in (("greedy", checkpoint.greedy), ("beam", checkpoint.beam)):
                assert written is not None, "models that are evaluated translate"
                found[f"{split}_bleu_{kind}"] = written.bleu
                found["bleu_signature"] = written.bleu_signature
        return {**found, "command": self.command}


@dataclass(frozen=True)
class Chain:
    """Commands that run in sequence in one process.

    Attributes:
        place: its directory.
        name: path of its directory below that of all experiments.
        seed: seed of its trainings.
        steps: steps for [`run_steps`].
        needs: chains that must be done first.
        measured: checkpoints to measure.
    """

    place: Path
    name: str
    seed: int
    steps: dict[str, Step]
    needs: tuple[str, ...]
    measured: tuple[Measured, ...]

    @property
    def done(self) -> bool:
        return not unfinished(self.steps, self.place / RECORD)

    def records(self) -> list[dict[str, Any]]:
        """Results of the finished steps."""
        missing = {self.steps[name].result for name in unfinished(self.steps, self.place / RECORD)}
        return [m.record() for m in self.measured if not missing & {m.training, *m.evaluations.values()}]


@dataclass(frozen=True)
class Experiment:
    """A recipe with its text.

    Attributes:
        task: name of the recipe.
        recipe: content of the file.
        text: a directory with `train.jsonl.xz`, `validation.jsonl.xz` and, for pairs, `test.jsonl.xz`; or a dataset id
            with these splits.
        work: working directory.
        device: device for fitting heads.
    """

    task: str
    recipe: Recipe
    text: str
    work: Path
    device: str

    @classmethod
    def parse(cls, said: str, work: Path, device: str) -> "Experiment":
        """`RECIPE=TEXT`.

        Raises:
            MQAError: if the recipe or text does not exist, or the recipe is invalid.
        """
        name, sign, text = said.partition("=")
        if not sign:
            raise MQAError(f"{said!r} is not RECIPE=TEXT")
        recipe = read_recipe(name)
        experiment = cls(Path(name).stem, recipe, text, work, device)
        missing = [path for split in recipe.splits if not os.path.isfile(path := experiment.split(split))]
        if os.path.isdir(text) and missing:
            raise MQAError(f"{text} lacks texts that {name} needs: {', '.join(missing)}")
        if not os.path.isdir(text) and not HUB_ID.fullmatch(text):
            raise MQAError(f"{text} is neither a directory nor a dataset id (name/name:configuration)")
        return experiment

    def split(self, name: str) -> str:
        """Path or dataset id of a split's text."""
        if os.path.isdir(self.text):
            return str((Path(self.text) / f"{name}.jsonl.xz").resolve())
        return self.text if name == "train" else f"{self.text}[{name}]"

    @property
    def tokenizer(self) -> Path:
        return self.work / self.task / "tokenizer"

    def job(self, kind: type[J], *options: dict[str, Any]) -> J:
        """A job with these options, the last one of a name taking effect; raises MQAError if they are invalid."""
        given = {name.replace("-", "_"): value for some in options for name, value in some.items()}
        try:
            return kind.of(given)
        except MQAError as error:
            raise MQAError(f"{self.task}, {kind.name}: {error}") from error

    def training(self, kind: type[J], seed: int, options: dict[str, Any]) -> J:
        """A job of pretraining or uptraining."""
        text = {"dataset": [self.split("train")], "validation": self.split("validation")}
        special = self.recipe.pretrain if kind.name == Pretraining.name else self.recipe.uptrain
        always = {"seed": seed, "report_to": "none"}
        columns = {"columns": self.recipe.columns or ()}
        return self.job(kind, text, columns, options, self.recipe.train, special, always)

    def evaluations(
        self, checkpoint: Path, directory: Path, needs: tuple[str, ...], splits: tuple[str, ...] = ("test",)
    ) -> dict[str, Step]:
        """Steps that translate; none for a language model."""
        if self.recipe.evaluate is None:
            return {}
        found = {}
        for split in splits:
            output = directory / split
            here = {"original": checkpoint, "text": self.split(split), "output": output}
            job = self.job(Evaluation, here, {"columns": self.recipe.columns or ()}, self.recipe.evaluate)
            found[f"{split} {checkpoint.name}"] = Step(job, output / EvaluationRecord.file, needs)
        return found

    def place(self, name: str, seed: int) -> Path:
        """The directory of a chain."""
        return self.work / self.task / f"seed-{seed}" / name.replace(",", "").replace(" ", "-")

    def chain(
        self, name: str, seed: int, steps: dict[str, Step], measured: list[Measured], needs: tuple[Path, ...] = ()
    ) -> Chain:
        place, *before = (str(path.relative_to(self.work)) for path in (self.place(name, seed), *needs))
        return Chain(self.place(name, seed), place, seed, steps, tuple(before), tuple(measured))

    def shown(self, job: Job[Any]) -> str:
        """A command as recorded, without the paths of work and text."""
        line = job.command().replace(f"{self.work}{os.sep}", "")
        return line.replace(f"{Path(self.text).resolve()}{os.sep}", "") if os.path.isdir(self.text) else line

    def model(self, name: str, seed: int) -> Chain:
        """A model in the tables: pretrained and measured."""
        shape, place = self.recipe.shape, self.place(name, seed)
        options = {
            "output": place / "model",
            "config": configured(shape, self.recipe.models[name]),
            "equal_parameters": None if name == FIRST else configured(shape),
            "tokenizer": str(self.tokenizer),
            "tokens": self.recipe.tokens,
        }
        job, report = self.training(Pretraining, seed, options), place / "model" / PretrainingRecord.file
        translated = self.evaluations(place / "model", place, ("pretrain",), ("validation", "test"))
        said = {"task": self.task, "table": "models", "model": name, "seed": seed}
        measured = Measured(said, place / "model", report, self.shown(job), evaluations=by_split(translated))
        return self.chain(name, seed, {"pretrain": Step(job, report, costly=True), **translated}, [measured])

    def conversion(self, name: str, seed: int) -> Conversion:
        """The job that converts the first model."""
        options = {**self.recipe.convert[name].options, "seed": seed}
        if options.get("method") == "shared":
            text = {"calibration": self.split("train"), "calibration_columns": self.recipe.columns or ()}
            options = {**options, **text, "device": self.device, **(self.recipe.calibrate or {})}
        source, output = self.place(FIRST, seed) / "model", self.place(f"from {name}", seed) / "converted"
        return self.job(Conversion, {"source": source, "output": output}, options)

    def converted(self, name: str, seed: int) -> Chain:
        """A conversion of the first model, trained on shares of its tokens, each with its own schedule."""
        loss, shares = self.recipe.convert[name].loss, self.recipe.shares_of(name)
        place, job = self.place(f"from {name}", seed), self.conversion(name, seed)
        student = place / "converted"
        steps = {"convert": Step(job, student / REPORT_FILE, costly=True)}
        said = {"task": self.task, "table": "conversions", "model": name, "seed": seed, "loss_function": loss}
        translated = self.evaluations(student, place / "0", ("convert",))
        # The loss before training is in the report of the first training.
        before = place / f"trained-{shares[0]:g}" / UptrainingRecord.file
        measured = [Measured(said | {"share": 0.0}, student, before, self.shown(job), False, by_split(translated))]
        steps |= translated
        for share in shares:
            output, step = place / f"trained-{share:g}", f"train {share:g}"
            options = {"student": student, "output": output, "tokens": round(share * self.recipe.tokens), "loss": loss}
            teacher = {"teacher": NO_TEACHER} if loss == "lm" else {}
            training = self.training(Uptraining, seed, {**options, **teacher})
            report = output / UptrainingRecord.file
            steps[step] = Step(training, report, ("convert",), costly=True)
            translated = self.evaluations(output, place / f"{share:g}", ("convert", step))
            steps |= translated
            line = self.shown(training)
            measured.append(Measured(said | {"share": share}, output, report, line, evaluations=by_split(translated)))
        return self.chain(f"from {name}", seed, steps, measured, (self.place(FIRST, seed),))

    @property
    def times(self) -> Step | None:
        """Time the first model and conversions that differ from it and from each other in shape."""
        if self.recipe.times is None:
            return None
        output = self.work / self.task / "times.jsonl"
        here = {"shapes": self.timed, "kv_heads": [ORIGINAL], "engines": ["mqa-hf"], "output": output}
        return Step(self.job(Benchmark, here, self.recipe.times), output)

    @property
    def timed(self) -> list[Path]:
        """The checkpoints to time: one of each of [`shapes`]."""
        seed = self.recipe.seeds[0]
        first, *others = (names[0] for names in self.shapes)
        return [self.place(first, seed) / "model", *(self.place(f"from {n}", seed) / "converted" for n in others)]

    @property
    def shapes(self) -> list[list[str]]:
        """Names of the first model and its conversions, grouped by shape, the first model's group first."""
        shape, seed = self.recipe.shape, self.recipe.seeds[0]
        heads = shape.get("decoder", shape)["num_attention_heads"]
        found = {(heads, 1.0): [FIRST]}
        for name in self.recipe.convert:
            job = self.conversion(name, seed)
            found.setdefault((job.kv_heads, job.head_width), []).append(name)
        return list(found.values())

    def time_records(self) -> list[dict[str, Any]]:
        """Results of [`times`]; `models` lists all models with the shape."""
        step = self.times
        if step is None or unfinished({self.task: step}, self.work / TIMES):
            return []
        found = BenchmarkRecord.read_lines(step.result)
        names = dict(zip(dict.fromkeys(r.shape for r in found), self.shapes))
        said = {"task": self.task, "table": "times", "command": self.shown(step.job)}
        kept = [(names[r.shape], r.model_dump(include=set(SHOWN), exclude_none=True)) for r in found if not r.error]
        return [
            {**said, "model": models[0], "models": models, **{name: r[name] for name in SHOWN if name in r}}
            for models, r in kept
        ]

    def chains(self) -> Iterator[Chain]:
        """All chains, those that others need first."""
        for seed in self.recipe.seeds:
            for name in self.recipe.models:
                yield self.model(name, seed)
        for seed in self.recipe.seeds:
            for name in self.recipe.convert:
                yield self.converted(name, seed)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; raises MQAError if one is invalid."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            content = json.loads(line)
        except ValueError as error:
            raise MQAError(f"{path}, line {number}: {error}") from error
        if not isinstance(content, dict) or not isinstance(content.get("model"), str):
            raise MQAError(f"{path}, line {number} is not a record of an experiment: it names no model")
        found.append(content)
    return found


def by_split(steps: dict[str, Step]) -> dict[str, Path]:
    """Results of [`Experiment.evaluations`]."""
    return {name.split()[0]: step.result for name, step in steps.items()}
