"""Results of `mqa-hf benchmark`: a file with one JSON record per line."""

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from mqa_hf.base.errors import MQAError
from mqa_hf.base.records import Record
from mqa_hf.conversion.record import Latent

Size = Annotated[int, Field(ge=0, lt=2**63)]


class BenchmarkRecord(Record):
    """One cell: a model, an engine, a batch and a context, with the time of a step or an error.

    Attributes:
        shape: as given.
        original: whether the model has the shape's number of key/value heads.
        model, engine, kv_heads, batch, context, beams: what was timed; `context` positions are in the cache.
        latent: the latent, if the model has one; `kv_heads` is then missing.
        keys: whether its keys were rebuilt at each step or cached; missing if none are rebuilt.
        source: source tokens of an encoder-decoder model; `context` then counts the cached tokens of the mean step.
        ranks: processes that the model is divided among by tensor parallelism; bytes and floor are those of one.
        largest_batch: whether the batch is the largest that fits.
        error: why nothing was measured; all times are then missing.
        time_per_token_ms: median time of a step of all rows, with the 10th and 90th percentiles.
        bytes_per_step, floor_ms: bytes that a step reads, and its minimum time.
        floor_share, bandwidth_share: the minimum time, and the time to copy these bytes, as shares of the median.
        warmup_sec: extra time of the first steps.
        encoder_sec, total_sec: for an encoder-decoder model, the encoder alone, and all tokens including it.
        copy_bandwidth, matmul_rate: measured on the device: bytes and operations per second.
        command: the command that measured it.
    """

    file = "benchmark.jsonl"
    model_config = ConfigDict(allow_inf_nan=False)

    shape: str
    original: bool = True
    model: str
    engine: str
    kv_heads: int | None = None
    latent: Latent | None = None
    keys: Literal["rebuilt", "expanded"] | None = None
    batch: Size
    context: Size
    beams: Size = 1
    source: int | None = None
    ranks: Size = 1
    largest_batch: bool | None = None
    error: str | None = None

    time_per_token_ms: Annotated[float, Field(gt=0)] | None = None
    time_per_token_p10_ms: float | None = None
    time_per_token_p90_ms: float | None = None
    tokens_per_sec: float | None = None
    bytes_per_step: float | None = None
    floor_ms: float | None = None
    floor_share: float | None = None
    bandwidth_share: float | None = None
    warmup_sec: float | None = None
    time_to_first_token_sec: float | None = None
    encoder_sec: float | None = None
    total_sec: float | None = None
    cache_bytes: int | None = None
    weight_bytes: int | None = None
    peak_memory_bytes: int | None = None

    dtype: str | None = None
    device: str
    copy_bandwidth: float | None = None
    matmul_rate: float | None = None
    versions: dict[str, str] = {}
    command: str = ""

    @model_validator(mode="after")
    def timed_or_not(self) -> "BenchmarkRecord":
        missing = [name for name in ("time_per_token_ms", "tokens_per_sec") if getattr(self, name) is None]
        if self.error is None and missing:
            raise ValueError(f"{' and '.join(missing)} missing, and no error")
        return self

    @classmethod
    def check_appendable(cls, path: Path) -> None:
        """Raise MQAError if a file's first line is not a record."""
        if not path.is_file():
            return
        try:
            with path.open(encoding="utf-8") as lines:
                number, first = next(((n, line) for n, line in enumerate(lines, 1) if line.strip()), (0, ""))
            if first:
                cls.of_line(path, number, first)
        except (OSError, ValueError, MQAError) as error:
            raise MQAError(f"`output` must be a new file or one with records; give another: {error}") from error

    @classmethod
    def of_line(cls, path: Path, number: int, line: str) -> "BenchmarkRecord":
        """Read the record in a line of a file; raise MQAError if it is invalid."""
        where = f"{path} is not a result file of mqa-hf benchmark: line {number}"
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise MQAError(f"{where}: {error}") from error
        if not isinstance(content, dict):
            raise MQAError(f"{where} is not an object with fields")
        return cls.of(content, f"{path}, line {number},")

    @classmethod
    def read_lines(cls, path: Path) -> list["BenchmarkRecord"]:
        """Read all records of a file.

        Raises:
            MQAError: if a line is not a record, naming its fields, or the file is empty.
        """
        what = f"{path} is not a result file of mqa-hf benchmark"
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise MQAError(f"{what}: {error}") from error
        found = [cls.of_line(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
        if not found:
            raise MQAError(f"{what}: it is empty")
        return found
