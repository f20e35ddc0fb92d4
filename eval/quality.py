"""How much worse a converted checkpoint is than its original: `mqa-hf evaluate`.

    mqa-hf evaluate ORIGINAL CONVERTED ... --text held-out.jsonl --output evaluation
    accelerate launch -m mqa_hf.eval.quality ORIGINAL CONVERTED ... --text held-out.jsonl --output evaluation

Language models: the likelihood of held-out text in sliding windows, the distance of each token's distribution from the
original's, and what is written freely after the beginnings of the texts. Encoder-decoder models: the same likelihoods
of the targets, and the texts that are written, greedily and with beams. Everything is measured document by document
and kept in OUTPUT as it comes, so that an interrupted run goes on and a finished measurement is not made again.
"""

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import (
    AutoConfig,
)
from transformers.utils import logging

from mqa_hf import inspect
from mqa_hf.base.devices import DTYPES, processes
from mqa_hf.base.errors import MQAError
from mqa_hf.base.files import write_whole
from mqa_hf.base.hub import locate
from mqa_hf.base.shapes import unique_names
from mqa_hf.base.text import documents, load, load_tokenizer, one_column, pairs
from mqa_hf.conversion.loading import load_model
from mqa_hf.finetune.data import IGNORED, CollatePairs, starts_with_last

from .metrics import Continuations, NextTokens, Translations, WordErrors, bleu_above

RESULTS = "evaluation.json"
FEW = 10  # documents; with fewer, intervals are over windows
NOT_DECISIVE = ("batch_tokens", "tasks", "include_path", "limit")  # for what is kept of a checkpoint
LOOKED_AT = 20  # documents for each prompt that is wanted, where most are shorter than a prompt
POSITIONS = 1024  # of logits that are compared at once, in float32


@dataclass(frozen=True)
class Evaluation:
    """What is measured, and on what.

    Attributes:
        text: data set, as for `--calibration`; `None`: Python's manual.
        columns: of the text; two for encoder-decoder models, read and written.
        tokens: of the text that are predicted, at most.
        window: tokens that a model reads at once. Default: its positions, 2,048 at most.
        stride: tokens by which windows are shifted; each token is predicted once, with more than `window - stride`
            before it, where there are so many. Default: half the window.
        prompts: texts that are continued, or translated; 0: none.
        prompt_tokens: of the beginning of a text.
        new_tokens: that are written, at most.
        beams: of beam search, for encoder-decoder models.
        batch_tokens: read at once.
        dtype: of weights. Default: the checkpoint's on a GPU, float32 on a CPU.
        seed: of the choice of documents.
        tasks: of lm-eval.
        include_path: directory with tasks of one's own.
        limit: examples of each task.
    """

    text: str | None = None
    columns: tuple[str, ...] = ()
    tokens: int = 131_072
    window: int | None = None
    stride: int | None = None
    prompts: int = 64
    prompt_tokens: int = 64
    new_tokens: int = 128
    beams: int = 4
    batch_tokens: int = 8_192
    dtype: str | None = None
    seed: int = 0
    tasks: tuple[str, ...] = ()
    include_path: Path | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        least = {"tokens": 1, "window": 1, "stride": 1, "prompts": 0, "prompt_tokens": 1, "new_tokens": 1, "beams": 1}
        for name, smallest in {**least, "batch_tokens": 1, "seed": 0, "limit": 1}.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise MQAError(f"--{name.replace('_', '-')} must be at least {smallest}; got {value}")


