"""Fewer key/value heads within the source's own class; for the model types of `families/native_only.py`.

Key and value projections are pooled, every other tensor is copied byte for byte under the name that it has on disk,
which for experts is often not the name that it has in the model. So only the projections are checked against the
class. The class is built twice on `meta`, with the heads before and after; nothing else may differ.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from mqa_hf.base.devices import DTYPES
from mqa_hf.base.errors import ConversionError, listing
from mqa_hf.configuration_mqa import MQAConfig

from .canonical import auto_class, with_fields
from .checkpoint import TensorInfo
from .convert import ConversionOptions
from .families import ONLY_OWN_CLASS, OWN_CLASS, Family, NativeOnly, check_not_quantised
from .matching import TensorStep, template
from .memory import AnySource
from .operations import SplitStacked
from .packed import check_packed
from .plan import Plan, Reading, in_parts
from .pooling import check_divides

Shape = tuple[int, ...]
_LAYERS = re.compile(r"layers\.\d+\..*")


@dataclass(frozen=True)
class OwnClass:
    """A source and its class with fewer heads.

    Attributes:
        output: the source's configuration with the requested heads.
        config, pooled: the attention of the layers that have keys and values, before and after, and nothing else of
            the model.
        model: the source's class on `meta`.
        shapes: shapes of the parameters with the requested heads.
    """

    output: PreTrainedConfig
    config: MQAConfig
    pooled: MQAConfig
    model: PreTrainedModel
    shapes: Mapping[str, Shape]


def own_class(source: AnySource, kv_heads: int) -> OwnClass:
    """Give a source in its own class fewer heads, from its configuration alone.

    Raises:
        ConversionError: for quantised weights, heads that do not divide, switches that do not fit, or a class where
            more than keys and values depends on the number of heads.
    """
    check_not_quantised(source.raw)
    row, before = OWN_CLASS[source.config.model_type], source.config
    for switch, reason in row.off:
        if getattr(before, switch):
            raise ConversionError(f"{before.model_type}: {switch}=True is not supported: {reason}")
    model, text = _build(before), before.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None)
    if row.image_text:
        _check_language_model(source, model, heads)
    assert isinstance(heads, int)
    check_divides(heads, kv_heads)
    output = _with_heads(before, row, kv_heads)
    shapes, after = _shapes(model), _shapes(_build(output))
    widths = {name: _head_dim(row, name, shape, text) for name, shape in shapes.items() if _pooled(row, name)}
    if row.image_text and not widths:
        raise ConversionError(
            f"{before.model_type}: its language model, a {text.model_type}, has no separate key and value projections"
        )
    if len(set(widths.values())) != 1:
        raise ConversionError(f"{before.model_type}: the heads of its layers differ in width: {widths}")
    # Layers may share their weights, but each has a cache of its own.
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if name.endswith(".weight")]
    layers = sum(_pooled(row, name) in (VALUE, FUSED) for name in names)
    config, pooled = (
        MQAConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=text.num_attention_heads,
            num_key_value_heads=n,
            head_dim=next(iter(widths.values())),
            initializer_range=getattr(text, "initializer_range", 0.02),
        )
        for n in (heads, kv_heads)
    )
    expected = {name: _pooled_shape(row, name, shape, config, pooled) for name, shape in shapes.items()}
    changed = [name for name in {**expected, **after} if expected.get(name) != after.get(name)]
    if changed:
        raise ConversionError(
            f"{before.model_type}: tensors other than keys and values depend on the number of key/value heads: "
            f"{listing(changed)}"
        )
    return OwnClass(output, config, pooled, model, after)


def _check_language_model(source: AnySource, model: PreTrainedModel, heads: object) -> None:
    """Raise ConversionError for a multimodal source of another class, or whose language model has no such heads."""
    kind, said = type(model).__name__, source.raw.get("architectures") or [type(model).__name__]
    if kind not in said:
        raise ConversionError(f"it is a {', '.join(map(str, said))}, and only {kind} is supported of this model type")
    if not isinstance(heads, int):
        language = source.config.get_text_config(decoder=True).model_type
        raise ConversionError(f"its language model, a {language}, has as many key/value heads as query heads")


def own_class_plan(source: AnySource, job: ConversionOptions) -> Plan:
    """Plan the conversion of a source in its own class; raises ConversionError if it is impossible."""
    kind = source.config.model_type
    if job.calibrated:
        other = "" if kind in ONLY_OWN_CLASS else "`target` mqa, or "
        raise ConversionError(
            f"calibration needs a canonical model, and {kind} with `target` native is not one; use {other}`method` "
            "mean, first or random"
        )
    if job.window is not None or job.attention not in (None, ("decoder",)):
        raise ConversionError(f"`window` and `attention` cannot be used with {kind}, which keeps its own class")
    if job.ignore_switch:
        raise ConversionError(f"`ignore_switch`: {kind} keeps its own class and every switch")
    own, row = own_class(source, job.kv_heads), OWN_CLASS[kind]
    reader = source.reader(job.allow_nonfinite)
    check_packed(reader, source.raw, getattr(source.config, "num_local_experts", None))
    _check_projections(reader.tensors, own, row)
    dtype = DTYPES[job.dtype] if job.dtype else None
    steps = [_step(row, name) for name in reader.tensors]
    tensors = {
        name: TensorInfo(
            _pooled_shape(row, name, info.shape, own.config, own.pooled),
            dtype if dtype and info.dtype.is_floating_point else info.dtype,
        )
        for name, info in reader.tensors.items()
    }
    nothing = Family(prefixes=(), config=lambda _: {}, rules=())
    parts = in_parts(steps)
    reading = Reading(source, reader, nothing, own.config, own.pooled, ("decoder",), parts)
    output = with_fields(own.output, dtype=dtype or source.config.dtype)
    return Plan(reading, own.pooled, output, tuple(replace(p, writes=p.reads) for p in parts), (), tensors)


# Words in the names of modules of multimodal classes beside the language model.
TOWERS = (
    *("vision", "visual", "image", "audio", "video", "aligner"),
    *("connector", "projector", "resampler", "perceiver", "qformer"),
)
# Kinds of pooled tensors; `pooling.py` recognises them by these endings of names.
KEY, VALUE, KEY_NORM, FUSED = "k_proj", "v_proj", "k_norm", "qkv"


def _pooled(row: NativeOnly, name: str) -> str | None:
    """The kind of a pooled tensor; `None` for a tensor that is copied."""
    module, _, kind = template(name)[0].rpartition(".")
    if kind not in ("weight", "bias") or (row.image_text and any(word in module for word in TOWERS)):
        return None
    kinds: dict[str, str] = {row.fused: FUSED} if row.fused else {row.key: KEY, row.value: VALUE}
    if row.key_norm:
        kinds[row.key_norm] = KEY_NORM
    return next((pooled for end, pooled in kinds.items() if f".{module}".endswith(f".{end}")), None)


def _step(row: NativeOnly, name: str) -> TensorStep:
    """The step of a tensor, which keeps its name; only canonical names of pooled tensors are known to `pooling.py`."""
    pooled, kind, number = _pooled(row, name), name.rpartition(".")[2], template(name)[1]
    layer = None if number is None else ("", number)
    place = name.replace(".", "/")
    if pooled == FUSED:
        targets: tuple[str, ...] = (f"copied.{place}", f"{place}.{KEY}.{kind}", f"{place}.{VALUE}.{kind}")
        return TensorStep(name, targets, SplitStacked(), layer)
    targets = (f"copied.{place}",) if pooled is None else (f"{place}.{pooled}.{kind}",)
    if pooled == KEY_NORM:
        targets = (f"{place}.{KEY}.scale",)
    return TensorStep(name, targets, layer=layer)


def _head_dim(row: NativeOnly, name: str, shape: Shape, config: PreTrainedConfig) -> int:
    heads = config.num_key_value_heads
    return shape[0] // (config.num_attention_heads + 2 * heads if _pooled(row, name) == FUSED else heads)


def _pooled_shape(row: NativeOnly, name: str, shape: Shape, before: MQAConfig, after: MQAConfig) -> Shape:
    pooled = _pooled(row, name)
    if pooled is None:
        return shape
    fewer = (before.num_key_value_heads - after.num_key_value_heads) * before.head_dim
    return (shape[0] - fewer * (2 if pooled == FUSED else 1), *shape[1:])


def _with_heads(config: PreTrainedConfig, row: NativeOnly, kv_heads: int) -> PreTrainedConfig:
    output = copy.deepcopy(config)
    if row.image_text:
        output.get_text_config(decoder=True).num_key_value_heads = kv_heads
        return output
    output.num_key_value_heads = kv_heads
    *path, field = row.heads.split(".")
    holder = output
    for part in path:
        holder = getattr(holder, part)
    setattr(holder, field, kv_heads)
    return output


def _build(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the class of a configuration on `meta`."""
    try:
        with torch.device("meta"):
            return auto_class(config).from_config(copy.deepcopy(config))
    except Exception as error:  # classes raise any type for an invalid configuration
        raise ConversionError(f"transformers cannot build this {config.model_type}: {error}") from error


