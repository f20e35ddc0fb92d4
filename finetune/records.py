"""What trainings leave beside their weights: `uptraining.json` and `pretraining.json`."""

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
        student: that was trained.
        options: what decided the result, `dataset` and `losses` with their weights.
        tokens: that were trained on.
        validation: losses before and after, where there was validation text.
        log: lines of each phase, `attention` and `main`.
        versions: of what it was trained with.
        command: that does it again.
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
        options: what decided the result.
        config: fields of the configuration, as wide as `equal_parameters` made it.
        parameters: of the model.
        tokens: that were trained on.
        loss: on validation text in the end, nats a token, where there was some.
        log: lines of the training.
    """

    file = "pretraining.json"

    options: dict[str, Any]
    config: dict[str, Any]
    parameters: int
    tokens: int
    loss: float | None
    log: list[Line]
