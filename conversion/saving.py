"""Files beside the weights of a result: configuration, code, record of the conversion, model card."""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from mqa_hf.base.code import runtime_files
from mqa_hf.base.errors import listing
from mqa_hf.base.files import REPORT_FILE

from .calibration import Calibration
from .canonical import canonical_class, decoder_of, heads_of, latents_of, on_meta, with_fields, with_stacks
from .checkpoint import CheckpointWriter, Writer
from .convert import Conversion
from .plan import Plan
from .record import BeforeAfter, ConversionRecord, HeldOutLoss, LayerRecord, Nonfinite
from .spellings import both_spellings, lost_in_transformers4
from .walk import HeadMaker


def final_config(plan: Plan, maker: HeadMaker) -> PreTrainedConfig:
    """The configuration of the result: the plan's, with class name and fitted choices."""
    output: PreTrainedConfig = plan.output
    if isinstance(maker, Calibration) and not plan.native:
        chosen = {name: {"rope_frequencies": pairs} for name, pairs in maker.frequencies.items()}
        output = with_stacks(plan.pooled, **chosen)
    architecture = type(on_meta(plan.output)) if plan.native else canonical_class(plan.pooled)
    return with_fields(output, architectures=[architecture.__name__])


def write_config(plan: Plan, config: PreTrainedConfig, partial: Path) -> None:
    """Code first, `config.json` last: a directory without it does not load."""
    if not plan.native:
        for path in runtime_files(canonical_class(plan.pooled)):
            shutil.copyfile(path, partial / path.name)
    written = both_spellings(config) if plan.native else config.to_diff_dict()
    written.pop("_name_or_path", None)
    if plan.native:
        written.pop("auto_map", None)  # names code of the source, which the transformers class replaces
    written["transformers_version"] = version("transformers")
    (partial / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")


def record_of(
    plan: Plan, job: Conversion, maker: HeadMaker, writer: Writer, layers: Sequence[LayerRecord], warnings: list[str]
) -> ConversionRecord:
    """The content of `conversion.json`."""
    source, before, after = plan.reading.source, plan.reading.config, plan.pooled
    heads_before, heads_after = heads_of(before), heads_of(after)
    found: dict[str, Any] = {}
    if job.allow_nonfinite:
        found["nonfinite"] = Nonfinite(read=plan.reading.reader.nonfinite, written=writer.nonfinite)
    if latents_of(after):
        found["latents"] = latents_of(after)
    if isinstance(maker, Calibration):
        said = ", ".join(dict.fromkeys(maker.held_out))
        found["held_out_loss"] = HeldOutLoss.model_validate({**maker.losses, "text": said})
    named = replace(job, source=source.name, output="OUTPUT", revision=source.revision)
    return ConversionRecord(
        source=source.name,
        revision=source.revision,
        family=source.config.model_type,
        output=plan.output.model_type,
        options=job.recorded(),
        num_attention_heads=decoder_of(before).num_attention_heads,
        num_key_value_heads=BeforeAfter(before=heads_before["decoder"], after=heads_after["decoder"]),
        attentions={name: BeforeAfter(before=n, after=heads_after[name]) for name, n in heads_before.items()},
        kv_bytes_per_token=BeforeAfter(before=before.kv_bytes_per_token, after=after.kv_bytes_per_token),
        cross_kv_bytes_per_token=BeforeAfter(
            before=before.cross_kv_bytes_per_token, after=after.cross_kv_bytes_per_token
        ),
        parameters=sum(math.prod(info.shape) for info in plan.tensors.values()),
        layers=list(layers),
        versions={name: version(name) for name in ("mqa-hf", "transformers", "torch", "safetensors")},
        command=job.call() if job.in_memory else named.command(),
        warnings=warnings,
        **found,
    )


def warnings_of(plan: Plan, maker: HeadMaker, writer: Writer) -> list[str]:
    """Warnings for users of the result, a sentence each."""
    found = []
    if writer.nonfinite:
        entries, tensors = sum(writer.nonfinite.values()), len(writer.nonfinite)
        said = f"{entries:,} entries of {tensors:,} tensors are NaN or infinite"
        written = isinstance(writer, CheckpointWriter)
        found.append(f"{said}; {REPORT_FILE} names them" if written else f"{said}: {listing(writer.nonfinite)}")
    if plan.native and plan.output.model_type == "gpt_bigcode" and decoder_of(plan.pooled).positions_from_mask:
        found.append(
            f"{plan.reading.source.config.model_type} counts positions from the first token after the padding, but "
            f"gpt_bigcode from the first column; for left-padded rows pass position_ids, as generate() and vLLM do"
        )
    if plan.native:
        found += lost_in_transformers4(plan.output)
    return [*found, *(maker.warnings() if isinstance(maker, Calibration) else ())]