def _shapes(model: PreTrainedModel) -> dict[str, Shape]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _check_projections(tensors: Mapping[str, TensorInfo], own: OwnClass, row: NativeOnly) -> None:
    """Raise ConversionError unless each layer with keys and values has projections with the rows of all heads."""
    prefixes = (f"{own.model.base_model_prefix}.", "backbone.")

    def place(name: str) -> str:
        # Files and classes name the language model within a multimodal one differently.
        within = _LAYERS.search(name) if row.image_text else None
        if within is not None:
            return within.group()
        return name.removeprefix(next((p for p in prefixes if name.startswith(p)), ""))

    def kind(name: str) -> tuple[str | None, str]:
        return _pooled(row, name), name.rpartition(".")[2]

    shapes = {name: shape for name, shape in _shapes(own.model).items() if _pooled(row, name)}
    expected = {place(name): name for name in shapes}
    of_kind = {kind(name): shape for name, shape in shapes.items()}
    found = {name: info for name, info in tensors.items() if _pooled(row, name)}
    missing = [expected[key] for key in expected.keys() - {place(name) for name in found}]
    problems = [f"tensors missing for: {listing(missing)}"] if missing else []
    for name, info in found.items():
        # Layers that the class ignores, such as those that predict further tokens, have the same heads.
        shape = shapes[expected[place(name)]] if place(name) in expected else of_kind.get(kind(name))
        if shape is None:
            problems.append(f"{name} is not in this configuration")
        elif info.shape != shape:
            problems.append(
                f"{name} has the shape {list(info.shape)}; {own.config.num_key_value_heads} key/value heads of "
                f"width {own.config.head_dim} need {list(shape)}"
            )
        elif info.unsuited:
            problems.append(f"{name} {info.unsuited}")
    if problems:
        raise ConversionError("the weights do not fit config.json: " + "; ".join(problems[:8]))
