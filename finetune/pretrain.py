"""`mqa-hf pretrain`: a small model from scratch, to convert it and to compare with.

    mqa-hf pretrain OUTPUT --config '{"model_type": "llama", "hidden_size": 512, "num_attention_heads": 8, ...}' \
        --dataset train.jsonl --validation validation.jsonl --tokens 100000000

trains a byte-level BPE tokenizer on the text, then the model, and leaves a checkpoint that loads like any other. It is
the same training as `mqa-hf uptrain`, without a student and a teacher: resumed, shared by processes, shown alike.
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
    """What is trained."""

    _: KW_ONLY
    config: Annotated[
        str | Mapping[str, Any],
        Option(
            "model_type and fields of its configuration, as JSON or a file with it, or a published shape by name. The "
            "vocabulary is the tokenizer's."
        ),
    ]
    equal_parameters: Annotated[
        str | Mapping[str, Any] | None,
        Option(
            "Another configuration: the feed-forward layers of `config` become so wide that the model has as many "
            "parameters as this one (arXiv 1911.02150, section 4.1)."
        ),
    ] = None
    tokenizer: Annotated[str | None, Option("Directory of a tokenizer. Default: one is trained on the text.")] = None
    vocab_size: Annotated[int, Option("Entries of a tokenizer that is trained.", min=1)] = 8192

    def __post_init__(self) -> None:
        for name in ("config", "equal_parameters"):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                try:
                    object.__setattr__(self, name, json.dumps(dict(value)))
                except (TypeError, ValueError, RecursionError) as error:
                    raise MQAError(f"`{name}` is no JSON: {error}") from error
        super().__post_init__()


@dataclass(frozen=True)
class PretrainingSchedule(Schedule, panel=HOW):
    """A schedule with what suits small models."""

    _: KW_ONLY
    tokens: Annotated[int, Option("Tokens to train on (of the decoder), in whole steps.", min=1, below=MOST_TOKENS)]
    batch_tokens: Annotated[
        int,
        Option(
            "Tokens of a step, on all processes together, rounded to whole rows. Pairs count as `sequence_length` "
            "each.",
            min=1,
            below=MOST_BATCH_TOKENS,
        ),
    ] = 65_536
    learning_rate: Annotated[
        float, Option("Peak, of AdamW (0.9, 0.95); it falls to a tenth along a cosine.", above=0)
    ] = 2e-3


@dataclass(frozen=True)
class Weights(Written, panel=OUTPUT):
    """What is written, and where."""

    _: KW_ONLY
    dtype: Annotated[str, Option("Of the weights written; they are trained in float32.", choices=NUMBER_TYPES)] = (
        "float32"
    )


@dataclass(frozen=True)
class Pretraining(Weights, PretrainingSchedule, Model, Training["PretrainingRecord"]):
    """Train a small model from scratch, to convert it or to compare with.

    Returns:
        What stands in `pretraining.json`: options, parameters, loss, the log.

    Raises:
        MQAError: for what cannot be, and where training diverges.
    """

    name = "pretrain"

    def decisive(self) -> dict[str, Any]:
        found = super().decisive()
        del found["dtype"]  # of what is written in the end
        other = self.equal_parameters
        return {
            **found,
            "config": read_config(self.config),
            "equal_parameters": None if other is None else read_config(other, "equal_parameters"),
        }

    def run(self) -> "PretrainingRecord":
        try:
            from .pretrainer import carry_out
        except ImportError as error:
            raise MQAError(f"this needs {error.name}: pip install 'mqa-hf[training]'") from error
        return carry_out(self.resolve())

    def show(self, record: "PretrainingRecord", console: "Console") -> None:
        """Say in a line how large the model is and how good."""
        loss = "" if record.loss is None else f", loss {record.loss:.3f} nats a token"
        said = f"{self.output}: {record.parameters:,} parameters, {record.tokens:,} tokens{loss}"
        console.print(said, soft_wrap=True)


def read_config(said: str | Mapping[str, Any], option: str = "config") -> dict[str, Any]:
    """A configuration from JSON, from a file with it, or of a published shape by its name.

    Raises:
        MQAError: where there is none, naming the option that said so.
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
            raise MQAError(f"`{option}` holds no JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        raise MQAError(f"`{option}` needs a model_type")
    return found


def refuse(constant: str) -> None:
    """What JSON does not have, and Python reads all the same: NaN and infinity."""
    raise ValueError(f"{constant} is no number")


pretrain = function(Pretraining)
