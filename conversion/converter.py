"""From a pretrained checkpoint to a multi-query one, a layer at a time.

plan      configuration and headers: what will be read, pooled and written, or why it cannot be
walk      per layer: source tensors -> canonical layer -> pooled layer -> output shard
finish    configuration, code, tokenizer, `conversion.json`, model card; then the directory gets its name
"""

import json
import math
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from transformers import AutoModelForCausalLM, PreTrainedConfig

import mqa_hf
from mqa_hf.base import text
from mqa_hf.base.console import progress_bar
from mqa_hf.base.devices import check_device
from mqa_hf.base.errors import ConversionError, ConversionWarning
from mqa_hf.base.files import REPORT_FILE
from mqa_hf.base.hub import make_repository, push
from mqa_hf.base.output import resolve_output, written_beside
from mqa_hf.configuration_mqa import MQAConfig

from .calibration import Calibration, Examples, FitOptions
from .card import write_card
from .checkpoint import CheckpointReader, CheckpointWriter, TensorInfo
from .companions import check_loads, copy_companions, not_looked_at
from .convert import Conversion
from .families import (
    FAMILIES,
    NATIVE_ONLY,
    Family,
    canonical_config,
    check_own_heads,
    family_of,
    fold_scales,
    native_config,
)
from .passthrough import own_class_plan
from .plan import Step, as_stored, canonical_class, decoder_of, match, read_steps, write_steps
from .pooling import CanonicalConfig, choose_attentions, heads_of, pool_layer, with_heads
from .source import Source, open_source
from .spellings import both_spellings, lost_in_transformers4
from .widths import Widths, budget_components, choose_widths, fitted_config

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# What `from_pretrained(..., trust_remote_code=True)` of each class imports.
_DECODER_FILES = (
    "compat_mqa.py", "configuration_mqa.py", "attention_mqa.py", "positions_mqa.py", "layer_mqa.py", "modeling_mqa.py",
    "decoding_mqa.py", "request_mqa.py", "engine_mqa.py", "graph_mqa.py", "sampling_mqa.py", "beams_mqa.py",
    "step_mqa.py", "weights_mqa.py", "rules_mqa.py", "cache_mqa.py",
    "kernel_launch_mqa.py", "kernel_attend_mqa.py", "kernel_append_mqa.py", "kernel_norm_mqa.py",
    "kernel_linear_mqa.py",
)  # fmt: skip
_SEQ2SEQ_FILES = (*_DECODER_FILES, "configuration_mqa_seq2seq.py", "modeling_mqa_seq2seq.py")
RUNTIME_FILES = {
    "MQAForCausalLM": _DECODER_FILES,
    "MQAForConditionalGeneration": _SEQ2SEQ_FILES,
    "MQAForSpeechSeq2Seq": (*_SEQ2SEQ_FILES, "modeling_mqa_speech.py"),
}


