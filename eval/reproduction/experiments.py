"""From a recipe to chains of commands: what is pretrained, converted, trained on and measured, and in which order."""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from mqa_hf.conversion.errors import ConversionError
from mqa_hf.conversion.source import REPORT_FILE
from mqa_hf.eval.quality import RESULTS, cache_size
from mqa_hf.finetune.pretrain import REPORT as PRETRAINING
from mqa_hf.finetune.recipe import Step, command_group, flags
from mqa_hf.finetune.uptrain import REPORT as UPTRAINING

FIRST = "multi-head"  # of the models: what the others are compared with, and what is converted


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
        for name in ("num_key_value_heads", "cross_num_key_value_heads"):
            if name == "num_key_value_heads" or name in stack:
                stack[name] = kv_heads or stack["num_attention_heads"]
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
        after: whether the loss is that after the training; before: of the checkpoint that was trained.
        evaluations: results of `mqa-hf evaluate` by split, where the model translates.
    """

    said: dict[str, Any]
    checkpoint: Path
    training: Path
    after: bool = True
    evaluations: dict[str, Path] | None = None

    def record(self) -> dict[str, Any] | None:
        """What was measured, or `None` where that is not done."""
        evaluations = self.evaluations or {}
        if not all(path.is_file() for path in (self.training, *evaluations.values())):
            return None
        report = json.loads(self.training.read_text())
        found = {**self.said, "tokens": report["tokens"] if self.after else 0}
        found["cache_bytes"] = sum(cache_size(self.checkpoint).values())
        if "parameters" in report:
            config = report["config"]
            found["parameters"] = report["parameters"]
            found["intermediate_size"] = config.get("decoder", config)["intermediate_size"]
            found["loss"] = report["loss"]
        else:
            found["loss"] = report["validation"]["after" if self.after else "before"]["lm"]
        for split, path in evaluations.items():
            result = json.loads(path.read_text())
            (checkpoint,) = result["checkpoints"]
            for kind in ("greedy", "beam"):
                found[f"{split}_bleu_{kind}"] = checkpoint[kind]["bleu"]
            found["bleu_signature"] = checkpoint["greedy"]["bleu_signature"]
        return found


@dataclass(frozen=True)
class Chain:
    """Commands that run in one process, one after another.

    Attributes:
        name: of its directory.
        steps: of [`run_steps`].
        needs: chains that must be done.
        measured: checkpoints.
    """

    name: str
    steps: dict[str, Step]
    needs: tuple[str, ...]
    measured: tuple[Measured, ...]

    @property
    def done(self) -> bool:
        return all(step.result.is_file() for step in self.steps.values())


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
            ConversionError: where there is no such recipe.
        """
        name, sign, text = said.partition("=")
        shipped = files("mqa_hf.eval.reproduction") / "recipes"
        path: Any = Path(name) if name.endswith((".yaml", ".yml")) else shipped / f"{name}.yaml"
        if not sign or not path.is_file():
            known = ", ".join(sorted(p.name.removesuffix(".yaml") for p in shipped.iterdir()))
            raise ConversionError(f"{said!r} is no RECIPE=TEXT, where RECIPE is a YAML file or one of {known}")
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        return cls(Path(name).stem, recipe, text, work, device)

    def split(self, name: str) -> str:
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
            *flags(options, command_group().commands[command]),
        ]

    def evaluations(
        self, checkpoint: Path, directory: Path, needs: tuple[str, ...], splits: tuple[str, ...] = ("test",)
    ) -> dict[str, Step]:
        """Steps that translate; a language model has none."""
        if "evaluate" not in self.recipe:
            return {}
        options = flags(self.recipe["evaluate"], command_group().commands["evaluate"])
        found = {}
        for split in splits:
            output = directory / split
            words = ["evaluate", str(checkpoint), "--text", self.split(split), *self.columns, "--output", str(output)]
            found[f"{split} {checkpoint.name}"] = Step([*words, *options], output / RESULTS, needs)
        return found

    def place(self, name: str, seed: int) -> Path:
        return self.work / self.task / f"seed-{seed}" / name.replace(",", "").replace(" ", "-")

    def chain(self, name: str, seed: int, steps: dict[str, Step], needs: tuple[str, ...], measured: list[Measured]):
        return Chain(str(self.place(name, seed).relative_to(self.work)), steps, needs, tuple(measured))

    def results(self, steps: dict[str, Step]) -> dict[str, Path] | None:
        """By split, of [`evaluations`]."""
        return {name.split()[0]: step.result for name, step in steps.items()} or None

    def model(self, name: str, seed: int) -> Chain:
        """A model of the tables: pretrained, measured."""
        shape, place = self.recipe["shape"], self.place(name, seed)
        config = configured(shape, **self.recipe["models"][name])
        equal = [] if name == FIRST else ["--equal-parameters", json.dumps(configured(shape))]
        words = ["pretrain", str(place / "model"), "--config", json.dumps(config), *equal]
        words += ["--tokenizer", str(self.tokenizer), "--tokens", str(self.recipe["tokens"])]
        report = place / "model" / PRETRAINING
        steps = {"pretrain": Step([*words, *self.training("pretrain", seed)], report, costly=True)}
        translated = self.evaluations(place / "model", place, ("pretrain",), ("validation", "test"))
        said = {"task": self.task, "table": "models", "model": name, "seed": seed}
        measured = Measured(said, place / "model", report, evaluations=self.results(translated))
        return self.chain(name, seed, {**steps, **translated}, (), [measured])

    def conversion(self, name: str, seed: int) -> Chain:
        """A conversion of the first model, trained on shares of its tokens, each with a schedule of its own."""
        options = dict(self.recipe["convert"][name])
        loss, shares = options.pop("loss"), options.pop("shares", self.recipe["shares"])
        source, place = self.place(FIRST, seed) / "model", self.place(f"from {name}", seed)
        if options.get("method") == "shared":
            text = {"calibration": self.split("train"), "device": self.device, **self.recipe["calibrate"]}
            options |= text | ({"calibration-columns": self.recipe["columns"]} if self.columns else {})
        converted = place / "converted"
        words = ["convert", str(source), str(converted), *flags(options, command_group().commands["convert"])]
        steps = {"convert": Step(words, converted / REPORT_FILE, costly=True)}
        translated = self.evaluations(converted, place / "0", ("convert",))
        said = {"task": self.task, "table": "conversions", "model": name, "seed": seed, "loss_function": loss}
        measured: list[Measured] = []
        for share in shares:
            trained = place / f"trained-{share:g}"
            words = ["uptrain", str(converted), str(trained), "--tokens", str(round(share * self.recipe["tokens"]))]
            words += ["--loss", loss, *self.training("uptrain", seed)]
            words += ["--teacher", "none"] if loss == "lm" else []
            report, step = trained / UPTRAINING, f"train {share:g}"
            steps[step] = Step(words, report, ("convert",), costly=True)
            if not measured:
                before = Measured(said | {"share": 0.0}, converted, report, False, self.results(translated))
                steps |= translated
                measured.append(before)
            after = self.evaluations(trained, place / f"{share:g}", ("convert", step))
            steps |= after
            measured.append(Measured(said | {"share": share}, trained, report, True, self.results(after)))
        return self.chain(f"from {name}", seed, steps, (self.chain_name(FIRST, seed),), measured)

    @property
    def times(self) -> Step:
        """Time the first model and what it was converted to."""
        seed = self.recipe["seeds"][0]
        place, output = self.place, self.work / self.task / "times.jsonl"
        timed = [place(FIRST, seed) / "model", *(place(f"from {n}", seed) / "converted" for n in self.timed[1:])]
        words = [
            "benchmark",
            *map(str, timed),
            "--kv-heads",
            "original",
            "--engines",
            "mqa-hf",
            "--output",
            str(output),
        ]
        return Step([*words, *flags(self.recipe["times"], command_group().commands["benchmark"])], output)

    @property
    def timed(self) -> list[str]:
        """The first model, and conversions that differ in shape."""
        alike = ("first", "random", "original")  # in shape to "mean", or to the first model
        return [FIRST, *(name for name in self.recipe["convert"] if name not in alike)]

    def time_records(self) -> list[dict[str, Any]]:
        """What [`times`] has measured."""
        if not self.times.result.is_file():
            return []
        kept = ("batch", "context", "source", "beams", "time_per_token_ms", "bytes_per_step", "floor_ms", "device")
        found = [json.loads(line) for line in self.times.result.read_text().splitlines()]
        names = dict(zip(dict.fromkeys(r["shape"] for r in found), self.timed))
        said = {"task": self.task, "table": "times"}
        return [said | {"model": names[r["shape"]]} | {k: r[k] for k in kept if k in r} for r in found]

    def chain_name(self, name: str, seed: int) -> str:
        return str(self.place(name, seed).relative_to(self.work))

    def chains(self) -> Iterator[Chain]:
        """All, those that others need first."""
        for seed in self.recipe["seeds"]:
            for name in self.recipe["models"]:
                yield self.model(name, seed)
        for seed in self.recipe["seeds"]:
            for name in self.recipe["convert"]:
                yield self.conversion(name, seed)
