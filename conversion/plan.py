"""What a conversion will read and write, settled and checked from configurations and headers alone.

Every source tensor is matched to a rule of its family, and its canonical shape computed on `meta` and compared with
the canonical model's; then the output's tensors are matched back to canonical ones. Whatever does not fit is an error
here, before a weight is read or a byte written.
"""

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from mqa_hf.base.errors import ConversionError, listing
from mqa_hf.configuration_mqa import MQAConfig
from mqa_hf.configuration_mqa_seq2seq import MQASeq2SeqConfig
from mqa_hf.modeling_mqa import MQAForCausalLM
from mqa_hf.modeling_mqa_seq2seq import MQAForConditionalGeneration
from mqa_hf.modeling_mqa_speech import MQAForSpeechSeq2Seq

from .checkpoint import CheckpointReader, TensorInfo
from .families import Family, Rule
from .operations import Flatten, SinusoidTable
from .pooling import CanonicalConfig

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")
_CANONICAL_LAYER = re.compile(r"model\.(?:(encoder|decoder)\.)?layers\.(\d+)\.")


@dataclass(frozen=True)
class Step:
    """A rule applied to one tensor: `name` on the checkpoint's side, `targets` in canonical names.

    `layer` is the stack ("" in a decoder-only model) and the layer of the targets; `None` outside the layers.
    """

    name: str
    rule: Rule
    targets: tuple[str | None, ...]
    layer: tuple[str, int] | None = None


def template(name: str) -> tuple[str, int | None]:
    """("h.{}.ln_1.weight", 3) of "h.3.ln_1.weight"; the layer is the first number standing alone."""
    match = _LAYER.search(name)
    return (name, None) if match is None else (_LAYER.sub("{}", name, count=1), int(match.group()))


def canonical_name(target: str, layer: int | None) -> str:
    name = target if layer is None else target.format(layer)
    return name if name.startswith("lm_head.") else f"model.{name}"


def match(names: Iterable[str], family: Family) -> tuple[list[Step], list[str]]:
    """The steps that the family's rules make of tensor names, and the names that no rule claims."""
    if family.canonical:
        own = [(name, _CANONICAL_LAYER.match(name)) for name in names]
        return [
            Step(name, Rule(name, (name,)), (name,), found and (found.group(1) or "", int(found.group(2))))
            for name, found in own
        ], []
    rules = {rule.source: rule for rule in family.rules}
    steps, unclaimed = [], []
    for name in names:
        prefix = next((p for p in family.prefixes if name.startswith(p)), "")
        source, layer = template(name.removeprefix(prefix))
        if source in family.ignored:
            continue
        if source in rules:
            rule = rules[source]
            targets = tuple(t and canonical_name(t, layer) for t in rule.targets)
            found = next((_CANONICAL_LAYER.match(t) for t in targets if t), None)
            steps.append(Step(name, rule, targets, found and (found.group(1) or "", int(found.group(2)))))
        else:
            unclaimed.append(name)
    return steps, unclaimed


