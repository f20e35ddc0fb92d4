"""From a recipe to chains of commands: what is pretrained, converted, trained on and measured, and in which order."""

import copy
import json
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from mqa_hf.base.errors import MQAError
from mqa_hf.base.files import REPORT_FILE, TRAINING_FILE, read_yaml
from mqa_hf.eval.evaluation_record import EvaluationRecord
from mqa_hf.eval.evaluator import cache_size
from mqa_hf.finetune.recipe import Step, command_group, flags, unfinished
from mqa_hf.finetune.records import PretrainingRecord

FIRST = "multi-head"  # of the models: what the others are compared with, and what is converted
TIMES = "times.json"  # which experiments have been timed
RECORD = "steps.json"  # in a chain's directory, which of its steps are done
NEEDED = ("shape", "vocab_size", "models", "seeds", "tokens", "train")
KNOWN = (*NEEDED, "columns", "pretrain", "uptrain", "evaluate", "calibrate", "times", "shares", "convert")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


def configured(
    shape: dict[str, Any],
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    window: int | None = None,
) -> dict[str, Any]:
    """A configuration of `shape` with other attention layers in all its stacks.

    Args:
        shape: fields of a configuration; with an encoder and a decoder, or of one stack.
        heads, head_dim: query heads and their width. Default: the shape's.
        kv_heads: key/value heads. Default: as many as query heads.
        window: of the decoder's self-attention. Default: none.
    """
    shape = copy.deepcopy(shape)
    stacks = [shape[side] for side in ("encoder", "decoder")] if "decoder" in shape else [shape]
    for stack in stacks:
        stack["head_dim"] = head_dim or stack["hidden_size"] // stack["num_attention_heads"]
        stack["num_attention_heads"] = heads or stack["num_attention_heads"]
        stack["num_key_value_heads"] = kv_heads or stack["num_attention_heads"]
        if "cross_num_key_value_heads" in stack:
            stack["cross_num_key_value_heads"] = stack["num_key_value_heads"]
    if window is not None:
        stacks[-1]["layer_types"] = ["sliding_attention"] * stacks[-1]["num_hidden_layers"]
        stacks[-1]["sliding_window"] = window
    return shape


@dataclass(frozen=True)
class Measured:
    """A checkpoint of a chain, and where its numbers stand.

    Attributes:
        said: what it is.
        checkpoint: its directory.
        training: the report of `mqa-hf pretrain` or `mqa-hf uptrain` with its loss.
        command: that made the report.
        after: whether the loss is that after the training; before: of the checkpoint that was trained.
        evaluations: results of `mqa-hf evaluate` by split, where the model translates.
    """

    said: dict[str, Any]
    checkpoint: Path
    training: Path
    command: str
    after: bool = True
    evaluations: dict[str, Path] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """What was measured."""
        report = json.loads(self.training.read_text())
        found = {**self.said, "tokens": report["tokens"] if self.after else 0}
        cache = cache_size(self.checkpoint)  # of pairs a token more of the target and one more of the source
        found["cache_bytes"] = sum(cache.values())
        if "parameters" in report:
            config = report["config"]
            found["parameters"] = report["parameters"]
            found["intermediate_size"] = config.get("decoder", config)["intermediate_size"]
            found["loss"] = report["loss"]
        else:
            found["loss"] = report["validation"]["after" if self.after else "before"]["lm"]
        for split, path in self.evaluations.items():
            result = json.loads(path.read_text())
            (checkpoint,) = result["checkpoints"]
            for kind in ("greedy", "beam"):
                found[f"{split}_bleu_{kind}"] = checkpoint[kind]["bleu"]
            found["bleu_signature"] = checkpoint["greedy"]["bleu_signature"]
        return {**found, "command": self.command}


