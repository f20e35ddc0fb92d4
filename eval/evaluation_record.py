"""The result files of an evaluation: `evaluation.json` and the measurements of each text.

Numbers are in nats per token unless their name says otherwise. `NAME_interval` contains 95% of the bootstrap samples
of NAME; it is `None` for a single document or text.
"""

import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from mqa_hf.base.errors import MQAError
from mqa_hf.base.records import Record
from mqa_hf.conversion.record import Latent

Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
Interval = tuple[Number, Number] | None
Natural = Annotated[int, Field(ge=0, lt=2**31)]
Bytes = Annotated[int, Field(ge=0, lt=2**63)]


class Part(BaseModel):
    """A part of a result file. Fields that were never set are left out."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    @model_serializer(mode="wrap")
    def without_unset(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in plain(self).items() if name in self.model_fields_set}


class NextToken(Part):
    """Likelihood of the held-out text, and divergence of each distribution from the original's."""

    loss: Number
    loss_interval: Interval
    perplexity: Number
    perplexity_interval: Interval = None
    bits_per_byte: Number
    bits_per_byte_interval: Interval = None
    loss_above_original: Number
    loss_above_original_interval: Interval = None
    kl: Number
    kl_interval: Interval = None
    same_first_choice: Number
    same_first_choice_interval: Interval = None
    tokens: int
    bytes: int = 0
    documents: int
    intervals_over: str = "documents"


class ContextLoss(BaseModel):
    """The loss of tokens with `first` to `last` tokens before them."""

    model_config = ConfigDict(populate_by_name=True)

    first: int = Field(validation_alias="from")
    last: int = Field(validation_alias="to")
    loss: Number
    tokens: int = 0

    @model_serializer
    def as_written(self) -> dict[str, Any]:
        return {"from": self.first, "to": self.last, "loss": self.loss, "tokens": self.tokens}


class Continuation(Part):
    """Continuations of the beginnings of texts, compared with the original's."""

    agreeing_tokens: Number
    agreeing_tokens_interval: Interval = None
    identical: Number
    identical_interval: Interval = None
    repetition: Number
    repetition_interval: Interval = None
    length: Number
    length_interval: Interval = None
    texts: int


class Written(Part):
    """Translations or transcripts compared with references: BLEU, chrF and ROUGE from 0 to 100, or word error rate."""

    bleu: Number | None = None
    bleu_interval: Interval = None
    bleu_signature: str | None = None
    bleu_above_original: Number | None = None
    bleu_above_original_interval: Interval = None
    chrf: Number | None = None
    chrf_interval: Interval = None
    chrf_signature: str | None = None
    rouge1: Number | None = None
    rouge1_interval: Interval = None
    rouge2: Number | None = None
    rouge2_interval: Interval = None
    rougeL: Number | None = None
    rougeL_interval: Interval = None
    word_error_rate: Number | None = None
    word_error_rate_interval: Interval = None
    texts: int = 0


class Sample(Part):
    """A prompt or source, and the generated text."""

    prompt: str
    text: str


class TaskResults(Part):
    """Results of lm-eval by task and metric, and the versions of the tasks."""

    results: dict[str, dict[str, Any]] = {}
    versions: dict[str, Any] = {}
    limit: int | None = None


class CheckpointResult(Part):
    """All measurements of a checkpoint.

    Attributes:
        name: name in tables.
        checkpoint: its directory.
        given: the directory or Hub id as given.
        kv_bytes_per_token, cross_kv_bytes_per_token: cache bytes at 16 bits, latents at their own bits; `None` if the
            class of the model is unknown.
        latent: the latent that replaces keys and values.
        greedy, beam: for encoder-decoder models, without and with beam search.
    """

    name: str
    checkpoint: str
    kv_bytes_per_token: Annotated[Bytes, Field(gt=0)] | None = None
    cross_kv_bytes_per_token: Bytes | None = None
    latent: Latent | None = None
    next_token: NextToken
    loss_by_context: list[ContextLoss]
    writing: Continuation | None = None
    greedy: Written | None = None
    beam: Written | None = None
    samples: list[Sample] = []
    tasks: TaskResults | None = None
    given: str | None = None


class Settings(Part):
    """The options, and the resulting numbers of windows and prompts."""

    text: str | None
    columns: list[str] = []
    loss_on: str = "all"
    tokens: int = 0
    window: int | None = None
    stride: int | None = None
    prompts: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    beams: int
    batch_tokens: int = 0
    dtype: str | None = None
    seed: int = 0
    tasks: list[str] = []
    include_path: str | None = None
    limit: int | None = None
    windows: int = 0


class EvaluationRecord(Record):
    """Results of `mqa-hf evaluate`.

    Attributes:
        settings: the options, and the resulting numbers of windows and prompts.
        command: the command that made it.
        versions: of this package and the libraries it measured with.
        checkpoints: the original first.
        note: how vocabularies differ, or "".
    """

    file = "evaluation.json"

    settings: Settings
    command: str = ""
    versions: dict[str, str]
    checkpoints: list[CheckpointResult] = Field(min_length=1)
    note: str = ""


class WindowRecord(BaseModel):
    """Sums over the predicted tokens of a window.

    Attributes:
        id: index of the window.
        document: index of its document.
        nats: negative log-likelihood.
        divergence: KL(original ‖ checkpoint).
        same: tokens for which both have the same first choice.
        tokens, bytes: predicted.
        context: nats and tokens, by the largest power of two that is at most the number of tokens before them.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    id: Natural
    document: Natural
    nats: float
    divergence: float
    same: Natural
    tokens: Annotated[int, Field(ge=1)]
    bytes: Natural
    context: dict[Annotated[int, Field(ge=0, lt=64)], tuple[float, Annotated[int, Field(ge=1)]]]


class WritingRecord(BaseModel):
    """Tokens generated after a prompt; for encoder-decoder models, the texts without and with beam search."""

    id: Natural
    tokens: list[Natural]
    greedy: str | None = None
    beam: str | None = None


def read_lines(directory: Path, step: str, kind: type[BaseModel], count: int) -> list[Any]:
    """Read the records that all processes have written for a step, in order; truncated lines are skipped.

    Args:
        directory: the checkpoint's measurements.
        step: the step, which file names begin with.
        kind: class of the records.
        count: number of records of a finished step; ids are below it.

    Raises:
        MQAError: if a complete line is not a record.
    """
    found: dict[int, Any] = {}
    for path in directory.glob(f"{step}-*.jsonl"):
        # Generated text may contain Unicode line separators, and a file may end within a character.
        for number, line in enumerate(path.read_bytes().decode("utf-8", errors="replace").split("\n"), 1):
            try:
                record: Any = kind.model_validate_json(line)
            except ValidationError as error:
                if all(e["type"] == "json_invalid" for e in error.errors()):
                    continue
                record = None
            if record is None or record.id >= count:
                raise MQAError(f"{path}, line {number}, is not a measurement; remove {directory} to measure again")
            found[record.id] = record
    return [found[i] for i in sorted(found)]