def model_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Parameters that a checkpoint of the model holds, in order; tied ones once."""
    tied = set(model.all_tied_weights_keys)
    return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False) if name not in tied}


def decoder_of(config: CanonicalConfig) -> MQAConfig:
    """The configuration of the stack that writes."""
    return config if isinstance(config, MQAConfig) else config.decoder


def canonical_class(config: CanonicalConfig) -> Any:
    """The class that holds a canonical model with its head."""
    if isinstance(config, MQAConfig):
        return MQAForCausalLM
    return MQAForConditionalGeneration if config.num_mel_bins is None else MQAForSpeechSeq2Seq


def canonical_shapes(config: CanonicalConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return model_shapes(canonical_class(config)(config))


def read_steps(
    tensors: Mapping[str, TensorInfo],
    family: Family,
    config: CanonicalConfig,
    equal: Callable[[str, str], bool] = lambda one, other: False,
) -> list[Step]:
    """How a source's tensors become the canonical model's, all its K/V heads still there.

    Args:
        tensors: what the source's headers say.
        family, config: its row, and its canonical configuration.
        equal: whether two source tensors have the same values; a second copy of a weight is left out.

    Raises:
        ConversionError: naming the tensors that are missing, that no rule claims, or whose shape does not fit.
    """
    matched, unclaimed = match(tensors, family)
    with torch.device("meta"):
        model = canonical_class(config)(config)
    expected, tied = model_shapes(model), model.all_tied_weights_keys
    matched = [replace(step, targets=tuple(t and tied.get(t, t) for t in step.targets)) for step in matched]
    steps: list[Step] = []
    decoder = decoder_of(config)
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
            results = step.rule.operation.to_canonical(torch.empty(info.shape, device="meta"), decoder)
        except (RuntimeError, IndexError):
            results = ()
        shapes = [tuple(result.shape) for result in results]
        if len(shapes) != len(wanted) or any(w is not None and s != w for s, w in zip(shapes, wanted)):
            fit = ", ".join(f"{target} {list(w)}" for target, w in zip(step.targets, wanted) if w is not None)
            problems.append(f"{step.name} has the shape {list(info.shape)}, which does not give {fit}")
            continue
        twice = [target for target in step.targets if target in produced]
        if not twice:
            produced.update({target: step.name for target in step.targets if target})
            steps.append(step)
        elif not equal(step.name, produced[twice[0]]):
            problems.append(f"{step.name} and {produced[twice[0]]} both stand for {twice[0]}, and differ")
    if unclaimed:
        problems.append(f"tensors that this configuration has no place for: {listing(unclaimed)}")
    attempted = {target for step in matched for target in step.targets}
    missing = [name for name in expected if name not in attempted]
    if missing:
        problems.append(f"tensors missing for: {listing(missing)}")
    if problems:
        raise ConversionError("the weights do not fit config.json: " + "; ".join(problems[:8]))
    return [step for step in steps if any(step.targets)]


def as_stored(family: Family, config: CanonicalConfig, reader: CheckpointReader) -> tuple[Family, CanonicalConfig]:
    """The row and the configuration of a source by what its files hold: which table of positions, which biases.

    BART's class takes zeros for a bias of the logits that the files do not have. Pegasus' and Marian's classes look
    positions up in a table that the checkpoint holds. In 16 bits it is rounded, and what they compute from it is
    another number, in whatever precision; so it is kept as a table of learned positions.
    """
    steps, _ = match(reader.tensors, family)
    optional = {t for rule in family.rules if isinstance(rule.operation, Flatten) for t in rule.targets}
    if "lm_head.bias" in optional and not any("lm_head.bias" in step.targets for step in steps):
        config = copy.deepcopy(config)
        decoder_of(config).lm_head_bias = False
    names = [step.name for step in steps if isinstance(step.rule.operation, SinusoidTable)]
    width = decoder_of(config).hidden_size
    tables = [t for t in reader.read(names).values() if t.ndim == 2 and t.shape[1] == width]
    if all(SinusoidTable.is_formula(table, decoder_of(config)) for table in tables):
        return family, config
    config = copy.deepcopy(config)
    for stack in (config.encoder, config.decoder) if isinstance(config, MQASeq2SeqConfig) else (config,):
        stack.position_embedding = "learned"
    rules = (Rule(r.source, (r.source,)) if isinstance(r.operation, SinusoidTable) else r for r in family.rules)
    return replace(family, rules=tuple(rules)), config


def write_steps(
    config: PreTrainedConfig, family: Family | None, available: set[str]
) -> tuple[list[Step], dict[str, tuple[int, ...]]]:
    """How canonical tensors become those of the output, and the output's shapes.

    Args:
        config: the output's configuration.
        family: the row of the output's class; `None` where the output is canonical itself.
        available: the canonical tensors that there are. A bias of the output that has none of its own is zero.
    """
    if family is None:
        assert isinstance(config, CanonicalConfig)
        shapes = canonical_shapes(config)
        return [Step(name, Rule(name, (name,)), (name,)) for name in shapes], shapes
    with torch.device("meta"):
        shapes = model_shapes(AutoModelForCausalLM.from_config(config))
    steps, unclaimed = match(shapes, family)
    unfilled = [s.name for s in steps if not set(s.targets) & available and not s.name.endswith(".bias")]
    nameless = unclaimed + unfilled
    assert not nameless, f"{config.model_type}: no canonical tensor for {nameless}"
    return steps, shapes