@dataclass(frozen=True)
class Chain:
    """Commands that run in one process, one after another.

    Attributes:
        place: its directory.
        name: of its directory under that of all experiments.
        seed: of its trainings.
        steps: of [`run_steps`].
        needs: chains that must be done.
        measured: checkpoints.
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
        """What was measured by the steps that are done."""
        missing = {self.steps[name].result for name in unfinished(self.steps, self.place / RECORD)}
        return [m.record() for m in self.measured if not missing & {m.training, *m.evaluations.values()}]


@dataclass(frozen=True)
class Experiment:
    """A recipe with its text.

    Attributes:
        task: name of the recipe.
        recipe: what stands in the file.
        text: a directory with `train.jsonl.xz`, `validation.jsonl.xz` and, for pairs, `test.jsonl.xz`; or an id of the
            Hub's data sets with these splits.
        work: directory for everything.
        device: where heads are fitted.
    """

    task: str
    recipe: dict[str, Any]
    text: str
    work: Path
    device: str

    @classmethod
    def parse(cls, said: str, work: Path, device: str) -> "Experiment":
        """`RECIPE=TEXT`; a recipe is one of this package's by its name, or a file.

        Raises:
            MQAError: where there is no such recipe or text, or the recipe says what is not understood.
        """
        name, sign, text = said.partition("=")
        shipped = files("mqa_hf.eval.reproduction") / "recipes"
        path: Any = Path(name) if name.endswith((".yaml", ".yml")) else shipped / f"{name}.yaml"
        if not sign or not path.is_file():
            known = ", ".join(sorted(p.name.removesuffix(".yaml") for p in shipped.iterdir()))
            raise MQAError(f"{said!r} is no RECIPE=TEXT, where RECIPE is a YAML file or one of {known}")
        recipe = read_yaml(path)
        check(recipe, name)
        experiment = cls(Path(name).stem, recipe, text, work, device)
        splits = ("train", "validation", *(("test",) if "evaluate" in recipe else ()))
        missing = [experiment.split(split) for split in splits if not Path(experiment.split(split)).is_file()]
        if Path(text).is_dir() and missing:
            raise MQAError(f"{text} has not all texts that {name} needs: {', '.join(missing)} is not there")
        if not Path(text).is_dir() and not HUB_ID.fullmatch(text):
            raise MQAError(f"{text} is no directory, and no id of the Hub's data sets (name/name:configuration)")
        return experiment

    def split(self, name: str) -> str:
        """Where the text of a split is."""
        if Path(self.text).is_dir():
            return str((Path(self.text) / f"{name}.jsonl.xz").resolve())
        return self.text if name == "train" else f"{self.text}[{name}]"

    @property
    def tokenizer(self) -> Path:
        return self.work / self.task / "tokenizer"

    @property
    def columns(self) -> list[str]:
        return ["--columns", self.recipe["columns"]] if "columns" in self.recipe else []

    def training(self, command: str, seed: int) -> list[str]:
        """Options of both kinds of training."""
        options = {**self.recipe["train"], **self.recipe.get(command, {}), "seed": seed, "report-to": "none"}
        return [
            *("--dataset", self.split("train"), "--validation", self.split("validation")),
            *self.columns,
            *option_words(command, options),
        ]

    def evaluations(
        self, checkpoint: Path, directory: Path, needs: tuple[str, ...], splits: tuple[str, ...] = ("test",)
    ) -> dict[str, Step]:
        """Steps that translate; a language model has none."""
        if "evaluate" not in self.recipe:
            return {}
        options = option_words("evaluate", self.recipe["evaluate"])
        found = {}
        for split in splits:
            output = directory / split
            words = ["evaluate", str(checkpoint), "--text", self.split(split), *self.columns, "--output", str(output)]
            found[f"{split} {checkpoint.name}"] = Step([*words, *options], output / EvaluationRecord.file, needs)
        return found

    def place(self, name: str, seed: int) -> Path:
        """The directory of a chain."""
        return self.work / self.task / f"seed-{seed}" / name.replace(",", "").replace(" ", "-")

    def chain(
        self, name: str, seed: int, steps: dict[str, Step], measured: list[Measured], needs: tuple[Path, ...] = ()
    ) -> Chain:
        place, *before = (str(path.relative_to(self.work)) for path in (self.place(name, seed), *needs))
        return Chain(self.place(name, seed), place, seed, steps, tuple(before), tuple(measured))

    def shown(self, words: list[str]) -> str:
        """A command as it is noted: where work and text are is left out."""
        line = shlex.join(["mqa-hf", *words]).replace(f"{self.work}{os.sep}", "")
        return line.replace(f"{Path(self.text).resolve()}{os.sep}", "") if Path(self.text).is_dir() else line

    def model(self, name: str, seed: int) -> Chain:
        """A model of the tables: pretrained, measured."""
        shape, place = self.recipe["shape"], self.place(name, seed)
        config = configured(shape, **self.recipe["models"][name])
        equal = [] if name == FIRST else ["--equal-parameters", json.dumps(configured(shape))]
        words = ["pretrain", str(place / "model"), "--config", json.dumps(config), *equal]
        words += ["--tokenizer", str(self.tokenizer), "--tokens", str(self.recipe["tokens"])]
        words += self.training("pretrain", seed)
        report = place / "model" / PretrainingRecord.file
        translated = self.evaluations(place / "model", place, ("pretrain",), ("validation", "test"))
        measured = Measured(
            {"task": self.task, "table": "models", "model": name, "seed": seed},
            place / "model",
            report,
            self.shown(words),
            evaluations=by_split(translated),
        )
        return self.chain(name, seed, {"pretrain": Step(words, report, costly=True), **translated}, [measured])

    def conversion(self, name: str, seed: int) -> Chain:
        """A conversion of the first model, trained on shares of its tokens, each with a schedule of its own."""
        options = dict(self.recipe["convert"][name])
        loss, shares = options.pop("loss"), options.pop("shares", self.recipe["shares"])
        source, place = self.place(FIRST, seed) / "model", self.place(f"from {name}", seed)
        options["seed"] = seed
        if options.get("method") == "shared":
            text = {"calibration": self.split("train"), "device": self.device, **self.recipe["calibrate"]}
            options |= text | ({"calibration-columns": self.recipe["columns"]} if self.columns else {})
        converted = place / "converted"
        words = ["convert", str(source), str(converted), *option_words("convert", options)]
        steps = {"convert": Step(words, converted / REPORT_FILE, costly=True)}
        said = {"task": self.task, "table": "conversions", "model": name, "seed": seed, "loss_function": loss}
        translated = self.evaluations(converted, place / "0", ("convert",))
        # The loss before a training stands in the report of the first one.
        before = place / f"trained-{shares[0]:g}" / TRAINING_FILE
        measured = [Measured(said | {"share": 0.0}, converted, before, self.shown(words), False, by_split(translated))]
        steps |= translated
        for share in shares:
            trained, step = place / f"trained-{share:g}", f"train {share:g}"
            words = ["uptrain", str(converted), str(trained), "--tokens", str(round(share * self.recipe["tokens"]))]
            words += ["--loss", loss, *self.training("uptrain", seed)]
            words += ["--teacher", "none"] if loss == "lm" else []
            steps[step] = Step(words, trained / TRAINING_FILE, ("convert",), costly=True)
            translated = self.evaluations(trained, place / f"{share:g}", ("convert", step))
            steps |= translated
            measured.append(
                Measured(
                    said | {"share": share},
                    trained,
                    trained / TRAINING_FILE,
                    self.shown(words),
                    evaluations=by_split(translated),
                )
            )
        return self.chain(f"from {name}", seed, steps, measured, (self.place(FIRST, seed),))

    @property
    def times(self) -> Step | None:
        """Time the first model and conversions that differ from it and from each other in shape."""
        if "times" not in self.recipe:
            return None
        output = self.work / self.task / "times.jsonl"
        words = ["benchmark", *map(str, self.timed), "--kv-heads", "original", "--engines", "mqa-hf"]
        return Step([*words, "--output", str(output), *option_words("benchmark", self.recipe["times"])], output)

    @property
    def timed(self) -> list[Path]:
        """The checkpoints that are timed: one of each of [`shapes`]."""
        seed = self.recipe["seeds"][0]
        first, *others = (names[0] for names in self.shapes)
        return [self.place(first, seed) / "model", *(self.place(f"from {n}", seed) / "converted" for n in others)]

    @property
    def shapes(self) -> list[list[str]]:
        """Names of the first model and of its conversions, alike ones together, its own first."""
        shape = self.recipe["shape"]
        heads = shape.get("decoder", shape)["num_attention_heads"]
        found = {(heads, 1): [FIRST]}
        for name, options in self.recipe.get("convert", {}).items():
            found.setdefault((options.get("kv-heads", 1), options.get("head-width", 1)), []).append(name)
        return list(found.values())

    def time_records(self) -> list[dict[str, Any]]:
        """What [`times`] has measured; `models` are all that have the shape."""
        step = self.times
        if step is None or unfinished({self.task: step}, self.work / TIMES):
            return []
        kept = ("batch", "context", "source", "beams", "time_per_token_ms", "bytes_per_step", "floor_ms", "device")
        found = read_lines(step.result)
        names = dict(zip(dict.fromkeys(r["shape"] for r in found), self.shapes))
        said = {"task": self.task, "table": "times", "command": self.shown(step.words)}
        return [
            {**said, "model": names[r["shape"]][0], "models": names[r["shape"]], **{k: r[k] for k in kept if k in r}}
            for r in found
            if "error" not in r
        ]

    def chains(self) -> Iterator[Chain]:
        """All, those that others need first."""
        for seed in self.recipe["seeds"]:
            for name in self.recipe["models"]:
                yield self.model(name, seed)
        for seed in self.recipe["seeds"]:
            for name in self.recipe.get("convert", {}):
                yield self.conversion(name, seed)


def option_words(command: str, options: dict[str, Any]) -> list[str]:
    """Options of a command of `mqa-hf` as words."""
    return flags(options, command_group().commands[command])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def by_split(steps: dict[str, Step]) -> dict[str, Path]:
    """Results of [`Experiment.evaluations`]."""
    return {name.split()[0]: step.result for name, step in steps.items()}


def check(recipe: Any, name: str) -> None:
    """Raise MQAError for a recipe that lacks something, or says what nothing reads."""
    if not isinstance(recipe, dict) or not set(NEEDED) <= set(recipe):
        raise MQAError(f"{name} needs {', '.join(NEEDED)}")
    unknown = [str(key) for key in recipe if key not in KNOWN]
    if unknown:
        raise MQAError(f"{name}: {', '.join(unknown)}: a recipe has {', '.join(KNOWN)}")
    if FIRST not in recipe["models"]:
        raise MQAError(f"{name} needs a model called {FIRST}, which the others are compared with")
    if "convert" in recipe and not {"shares", "calibrate"} <= set(recipe):
        raise MQAError(f"{name} needs shares and calibrate beside convert")
