"""Data that models predict and continue: held-out text in windows, pairs of texts, recordings with transcripts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mqa_hf.base import sound
from mqa_hf.base.chats import Document, encoded
from mqa_hf.base.errors import MQAError
from mqa_hf.base.text import Texts, documents, load_processor, pairs
from mqa_hf.finetune.data import IGNORED, CollatePairs, starts_with_last

from .metrics import Translations, WordErrors
from .vocabulary import vocabulary_size

if TYPE_CHECKING:
    from .evaluate import Evaluation

LOOKED_AT = 20  # documents to search per requested prompt, because many are shorter than a prompt


@dataclass(frozen=True)
class Window:
    """A window of a document, and the tokens in it that are predicted.

    Attributes:
        document: index of the document.
        ids: [L] tokens read, for encoder-decoder models by the encoder.
        labels: [L] the token to predict at each position (of the decoder), or `IGNORED`.
        bytes: UTF-8 bytes of the predicted tokens' text.
    """

    document: int
    ids: list[int]
    labels: list[int]
    bytes: int


@dataclass(frozen=True)
class HeldOut:
    """Windows to predict, and prompts to continue.

    Attributes:
        windows: windows to predict.
        collate: windows -> the model's inputs and labels [B, T].
        prompts: beginnings to continue, or sources to translate; empty for speech.
        ask: indices of prompts -> the inputs of `generate()`.
        references: reference texts; none for language models.
        metric: compares texts with references.
    """

    windows: list[Window]
    collate: Callable[[Sequence[Window]], dict[str, torch.Tensor]]
    prompts: list[list[int]]
    ask: Callable[[Sequence[int]], dict[str, torch.Tensor]]
    references: list[str] = field(default_factory=list)
    metric: Any = None

    def ids(self) -> set[int]:
        """All token ids that are read or predicted."""
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
    """Make windows over documents drawn with the seed, until they have `tokens`, and prompts from their beginnings.

    A document is preceded by the tokenizer's bos, or by eos if there is none, so that its first token is also
    predicted.
    """
    texts = documents(job.text, job.columns, "`text`", tokenizer)
    answers = job.loss_on == "answers"
    if answers and (not isinstance(texts, Texts) or texts.form.kind == "text"):
        raise MQAError(f"`text` {job.text} has no answers; use `loss_on` all")
    longest = getattr(config, "max_position_embeddings", None) or 2048
    window = job.window or min(longest, 2048)
    stride = job.stride or max(1, window // 2)
    if stride > window:
        raise MQAError(f"`window` must be at least as long as `stride`; got {window} and {stride}")
    if getattr(config, "position_embedding", "learned") == "learned" and window > longest:
        raise MQAError(f"`window` must be at most {longest}, the positions of the model; got {window}")
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    windows: list[Window] = []
    prompts: list[list[int]] = []
    left = job.tokens
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(job.seed)).tolist()
    for number, document in enumerate(order):
        text = texts.document(document) if answers and isinstance(texts, Texts) else Document(texts[document])
        ((ids, counted),) = encoded([text], tokenizer, answers)
        if prefix is not None and ids[:1] != [prefix]:
            ids, counted = [prefix, *ids], [False, *counted]
        if len(ids) > job.prompt_tokens and len(prompts) < job.prompts:
            prompts.append(ids[: job.prompt_tokens])
        if left < 1:  # looking for prompts only
            ids = ids[:1]
        ids = ids if answers else ids[: left + 1]
        end = 1  # tokens before it are already predicted
        for begin in range(0, len(ids) - 1, stride):
            last = min(begin + window + 1, len(ids))
            if last <= end:
                break
            begin = max(0, min(begin, last - 1 - window))  # the last window is as long as the others
            predicted = [i for i in range(end, last) if not answers or counted[i]][: max(left, 0)]
            labels = [IGNORED] * (last - begin - 1)
            for i in predicted:
                labels[i - begin - 1] = ids[i]
            if predicted:
                said = tokenizer.decode([ids[i] for i in predicted], skip_special_tokens=True)
                windows.append(Window(number, ids[begin : last - 1], labels, len(said.encode())))
            left -= len(predicted)
            end = last
        if left < 1 and (len(prompts) == job.prompts or number > LOOKED_AT * job.prompts):
            break
    if not windows:
        raise MQAError(f"{job.text}: no document has two tokens; give a longer `text`")
    check_ids(windows, vocabulary_size(config))

    def ask(chosen: Sequence[int]) -> dict[str, torch.Tensor]:  # all have the same length
        ids = torch.tensor([prompts[i] for i in chosen])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return HeldOut(windows, collate_windows, prompts, ask)


def held_out_pairs(tokenizer: Any, config: Any, job: "Evaluation") -> HeldOut:
    """Make pairs of texts, shuffled with the seed, until the targets have `tokens`."""
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
        raise MQAError(f"{job.text} has no pairs of texts")
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
    """Load recordings and transcripts, shuffled with the seed, until the transcripts have `tokens`.

    Columns are "audio" (a file, or audio decoded by `datasets`) and "text", unless two others are named.
    """
    if job.text is None:
        raise MQAError("speech models need `text` with recordings and transcripts (columns audio and text)")
    processor = load_processor(path)
    rate, longest = processor.feature_extractor.sampling_rate, processor.feature_extractor.n_samples
    recordings: list[Any] = []
    references: list[str] = []
    windows: list[Window] = []
    left = job.tokens
    for audio, text, _ in sound.recordings(job.text, job.columns, rate, "`text`", job.seed):
        if text is None:
            raise MQAError(f"`text` {job.text} needs a transcript for each recording")
        sound.check_length(audio, longest, rate, job.text)
        labels = processor.tokenizer(text).input_ids[1:]  # the first is the decoder's start token
        windows.append(Window(len(windows), [0] * len(labels), labels[: max(left, 1)], len(text.encode())))
        recordings.append(audio)
        references.append(text)
        left -= len(labels)
        if left < 1:
            break
    if not windows:
        raise MQAError(f"{job.text} has no recordings")
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


def check_ids(windows: Sequence[Window], size: int | None) -> None:
    most = max(max(*window.ids, *window.labels) for window in windows)
    if size is not None and most >= size:
        raise MQAError(f"the tokenizer has ids up to {most}, but the model's vocabulary has {size} tokens")
