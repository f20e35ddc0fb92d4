"""Measure checkpoints and their original; measurements are stored in OUTPUT as they are made.

    OUTPUT/evaluation.json            the results, written at the end
    OUTPUT/NAME/key.json              the files and options that a checkpoint's measurements depend on
    OUTPUT/NAME/tokens-0.jsonl        one line per window, by the first process
    OUTPUT/NAME/writing-0.jsonl       one line per prompt
    OUTPUT/NAME/tasks.json            the results of lm-eval

An interrupted run continues where it stopped, and finished measurements are not repeated.
"""

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from transformers.utils import logging

from mqa_hf.base.console import progress_bar
from mqa_hf.base.devices import DTYPES, processes
from mqa_hf.base.errors import MQAError, listing
from mqa_hf.base.files import read_json, stamps, write_whole
from mqa_hf.base.hub import PICKLES, SAFETENSORS, locate
from mqa_hf.base.shapes import unique_names
from mqa_hf.conversion.inspect import Inspection
from mqa_hf.conversion.loading import load_model
from mqa_hf.conversion.source import load_config

from .evaluation_record import (
    CheckpointResult,
    Continuation,
    EvaluationRecord,
    NextToken,
    Sample,
    Settings,
    TaskResults,
    WindowRecord,
    WritingRecord,
    Written,
    read_lines,
)
from .held_out import HeldOut, held_out_pairs, held_out_speech, held_out_text
from .likelihood import by_context, by_document, predict
from .metrics import Continuations, NextTokens, bleu_above
from .vocabulary import Vocabulary, common_vocabulary
from .writing import Writer

if TYPE_CHECKING:
    from .evaluate import Evaluation

FEW = 10  # with fewer documents, intervals are over windows
# Options that determine the measurements of a checkpoint; if one changes, they are repeated.
DECISIVE = (
    *("text", "columns", "loss_on", "tokens", "window", "stride", "prompts", "prompt_tokens", "new_tokens", "beams"),
    *("dtype", "seed"),
)
KEY, TASKS = "key.json", "tasks.json"
OWN_FILES = re.compile(r"key\.json|tasks\.json|(tokens|writing)-\d+\.jsonl|\.(key|tasks)\.json\.partial")
SAMPLES = 3  # generated texts to store


def carry_out(job: "Evaluation") -> EvaluationRecord:
    """Measure what is still missing, and write the results."""
    logging.disable_progress_bar()
    given = [str(job.original), *job.checkpoints]
    names = unique_names(given)
    check_output(Path(job.output), names)
    with processes().main_process_first():
        paths = [locate(said, weights=True)[0] for said in given]
    for said, path in zip(given, paths):
        if not any(next(path.glob(pattern), None) for pattern in (*SAFETENSORS, *PICKLES)):
            raise MQAError(f"{said} has no weights (*.safetensors or *.bin); give a complete checkpoint")
    configs = [load_config(path) for path in paths]
    check_kinds(given, configs)
    vocabulary = common_vocabulary(names, paths, configs)
    if configs[0].is_encoder_decoder and job.loss_on != "all":
        raise MQAError(f"`loss_on` {job.loss_on} is for decoder-only models; others write only what is predicted")
    if getattr(configs[0], "num_mel_bins", None):
        held_out = held_out_speech(paths[0], configs[0], job)
    elif configs[0].is_encoder_decoder:
        held_out = held_out_pairs(vocabulary.tokenizer, configs[0], job)
    else:
        held_out = held_out_text(vocabulary.tokenizer, configs[0], job)
    vocabulary.check_common(held_out.ids())
    measurements = Measurements(job, names[0], paths[0], held_out, vocabulary)
    results = [measurements.of(name, path, said) for name, path, said in zip(names, paths, given)]
    options = {name: value for name, value in job.recorded().items() if name in Settings.model_fields}
    record = EvaluationRecord(
        settings=Settings(**{**options, "windows": len(held_out.windows), "prompts": len(held_out.prompts)}),
        command=job.command(),
        versions={name: version(name) for name in ("mqa-hf", "transformers", "torch", "sacrebleu")},
        checkpoints=results,
        note=vocabulary.note,
    )
    state = processes()
    if state.is_main_process:
        record.write(Path(job.output))
    state.wait_for_everyone()
    return record


