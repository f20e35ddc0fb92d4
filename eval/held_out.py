"""What models predict and write: held-out text in windows, pairs of texts, recordings with their transcripts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mqa_hf.base.errors import MQAError
from mqa_hf.base.text import documents, load, one_column, pairs
from mqa_hf.finetune.data import IGNORED, CollatePairs, starts_with_last

from .metrics import Translations, WordErrors
from .vocabulary import vocabulary_size

if TYPE_CHECKING:
    from .evaluate import Evaluation

LOOKED_AT = 20  # documents for each prompt that is wanted, where most are shorter than a prompt


@dataclass(frozen=True)
class Window:
    """A stretch of a document that a model reads, and the tokens in it that are predicted.

    Attributes:
        document: which one.
        ids: [L] tokens read, of an encoder-decoder model by the encoder.
        labels: [L] the token to be predicted at each position (of the decoder), or `IGNORED`.
        bytes: of the text of the predicted tokens, in UTF-8.
    """

    document: int
    ids: list[int]
    labels: list[int]
    bytes: int


@dataclass(frozen=True)
class HeldOut:
    """What is predicted, and what is written.

    Attributes:
        windows: to predict.
        collate: windows -> the model's inputs and labels [B, T].
        prompts: beginnings to continue, sources to translate; of speech nothing.
        ask: indices of prompts -> the inputs of `generate()`.
        references: what should be written; of a language model nothing.
        metric: of texts beside references.
    """

    windows: list[Window]
    collate: Callable[[Sequence[Window]], dict[str, torch.Tensor]]
    prompts: list[list[int]]
    ask: Callable[[Sequence[int]], dict[str, torch.Tensor]]
    references: list[str] = field(default_factory=list)
    metric: Any = None

    def ids(self) -> set[int]:
        """The words that are read or predicted."""
        read = {token for window in self.windows for token in (*window.ids, *window.labels)} - {IGNORED}
        return read.union(*self.prompts)


def collate_windows(windows: Sequence[Window]) -> dict[str, torch.Tensor]:
    """[B, T], padded on the right."""
    length = max(len(window.ids) for window in windows)
    ids = torch.zeros(len(windows), length, dtype=torch.long)
    labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    for row, window in enumerate(windows):
        ids[row, : len(window.ids)] = torch.tensor(window.ids)
        labels[row, : len(window.labels)] = torch.tensor(window.labels)
        mask[row, : len(window.ids)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def held_out_text(tokenizer: Any, config: Any, job: "Evaluation") -> HeldOut:
    """Windows over documents drawn by the seed, until they have `tokens`; their beginnings as prompts.

    A document is preceded by the tokenizer's bos, or eos where there is none, so that its first token is predicted
    too.
    """
    texts = documents(job.text, one_column(job.columns, "`columns`"), "`text`", tokenizer)
    longest = getattr(config, "max_position_embeddings", None) or 2048
    window = job.window or min(longest, 2048)
    stride = job.stride or max(1, window // 2)
    if stride > window:
        raise MQAError(f"`window` must be at least as long as `stride`; got {window} and {stride}")
    if getattr(config, "position_embedding", "learned") == "learned" and window > longest:
        raise MQAError(f"`window` {window} is more than the {longest} positions of the model")
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    windows: list[Window] = []
    prompts: list[list[int]] = []
    left = job.tokens
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(job.seed)).tolist()
    for number, document in enumerate(order):
        ids = tokenizer(texts[document], verbose=False).input_ids
        if prefix is not None and ids[:1] != [prefix]:
            ids = [prefix, *ids]
        if len(ids) > job.prompt_tokens and len(prompts) < job.prompts:
            prompts.append(ids[: job.prompt_tokens])
        ids = ids[: left + 1]
        end = 1  # what is predicted before it is done
        for begin in range(0, len(ids) - 1, stride):
            last = min(begin + window + 1, len(ids))
            if last <= end:
                break
            begin = max(0, min(begin, last - 1 - window))  # the last one reads as much as the others
            labels = [IGNORED] * (end - begin - 1) + ids[end:last]
            said = tokenizer.decode(ids[end:last], skip_special_tokens=True)
            windows.append(Window(number, ids[begin : last - 1], labels, len(said.encode())))
            end = last
        left -= max(len(ids) - 1, 0)
        if left < 1 and (len(prompts) == job.prompts or number > LOOKED_AT * job.prompts):
            break
    if not windows:
        raise MQAError(f"{job.text}: no document has two tokens; give `text` with something to predict")
    check_ids(windows, vocabulary_size(config))

    def ask(chosen: Sequence[int]) -> dict[str, torch.Tensor]:  # all are as long
        ids = torch.tensor([prompts[i] for i in chosen])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return HeldOut(windows, collate_windows, prompts, ask)


def held_out_pairs(tokenizer: Any, config: Any, job: "Evaluation") -> HeldOut:
    """Pairs of texts, in the order drawn by the seed, until the targets have `tokens`."""
    two = pairs(job.text, job.columns, "`text`")
    if two is None:
        raise MQAError("encoder-decoder models need pairs: `text` with two `columns`, such as en,de")
    longest = job.window or 512
    options = {"truncation": True, "max_length": longest, "verbose": False}
    windows: list[Window] = []
    prompts: list[list[int]] = []
    references: list[str] = []
    left = job.tokens
    for index in torch.randperm(len(two[0]), generator=torch.Generator().manual_seed(job.seed)).tolist():
        source, target = two[0][index], two[1][index]
        if not source or not target:
            continue
        ids, labels = tokenizer(source, **options).input_ids, tokenizer(text_target=target, **options).input_ids
        if len(prompts) < job.prompts:
            prompts.append(ids)
            references.append(target)
        windows.append(Window(len(windows), ids, labels[: max(left, 1)], len(target.encode())))
        left -= len(labels)
        if left < 1:
            break
    if not windows:
        raise MQAError(f"{job.text}: there is no pair of texts")
    check_ids(windows, vocabulary_size(config))
    pad = config.pad_token_id if config.pad_token_id is not None else 0
    inner = CollatePairs(pad, config.decoder_start_token_id, start_is_last=starts_with_last(config))

    def collate(chosen: Sequence[Window]) -> dict[str, torch.Tensor]:
        return inner([{"input_ids": window.ids, "labels": window.labels} for window in chosen])

    def ask(chosen: Sequence[int]) -> dict[str, torch.Tensor]:
        inputs = inner([{"input_ids": prompts[i], "labels": [pad]} for i in chosen])
        return {name: inputs[name] for name in ("input_ids", "attention_mask")}

    return HeldOut(windows, collate, prompts, ask, references, Translations())


def held_out_speech(path: Path, config: Any, job: "Evaluation") -> HeldOut:
    """Recordings and their transcripts, in the order drawn by the seed, until the transcripts have `tokens`.

    Columns: "audio", a file or what `datasets` decodes, and "text", unless two others are named.
    """
    from transformers import AutoProcessor

    if job.text is None:
        raise MQAError("speech models need `text` with recordings and transcripts (columns audio and text)")
    try:
        processor: Any = AutoProcessor.from_pretrained(path)
        rate, longest = processor.feature_extractor.sampling_rate, processor.feature_extractor.n_samples
    except Exception as error:  # whatever transformers raises for files that are none
        raise MQAError(f"{path} has no processor of speech that can be loaded: {error}") from error
    if len(job.columns) not in (0, 2):
        raise MQAError(f"speech models need two `columns`, such as audio,text; got {', '.join(job.columns)}")
    rows, (sound, said) = load(job.text, "`text`"), job.columns or ("audio", "text")
    if not {sound, said} <= set(rows.column_names):
        raise MQAError(f"{job.text} has no columns {sound} and {said}; its columns: {rows.column_names}")
    recordings: list[Any] = []
    references: list[str] = []
    windows: list[Window] = []
    left = job.tokens
    for index in torch.randperm(len(rows), generator=torch.Generator().manual_seed(job.seed)).tolist():
        try:
            audio, text = rows[index][sound], rows[index][said]
        except Exception as error:  # whatever `datasets` raises for what it cannot decode
            raise MQAError(f"`text` {job.text}: row {index} cannot be read: {error}") from error
        if not isinstance(text, str):
            raise MQAError(f"`text` {job.text}: row {index} has no transcript in {said}, but {text!r}")
        audio = hear(Path(job.text).parent / audio if isinstance(audio, str) else audio, rate)
        if len(audio) > longest:
            raise MQAError(
                f"{job.text}: a recording of {len(audio) / rate:.1f} s, longer than the {longest / rate:.1f} s that "
                "the model hears at once"
            )
        labels = processor.tokenizer(text).input_ids[1:]  # the first is what the decoder begins with
        windows.append(Window(len(windows), [0] * len(labels), labels[: max(left, 1)], len(text.encode())))
        recordings.append(audio)
        references.append(text)
        left -= len(labels)
        if left < 1:
            break
    if not windows:
        raise MQAError(f"{job.text}: there is no recording")
    check_ids(windows, vocabulary_size(config))
    targets = CollatePairs(config.pad_token_id, config.decoder_start_token_id)

    def ask(chosen: Sequence[int]) -> dict[str, torch.Tensor]:
        sounds = [recordings[i] for i in chosen]
        return {"input_features": processor(sounds, sampling_rate=rate, return_tensors="pt").input_features}

    def collate(chosen: Sequence[Window]) -> dict[str, torch.Tensor]:
        inputs = targets([{"input_ids": [0], "labels": window.labels} for window in chosen])
        return {**ask([w.document for w in chosen]), **{n: inputs[n] for n in ("decoder_input_ids", "labels")}}

    count = min(job.prompts, len(windows))
    return HeldOut(windows, collate, [[]] * count, ask, references[:count], WordErrors())


def hear(recording: Any, rate: int) -> Any:
    """Samples [N] at `rate`, of a file or of what `datasets` has decoded."""
    if isinstance(recording, Path):
        try:
            import soundfile
        except ImportError as error:
            raise MQAError("recordings need soundfile and soxr: pip install 'mqa-hf[speech]'") from error
        try:
            channels, had = soundfile.read(recording, dtype="float32", always_2d=True)
        except (OSError, RuntimeError) as error:
            raise MQAError(f"{recording} is no recording that can be read: {error}") from error
        samples = channels.mean(1)
    else:
        try:
            samples, had = recording["array"], recording["sampling_rate"]
        except (KeyError, TypeError) as error:
            raise MQAError(f"{str(recording)[:80]} is no recording; give the name of a file, or its bytes") from error
    if had == rate:
        return samples
    import soxr

    return soxr.resample(samples, had, rate)


def check_ids(windows: Sequence[Window], size: int | None) -> None:
    most = max(max(*window.ids, *window.labels) for window in windows)
    if size is not None and most >= size:
        raise MQAError(f"the tokenizer gives ids up to {most}; the model has {size}")