def carry_out(job: Conversion) -> dict[str, Any]:
    """Convert as a resolved job says; returns the content of `conversion.json`."""
    check_device(job.device)
    opened = open_source(job.source, job.revision)
    plan = make_plan(opened, job)
    place = resolve_output(job.output, plan.source.directory, job.overwrite)
    components = {
        name: budget_components(job.cache_budget, plan.config, job.kv_heads, name)
        for name in plan.attentions
        if name != "encoder" and job.cache_budget is not None
    }
    fit = None
    if job.calibrated:
        length = min(job.sequence_length, _longest(plan.config))
        examples = _examples(plan, job, length)
        options_of_fit = FitOptions(
            method=job.method,
            refit=bool(job.refit),
            held_out=max(1, len(examples.tokens) // 16),
            device=job.device,
            seed=job.seed,
            scratch=place.parent,
        )
        if components:
            surveyor = Calibration(plan.config, plan.pooled, examples, plan.attentions, options_of_fit)
            plan = make_plan(opened, job, survey(plan, surveyor, components))
        fit = Calibration(plan.config, plan.pooled, examples, plan.attentions, options_of_fit)
    if job.push_to_hub:
        make_repository(job.push_to_hub, job.private)
    with written_beside(place, sum(info.nbytes for info in plan.tensors.values()), job.overwrite) as partial:
        copy_companions(plan.source.directory, partial)
        writer = CheckpointWriter(partial, plan.tensors, job.max_shard_size, job.allow_nonfinite)
        layers = walk(plan, writer, job.method, job.seed, fit)
        report = _report(plan, job, layers)
        if job.allow_nonfinite:
            report["nonfinite"] = {"read": plan.reader.nonfinite, "written": writer.nonfinite}
        if fit is not None:
            report["held_out_loss"] = {**fit.losses(), "text": job.calibration or text.DEFAULT_TEXT}
            if isinstance(plan.pooled, MQAConfig):  # (no encoder-decoder family is rotary)
                plan.pooled.rope_frequencies = fit.last.pooled.rope_frequencies
        report["warnings"] = [*_doubts(plan, writer), *(fit.warnings() if fit is not None else ())]
        (partial / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
        write_card(partial, report, plan.source.directory, auto_class(plan))
        _write_config(plan, partial)
        check_loads(partial, plan.source.directory)
    if job.push_to_hub:
        push(place, job.push_to_hub)
    for message in report["warnings"]:
        warnings.warn(message, ConversionWarning, stacklevel=4)
    return report


def _doubts(plan: "Plan", writer: CheckpointWriter) -> list[str]:
    """What a person has to know before the result is used, in sentences."""
    doubts = not_looked_at(plan.source.directory)
    if writer.nonfinite:
        entries, tensors = sum(writer.nonfinite.values()), len(writer.nonfinite)
        doubts.append(f"{entries:,} entries of {tensors:,} tensors are NaN or infinite; {REPORT_FILE} names them")
    if plan.output is plan.pooled:
        return doubts
    if plan.output.model_type == "gpt_bigcode" and decoder_of(plan.pooled).positions_from_mask:
        doubts.append(
            f"{plan.source.config.model_type} counts positions from the first token that is no padding, and "
            "gpt_bigcode from the first column: with rows that are padded on the left pass position_ids, as "
            "generate() and vLLM do"
        )
    return doubts + lost_in_transformers4(plan.output)


def _longest(config: CanonicalConfig) -> int:
    stacks = (config,) if isinstance(config, MQAConfig) else (config.encoder, config.decoder)
    limited = [
        s.max_position_embeddings for s in stacks if s.position_embedding in ("learned", "sinusoidal", "rotary")
    ]
    return min(limited, default=2**31)


def _examples(plan: "Plan", job: Conversion, length: int) -> Examples:
    directory, columns = plan.source.directory, list(job.calibration_columns)
    if isinstance(plan.config, MQAConfig):
        vocab_size, column = plan.config.vocab_size, text.one_column(columns, "`calibration_columns`")
        tokens = text.calibration_tokens(
            directory, job.calibration, job.calibration_tokens, length, vocab_size, job.seed, column
        )
        return Examples(tokens)
    source, source_valid, tokens, valid = text.seq2seq_tokens(
        directory, job.calibration, columns, job.calibration_tokens, length, plan.config, job.seed
    )
    return Examples(tokens, valid, source, source_valid)


def survey(plan: "Plan", fit: Calibration, components: dict[str, int]) -> dict[str, Widths]:
    """Walk over the layers without writing, and choose the widths of each attention within its components."""
    curves: dict[str, list] = {}
    with _progress() as bar, torch.no_grad():
        parts = _parts(plan)
        task = bar.add_task("looking at layers", total=len(parts))
        for layer, steps in parts:
            canonical = _read(plan, steps)
            if layer is None:
                fit.take(canonical)
            else:
                for name, found in fit.survey(*layer, canonical).items():
                    curves.setdefault(name, []).append(found)
            bar.advance(task)
    return {name: choose_widths(curves[name], count) for name, count in components.items()}


def _progress(*columns: ProgressColumn) -> Progress:
    return progress_bar(TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn())


def _parts(plan: "Plan") -> list[tuple[tuple[str, int] | None, list[Step]]]:
    """What is read together: tensors outside the layers one by one, then layers, those of an encoder first."""
    layers: dict[tuple[str, int], list[Step]] = {}
    parts: list[tuple[tuple[str, int] | None, list[Step]]] = []
    for step in plan.reads:
        if step.layer is None:
            parts.append((None, [step]))
        else:
            layers.setdefault(step.layer, []).append(step)
    ordered = sorted(layers.items(), key=lambda item: (item[0][0] != "encoder", item[0]))
    return [*parts, *ordered]


@dataclass(frozen=True)
class Plan:
    """A conversion that can be carried out.

    Attributes:
        source, reader, family: where the weights come from.
        config: the canonical configuration with all of the source's K/V heads.
        pooled: the same with the heads that are asked for.
        output: the configuration that is written: `pooled`, or that of a class of transformers.
        reads, writes: the steps on either side.
        tensors: shape and dtype of what is written.
        attentions: those that get fewer heads.
    """

    source: Source
    reader: CheckpointReader
    family: Family
    config: CanonicalConfig
    pooled: CanonicalConfig
    output: PreTrainedConfig
    reads: list[Step]
    writes: list[Step]
    tensors: dict[str, TensorInfo]
    attentions: Sequence[str] = ("decoder",)


def make_plan(source: Source, job: Conversion, widths: dict[str, Widths] | None = None) -> Plan:
    """Settle a conversion from configuration and headers; raises ConversionError where it is impossible.

    Args:
        source: that is converted.
        job: resolved.
        widths: of each layer's heads, by attention, in place of the job's.
    """
    dtype = DTYPES[job.dtype] if job.dtype else None
    if job.target == "native" and source.config.model_type in NATIVE_ONLY:
        if job.calibrated:
            raise ConversionError(
                f"`method` shared needs a canonical model, which {source.config.model_type} has none of"
            )
        if job.window is not None or job.attention not in (None, ("decoder",)):
            raise ConversionError(f"`window` and `attention` are not for {source.config.model_type} in its own class")
        if job.ignore_switch:
            raise ConversionError(f"`ignore_switch`: {source.config.model_type} keeps its own class and every switch")
        return Plan(**own_class_plan(source, kv_heads=job.kv_heads, dtype=dtype, allow_nonfinite=job.allow_nonfinite))
    family = family_of(source.config.model_type)
    config = canonical_config(source.config, source.raw, frozenset(job.ignore_switch))
    if family.canonical:
        check_own_heads(config)
    reader = CheckpointReader(source.directory, job.allow_nonfinite)
    family, config = as_stored(family, config, reader)
    chosen = choose_attentions(config, job.attention)
    pooled = with_heads(config, job.kv_heads, chosen)
    if job.calibrated:
        pooled = _fitted(config, pooled, chosen, job, widths)
    config.tie_word_embeddings = pooled.tie_word_embeddings = _really_tied(source, reader, family, config)
    reads = read_steps(reader.tensors, family, config, equal=lambda *names: _equal(reader, names))
    if job.window is not None:
        if job.calibrated:
            raise ConversionError("`window` and `method` shared do not go together: heads are fitted to all they see")
        _set_window(pooled, job.window, job.target)

    output: PreTrainedConfig = pooled
    output_family: Family | None = None
    if job.target == "native":
        output = native_config(source.config, decoder_of(pooled))
        output.tie_word_embeddings = config.tie_word_embeddings
        output_family = FAMILIES[output.model_type]
    for part in (output, *(getattr(output, name) for name in output.sub_configs)):
        part.dtype = dtype or source.config.dtype
    available = {target: step.name for step in reads for target in step.targets if target}
    writes, shapes = write_steps(output, output_family, set(available))

    tensors = {}
    for step in writes:
        given = next((available[t] for t in step.targets if t in available), reads[0].name)
        tensors[step.name] = TensorInfo(shapes[step.name], dtype or reader.tensors[given].dtype)
    return Plan(source, reader, family, config, pooled, output, reads, writes, tensors, chosen)


def _really_tied(source: Source, reader: CheckpointReader, family: Family, config: CanonicalConfig) -> bool:
    """Whether the head is the embedding; files that contradict `config.json` decide, as they do in transformers."""
    steps, _ = match(reader.tensors, family)
    names = {target: step.name for step in reversed(steps) for target in step.targets}
    head = names.get("lm_head.weight")
    if not config.tie_word_embeddings:
        return head is None and source.config.tie_word_embeddings
    embedding = names.get(canonical_class(config)._tied_weights_keys["lm_head.weight"])
    return head is None or embedding is None or _equal(reader, (head, embedding))


def _equal(reader: CheckpointReader, names: tuple[str, ...]) -> bool:
    one, other = reader.read(names).values()
    return torch.equal(one, other)


def _fitted(
    config: CanonicalConfig,
    pooled: CanonicalConfig,
    attentions: Sequence[str],
    job: Conversion,
    widths: dict[str, Widths] | None,
) -> CanonicalConfig:
    if not isinstance(config, MQAConfig) and config.num_mel_bins is not None:
        raise ConversionError("`method` shared calibrates on text, and this model hears; use mean, first or random")
    # Classes of transformers have all frequencies alike.
    chosen_frequencies = job.method == "shared" and job.target != "native"
    fitted = fitted_config(config, pooled, attentions, job.width_factors, widths, chosen_frequencies)
    wider = job.width_factors != (1, 1) or decoder_of(fitted).output_bias != decoder_of(config).output_bias
    if job.target == "native" and wider:
        raise ConversionError(
            "`target` native: classes of transformers have no heads wider than the source's, and where values "
            "have a bias and the output has none, no place for the fitted one; use `target` mqa"
        )
    return fitted


def _set_window(config: CanonicalConfig, window: int, target: str) -> None:
    stack = decoder_of(config)
    if target == "native":
        raise ConversionError("`window` is for `target` mqa: the classes of transformers keep the source's windows")
    if not 2 <= window < 2**31:
        raise ConversionError(
            f"`window` must be at least 2 positions, the current one and the one before, and below 2**31; got {window}"
        )
    if stack.sliding_window and stack.sliding_window < window:
        raise ConversionError(f"`window` {window} is wider than the source's own of {stack.sliding_window}")
    stack.layer_types, stack.sliding_window = ["sliding_attention"] * stack.num_hidden_layers, window


def walk(
    plan: Plan, writer: CheckpointWriter, method: str, seed: int, fit: Calibration | None = None
) -> list[dict[str, Any]]:
    """Read, pool or fit, and write one layer after the other, and each tensor outside the layers by itself.

    Returns:
        Per layer, the errors of [`pool_layer`] or the report of [`Calibration.fit`].
    """
    generator = torch.Generator().manual_seed(seed)
    waiting: dict[str, list[Step]] = {}  # by the canonical tensor that a step is written with
    read = {target for step in plan.reads for target in step.targets}
    if fit is not None:  # fitted heads may have a bias of the output that the source has not
        read |= {target for step in plan.writes for target in step.targets if target and "o_proj.bias" in target}
    for step in plan.writes:
        waiting.setdefault(next((t for t in step.targets if t and t in read), ""), []).append(step)
    parts = _parts(plan)
    count = sum(layer is not None for layer, _ in parts)
    before, after = heads_of(plan.config), heads_of(plan.pooled)

    errors: dict[str, Any]
    reports: list[dict[str, Any]] = []
    with _progress(DownloadColumn(), TransferSpeedColumn()) as bar, torch.no_grad():
        task = bar.add_task("embeddings", total=writer.total_bytes)
        for layer, steps in parts:
            canonical = _read(plan, steps)
            if layer is not None:
                stack, number = layer
                bar.update(task, description=f"layer {len(reports) + 1}/{count}")
                if fit is not None:
                    canonical, errors = fit.fit(stack, number, canonical)
                    if errors:
                        said = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in errors.items())
                        bar.console.print(f"{stack} layer {number}: {said}".strip(), highlight=False, soft_wrap=True)
                else:
                    errors = pool_layer(
                        canonical,
                        before=before,
                        after=after,
                        attentions=plan.attentions,
                        method=method,
                        generator=generator,
                        std=plan.config.initializer_range,
                    )
                reports.append({"layer": number, **({"stack": stack} if stack else {}), **errors})
            elif fit is not None:
                fit.take(canonical)
            ready = [step for name in canonical for step in waiting.pop(name, ())]
            bar.advance(task, writer.write({step.name: _output_tensor(plan, step, canonical) for step in ready}))
        bar.advance(task, writer.write({s.name: torch.zeros(plan.tensors[s.name].shape) for s in waiting.pop("", ())}))
    writer.finish()
    return reports


def _read(plan: Plan, steps: list[Step]) -> dict[str, torch.Tensor]:
    """The canonical tensors that some source tensors of one layer, or of none, hold."""
    tensors = plan.reader.read(step.name for step in steps)
    canonical = {}
    for step in steps:
        for target, tensor in zip(
            step.targets, step.rule.operation.to_canonical(tensors[step.name], decoder_of(plan.config))
        ):
            if target is not None:
                canonical[target] = tensor
    if steps[0].layer is not None:
        fold_scales(plan.family, plan.source.config, steps[0].layer[1], canonical)
    return canonical


def _output_tensor(plan: Plan, step: Step, canonical: dict[str, torch.Tensor]) -> torch.Tensor:
    given = tuple(canonical.get(target) if target else None for target in step.targets)
    return step.rule.operation.from_canonical(given, decoder_of(plan.pooled))


def auto_class(plan: Plan) -> str:
    """The name of transformers' class that loads the output with its head."""
    if isinstance(plan.pooled, MQAConfig):
        return "AutoModelForCausalLM"
    return next(name for name in plan.pooled.auto_map if name.startswith("AutoModelFor"))


def _write_config(plan: Plan, partial: Path) -> None:
    """Code first, `config.json` last: a directory without it does not load."""
    if plan.output is plan.pooled:
        architecture = canonical_class(plan.pooled).__name__
        for name in RUNTIME_FILES[architecture]:
            shutil.copyfile(Path(mqa_hf.__file__).parent / name, partial / name)
    else:
        with torch.device("meta"):
            architecture = type(AutoModelForCausalLM.from_config(plan.output)).__name__
    plan.output.architectures = [architecture]
    native = plan.output is not plan.pooled
    config = both_spellings(plan.output) if native else plan.output.to_diff_dict()
    config.pop("_name_or_path", None)
    if native:
        config.pop("auto_map", None)  # of code that the source brings along and its class in transformers replaces
    config["transformers_version"] = version("transformers")
    (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _report(plan: Plan, job: Conversion, layers: list[dict[str, Any]]) -> dict[str, Any]:
    before, after = plan.config, plan.pooled
    heads_before, heads_after = heads_of(before), heads_of(after)
    return {
        "source": plan.source.name,
        "revision": plan.source.revision,
        "family": plan.source.config.model_type,
        "output": plan.output.model_type,
        "options": job.recorded(),
        "num_attention_heads": decoder_of(before).num_attention_heads,
        "num_key_value_heads": {"before": heads_before["decoder"], "after": heads_after["decoder"]},
        "attentions": {name: {"before": n, "after": heads_after[name]} for name, n in heads_before.items()},
        "kv_bytes_per_token": {"before": before.kv_bytes_per_token, "after": after.kv_bytes_per_token},
        "cross_kv_bytes_per_token": {
            "before": before.cross_kv_bytes_per_token,
            "after": after.cross_kv_bytes_per_token,
        },
        "parameters": sum(math.prod(info.shape) for info in plan.tensors.values()),
        "layers": layers,
        "versions": {name: version(name) for name in ("mqa-hf", "transformers", "torch", "safetensors")},
        "command": replace(job, source=plan.source.name, output="OUTPUT", revision=plan.source.revision).command(),
    }