def evaluate(
    original: str | Path, checkpoints: Sequence[str | Path], output: str | Path, what: Evaluation, command: str = ""
) -> dict[str, Any]:
    """Measure checkpoints beside their original.

    Args:
        original: directory or hub id.
        checkpoints: directories or hub ids of what was made of it.
        output: directory that gets `evaluation.json`, and a folder for each checkpoint.
        what: is measured.
        command: that is noted in the results.

    Returns:
        What stands in `evaluation.json`.

    Raises:
        MQAError: for what cannot be: no checkpoint, another tokenizer, too little text, logits that are no
            numbers.
    """
    logging.disable_progress_bar()
    given = [str(original), *map(str, checkpoints)]
    names, output = unique_names(given), Path(output)
    if output.is_file():
        raise MQAError(f"{output} is a file; give a directory")
    with processes().main_process_first():
        paths = [locate(said, weights=True)[0] for said in given]
    for said, path in zip(given, paths):
        if not (path / "config.json").is_file():
            raise MQAError(f"{said} is no checkpoint: it has no config.json")
    tokenizer = common_tokenizer(paths)
    config = AutoConfig.from_pretrained(paths[0])
    note = compared_words(names, paths, tokenizer)
    if getattr(config, "num_mel_bins", None):
        examples = read_speech(paths[0], config, what)
    elif config.is_encoder_decoder:
        examples = read_pairs(tokenizer, config, what)
    else:
        examples = read_text(tokenizer, config, what)
    job = Job(output, names[0], paths[0], examples, what, tokenizer)
    results = [{**job.measure(name, path), "given": said} for name, path, said in zip(names, paths, given)]
    whole = {
        "settings": {
            **json.loads(json.dumps(asdict(what), default=str)),
            "windows": len(examples.windows),
            "prompts": len(examples.prompts),
        },
        "command": command,
        "versions": {name: version(name) for name in ("mqa-hf", "transformers", "torch", "sacrebleu")},
        "checkpoints": results,
        **({"note": note} if note else {}),
    }
    state = processes()
    if state.is_main_process:
        write(output / RESULTS, whole)
    state.wait_for_everyone()
    return whole


