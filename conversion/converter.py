"""Convert a pretrained checkpoint to a multi-query one, one layer at a time.

plan      configuration and headers: what is read, pooled and written, or why that is impossible
walk      per layer: source tensors -> canonical layer -> pooled layer -> output shard
save      configuration, code, tokenizer, `conversion.json`, model card; then the directory is renamed
"""

import os
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from mqa_hf.base.devices import check_device
from mqa_hf.base.errors import ConversionError, ConversionWarning
from mqa_hf.base.files import REPORT_FILE
from mqa_hf.base.hub import make_repository, push
from mqa_hf.base.output import resolve_output, written_beside

from .calibration import Calibration
from .card import write_card
from .checkpoint import CheckpointWriter
from .convert import Conversion, ConversionOptions, ModelConversion
from .examples import companions_of, examples_of
from .families import OWN_CLASS
from .latent_sizes import choose_latents
from .memory import AnySource, ModelSource, ModelWriter, build, open_model
from .passthrough import own_class_plan
from .plan import Plan, Reading, make_plan, make_reading, surveyed
from .pooling import Pooling
from .record import ConversionRecord
from .saving import final_config, record_of, warnings_of, write_config
from .source import open_source
from .states import FitOptions
from .walk import HeadMaker, survey, walk
from .widths import budget_components, choose_widths


def carry_out(job: Conversion) -> ConversionRecord:
    """Run a resolved conversion and write the result."""
    check_device(job.device)
    source = open_any(job)
    companions = companions_of(source)
    place = resolve_output(job.output, source.directory, job.overwrite)
    plan, maker = prepare(source, job, scratch=place.parent)
    if job.push_to_hub:
        job = replace(job, push_to_hub=make_repository(job.push_to_hub, job.private))
    with written_beside(place, plan.nbytes, job.overwrite) as partial:
        companions.carry_over(partial)
        writer = CheckpointWriter(partial, plan.tensors, job.max_shard_size, job.allow_nonfinite)
        layers = walk(plan, maker, writer)
        said = [*companions.doubts(), *warnings_of(plan, maker, writer)]
        record = record_of(plan, job, maker, writer, layers, said)
        (partial / REPORT_FILE).write_text(record.to_json() + "\n", encoding="utf-8")  # renamed as a whole
        said += write_card(partial, record, companions.card, plan.output, job)
        write_config(plan, final_config(plan, maker), partial)
        companions.check(partial)
    for message in said:
        warnings.warn(message, ConversionWarning, stacklevel=4)
    if job.push_to_hub:
        push(place, job.push_to_hub, "Convert with mqa-hf")
    return record


def converted(job: ModelConversion) -> PreTrainedModel:
    """Run a resolved conversion in memory; the model is on the source model's device, or the CPU."""
    check_device(job.device)
    source = open_any(job)
    plan, maker = prepare(source, job, scratch=Path(tempfile.gettempdir()))
    writer = ModelWriter(plan.tensors, job.allow_nonfinite)
    walk(plan, maker, writer)
    generation = companions_of(source).generation()
    model = build(final_config(plan, maker), writer.state, generation, job.allow_nonfinite)
    for message in warnings_of(plan, maker, writer):
        warnings.warn(message, ConversionWarning, stacklevel=4)
    return model.to(source.model.device) if isinstance(source, ModelSource) else model  # type: ignore[arg-type]


def open_any(job: Conversion | ModelConversion) -> AnySource:
    """The source of a job: a checkpoint's directory or hub id, or a model in memory."""
    if isinstance(job.source, str | os.PathLike):
        if job.tokenizer is not None:
            raise ConversionError("`tokenizer` is for a model in memory; a checkpoint has its own")
        return open_source(job.source, job.revision)
    if job.revision is not None:
        raise ConversionError("`revision` is for hub ids; the source is a model in memory")
    return open_model(job.source, job.tokenizer)


def prepare(source: AnySource, job: ConversionOptions, scratch: Path | None) -> tuple[Plan, HeadMaker]:
    """The plan of a conversion and the maker of its heads.

    Args:
        source: the source.
        job: the resolved job.
        scratch: directory for large temporary files.

    Raises:
        ConversionError: if the conversion is impossible.
    """
    if job.target == "native" and source.config.model_type in OWN_CLASS:
        plan = own_class_plan(source, job)
    else:
        reading = make_reading(source, job)
        if job.calibrated:
            return _calibrated(reading, job, scratch)
        plan = make_plan(reading, job)
    reading = plan.reading
    return plan, Pooling(reading.config, plan.pooled, reading.attentions, job.method, job.seed)


def _calibrated(reading: Reading, job: ConversionOptions, scratch: Path | None) -> tuple[Plan, HeadMaker]:
    examples = examples_of(reading, job)
    options = FitOptions(
        method=job.method,
        refit=bool(job.refit),
        steps=job.fit_steps or 0,
        held_out=len(examples.held_out),
        device=job.device,
        seed=job.seed,
        scratch=scratch,
    )
    widths = None
    if surveyed(reading, job):
        looking = Calibration(reading.config, reading.pooled, examples, reading.attentions, options)
        curves = survey(reading, looking)
        if job.method == "latent":
            widths = {name: choose_latents(found, reading.config, name, job) for name, found in curves.items()}
        else:
            widths = {
                name: choose_widths(
                    curves[name], budget_components(job.cache_budget or "", reading.config, job.kv_heads, name)
                )
                for name in reading.attentions
                if name != "encoder"
            }
    plan = make_plan(reading, job, widths)
    return plan, Calibration(reading.config, plan.pooled, examples, reading.attentions, options)
