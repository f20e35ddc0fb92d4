"""The plan of a conversion, checked from configurations and headers alone.

Every source tensor is matched to a rule of its family, and its canonical shape computed on `meta` and compared with
the canonical model's; then the output's tensors are matched back to canonical ones. Whatever does not fit is an error
here, before a weight is read or a byte written. A plan is made once, and nothing in it changes afterwards.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedConfig

from mqa_hf.base.devices import DTYPES
from mqa_hf.base.errors import ConversionError, listing

from .canonical import (
    CanonicalConfig,
    Shapes,
    canonical_class,
    canonical_shapes,
    decoder_of,
    model_shapes,
    on_meta,
    stacks_of,
    with_fields,
    with_stacks,
)
from .checkpoint import Reader, TensorInfo
from .convert import ConversionOptions
from .families import FAMILIES, Family, canonical_config, check_own_heads, family_of, fold_scales, native_config
from .latent_sizes import check_sizes, equal_latents, latent_config
from .matching import Layer, TensorStep, layer_of, match
from .memory import AnySource
from .operations import Flatten, SinusoidTable
from .packed import PackedReader, is_mxfp4, prediction_layers
from .pooling import choose_attentions, with_heads
from .stacked import StackedReader
from .widths import Widths, fitted_config

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Part:
    """What is read, pooled and written together: a layer, or one tensor outside the layers (`layer` is `None`)."""

    layer: Layer | None
    reads: tuple[TensorStep, ...]
    writes: tuple[TensorStep, ...] = ()


@dataclass(frozen=True)
class Reading:
    """A supported source.

    Attributes:
        source, reader, family: where the weights come from.
        config: the canonical configuration, with all key/value heads of the source.
        pooled: the same with the requested heads.
        attentions: the attentions to convert.
        parts: each tensor outside the layers, then the layers, those of an encoder first.
    """

    source: AnySource
    reader: Reader
    family: Family
    config: CanonicalConfig
    pooled: CanonicalConfig
    attentions: Sequence[str]
    parts: tuple[Part, ...]

    def read(self, part: Part) -> Tensors:
        """Read the canonical tensors of a part, with all heads of the source."""
        found = self.reader.read(step.name for step in part.reads)
        canonical: Tensors = {}
        for step in part.reads:
            results = step.operation.to_canonical(found[step.name], decoder_of(self.config))
            canonical |= {target: tensor for target, tensor in zip(step.targets, results) if target is not None}
        if part.layer is not None:
            fold_scales(self.family, self.source.config, part.layer[1], canonical)
        return canonical


@dataclass(frozen=True)
class Plan:
    """A conversion that is known to be possible.

    Attributes:
        reading: what is read.
        pooled: the canonical configuration of the result. The fit adds the frequencies of its heads.
        output: the written configuration: `pooled`, or that of a transformers class.
        parts: what is read, and what is written with it.
        zeros: tensors of the output without a canonical counterpart, which are zero.
        tensors: shape and dtype of the written tensors.
    """

    reading: Reading
    pooled: CanonicalConfig
    output: PreTrainedConfig
    parts: tuple[Part, ...]
    zeros: tuple[str, ...]
    tensors: Mapping[str, TensorInfo]

    @property
    def native(self) -> bool:
        """Whether the result is of a transformers class."""
        return self.output is not self.pooled

    @property
    def nbytes(self) -> int:
        """Size of the written weights in bytes."""
        return sum(info.nbytes for info in self.tensors.values())

    def written(self, part: Part, canonical: Tensors) -> Tensors:
        """Convert the canonical tensors of a part, with fewer heads, to those of the output."""
        config = decoder_of(self.pooled)
        return {
            step.name: step.operation.from_canonical(
                tuple(None if target is None else canonical.get(target) for target in step.targets), config
            )
            for step in part.writes
        }


def in_parts(steps: Sequence[TensorStep]) -> tuple[Part, ...]:
    layers: dict[Layer, list[TensorStep]] = {}
    for step in steps:
        if step.layer is not None:
            layers.setdefault(step.layer, []).append(step)
    ordered = sorted(layers.items(), key=lambda item: (item[0][0] != "encoder", item[0]))
    outside = [Part(None, (step,)) for step in steps if step.layer is None]
    return (*outside, *(Part(layer, tuple(some)) for layer, some in ordered))


def with_writes(
    parts: Sequence[Part], writes: Sequence[TensorStep], made: Mapping[str, Layer]
) -> tuple[tuple[Part, ...], tuple[str, ...]]:
    """Assign the output's tensors to parts; returns the parts and the names of tensors without one.

    Args:
        parts: the parts that are read.
        writes: steps of the output.
        made: canonical tensors that are made, not read, and their layers.
    """
    place = {target: i for i, part in enumerate(parts) for step in part.reads for target in step.targets if target}
    layers = {part.layer: i for i, part in enumerate(parts)}
    place |= {name: layers[layer] for name, layer in made.items()}
    by_part: dict[int, list[TensorStep]] = {}
    zeros = []
    for step in writes:
        found = next((place[target] for target in step.targets if target in place), None)
        if found is None:
            zeros.append(step.name)
        else:
            by_part.setdefault(found, []).append(step)
    return tuple(replace(part, writes=tuple(by_part.get(i, ()))) for i, part in enumerate(parts)), tuple(zeros)


def surveyed(reading: Reading, job: ConversionOptions) -> bool:
    """Whether all layers are surveyed before the conversion, to choose sizes by their error."""
    rotated = any(stack.position_embedding == "rotary" for stack in stacks_of(reading.config).values())
    return job.cache_budget is not None or (job.method == "latent" and job.key_width is None and rotated)


def make_reading(source: AnySource, job: ConversionOptions) -> Reading:
    """Read configuration and headers of a source; raises ConversionError if it cannot be converted as requested."""
    family = family_of(source.config.model_type)
    config = canonical_config(source.config, source.raw, frozenset(job.ignore_switch))
    if family.canonical:
        check_own_heads(config)
    reader: Reader = source.reader(job.allow_nonfinite)
    if is_mxfp4(source.raw):
        reader = PackedReader(reader, job.allow_nonfinite)
    for name in prediction_layers(list(reader.tensors), source.raw, decoder_of(config).num_hidden_layers):
        del reader.tensors[name]
    if family.stacked:
        reader = StackedReader(reader, family)
    family, config = as_stored(family, config, reader)
    attentions = choose_attentions(config, job.attention)
    with_heads(config, job.kv_heads, attentions)  # check before comparing values
    if job.calibrated:
        check_fit(config, job)
    if job.method == "latent":
        check_sizes(config, attentions, job)
    config = with_fields(config, tie_word_embeddings=really_tied(source, reader, family, config))
    steps = read_steps(reader.tensors, family, config, equal=lambda *names: same_values(reader, names))
    pooled = with_heads(config, job.kv_heads, attentions)
    return Reading(source, reader, family, config, pooled, attentions, in_parts(steps))


def check_fit(config: CanonicalConfig, job: ConversionOptions) -> None:
    """Raise ConversionError for an attention that the method cannot be fitted to."""
    stack = decoder_of(config)
    if stack.qk_norm is not None and job.method == "shared" and job.kv_heads == stack.num_key_value_heads:
        raise ConversionError(
            f"`method` shared has nothing to share with all {job.kv_heads} key/value heads, and would replace "
            "normalised keys by linear ones; use mean, which changes nothing then"
        )
    if stack.qk_norm is not None and job.method == "shared" and job.target == "native":
        raise ConversionError(
            "`target` native: classes of transformers cannot hold heads fitted to normalised queries and keys, which "
            "need maps of queries; use `target` mqa"
        )
    for field, what in (
        ("clip_qkv", "clipped keys and values"),
        ("attention_gate", "a gate on the output of attention"),
    ):
        if getattr(stack, field) and job.method in ("shared", "latent"):
            raise ConversionError(
                f"`method` {job.method} cannot be fitted to a model with {what} ({field}); use mean, first or random"
            )
    if not stack.folds_value_bias and job.method == "latent":
        raise ConversionError(
            "`method` latent cannot be fitted to a model with attention sinks and value biases; use shared"
        )


def make_plan(reading: Reading, job: ConversionOptions, widths: Mapping[str, Widths] | None = None) -> Plan:
    """Plan a conversion; raises ConversionError if it is impossible.

    Args:
        reading: the source.
        job: the resolved job.
        widths: widths per layer, by attention, instead of the job's.
    """
    source, config, pooled = reading.source, reading.config, reading.pooled
    if job.calibrated:
        pooled = _fitted(reading, job, widths)
    if job.window is not None:
        pooled = _windowed(pooled, job.window, job.target)
    dtype = DTYPES[job.dtype] if job.dtype else None
    stored = {"dtype": dtype or source.config.dtype}
    pooled = with_stacks(with_fields(pooled, **stored), **dict.fromkeys(stacks_of(pooled), stored))
    output: PreTrainedConfig = pooled
    if job.target == "native":
        native = native_config(source.config, decoder_of(pooled))
        output = with_fields(native, tie_word_embeddings=config.tie_word_embeddings, **stored)
        for name in output.sub_configs:
            getattr(output, name).dtype = stored["dtype"]

    read = {target: step.name for part in reading.parts for step in part.reads for target in step.targets if target}
    writes, shapes = write_steps(output, FAMILIES[output.model_type] if job.target == "native" else None, set(read))
    made = {}
    if job.calibrated:  # fits add tensors: biases of the output, latents
        made = {
            name: layer
            for name in canonical_shapes(pooled)
            if name not in read and (layer := layer_of(name)) is not None
        }
    parts, zeros = with_writes(reading.parts, writes, made)
    first = reading.parts[0].reads[0].name
    tensors = {}
    for step in writes:
        given = next((read[t] for t in step.targets if t in read), first)
        tensors[step.name] = TensorInfo(shapes[step.name], dtype or reading.reader.tensors[given].dtype)
    return Plan(reading, pooled, output, parts, zeros, tensors)


def really_tied(source: AnySource, reader: Reader, family: Family, config: CanonicalConfig) -> bool:
    """Whether the head is the embedding; files that contradict `config.json` decide, as they do in transformers."""
    steps, _ = match(reader.tensors, family)
    names = {target: step.name for step in reversed(steps) for target in step.targets}
    head = names.get("lm_head.weight")
    if not config.tie_word_embeddings:
        return head is None and source.config.tie_word_embeddings
    embedding = names.get(canonical_class(config)._tied_weights_keys["lm_head.weight"])
    return head is None or embedding is None or same_values(reader, (head, embedding))


def same_values(reader: Reader, names: Sequence[str]) -> bool:
    one, other = reader.read(names).values()
    return torch.equal(one, other)


def _fitted(reading: Reading, job: ConversionOptions, widths: Mapping[str, Widths] | None) -> CanonicalConfig:
    # Transformers classes have the same number of pairs for each frequency.
    chosen_frequencies = job.method == "shared" and job.target != "native"
    config = reading.config
    if job.method == "latent":
        sizes = widths or {name: equal_latents(config, name, job) for name in reading.attentions}
        return latent_config(config, reading.pooled, reading.attentions, sizes, job.latent_bits)
    fitted = fitted_config(
        config, reading.pooled, reading.attentions, job.width_factors, widths, chosen_frequencies,
        linear_keys=job.method == "shared",
    )  # fmt: skip
    wider = job.width_factors != (1, 1) or decoder_of(fitted).output_bias != decoder_of(config).output_bias
    if job.target == "native" and wider:
        raise ConversionError(
            "`target` native: classes of transformers cannot hold heads wider than the source's, nor a fitted "
            "output bias where only values have a bias; use `target` mqa"
        )
    return fitted


def _windowed(config: CanonicalConfig, window: int, target: str) -> CanonicalConfig:
    stack = decoder_of(config)
    if target == "native":
        raise ConversionError("`window` is for `target` mqa; classes of transformers keep the source's windows")
    if stack.sliding_window and stack.sliding_window < window:
        raise ConversionError(f"`window` must be at most the source's {stack.sliding_window}, got {window}")
    layer_types = ["sliding_attention"] * stack.num_hidden_layers
    return with_stacks(config, decoder={"layer_types": layer_types, "sliding_window": window})


def read_steps(
    tensors: Mapping[str, TensorInfo],
    family: Family,
    config: CanonicalConfig,
    equal: Callable[[str, str], bool] = lambda one, other: False,
) -> list[TensorStep]:
    """Steps from the source's tensors to those of the canonical model with all its key/value heads.

    Args:
        tensors: the headers of the source.
        family, config: its family and its canonical configuration.
        equal: whether two source tensors have the same values; a second copy of a weight is left out.

    Raises:
        ConversionError: naming tensors that are missing, without a rule or of the wrong shape.
    """
    matched, unclaimed = match(tensors, family)
    model = on_meta(config)
    expected, tied = model_shapes(model), model.all_tied_weights_keys
    decoder = decoder_of(config)
    matched = [replace(step, targets=tuple(t and tied.get(t, t) for t in step.targets)) for step in matched]
    steps: list[TensorStep] = []
    problems = []
    produced: dict[str, str] = {}
    for step in matched:
        info = tensors[step.name]
        if info.unsuited:
            problems.append(f"{step.name} {info.unsuited}")
            continue
        wanted = [expected.get(target) if target else None for target in step.targets]
        if all(shape is None for shape, target in zip(wanted, step.targets) if target) and any(step.targets):
            unclaimed.append(step.name)
            continue
        try:
            results = step.operation.to_canonical(torch.empty(info.shape, device="meta"), decoder)
        except (RuntimeError, IndexError):
            results = ()
        shapes = [tuple(result.shape) for result in results]
        if len(shapes) != len(wanted) or any(w is not None and s != w for s, w in zip(shapes, wanted)):
            fit = ", ".join(f"{target} {list(w)}" for target, w in zip(step.targets, wanted) if w is not None)
            problems.append(f"{step.name} has the shape {list(info.shape)}, which does not fit {fit}")
            continue
        twice = [target for target in step.targets if target in produced]
        if not twice:
            produced.update({target: step.name for target in step.targets if target})
            steps.append(step)
        elif not equal(step.name, produced[twice[0]]):
            problems.append(f"{step.name} and {produced[twice[0]]} both hold {twice[0]}, but differ")
    if unclaimed:
        problems.append(f"tensors that are not in this configuration: {listing(unclaimed)}")
    attempted = {target for step in matched for target in step.targets}
    missing = [name for name in expected if name not in attempted]
    if missing:
        problems.append(f"tensors missing for: {listing(missing)}")
    if problems:
        raise ConversionError("the weights do not fit config.json: " + "; ".join(problems[:8]))
    return [step for step in steps if any(step.targets)]


def as_stored(family: Family, config: CanonicalConfig, reader: Reader) -> tuple[Family, CanonicalConfig]:
    """Adapt the family and the configuration of a source to its files: the table of positions and the biases.

    BART's class uses zeros if the files have no bias of the logits. Pegasus', Marian's and FSMT's classes look
    positions up in a table in the checkpoint. In 16 bits it is rounded and differs from the formula; it is then kept
    as a table of learned positions.
    """
    steps, _ = match(reader.tensors, family)
    optional = {t for rule in family.rules if isinstance(rule.operation, Flatten) for t in rule.targets}
    if "lm_head.bias" in optional and not any("lm_head.bias" in step.targets for step in steps):
        config = with_stacks(config, decoder={"lm_head_bias": False})
    stack, tables = decoder_of(config), {s.name: s.operation for s in steps if isinstance(s.operation, SinusoidTable)}
    fits = {name: t for name, t in reader.read(tables).items() if t.ndim == 2 and t.shape[1] == stack.hidden_size}
    if all(tables[name].is_formula(table, stack) for name, table in fits.items()):
        return family, config
    config = with_stacks(config, **{name: {"position_embedding": "learned"} for name in stacks_of(config)})
    rules = (
        replace(r, targets=(r.source,), operation=r.operation.as_learned(stack))
        if isinstance(r.operation, SinusoidTable)
        else r
        for r in family.rules
    )
    return replace(family, rules=tuple(rules)), config


def write_steps(
    config: PreTrainedConfig, family: Family | None, available: set[str]
) -> tuple[list[TensorStep], Shapes]:
    """Steps from canonical tensors to those of the output, and the output's shapes.

    Args:
        config: configuration of the output.
        family: family of the output's class; `None` if the output is canonical.
        available: names of the canonical tensors. A bias of the output without one is zero.
    """
    if family is None:
        assert isinstance(config, CanonicalConfig)
        shapes = canonical_shapes(config)
        return [TensorStep(name, (name,)) for name in shapes], shapes
    shapes = model_shapes(on_meta(config))
    steps, unclaimed = match(shapes, family)
    unfilled = [s.name for s in steps if not set(s.targets) & available and not s.name.endswith(".bias")]
    nameless = unclaimed + unfilled
    assert not nameless, f"{config.model_type}: no canonical tensor for {nameless}"
    return steps, shapes
