"""Recordings with transcripts: from files, folders and data sets, or spoken by eSpeak NG.

N samples at a rate in Hz
"""

import copy
import io
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .errors import MQAError
from .mixture import spoken_sentences
from .text import holds_text, load, no_text

SOUNDS = (".wav", ".flac", ".ogg", ".mp3")
SPEECH = "builtin:speech"
COLUMNS = ("audio", "text")


class Recording(NamedTuple):
    """Samples [N], what is said, and the language as Whisper's tokenizer names it; `None` where it is not known."""

    samples: Any
    text: str | None = None
    language: str | None = None


def recordings(source: str, columns: Sequence[str], rate: int, option: str, seed: int = 0) -> Iterator[Recording]:
    """The recordings of a source at `rate`, in an order drawn by `seed`.

    Args:
        source: a sound file; a folder of them, with `metadata.jsonl` (`file_name`, `text`) if there are transcripts; a
            data file or an id of the Hub's datasets with columns of audio and, if there are transcripts, of text;
            or `builtin:speech`.
        columns: of audio and text. Default: "audio", and "text" if it is there.
        option: name of the option, for messages.

    Raises:
        MQAError: if something cannot be read.
    """
    if source == SPEECH:
        if columns:
            raise MQAError(f"{option} {SPEECH} has no columns; got {', '.join(columns)}")
        yield from spoken(rate, seed)
        return
    listed = references(source, columns, option)
    for index in shuffled(len(listed), seed):
        audio, text = read_row(listed, index, f"{option} {source}")
        yield Recording(hear(audio, rate), text)


def references(source: str, columns: Sequence[str], option: str) -> Any:
    """The recordings of a source of [`recordings`] as rows of "audio" (a path, or bytes or samples of `datasets`) and
    "text" (`None`: no transcript), a list or a `Dataset`."""
    path = Path(source)
    if path.is_dir() or path.suffix in SOUNDS:
        return in_folder(path, option)
    import datasets

    if len(columns) > 2:
        raise MQAError(f"{option} of a speech model needs `columns` of audio and text; got {', '.join(columns)}")
    rows = load(source, option)
    sound, said = (*columns, *COLUMNS[len(columns) :])
    known = rows.column_names
    if sound not in known or (len(columns) == 2 and said not in known):
        raise MQAError(f"{option} {source} has no columns {sound} and {said}; its columns are {', '.join(known)}")
    if said in known and not holds_text(rows.features[said]):
        raise no_text(source, option, [said], rows.features)
    if isinstance(rows.features[sound], datasets.Audio):
        rows = rows.cast_column(sound, datasets.Audio(decode=False))
    rows = rows.select_columns([name for name in (sound, said) if name in known])
    others = {old: new for old, new in ((sound, "audio"), (said, "text")) if old in known and old != new}
    rows = rows.rename_columns(others)
    if holds_text(rows.features["audio"]):  # names of files beside the data file
        rows = rows.map(lambda row: {"audio": row["audio"] and str(path.parent / row["audio"])})
    return rows


def read_row(rows: Any, index: int, name: str) -> tuple[Any, str | None]:
    """The recording and the transcript of a row of [`references`]."""
    try:
        row = rows[index]
    except Exception as error:  # `datasets` raises anything
        raise MQAError(f"{name}: row {index} cannot be read: {error}") from error
    return row["audio"], row.get("text") or None


