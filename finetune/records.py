"""Result files of trainings: `uptraining.json` and `pretraining.json`."""

from typing import Any

from pydantic import BaseModel

from mqa_hf.base.files import TRAINING_FILE
from mqa_hf.base.records import Record

Line = dict[str, int | float | None]  # of a log: step, losses, learning rate ... by name


class Validation(BaseModel):
    """Losses on validation text by name, in the units of [`Objective`]."""

    before: dict[str, float | None]
    after: dict[str, float | None]


class UptrainingRecord(Record):
    """`uptraining.json` of a trained checkpoint.

    Attributes:
        student: the checkpoint that was trained.
        options: options that decide the result, `dataset` and `losses` with their weights.
        tokens: that were trained on.
        validation: losses before and after, if there was validation text.
        log: lines of each phase, `attention` and `main`.
        versions: versions of the libraries.
        command: command that repeats it.
    """

    file = TRAINING_FILE

    student: str | None = None
    options: dict[str, Any]
    tokens: int
    validation: Validation | None
    log: dict[str, list[Line]]
    versions: dict[str, str]
    command: str | None


class PretrainingRecord(Record):
    """`pretraining.json` of a model trained from scratch.

    Attributes:
        options: options that decide the result.
        config: fields of the configuration, as wide as `equal_parameters` made it.
        parameters: number of parameters.
        tokens: that were trained on.
        loss: final loss on validation text, if any, in nats per token.
        log: lines of the training.
    """

    file = "pretraining.json"

    options: dict[str, Any]
    config: dict[str, Any]
    parameters: int
    tokens: int
    loss: float | None
    log: list[Line]
