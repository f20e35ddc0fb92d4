"""What a conversion would read, write and need in memory, from headers alone."""

import shutil
from collections.abc import Mapping
from typing import Any

from mqa_hf.base.errors import ConversionError
from mqa_hf.base.output import resolve_output
from mqa_hf.base.text import check_source
from mqa_hf.base.tokens import check_count
from mqa_hf.configuration_mqa import of_layer
from mqa_hf.configuration_mqa_seq2seq import MQASeq2SeqConfig

from . import states
from .canonical import decoder_of, heads_of, longest, stack_of, stacks_of
from .checkpoint import CheckpointReader, shards
from .convert import Conversion
from .families import OWN_CLASS
from .latent_moments import parts_of
from .memory import AnySource, open_model
from .passthrough import own_class_plan
from .plan import Plan, Reading, make_plan, make_reading, surveyed
from .source import open_source
from .stacked import StackedReader
from .states import FitOptions
from .widths import Widths, budget_components

# Float64 matrices [d, d] held at once when a latent is fitted: per part of the heads, and in addition. Measured.
LATENT_MATRICES = (10, 20)


def forecast(job: Conversion) -> dict[str, Any]:
    """Forecast of a resolved job, by name; sizes in bytes.

    Memory counts what is held at once: the largest part read, its converted form, and the calibration tokens with
    their moments; not Python and its libraries. With `cache_budget`, sizes are those of equal widths. If a latent's
    rebuilt keys are chosen per layer, weights are an upper bound, with all keys.

    Raises:
        ConversionError: if the conversion is impossible, or the weights of a hub id are not downloaded.
    """
    source = _here(job)
    place = resolve_output(job.output, source.directory, job.overwrite, recover=False)
    plan = _plan(source, job)
    reader = plan.reading.reader
    files = reader.reader if isinstance(reader, StackedReader) else reader
    read = sum(reader.tensors[s.name].nbytes for part in plan.parts for s in part.reads)
    scratch = mapped = 0
    if job.calibrated:
        config = plan.reading.config
        speech = isinstance(config, MQASeq2SeqConfig) and config.num_mel_bins is not None
        for part in job.calibration_parts if job.texts is None and not speech else ():
            check_source(part.source, "`calibration`")
        if not config.is_encoder_decoder:
            check_count(job.calibration_tokens, min(job.sequence_length, longest(config)))
        scratch, mapped = _calibration(plan, job)
    parent = next(parent for parent in place.parents if parent.exists())
    return {
        "source": source.name,
        "source_files": len(files.files) if isinstance(files, CheckpointReader) else 0,
        "read_bytes": read * (2 if surveyed(plan.reading, job) else 1),
        "layers": sum(part.layer is not None for part in plan.parts),
        "output": str(place),
        "output_files": len(shards(plan.tensors, job.max_shard_size).filename_to_tensors),
        "written_bytes": plan.nbytes,
        "kv_bytes_per_token": plan.pooled.kv_bytes_per_token,
        "memory_bytes": max(_at_once(plan, i) for i in range(len(plan.parts))) + scratch,
        "disk_bytes": plan.nbytes + mapped,
        "free_bytes": shutil.disk_usage(parent).free,
    }


def _here(job: Conversion) -> AnySource:
    """The source, without downloading weights."""
    if not isinstance(job.source, str):
        return open_model(job.source, job.tokenizer)
    source = open_source(job.source, job.revision, weights=False)
    weights = [path for kind in ("*.safetensors", "*.bin") for path in source.directory.glob(kind)]
    if source.revision is not None and not weights:
        raise ConversionError(
            f"the weights of {source.name} are not downloaded, and a dry run downloads nothing; download them "
            f"first: hf download "
            f"{source.name}"
        )
    return source


def _plan(source: AnySource, job: Conversion) -> Plan:
    if job.target == "native" and source.config.model_type in OWN_CLASS:
        return own_class_plan(source, job)
    reading = make_reading(source, job)
    latent = job.method == "latent"  # whose plan has equal sizes anyway
    return make_plan(
        reading, job, None if latent or not job.cache_budget else _equal_widths(reading, job.cache_budget)
    )


def _equal_widths(reading: Reading, budget: str) -> Mapping[str, Widths]:
    widths = {}
    for name in reading.attentions:
        if name == "encoder":
            continue
        stack, heads = stack_of(reading.config, name), heads_of(reading.pooled)[name]
        layers, most = stack.num_hidden_layers, heads_of(reading.config)[name] // heads
        share = budget_components(budget, reading.config, heads, name) // (2 * layers)
        fields = ("cross_qk_head_dim", "cross_v_head_dim") if name == "cross" else ("qk_head_dim", "v_head_dim")
        keys, values = (
            [min(max(2, share // 2 * 2), most * of_layer(getattr(stack, field), i)) for i in range(layers)]
            for field in fields
        )
        widths[name] = keys, values
    return widths


def _at_once(plan: Plan, i: int) -> int:
    """Bytes while a part is converted: what is read of it and of the next one, what is written of it and of the last
    one, and one tensor in float32."""
    read = [plan.reading.reader.tensors[step.name] for step in plan.parts[i].reads]
    following = [plan.reading.reader.tensors[step.name] for part in plan.parts[i + 1 : i + 2] for step in part.reads]
    written = sum(plan.tensors[step.name].nbytes for part in plan.parts[max(i - 1, 0) : i + 1] for step in part.writes)
    widest = max(info.nbytes * 4 // info.dtype.itemsize for info in read)
    return sum(info.nbytes for info in [*read, *following]) + written + widest


def _calibration(plan: Plan, job: Conversion) -> tuple[int, int]:
    """Bytes of a calibration in memory and in a mapped file."""
    config, options = plan.reading.config, FitOptions()
    tensors = plan.reading.reader.tensors
    outside = sum(4 * tensors[s.name].numel for part in plan.parts if part.layer is None for s in part.reads)
    layers = [
        sum(4 * tensors[s.name].numel for s in part.reads) + sum(4 * plan.tensors[s.name].numel for s in part.writes)
        for part in plan.parts
        if part.layer is not None
    ]
    memory, mapped = outside + max(layers), 0
    decoder = decoder_of(config)
    d, H, T = decoder.hidden_size, decoder.num_attention_heads, min(job.sequence_length, longest(config))
    for _ in stacks_of(config):
        held = 4 * job.calibration_tokens * d * (2 if job.refit else 1)  # states, and outputs of heads
        if held > states.MAPPED_ABOVE:
            mapped += held
        else:
            memory += held
        memory += held // 16  # the held-out ones again
    new = max(heads_of(plan.pooled).values())
    if job.method == "latent":
        heads = max(heads_of(config)[name] for name in plan.reading.attentions)
        each, besides = LATENT_MATRICES
        moments = 8 * (each * parts_of(heads) + besides) * d * d
    else:
        moments = 8 * (2 * (d + 1) ** 2 + 2 * new * d * d)
    batch = 4 * options.batch * (T * d * 4 + H * options.queries * T * 3 + H * T * T)
    return memory + moments + batch, mapped