def check_output(output: Path, names: Sequence[str]) -> None:
    """Raise MQAError if results cannot be written to `output`, or would replace something else."""
    if output.exists() and not output.is_dir():
        raise MQAError(f"{output} is a file; give a directory as `output`")
    if (output / "config.json").exists():
        raise MQAError(f"{output} is a checkpoint (it has a config.json); give another directory as `output`")
    found = output / EvaluationRecord.file
    if found.exists() and not {"settings", "checkpoints"} <= read_json(found).keys():
        raise MQAError(f"{found} is not a result of mqa-hf evaluate; give another `output`")
    for place in (output / name for name in names):
        if place.exists() and not place.is_dir():
            raise MQAError(f"{place} is a file where a directory is needed; give another `output`")
        inside = [path.name for path in place.iterdir()] if place.exists() else []
        foreign = [name for name in inside if not OWN_FILES.fullmatch(name)]
        if foreign:
            raise MQAError(
                f"{place} has files that are not measurements ({listing(foreign, 3)}); give another `output`"
            )


def check_kinds(given: Sequence[str], configs: Sequence[Any]) -> None:
    """Raise MQAError if checkpoints are not of the same kind as the original, the first."""
    kinds = [kind_of(config) for config in configs]
    for said, kind in zip(given, kinds):
        if kind != kinds[0]:
            raise MQAError(f"{said} is {kind}, and {given[0]} is {kinds[0]}; give `checkpoints` made from `original`")


def kind_of(config: Any) -> str:
    if getattr(config, "num_mel_bins", None):
        return "a speech model"
    return "an encoder-decoder model" if config.is_encoder_decoder else "a decoder-only model"