def write(path: Path, content: Any) -> None:
    """JSON, whole or not at all."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def common_tokenizer(paths: Sequence[Path]) -> Any:
    """The tokenizer of all checkpoints, which must be one."""
    found = [load_tokenizer(path) for path in paths]
    for path, tokenizer in zip(paths, found):
        if tokenizer.get_vocab() != found[0].get_vocab():
            raise MQAError(
                f"{path} has another tokenizer ({len(tokenizer)} words) than {paths[0]} ({len(found[0])} words), so "
                "that their losses cannot be compared"
            )
    return found[0]


def compared_words(names: Sequence[str], paths: Sequence[Path], tokenizer: Any) -> str:
    """What to say where models have different numbers of words (embeddings padded to a multiple); "" where not.

    Raises:
        MQAError: where the tokenizer has an id that one of them does not have.
    """
    sizes = [vocabulary(AutoConfig.from_pretrained(path)) for path in paths]
    found = {name: size for name, size in zip(names, sizes) if size is not None}
    if len(set(found.values())) < 2 or names[0] not in found:
        return ""
    said = ", ".join(f"{name} {size:,}" for name, size in found.items())
    most = max(tokenizer.get_vocab().values())
    if most >= min(found.values()):
        raise MQAError(
            f"the models have different numbers of words ({said}), and the tokenizer gives ids up to {most:,}; they "
            "can be compared only where each has all of the tokenizer's words"
        )
    return (
        f"The models have different numbers of words ({said}). Each loss is over all words of its model; KL and first "
        "choice are over those that it has in common with the original."
    )


def vocabulary(config: Any) -> int | None:
    """Words that a model writes, as far as its configuration says."""
    return getattr(config.get_text_config(decoder=True), "vocab_size", None)


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
class Examples:
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


def read_text(tokenizer: Any, config: Any, what: Evaluation) -> Examples:
    """Windows over documents drawn by the seed, until they have `what.tokens`; their beginnings as prompts.

    A document is preceded by the tokenizer's bos, or eos where there is none, so that its first token is predicted
    too.
    """
    texts = documents(what.text, one_column(what.columns, "--columns"), "--text", tokenizer)
    longest = getattr(config, "max_position_embeddings", None) or 2048
    window = what.window or min(longest, 2048)
    stride = what.stride or max(1, window // 2)
    if window < 1 or not 0 < stride <= window:
        raise MQAError(f"--window must be above 0 and --stride at most as long; got {window} and {stride}")
    if getattr(config, "position_embedding", "learned") == "learned" and window > longest:
        raise MQAError(f"--window {window} is more than the {longest} positions of the model")
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    windows: list[Window] = []
    prompts: list[list[int]] = []
    left = what.tokens
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(what.seed)).tolist()
    for number, document in enumerate(order):
        ids = tokenizer(texts[document], verbose=False).input_ids
        if prefix is not None and ids[:1] != [prefix]:
            ids = [prefix, *ids]
        if len(ids) > what.prompt_tokens and len(prompts) < what.prompts:
            prompts.append(ids[: what.prompt_tokens])
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
        if left < 1 and (len(prompts) == what.prompts or number > LOOKED_AT * what.prompts):
            break
    if not windows:
        raise MQAError(f"{what.text}: no document has two tokens; give --text with something to predict")
    check_ids(windows, vocabulary(config))

    def ask(chosen: Sequence[int]) -> dict[str, torch.Tensor]:  # all are as long
        ids = torch.tensor([prompts[i] for i in chosen])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return Examples(windows, collate_windows, prompts, ask)


def read_pairs(tokenizer: Any, config: Any, what: Evaluation) -> Examples:
    """Pairs of texts, in the order drawn by the seed, until the targets have `what.tokens`."""
    two = pairs(what.text, what.columns, "--text")
    if two is None:
        raise MQAError("encoder-decoder models need pairs: --text with two --columns, such as en,de")
    longest = what.window or 512
    options = {"truncation": True, "max_length": longest, "verbose": False}
    windows: list[Window] = []
    prompts: list[list[int]] = []
    references: list[str] = []
    left = what.tokens
    for index in torch.randperm(len(two[0]), generator=torch.Generator().manual_seed(what.seed)).tolist():
        source, target = two[0][index], two[1][index]
        if not source or not target:
            continue
        ids, labels = tokenizer(source, **options).input_ids, tokenizer(text_target=target, **options).input_ids
        if len(prompts) < what.prompts:
            prompts.append(ids)
            references.append(target)
        windows.append(Window(len(windows), ids, labels[: max(left, 1)], len(target.encode())))
        left -= len(labels)
        if left < 1:
            break
    if not windows:
        raise MQAError(f"{what.text}: there is no pair of texts")
    check_ids(windows, vocabulary(config))
    pad = config.pad_token_id if config.pad_token_id is not None else 0
    inner = CollatePairs(pad, config.decoder_start_token_id, start_is_last=starts_with_last(config))

    def collate(chosen: Sequence[Window]) -> dict[str, torch.Tensor]:
        return inner([{"input_ids": window.ids, "labels": window.labels} for window in chosen])

    def ask(chosen: Sequence[int]) -> dict[str, torch.Tensor]:
        inputs = inner([{"input_ids": prompts[i], "labels": [pad]} for i in chosen])
        return {name: inputs[name] for name in ("input_ids", "attention_mask")}

    return Examples(windows, collate, prompts, ask, references, Translations())


def read_speech(path: Path, config: Any, what: Evaluation) -> Examples:
    """Recordings and their transcripts, in the order drawn by the seed, until the transcripts have `what.tokens`.

    Columns: "audio", a file or what `datasets` decodes, and "text", unless two others are named.
    """
    from transformers import AutoProcessor

    if what.text is None:
        raise MQAError("speech models need --text with recordings and transcripts (columns audio and text)")
    processor: Any = AutoProcessor.from_pretrained(path)
    rate, longest = processor.feature_extractor.sampling_rate, processor.feature_extractor.n_samples
    if len(what.columns) not in (0, 2):
        raise MQAError(f"speech models need two --columns, such as audio,text; got {', '.join(what.columns)}")
    rows, (sound, said) = load(what.text, "--text"), what.columns or ("audio", "text")
    if not {sound, said} <= set(rows.column_names):
        raise MQAError(f"{what.text} has no columns {sound} and {said}; its columns: {rows.column_names}")
    recordings: list[Any] = []
    references: list[str] = []
    windows: list[Window] = []
    left = what.tokens
    for index in torch.randperm(len(rows), generator=torch.Generator().manual_seed(what.seed)).tolist():
        audio, text = rows[index][sound], rows[index][said]
        audio = hear(Path(what.text).parent / audio if isinstance(audio, str) else audio, rate)
        if len(audio) > longest:
            raise MQAError(
                f"{what.text}: a recording of {len(audio) / rate:.1f} s, longer than the {longest / rate:.1f} s that "
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
        raise MQAError(f"{what.text}: there is no recording")
    check_ids(windows, vocabulary(config))
    targets = CollatePairs(config.pad_token_id, config.decoder_start_token_id)

    def ask(chosen: Sequence[int]) -> dict[str, torch.Tensor]:
        sounds = [recordings[i] for i in chosen]
        return {"input_features": processor(sounds, sampling_rate=rate, return_tensors="pt").input_features}

    def collate(chosen: Sequence[Window]) -> dict[str, torch.Tensor]:
        inputs = targets([{"input_ids": [0], "labels": window.labels} for window in chosen])
        return {**ask([w.document for w in chosen]), **{n: inputs[n] for n in ("decoder_input_ids", "labels")}}

    count = min(what.prompts, len(windows))
    return Examples(windows, collate, [[]] * count, ask, references[:count], WordErrors())


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
        samples, had = recording["array"], recording["sampling_rate"]
    if had == rate:
        return samples
    import soxr

    return soxr.resample(samples, had, rate)


def check_ids(windows: Sequence[Window], vocabulary: int | None) -> None:
    most = max(max(*window.ids, *window.labels) for window in windows)
    if vocabulary is not None and most >= vocabulary:
        raise MQAError(f"the tokenizer gives ids up to {most}; the model has {vocabulary}")


@dataclass
class Job:
    """Measurements of checkpoints on the same examples, in the folder of each."""

    output: Path
    first: str
    original: Path
    examples: Examples
    what: Evaluation
    tokenizer: Any

    def measure(self, name: str, path: Path) -> dict[str, Any]:
        """All measurements of a checkpoint; those that are in the output are read."""
        state, place = processes(), self.output / name
        key = {
            "checkpoint": str(path.resolve()),
            "files": stamps(path),
            "original": [str(self.original.resolve()), stamps(self.original)],
            "what": {f.name: getattr(self.what, f.name) for f in fields(self.what) if f.name not in NOT_DECISIVE},
        }
        key = json.loads(json.dumps(key))
        with state.main_process_first():
            if state.is_main_process and read(place / "key.json") != key:
                shutil.rmtree(place, ignore_errors=True)
                write(place / "key.json", key)
        seq2seq = bool(self.examples.references)
        steps = {"tokens": self.predict, "writing": self.translate if seq2seq else self.carry_on}
        models: dict[Path, Any] = {}
        for step, run in steps.items():
            done = {record["id"] for record in self.records(place, step)}
            state.wait_for_everyone()  # all share out the same rest, before one of them writes
            count = len(self.examples.windows) if step == "tokens" else len(self.examples.prompts)
            todo = [i for i in range(count) if i not in done]
            mine = todo[state.process_index :: state.num_processes]
            if mine:
                if path not in models:
                    models[path] = self.load(path)
                if step == "tokens" and path != self.original and self.original not in models:
                    models[self.original] = self.load(self.original)
                self.keep(
                    place / f"{step}-{state.process_index}.jsonl", name, step, run(models, path, mine), len(mine)
                )
            state.wait_for_everyone()
        found = self.summary(name, path, place)
        if self.what.tasks:
            found["tasks"] = self.run_tasks(path, place / "tasks.json")
        return found

    def run_tasks(self, path: Path, kept: Path) -> dict[str, Any]:
        """Results of lm-eval, or those that are kept."""
        from .harness import run_tasks

        what, state = self.what, processes()
        dtype = what.dtype or ("auto" if state.device.type != "cpu" else "float32")
        asked = [list(what.tasks), str(what.include_path), what.limit, dtype]
        before = read(kept)
        if not isinstance(before, dict) or before.get("asked") != asked:
            before = {
                "asked": asked,
                **run_tasks(path, what.tasks, what.include_path, what.limit, dtype, str(state.device)),
            }
            if state.is_main_process:
                write(kept, before)
        state.wait_for_everyone()
        return {name: value for name, value in before.items() if name != "asked"}

    def load(self, path: Path) -> Any:
        state = processes()
        if self.what.dtype is not None and self.what.dtype not in DTYPES:
            raise MQAError(f"--dtype must be one of {', '.join(DTYPES)}; got {self.what.dtype!r}")
        default: Any = "auto" if state.device.type != "cpu" else torch.float32
        dtype = DTYPES[self.what.dtype] if self.what.dtype else default
        return load_model(path, dtype=dtype).to(state.device)

    @staticmethod
    def records(place: Path, step: str) -> list[dict[str, Any]]:
        """What all processes have written, in order; the end of a line that was being written is passed over."""
        found: dict[int, dict[str, Any]] = {}
        for path in place.glob(f"{step}-*.jsonl"):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                found[record["id"]] = record
        return [found[i] for i in sorted(found)]

    @staticmethod
    def keep(path: Path, name: str, step: str, records: Iterator[dict[str, Any]], count: int) -> None:
        """Append records to a file as they come."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task(f"{name}: {step}", total=count)
            with path.open("a", encoding="utf-8") as file:
                file.write("\n" if path.stat().st_size else "")  # after a line that was cut off
                for record in records:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                    file.flush()
                    progress.advance(task)

    @torch.no_grad()
    def predict(self, models: dict[Path, Any], path: Path, chosen: list[int]) -> Iterator[dict[str, Any]]:
        """Likelihoods of windows, and how far they are from the original's."""
        windows = self.examples.windows
        for batch in batches(chosen, lambda i: len(windows[i].ids), self.what.batch_tokens):
            inputs = self.examples.collate([windows[i] for i in batch])
            labels = inputs.pop("labels")
            ours = logits(models[path], inputs)
            theirs = ours if path == self.original else logits(models[self.original], inputs)
            for row, index in enumerate(batch):
                places = (labels[row] != IGNORED).nonzero()[:, 0]
                measured = compare(ours[row], theirs[row], labels[row], places)
                if not measured.isfinite().all():
                    wrong = "its" if not measured[0].isfinite().all() else "the original's"
                    raise MQAError(
                        f"{path}: {wrong} logits are no numbers in document {windows[index].document}, "
                        f"{int((~measured.isfinite()).any(0).sum())} of {len(places)} tokens (dtype "
                        f"{models[path].dtype}); try --dtype float32, and look at the checkpoint"
                    )
                nats, divergence, same = measured
                context: dict[int, list[float]] = {}
                for bucket in (places + 1).float().log2().floor().long().unique().tolist():
                    here = (places + 1).float().log2().floor().long() == bucket
                    context[bucket] = [float(nats[here].sum()), int(here.sum())]
                yield {
                    "id": index,
                    "document": windows[index].document,
                    "nats": float(nats.sum()),
                    "divergence": float(divergence.sum()),
                    "same": int(same.sum()),
                    "tokens": len(places),
                    "bytes": windows[index].bytes,
                    "context": context,
                }

    @torch.no_grad()
    def write_after(self, model: Any, chosen: list[int], beams: int) -> Iterator[tuple[int, list[int]]]:
        """Tokens that follow prompts, up to eos."""
        prompts = self.examples.prompts
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        ends = model.generation_config.eos_token_id
        stops = set(ends if isinstance(ends, list) else [ends])
        options = {"max_new_tokens": self.what.new_tokens, "do_sample": False, "num_beams": beams, "pad_token_id": pad}
        cost = self.what.batch_tokens // max(1, beams)
        for batch in batches(chosen, lambda i: len(prompts[i]) + self.what.new_tokens, cost):
            given = {name: value.to(model.device) for name, value in self.examples.ask(batch).items()}
            written = model.generate(**given, **options).cpu()
            written = written[:, 1 if model.config.is_encoder_decoder else len(prompts[batch[0]]) :]
            for i, row in zip(batch, written.tolist()):
                end = next((n for n, token in enumerate(row) if token in stops), len(row))
                yield i, row[:end]

    def carry_on(self, models: dict[Path, Any], path: Path, chosen: list[int]) -> Iterator[dict[str, Any]]:
        """What a language model writes after the beginnings of texts."""
        for i, tokens in self.write_after(models[path], chosen, 1):
            yield {"id": i, "tokens": tokens}

    def translate(self, models: dict[Path, Any], path: Path, chosen: list[int]) -> Iterator[dict[str, Any]]:
        """What an encoder-decoder model writes, greedily and with beams."""
        beams = dict(self.write_after(models[path], chosen, self.what.beams))
        for i, tokens in self.write_after(models[path], chosen, 1):
            texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in (tokens, beams[i])]
            yield {"id": i, "tokens": tokens, "greedy": texts[0], "beam": texts[1]}

    def summary(self, name: str, path: Path, place: Path) -> dict[str, Any]:
        """The numbers of a checkpoint, from its records and the original's."""
        first = self.output / self.first
        ours, theirs = self.records(place, "tokens"), self.records(first, "tokens")
        names = ("nats", "divergence", "same", "tokens", "bytes")
        found: dict[str, Any] = {"name": name, "checkpoint": str(path.resolve()), **cache_size(path)}
        sums = {n: [record[n] for record in ours] for n in names} | {"original": [r["nats"] for r in theirs]}
        groups = [record["document"] for record in ours]
        over = "documents" if len(set(groups)) >= FEW else "windows"
        if over == "documents":
            sums = {n: list(by_document(groups, values).values()) for n, values in sums.items()}
        found["next_token"] = {**NextTokens().compute(**sums), "documents": len(set(groups)), "intervals_over": over}
        found["loss_by_context"] = by_context(ours)
        if not self.examples.prompts:
            return found
        ours, theirs = self.records(place, "writing"), self.records(first, "writing")
        tokens = {"predictions": [r["tokens"] for r in ours], "references": [r["tokens"] for r in theirs]}
        found["writing"] = Continuations().compute(**tokens)
        if self.examples.references:
            for kind in ("greedy", "beam"):
                texts = [record[kind] for record in ours]
                found[kind] = self.examples.metric.compute(predictions=texts, references=self.examples.references)
                if "bleu" in found[kind]:
                    before = [record[kind] for record in theirs]
                    above = bleu_above(texts, before, self.examples.references)
                    found[kind]["bleu_above_original"], found[kind]["bleu_above_original_interval"] = above
        found["samples"] = [
            {"prompt": self.tokenizer.decode(self.examples.prompts[r["id"]], skip_special_tokens=True)}
            | {"text": self.tokenizer.decode(r["tokens"], skip_special_tokens=True)}
            for r in ours[:3]
        ]
        return found


