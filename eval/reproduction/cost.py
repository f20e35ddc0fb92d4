"""The cost of the first paper's shape: training, encoder and decoder, with all heads and with one (arXiv 1911.02150,
table 2: microseconds per output token)."""

import json
import shlex
import tempfile
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any

import datasets
import torch
from transformers import set_seed

from mqa_hf.base.devices import peak_rate
from mqa_hf.base.errors import MQAError
from mqa_hf.base.options import Job, Option
from mqa_hf.eval.benchmark import ORIGINAL, Benchmark
from mqa_hf.eval.benchmark_record import BenchmarkRecord
from mqa_hf.finetune.architecture import configuration
from mqa_hf.finetune.data import CollatePairs, TrainingSet
from mqa_hf.finetune.losses import Objective
from mqa_hf.finetune.options import Run
from mqa_hf.finetune.throughput import StepClock
from mqa_hf.finetune.trainer import operations_per_token, train
from mqa_hf.modeling_mqa_seq2seq import MQAForConditionalGeneration

from .recipe import FIRST, Heads, configured

STACK: dict[str, Any] = {
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "position_embedding": "learned",
    "gated_mlp": False,
    "hidden_act": "relu",
}
WIDENED = 5440  # d_ff of multi-query at equal parameters, section 4.1
WINDOW = 32
KEPT = ("device", "copy_bandwidth", "versions", "time_per_token_ms", "encoder_sec", "bytes_per_step", "floor_ms")
MODELS = {
    FIRST: Heads(),
    "multi-query": Heads(kv_heads=1),
    "multi-head local": Heads(window=WINDOW),
    "multi-query local": Heads(kv_heads=1, window=WINDOW),
}


def paper_config(name: str, scale: int = 1, length: int = 256) -> dict[str, Any]:
    """A model of the paper's tables with `length` positions, all widths divided by `scale`."""
    heads, stack = MODELS[name], {**STACK, "max_position_embeddings": length}
    if heads.kv_heads is not None:
        stack["intermediate_size"] = WIDENED
    for field in ("hidden_size", "intermediate_size"):
        stack[field] = stack[field] // scale
    shape = {
        "model_type": "mqa_seq2seq",
        "encoder": {**stack, "causal": False},
        "decoder": {**stack, "cross_num_key_value_heads": 8},
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
    }
    return configured(shape, heads)


def training_cost(name: str, config: Any, rows: int, length: int, steps: int) -> dict[str, Any]:
    """Seconds of a training step of `rows` random pairs with `length` tokens on each side."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, config.vocab_size, (2, rows, length), generator=generator).tolist()
    pairs = datasets.Dataset.from_dict({"input_ids": ids[0], "labels": ids[1]})
    schedule = Run(
        tokens=steps * rows * length,
        sequence_length=length,
        batch_tokens=rows * length,
        micro_batch=rows,
        learning_rate=1e-5,
        save_every=10**9,
        log_every=max(1, steps // 12),
        report_to=("none",),
    )
    set_seed(0)
    model, clock = MQAForConditionalGeneration(config), StepClock()
    text = TrainingSet(pairs, CollatePairs(0, 0), row_tokens=length)
    with tempfile.TemporaryDirectory() as place:
        train(name, model, Objective({"lm": 1.0}), schedule, text, Path(place), callbacks=[clock])
    seconds, peak = clock.seconds_per_step(), peak_rate()
    operations = rows * length * operations_per_token(model, None, length)
    return {
        "parameters": model.num_parameters(),
        "training_rows": rows,
        "training_length": length,
        "training_step_sec": seconds,
        "training_us_per_token": 1e6 * seconds / (rows * length),
        "training_operations_per_token": operations / (rows * length),
        "training_mfu": None if peak is None else operations / seconds / peak,
    }


@dataclass(frozen=True)
class Costs(Job[None]):
    """Time training and decoding of the first paper's shape; results are in WORK/cost.jsonl."""

    name = "cost"

    work: Annotated[Path, Option("Working directory.")]
    _: KW_ONLY
    batch: Annotated[int, Option("Rows decoded at once.", min=1)] = 1024
    length: Annotated[int, Option("Tokens of source and target.", min=4)] = 128
    rows: Annotated[int, Option("Pairs per training step, of twice the length.", min=1)] = 128
    steps: Annotated[int, Option("Of training.", min=4)] = 24
    scale: Annotated[int, Option("Divide the widths of the paper's shape by this.", min=1)] = 1

    def command(self) -> str:
        return shlex.join(["python", "-m", "mqa_hf.eval.reproduction", *self.words()])

    def run(self) -> None:
        """Time all models, with one line each in `work/cost.jsonl`, which is replaced."""
        self.work.mkdir(parents=True, exist_ok=True)
        lines = self.work / "cost.jsonl"
        lines.unlink(missing_ok=True)
        for name in MODELS:
            config = configuration(paper_config(name, self.scale, 2 * self.length))
            shape = self.work / "shapes" / name.replace(" ", "-")
            config.save_pretrained(shape)
            timed = self.decoding(shape)
            trained = training_cost(name, config, self.rows, 2 * self.length, self.steps)
            with lines.open("a", encoding="utf-8") as file:
                for record in timed:
                    said = {"model": name, "batch": self.batch, "length": self.length, "beams": record.beams}
                    found = said | record.model_dump(include=set(KEPT)) | trained | {"command": self.command()}
                    file.write(json.dumps(found) + "\n")

    def decoding(self, shape: Path) -> list[BenchmarkRecord]:
        """Time greedy decoding and 4 beams; raise MQAError if memory runs out."""
        timed = Benchmark(
            [str(shape)],
            kv_heads=[ORIGINAL],
            engines=["mqa-hf"],
            cells=[f"{self.batch}x{self.length}"],
            beams=[1, 4],
            tokens=self.length,
            prefill_limit=0,
            rounds=1,
        ).run()
        failed = [record.error for record in timed if record.error is not None]
        if failed:
            raise MQAError(f"{shape.name}: {failed[0]}; lower `batch` ({self.batch}) or `length` ({self.length})")
        return timed