@dataclass
class Measurements:
    """Measurements of checkpoints on the same text.

    Attributes:
        job: the evaluation.
        first: name of the original.
        original: directory of the original.
        held_out: windows to predict and prompts.
        vocabulary: vocabularies of the checkpoints.
    """

    job: "Evaluation"
    first: str
    original: Path
    held_out: HeldOut
    vocabulary: Vocabulary

    def of(self, name: str, path: Path, given: str) -> CheckpointResult:
        """Make all measurements of a checkpoint; those already in the output are read."""
        state, place, held_out = processes(), Path(self.job.output) / name, self.held_out
        key = self.key(path)
        with state.main_process_first():
            if state.is_main_process and json_or_none(place / KEY) != key:
                shutil.rmtree(place, ignore_errors=True)
                write_json(place / KEY, key)
        models: dict[Path, Any] = {}
        for step, count in (("tokens", len(held_out.windows)), ("writing", len(held_out.prompts))):
            done = {record.id for record in self.kept(place, step)}
            state.wait_for_everyone()  # all processes divide the same remainder, before one of them writes
            todo = [i for i in range(count) if i not in done]
            mine = todo[state.process_index :: state.num_processes]
            if mine:
                for needed in (path, self.original) if step == "tokens" else (path,):
                    if needed not in models:
                        models[needed] = self.load(needed)
                measure = self.predicted if step == "tokens" else self.written
                records = measure(models, name, path, mine)
                append(place / f"{step}-{state.process_index}.jsonl", f"{name}: {step}", records, len(mine))
            state.wait_for_everyone()
        result = self.summary(name, path, given)
        if self.job.tasks:
            result.tasks = self.tasks(path, place / TASKS)
        return result

    def kept(self, place: Path, step: str) -> list[Any]:
        """Read the measurements of a step: [`WindowRecord`] per window, [`WritingRecord`] per prompt."""
        if step == "tokens":
            return read_lines(place, step, WindowRecord, len(self.held_out.windows))
        return read_lines(place, step, WritingRecord, len(self.held_out.prompts))

    def key(self, path: Path) -> Any:
        """Everything that a checkpoint's measurements depend on, as in JSON."""
        job = self.job
        key: dict[str, Any] = {
            "checkpoint": str(path.resolve()),
            "files": stamps(path),
            "original": [str(self.original.resolve()), stamps(self.original)],
            "what": {name: getattr(job, name) for name in DECISIVE},
        }
        if job.text is not None and Path(job.text).is_file():
            key["text"] = stamps(job.text)
        return json.loads(json.dumps(key))

    def load(self, path: Path) -> Any:
        state = processes()
        default: Any = "auto" if state.device.type != "cpu" else torch.float32
        dtype = DTYPES[self.job.dtype] if self.job.dtype else default
        return load_model(path, dtype=dtype).to(state.device)

    def predicted(self, models: dict[Path, Any], name: str, path: Path, chosen: list[int]) -> Iterable[WindowRecord]:
        ours, theirs = models[path], models[self.original]
        apart = self.vocabulary.apart.get(name, ())
        return predict(ours, theirs, self.held_out, chosen, self.job.batch_tokens, path, apart)

    def written(self, models: dict[Path, Any], name: str, path: Path, chosen: list[int]) -> Iterable[WritingRecord]:
        job = self.job
        writer = Writer(self.held_out, self.vocabulary.tokenizer, job.new_tokens, job.beams, job.batch_tokens)
        write = writer.translations if self.held_out.references else writer.continuations
        return write(models[path], chosen)

    def tasks(self, path: Path, kept: Path) -> TaskResults:
        """Results of lm-eval, stored or new."""
        from .harness import run_tasks

        job, state = self.job, processes()
        dtype = job.dtype or ("auto" if state.device.type != "cpu" else "float32")
        asked = [list(job.tasks), str(job.include_path), job.limit, dtype]
        before = json_or_none(kept)
        if not isinstance(before, dict) or before.get("asked") != asked:
            names = tuple(job.tasks)
            found = run_tasks(path, names, job.include_path, job.limit, dtype, str(state.device))
            before = {"asked": asked, **found}
            if state.is_main_process:
                write_json(kept, before)
        state.wait_for_everyone()
        return TaskResults(**{name: before[name] for name in TaskResults.model_fields if name in before})

    def summary(self, name: str, path: Path, given: str) -> CheckpointResult:
        """Summarise a checkpoint's measurements, compared with the original's."""
        output = Path(self.job.output)
        place, first = output / name, output / self.first
        ours, theirs = (self.kept(directory, "tokens") for directory in (place, first))
        names = ("nats", "divergence", "same", "tokens", "bytes")
        sums = {n: [getattr(record, n) for record in ours] for n in names} | {"original": [r.nats for r in theirs]}
        groups = [record.document for record in ours]
        over = "documents" if len(set(groups)) >= FEW else "windows"
        if over == "documents":
            sums = {n: list(by_document(groups, values).values()) for n, values in sums.items()}
        next_token = NextToken(
            **{**NextTokens().compute(**sums), "documents": len(set(groups)), "intervals_over": over}
        )
        found: dict[str, Any] = {
            "name": name,
            "checkpoint": str(path.resolve()),
            **cached(path),
            "next_token": next_token,
            "loss_by_context": by_context(ours),
        }
        if self.held_out.prompts:
            found |= self.writing_summary(place, first)
        return CheckpointResult(**found, given=given)

    def writing_summary(self, place: Path, first: Path) -> dict[str, Any]:
        """Summarise generated text, compared with the original's and with references, if any."""
        held_out, tokenizer = self.held_out, self.vocabulary.tokenizer
        ours, theirs = (self.kept(directory, "writing") for directory in (place, first))
        tokens = {"predictions": [r.tokens for r in ours], "references": [r.tokens for r in theirs]}
        found: dict[str, Any] = {"writing": Continuation(**Continuations().compute(**tokens))}
        if held_out.references:
            for kind in ("greedy", "beam"):
                texts, before = ([getattr(record, kind) for record in records] for records in (ours, theirs))
                numbers = held_out.metric.compute(predictions=texts, references=held_out.references)
                if "bleu" in numbers:
                    above = bleu_above(texts, before, held_out.references)
                    numbers["bleu_above_original"], numbers["bleu_above_original_interval"] = above
                found[kind] = Written(**numbers)
        found["samples"] = [
            Sample(
                prompt=tokenizer.decode(held_out.prompts[r.id], skip_special_tokens=True),
                text=tokenizer.decode(r.tokens, skip_special_tokens=True),
            )
            for r in ours[:SAMPLES]
        ]
        return found


def append(path: Path, title: str, records: Iterable[BaseModel], count: int) -> None:
    """Append records to a file as they are made."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with progress_bar(*columns) as progress:
        task = progress.add_task(title, total=count)
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" if path.stat().st_size else "")  # after a truncated line
            for record in records:
                file.write(record.model_dump_json(exclude_none=True) + "\n")
                file.flush()
                progress.advance(task)


def cached(path: Path) -> dict[str, Any]:
    """Cache bytes per token, and the latent if there is one, from `mqa-hf inspect`."""
    try:
        said = Inspection(path).run()
    except MQAError:  # a class that this package does not support
        return {}
    found = {n: said[n]["now"] for n in ("kv_bytes_per_token", "cross_kv_bytes_per_token") if n in said}
    latents = [*said.get("latents", {}).values()]
    return {**found, "latent": latents[0]} if latents else found


def json_or_none(path: Path) -> Any:
    """Content of a JSON file; `None` if it is missing or truncated."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_json(path: Path, content: Any) -> None:
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