def stamps(path: Path) -> list[list[Any]]:
    """What tells whether a checkpoint's files are still the same."""
    parts = sorted(p for p in path.iterdir() if p.suffix in (".json", ".safetensors", ".bin", ".model"))
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in parts]


def read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def batches(chosen: list[int], length: Any, most: int) -> Iterator[list[int]]:
    """Examples of like length, the longest first, at most so many tokens of them at once."""
    batch: list[int] = []
    for i in sorted(chosen, key=lambda i: (-length(i), i)):
        if batch and (len(batch) + 1) * length(batch[0]) > most:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**{name: value.to(model.device) for name, value in inputs.items()}, use_cache=False).logits


def compare(ours: torch.Tensor, theirs: torch.Tensor, labels: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Of each place: nats of its label, KL(theirs ‖ ours) in nats, and whether both have the same first choice.

    Each model's loss is over all of its own words. Where one has more (a padded embedding), the other two numbers are
    of the distributions over the words that both have.

    Args:
        ours, theirs: logits [T, V] and [T, V'].
        labels: [T].
        places: [n] of T.

    Returns:
        [3, n] in float64.
    """
    found = []
    for part in places.split(POSITIONS):
        log_p = ours[part.to(ours.device)].float().log_softmax(-1)
        nats = -log_p.gather(-1, labels[part].to(log_p.device)[:, None])[:, 0]
        if theirs is ours:
            found.append(torch.stack((nats, torch.zeros_like(nats), torch.ones_like(nats))))
            continue
        words = min(ours.shape[-1], theirs.shape[-1])
        if words < ours.shape[-1]:
            log_p = log_p[:, :words].log_softmax(-1)
        log_q = theirs[part.to(theirs.device), :words].float().log_softmax(-1).to(log_p.device)
        divergence = (log_q.exp() * (log_q - log_p)).sum(-1)
        found.append(torch.stack((nats, divergence, (log_p.argmax(-1) == log_q.argmax(-1)).to(nats.dtype))))
    return torch.cat(found, 1).double().cpu()


def by_document(groups: Sequence[int], values: Sequence[float]) -> dict[int, float]:
    sums: dict[int, float] = {}
    for group, value in zip(groups, values):
        sums[group] = sums.get(group, 0) + value
    return sums


def by_context(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Loss by how many tokens stand before the predicted one, in powers of two."""
    sums: dict[int, list[float]] = {}
    for record in records:
        for bucket, (nats, count) in record["context"].items():
            entry = sums.setdefault(int(bucket), [0.0, 0])
            entry[0], entry[1] = entry[0] + nats, entry[1] + count
    return [
        {"from": 2**b, "to": 2 ** (b + 1) - 1, "loss": sums[b][0] / sums[b][1], "tokens": sums[b][1]}
        for b in sorted(sums)
    ]


def cache_size(path: Path) -> dict[str, Any]:
    """Bytes of cache that a token takes, as `mqa-hf inspect` says."""
    try:
        said = inspect(path)
    except MQAError:  # a model of a class that this package does not know
        return {}
    return {n: said[n]["now"] for n in ("kv_bytes_per_token", "cross_kv_bytes_per_token") if n in said}


def show(results: dict[str, Any], console: Console) -> None:
    """The main numbers as a table, with their intervals."""
    checkpoints = results["checkpoints"]
    over = checkpoints[0]["next_token"]["intervals_over"]
    seq2seq = "greedy" in checkpoints[0]
    beam = f"BLEU, beam {results['settings']['beams']}"
    speech = seq2seq and "word_error_rate" in checkpoints[0]["greedy"]
    columns = ["", "loss,\nnats", "above the original", "perplexity", "KL", "same first\nchoice"]
    if speech:
        columns += ["word errors, greedy", f"beam {results['settings']['beams']}"]
    else:
        columns += ["BLEU, greedy", beam, "chrF"] if seq2seq else ["tokens before\nit differs", "repetition"]
    columns.append("cache,\nbytes a token")
    table = Table(title_justify="left", title=f"held-out text; 95% intervals over {over}")
    for column in columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for found in checkpoints:
        next_token, writing = found["next_token"], found.get("writing", {})
        cells = [
            found["name"],
            f"{next_token['loss']:.3f}",
            "" if found is checkpoints[0] else spread(next_token, "loss_above_original", "+.3f"),
            f"{next_token['perplexity']:.2f}",
            f"{next_token['kl']:.3f}",
            f"{next_token['same_first_choice']:.1%}",
        ]
        if speech:
            cells += [spread(found[kind], "word_error_rate", ".1%") for kind in ("greedy", "beam")]
        elif seq2seq:
            cells += [spread(found["greedy"], "bleu", ".1f"), spread(found["beam"], "bleu", ".1f")]
            cells.append(f"{found['greedy']['chrf']:.1f}")
        else:
            cells += [f"{writing['agreeing_tokens']:.1f}", f"{writing['repetition']:.1%}"] if writing else ["", ""]
        size = found.get("kv_bytes_per_token")
        table.add_row(*cells, f"{size:,}" if size is not None else "")
    console.print(table)
    if "note" in results:
        console.print(results["note"])


def spread(found: dict[str, Any], name: str, form: str) -> str:
    """A number and its interval."""
    interval = found[f"{name}_interval"]
    said = format(found[name], form)
    if interval is None or not all(map(math.isfinite, interval)):
        return said
    low, high = (format(x, form) for x in interval)
    return f"{said} [{low}, {high}]"


if __name__ == "__main__":
    from mqa_hf.cli import main

    sys.argv.insert(1, "evaluate")
    main()
