"""`mqa-hf pretrain`: train a small model from scratch, to convert it or compare with it.

    mqa-hf pretrain OUTPUT --config '{"model_type": "llama", "hidden_size": 512, "num_attention_heads": 8, ...}' \
        --dataset train.jsonl --validation validation.jsonl --tokens 100000000

trains a byte-level BPE tokenizer on the text, then the model, and writes a checkpoint that loads like any other. It
resumes, runs on several processes and shows progress as `mqa-hf uptrain` does.
"""

import json
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mqa_hf.base.errors import MQAError
from mqa_hf.base.options import NUMBER_TYPES, Option, Options, function
from mqa_hf.base.shapes import SHAPES

from .options import HOW, MOST_BATCH_TOKENS, MOST_TOKENS, OUTPUT, TRAINED_ON, Schedule, Training, Written

if TYPE_CHECKING:
    from rich.console import Console

    from .records import PretrainingRecord


@dataclass(frozen=True)
class Model(Options, panel=TRAINED_ON):
    """The model to train."""

    _: KW_ONLY
    config: Annotated[
        str | Mapping[str, Any],
        Option(
            "Configuration of the model: JSON with model_type and other fields, a file with it, or the name of a "
            "published shape. The vocabulary is the tokenizer's."
        ),
    ]
    equal_parameters: Annotated[
        str | Mapping[str, Any] | None,
        Option(
            "Another configuration: widen the feed-forward layers of `config` until it has as many parameters as this "
            "one (arXiv 1911.02150, section 4.1)."
        ),
    ] = None
    tokenizer: Annotated[str | None, Option("Directory of a tokenizer. Default: train one on the text.")] = None
    vocab_size: Annotated[int, Option("Vocabulary size of a newly trained tokenizer.", min=1)] = 8192

    def __post_init__(self) -> None:
        for name in ("config", "equal_parameters"):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                try:
                    object.__setattr__(self, name, json.dumps(dict(value)))
                except (TypeError, ValueError, RecursionError) as error:
                    raise MQAError(f"`{name}` is not JSON: {error}") from error
        super().__post_init__()


@dataclass(frozen=True)
class PretrainingSchedule(Schedule, panel=HOW):
    """A schedule with defaults for small models."""

    _: KW_ONLY
    tokens: Annotated[int, Option("Tokens to train on (decoder tokens), in whole steps.", min=1, below=MOST_TOKENS)]
    batch_tokens: Annotated[
        int,
        Option(
            "Tokens per step over all processes, rounded to whole rows. A pair counts as `sequence_length` tokens.",
            min=1,
            below=MOST_BATCH_TOKENS,
        ),
    ] = 65_536
    learning_rate: Annotated[
        float, Option("Peak learning rate of AdamW (betas 0.9, 0.95); decays to a tenth along a cosine.", above=0)
    ] = 2e-3


@dataclass(frozen=True)
class Weights(Written, panel=OUTPUT):
    """Output directory and data type."""

    _: KW_ONLY
    dtype: Annotated[str, Option("Data type of the saved weights; training is in float32.", choices=NUMBER_TYPES)] = (
        "float32"
    )


@dataclass(frozen=True)
class Pretraining(Weights, PretrainingSchedule, Model, Training["PretrainingRecord"]):
    """Train a small model from scratch, to convert it or compare with it.

    Returns:
        The content of `pretraining.json`: options, parameters, loss, the log.

    Raises:
        MQAError: if the request is invalid, or if training diverges.
    """

    name = "pretrain"

    def decisive(self) -> dict[str, Any]:
        found = super().decisive()
        del found["dtype"]  # only of the saved weights
        other = self.equal_parameters
        return {
            **found,
            "config": read_config(self.config),
            "equal_parameters": None if other is None else read_config(other, "equal_parameters"),
        }

    def resolve(self) -> "Pretraining":
        self.check_upload()
        return self

    def run(self) -> "PretrainingRecord":
        try:
            from .pretrainer import carry_out
        except ImportError as error:
            raise MQAError(f"this needs {error.name}: pip install 'mqa-hf[training]'") from error
        return carry_out(self.resolve())

    def show(self, record: "PretrainingRecord", console: "Console") -> None:
        """Print parameters, tokens and loss in a line."""
        loss = "" if record.loss is None else f", loss {record.loss:.3f} nats per token"
        said = f"{self.output}: {record.parameters:,} parameters, {record.tokens:,} tokens{loss}"
        console.print(said, soft_wrap=True)


def read_config(said: str | Mapping[str, Any], option: str = "config") -> dict[str, Any]:
    """Configuration from JSON, from a JSON file, or from the name of a published shape.

    Raises:
        MQAError: if it is none of these; the message names `option`.
    """
    if isinstance(said, Mapping):
        found: Any = dict(said)
    elif said in SHAPES:
        found = dict(SHAPES[said])
    else:
        try:
            text = said if said.lstrip()[:1] in ("{", "[") else Path(said).read_text(encoding="utf-8")
            found = json.loads(text, parse_constant=refuse)
        except FileNotFoundError:
            raise MQAError(f"`{option}` is neither JSON, nor a file, nor one of {', '.join(SHAPES)}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise MQAError(f"`{option}` is not valid JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        raise MQAError(f"`{option}` needs a model_type")
    return found


def refuse(constant: str) -> None:
    """Reject NaN and infinity, which are not JSON but which Python reads."""
    raise ValueError(f"{constant} is not a number")


pretrain = function(Pretraining)
