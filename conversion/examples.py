"""What heads are fitted on: token ids of texts, or features of recordings with what is said."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from mqa_hf.base import sound
from mqa_hf.base import tokens as tokens_of
from mqa_hf.base.errors import ConversionError
from mqa_hf.base.mixture import Part, shares
from mqa_hf.configuration_mqa import MQAConfig
from mqa_hf.configuration_mqa_seq2seq import MQASeq2SeqConfig

from .canonical import longest
from .companions import Beside
from .convert import ConversionOptions
from .loading import load_model
from .memory import AnySource, Given, ModelSource
from .plan import Reading
from .states import Examples


def companions_of(source: AnySource) -> Beside | Given:
    return Given(source.model, source.tokenizer) if isinstance(source, ModelSource) else Beside(source.directory)


def examples_of(reading: Reading, job: ConversionOptions) -> Examples:
    """The examples of a job, those that are held out last.

    Raises:
        MQAError: if there are too few, or they cannot be read.
    """
    config, columns = reading.config, job.calibration_columns
    if isinstance(config, MQASeq2SeqConfig) and config.num_mel_bins is not None:
        return recordings(reading, config, job)
    tokenizer, count = companions_of(reading.source).tokenizer(), job.calibration_tokens
    length = min(job.sequence_length, longest(config))
    parts: Sequence[Part] | Sequence[str] = job.calibration_parts if job.texts is None else job.texts
    names = [job.calibration_text] if job.texts is not None else [part.source for part in job.calibration_parts]
    if isinstance(config, MQAConfig):
        tokens_of.check_count(count, length)
        found = tokens_of.mixed_tokens(tokenizer, parts, count, length, config.vocab_size, job.seed, columns)
        order, held_out = held_out_last(names, [len(rows) for rows in found])
        return Examples(torch.cat(found)[order], held_out=held_out)
    source, source_valid, tokens, valid, counts = tokens_of.seq2seq_tokens(
        tokenizer, parts, columns, count, length, config, job.seed
    )
    order, held_out = held_out_last(names, counts)
    return Examples(tokens[order], valid[order], source[order], source_valid[order], held_out)


def recordings(reading: Reading, config: MQASeq2SeqConfig, job: ConversionOptions) -> Examples:
    """Recordings and what is said in them; the source transcribes those that have no transcript."""
    if job.texts is not None:
        raise ConversionError("a speech model is fitted on recordings; name them with `calibration`, not `texts`")
    processor = companions_of(reading.source).processor()
    transcribe = transcriber(reading.source, processor)
    parts = job.calibration_parts if job.calibration else (Part(sound.SPEECH),)
    most = config.decoder.max_position_embeddings
    features: list[torch.Tensor] = []
    tokens: list[list[int]] = []
    counts: list[int] = []
    for part, share in zip(parts, shares(parts, job.calibration_tokens)):
        columns = () if part.source == sound.SPEECH else job.calibration_columns
        some, said = sound.heard_examples(processor, part.source, columns, share, most, transcribe, job.seed)
        features, tokens, counts = features + some, tokens + said, [*counts, len(said)]
    names = [part.source for part in parts]
    if len(tokens) < 2:
        raise ConversionError(
            f"`calibration` {', '.join(names)} gives {len(tokens)} recordings; give at least two, of at most "
            f"{processor.feature_extractor.n_samples / processor.feature_extractor.sampling_rate:g} s"
        )
    order, held_out = held_out_last(names, counts)
    read, valid = tokens_of.padded(tokens, config.pad_token_id or 0)
    tokens_of.check_ids(read, config.decoder.vocab_size)
    return Examples(read[order], valid[order], torch.stack(features)[order], None, held_out)


def transcriber(source: AnySource, processor: Any) -> Callable[[torch.Tensor], str]:
    """A function that transcribes features [1, mels, frames] with the source, which is loaded when first needed."""

    @cache
    def model() -> Any:
        return source.model if isinstance(source, ModelSource) else load_model(source.directory, dtype=torch.float32)

    @torch.no_grad()
    def transcribe(features: torch.Tensor) -> str:
        own = model()
        ids = own.generate(features.to(own.device, own.dtype))
        return processor.tokenizer.decode(ids[0], skip_special_tokens=True)

    return transcribe


def held_out_last(names: Sequence[str], counts: Sequence[int]) -> tuple[torch.Tensor, list[str]]:
    """The order of rows in which a sixteenth of each part of a mixture comes last, and the names of the parts of these
    rows; a part of one row has none there, unless all have one."""
    fitted: list[int] = []
    last: list[int] = []
    held_out: list[str] = []
    start = 0
    alone = max(i for i, count in enumerate(counts) if count) if max(counts) == 1 else None
    for i, (name, count) in enumerate(zip(names, counts)):
        some = max(1, count // 16) if count > 1 or i == alone else 0
        fitted += range(start, start + count - some)
        last += range(start + count - some, start + count)
        held_out += [name] * some
        start += count
    return torch.tensor(fitted + last), held_out