def in_folder(path: Path, option: str) -> list[dict[str, str | None]]:
    """The recordings of a folder, or one recording."""
    if path.is_file():
        return [{"audio": str(path), "text": None}]
    if not path.exists():
        raise MQAError(f"{option} {path} does not exist")
    files = sorted(p for p in path.rglob("*") if p.suffix in SOUNDS)
    if not files:
        raise MQAError(f"{option} {path} has no recordings ({', '.join(SOUNDS)})")
    said: dict[Path, str | None] = {}
    notes = path / "metadata.jsonl"
    if notes.is_file():
        try:
            rows = [json.loads(line) for line in notes.read_text(encoding="utf-8").splitlines() if line.strip()]
            said = {path / row["file_name"]: row["text"] for row in rows}
            wrong = [text for text in said.values() if not isinstance(text, str | None)]
            if wrong:
                raise ValueError(f"text {wrong[0]!r}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MQAError(f"{option} {notes} needs lines with file_name and text: {error!r}") from error
    return [{"audio": str(file), "text": said.get(file)} for file in files]


def shuffled(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def spoken(rate: int, seed: int) -> Iterator[Recording]:
    """Sentences of the Universal Declaration of Human Rights in several languages, spoken by eSpeak NG."""
    program = shutil.which("espeak-ng") or shutil.which("espeak")
    if program is None:
        raise MQAError(
            "a speech model is fitted on recordings; name some with `calibration`, or install espeak-ng, which speaks "
            f"the default, {SPEECH}"
        )
    sentences = spoken_sentences()
    for index in shuffled(len(sentences), seed):
        language, text = sentences[index]
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "speech.wav"
            words = [program, "-v", language, "-w", str(path), "--", text]
            done = subprocess.run(words, capture_output=True, check=False)
            if done.returncode == 0 and path.is_file():  # a voice may be missing
                yield Recording(hear(path, rate), text, language)


def hear(recording: Any, rate: int) -> Any:
    """Samples [N] at `rate`, from a file, its bytes, or samples with their rate."""
    if isinstance(recording, dict) and "array" not in recording:
        content, recording = recording.get("bytes"), recording.get("path")
        recording = recording if content is None else io.BytesIO(content)
    if isinstance(recording, str | os.PathLike | io.BytesIO):
        try:
            import soundfile
        except ImportError as error:
            raise MQAError("recordings need soundfile and soxr: pip install 'mqa-hf[speech]'") from error
        try:
            channels, had = soundfile.read(recording, dtype="float32", always_2d=True)
        except (OSError, RuntimeError) as error:
            raise MQAError(f"recording {recording} cannot be read: {error}") from error
        samples = channels.mean(1)
    else:
        try:
            samples, had = np.asarray(recording["array"], np.float32), int(recording["sampling_rate"])
            if samples.ndim != 1 or had < 1:
                raise ValueError("samples need one dimension and a rate")
        except (KeyError, TypeError, ValueError) as error:
            raise MQAError(f"{str(recording)[:80]} is not a recording; give a file name or its bytes") from error
    if had == rate:
        return samples
    import soxr

    return soxr.resample(samples, had, rate)


def heard_examples(
    processor: Any,
    source: str,
    columns: Sequence[str],
    count: int,
    longest: int,
    transcribe: Callable[[torch.Tensor], str],
    seed: int,
    option: str = "`calibration`",
) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Features [mels, frames] of recordings, and the token ids that the decoder reads, of the start and what is said.

    Args:
        processor: Whisper's, of transformers.
        source, columns, seed, option: see [`recordings`].
        count: number of positions of encoder and decoder together.
        longest: maximum number of token ids of a recording.
        transcribe: gives the text of features [1, mels, frames], for recordings without a transcript.
    """
    extractor, tokenizer = processor.feature_extractor, copy.deepcopy(processor.tokenizer)
    usual = getattr(tokenizer, "language", None), getattr(tokenizer, "task", None)
    rate, samples = extractor.sampling_rate, extractor.n_samples
    features: list[torch.Tensor] = []
    tokens: list[list[int]] = []
    total = 0
    for recording in recordings(source, columns, rate, option, seed):
        for piece in pieces(recording, samples, rate, f"{option} {source}"):
            made = extractor(piece.samples, sampling_rate=rate, return_tensors="pt").input_features
            text = transcribe(made) if piece.text is None else piece.text
            if hasattr(tokenizer, "set_prefix_tokens"):
                known = f"<|{piece.language}|>" in tokenizer.get_vocab()
                tokenizer.language, tokenizer.task = usual  # which `None` would keep as they are
                tokenizer.set_prefix_tokens(**({"language": piece.language, "task": "transcribe"} if known else {}))
            features.append(made[0])
            tokens.append(tokenizer(text).input_ids[:longest])
            total += made.shape[-1] // 2 + len(tokens[-1])
            if total >= count:
                return features, tokens
    return features, tokens


def pieces(recording: Recording, samples: int, rate: int, name: str) -> Iterator[Recording]:
    """A recording in pieces that the model hears at once; with a transcript it cannot be cut."""
    audio, text, language = recording
    if len(audio) <= samples:
        yield recording
    elif text is None:
        for start in range(0, len(audio), samples):
            yield Recording(audio[start : start + samples], None, language)
    elif not name.endswith(SPEECH):
        check_length(audio, samples, rate, name)


def check_length(audio: Any, samples: int, rate: int, name: str) -> None:
    """Raise MQAError for a recording with more samples than a model hears at once."""
    if len(audio) > samples:
        raise MQAError(
            f"{name}: a recording of {len(audio) / rate:.1f} s is longer than the model's input of "
            f"{samples / rate:.1f} s; split it"
        )
