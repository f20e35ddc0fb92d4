"""What an evaluation has found, as its files have it: `evaluation.json`, and beside it what was measured of each text.

Numbers are per token in nats unless their name says otherwise; `NAME_interval` holds 95% of the bootstrap samples of
NAME, `None` where there is a single document or text.
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
    """A part of a result file. What was never set is left out."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    @model_serializer(mode="wrap")
    def without_unset(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in plain(self).items() if name in self.model_fields_set}


class NextToken(Part):
    """Likelihood of the held-out text, and how far each distribution is from the original's."""

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
    """What is written after the beginnings of texts, beside what the original writes."""

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
    """Translations or transcripts beside references: BLEU, chrF and ROUGE from 0 to 100, or the word error rate."""

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
    """A beginning and what was written after it, or a source and what was written of it."""

    prompt: str
    text: str


class TaskResults(Part):
    """Numbers of lm-eval by task and metric, and the versions of the tasks."""

    results: dict[str, dict[str, Any]] = {}
    versions: dict[str, Any] = {}
    limit: int | None = None


class CheckpointResult(Part):
    """All that was measured of a checkpoint.

    Attributes:
        name: in tables.
        checkpoint: its directory.
        given: as it was named: a directory or a hub id.
        kv_bytes_per_token, cross_kv_bytes_per_token: cache at 16 bits, latents at theirs; `None` where the class of
            the model is unknown.
        latent: what a token has in place of keys and values.
        greedy, beam: of encoder-decoder models, without beams and with.
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
    """The options, and how many windows and prompts they gave."""

    text: str | None
    columns: list[str] = []
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
    """What `mqa-hf evaluate` has found, the original first.

    Attributes:
        settings: the options, and what they gave.
        command: that made it.
        versions: of this package and those that it measured with.
        checkpoints: the original first.
        note: what to know before numbers are compared; "" where nothing.
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
        id: of the window.
        document: that it is of.
        nats: negative log-likelihood.
        divergence: KL(original ‖ checkpoint).
        same: tokens at which both have the same first choice.
        tokens, bytes: that were predicted.
        context: nats and tokens by the power of two that the number of tokens before them reaches.
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
    """Tokens that follow a prompt, and the texts of encoder-decoder models, without beams and with."""

    id: Natural
    tokens: list[Natural]
    greedy: str | None = None
    beam: str | None = None


def read_lines(directory: Path, step: str, kind: type[BaseModel], count: int) -> list[Any]:
    """What all processes have written of a step, in order; a line that was cut off is passed over.

    Args:
        directory: of the checkpoint's measurements.
        step: that the files are named after.
        kind: of the records.
        count: of records when the step is done, with numbers below it.

    Raises:
        MQAError: for a line that is whole and holds something else.
    """
    found: dict[int, Any] = {}
    for path in directory.glob(f"{step}-*.jsonl"):
        # What is written has line separators of Unicode in it, and may end within a character.
        for number, line in enumerate(path.read_bytes().decode("utf-8", errors="replace").split("\n"), 1):
            try:
                record: Any = kind.model_validate_json(line)
            except ValidationError as error:
                if all(e["type"] == "json_invalid" for e in error.errors()):
                    continue
                record = None
            if record is None or record.id >= count:
                raise MQAError(f"{path}, line {number}, holds no measurement; remove {directory} to measure again")
            found[record.id] = record
    return [found[i] for i in sorted(found)]
