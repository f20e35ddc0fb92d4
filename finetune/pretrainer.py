"""Run a pretraining: make tokenizer and model, train, and write the result."""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import set_seed

from mqa_hf.base.code import runtime_files
from mqa_hf.base.devices import DTYPES, processes
from mqa_hf.base.files import stamps
from mqa_hf.base.hub import make_repository, push
from mqa_hf.base.output import resolve_output, written_beside
from mqa_hf.base.text import load_tokenizer
from mqa_hf.conversion.loading import load_model

from .architecture import build, configuration, widened
from .checkpoints import begin
from .data import set_up_logs, training_set
from .losses import Objective
from .pretrain import Pretraining, read_config
from .records import PretrainingRecord
from .tokenizer import trained_tokenizer
from .trainer import train


def carry_out(job: Pretraining) -> PretrainingRecord:
    """Train a model from scratch and write it with its tokenizer to the output of a job."""
    state = processes()
    set_up_logs()
    target = resolve_output(job.output, Path(job.parts[0].source), job.overwrite, PretrainingRecord.file)
    fields, options = read_config(job.config), job.decisive()
    pairs = bool(configuration(fields).is_encoder_decoder)
    begin(job.place, {"files": [stamp for part in job.parts for stamp in stamps(part.source)], **options}, job.restart)

    with state.main_process_first():
        if job.tokenizer is not None:
            tokenizer = load_tokenizer(job.tokenizer)
        else:
            tokenizer = trained_tokenizer(job, job.vocab_size, job.place / "tokenizer", pairs, job.seed)
    if job.equal_parameters is not None:
        fields = widened(fields, read_config(job.equal_parameters, "equal_parameters"), tokenizer)
    place = make_repository(job.push_to_hub, job.private) if job.push_to_hub and state.is_main_process else None
    set_seed(job.seed)
    model = build(fields, tokenizer)
    text = training_set(tokenizer, model.config, job)
    log = train("pretraining", model, Objective({"lm": 1.0}, compile=job.compile), job, text, job.place / "main")

    measured = [line["eval_lm"] for line in log if "eval_lm" in line]
    record = PretrainingRecord(
        options=options,
        config=fields,
        parameters=model.num_parameters(),
        tokens=round(job.steps(text.row_tokens) * job.rows * text.row_tokens),
        loss=measured[-1] if measured else None,
        log=[{**line} for line in log],
    )
    if state.is_main_process:
        write(job, target, model.config, tokenizer, record)
    state.wait_for_everyone()  # not for the upload, which may take longer than a barrier waits
    if place is not None:
        push(target, place, "Train with mqa-hf")
    return record


def write(job: Pretraining, target: Path, config: Any, tokenizer: Any, record: PretrainingRecord) -> None:
    """Write the trained model beside its place, with its tokenizer, and its code where that is this package's."""
    main = job.place / "main"
    trained = load_model(main / "final", config=config, dtype=DTYPES[job.dtype])
    trained.config.use_cache = True
    with written_beside(target, 4 * trained.num_parameters(), job.overwrite, PretrainingRecord.file) as partial:
        trained.save_pretrained(partial)
        for path in runtime_files(type(trained)):
            shutil.copyfile(path, partial / path.name)
        tokenizer.save_pretrained(partial)
        if (main / "runs").is_dir():
            shutil.copytree(main / "runs", partial / "runs")
        record.write(partial)
    with suppress(OSError):
        shutil.rmtree(job.place)
