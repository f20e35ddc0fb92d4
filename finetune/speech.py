"""Training rows of speech models: recordings with transcripts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mqa_hf.base.chats import holds_text
from mqa_hf.base.errors import MQAError
from mqa_hf.base.mixture import Part
from mqa_hf.base.sound import check_length, hear, references

from .data import DATASET, CollatePairs, check_weights, interleaved


def recording_rows(
    parts: Sequence[Part], processor: Any, length: int, columns: Sequence[str], seed: int, option: str = DATASET
) -> Any:
    """The rows of a mixture of recordings, drawn at random by weight: "audio" as in [`references`], and "labels", at
    most `length` token ids of the transcript.

    Raises:
        MQAError: for recordings without a transcript, and for sources that cannot be read.
    """
    import datasets

    check_weights(parts, option)

    def labelled(row: dict[str, Any]) -> dict[str, list[int]]:
        return {"labels": processor.tokenizer(row["text"]).input_ids[1:][:length]}  # without the decoder's start

    found = []
    for part in parts:
        rows = references(part.source, columns, option)
        rows = datasets.Dataset.from_list(rows) if isinstance(rows, list) else rows
        if holds_text(rows.features["audio"]):  # so that all parts have the same type
            rows = rows.cast_column("audio", datasets.Audio(decode=False))
        if "text" not in rows.column_names or not all(rows["text"]):
            raise MQAError(f"{option} {part.source}: training needs a transcript for each recording")
        found.append(rows.map(labelled, remove_columns=["text"]).shuffle(seed=seed))
    return interleaved(found, parts, seed, option)


@dataclass(frozen=True)
class CollateSpeech:
    """Batch recordings as features [B, mels, frames], with the decoder's input and labels [B, T]."""

    extractor: Any
    targets: CollatePairs

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rate, longest = self.extractor.sampling_rate, self.extractor.n_samples
        sounds = [np.asarray(hear(row["audio"], rate)) for row in rows]
        for samples in sounds:
            check_length(samples, longest, rate, DATASET)
        made = self.extractor(sounds, sampling_rate=rate, return_tensors="pt").input_features
        inputs = self.targets([{"input_ids": [0], "labels": row["labels"]} for row in rows])
        return {"input_features": made, **{name: inputs[name] for name in ("decoder_input_ids", "labels")}}


def speech_set(processor: Any, config: Any, job: Any) -> tuple[Any, Any, CollateSpeech]:
    """Training rows, validation rows (or `None`) and the collator of a speech model's job."""
    if job.streaming or job.loss_on != "all":
        raise MQAError("speech models take neither `streaming` nor `loss_on` answers")
    longest = min(job.sequence_length, config.decoder.max_position_embeddings)
    rows = recording_rows(job.parts, processor, longest, job.columns, job.seed)
    validation = None
    if job.validation is not None:
        part = (Part(job.validation),)
        validation = recording_rows(part, processor, longest, job.columns, job.seed, "`validation`")
        count, total = 0, 0
        while count < len(validation) and total < job.validation_tokens:
            total += len(validation[count]["labels"])
            count += 1
        validation = validation.select(range(count))
    targets = CollatePairs(config.pad_token_id, config.decoder_start_token_id)
    return rows, validation, CollateSpeech(processor.feature_extractor, targets)
