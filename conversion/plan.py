"""What a conversion will read and write, settled and checked from configurations and headers alone.

Every source tensor is matched to a rule of its family, and its canonical shape computed on `meta` and compared with
the canonical model's; then the output's tensors are matched back to canonical ones. Whatever does not fit is an error
here, before a weight is read or a byte written.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from mqa_hf.configuration_mqa import MQAConfig
from mqa_hf.modeling_mqa import MQAForCausalLM

from .checkpoint import TensorInfo
from .errors import ConversionError, listing
from .families import Family, Rule

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


@dataclass(frozen=True)
class Step:
    """A rule applied to one tensor: `name` on the checkpoint's side, `targets` in canonical names."""

    name: str
    rule: Rule
    targets: tuple[str | None, ...]


def template(name: str) -> tuple[str, int | None]:
    """("h.{}.ln_1.weight", 3) of "h.3.ln_1.weight"; the layer is the first number standing alone."""
    match = _LAYER.search(name)
    return (name, None) if match is None else (_LAYER.sub("{}", name, count=1), int(match.group()))


def canonical_name(target: str, layer: int | None) -> str:
    name = target if layer is None else target.format(layer)
    return name if name.startswith("lm_head.") else f"model.{name}"


def match(names: Iterable[str], family: Family) -> tuple[list[Step], list[str]]:
    """The steps that the family's rules make of tensor names, and the names that no rule claims."""
    rules = {rule.source: rule for rule in family.rules}
    steps, unclaimed = [], []
    for name in names:
        prefix = next((p for p in family.prefixes if name.startswith(p)), "")
        source, layer = template(name.removeprefix(prefix))
        if source in rules:
            rule = rules[source]
            steps.append(Step(name, rule, tuple(t and canonical_name(t, layer) for t in rule.targets)))
        elif source not in family.ignored:
            unclaimed.append(name)
    return steps, unclaimed


def model_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Parameters that a checkpoint of the model holds, in order; tied ones once."""
    tied = set(model.all_tied_weights_keys)
    return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False) if name not in tied}


def canonical_shapes(config: MQAConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return model_shapes(MQAForCausalLM(config))


def read_steps(tensors: Mapping[str, TensorInfo], family: Family, config: MQAConfig) -> list[Step]:
    """How a source's tensors become the canonical model's, all its K/V heads still there.

    Raises:
        ConversionError: naming the tensors that are missing, that no rule claims, or whose shape does not fit.
    """
    steps, unclaimed = match(tensors, family)
    if config.tie_word_embeddings:
        steps = [step for step in steps if "lm_head.weight" not in step.targets]
    expected = canonical_shapes(config)
    problems = []
    produced: dict[str, str] = {}
    for step in steps:
        info = tensors[step.name]
        if not info.dtype.is_floating_point or info.dtype.itemsize < 2:
            problems.append(f"{step.name} is stored as {info.dtype}; convert from 16-, 32- or 64-bit floats")
            continue
        wanted = [expected.get(target) if target else None for target in step.targets]
        if all(shape is None for shape, target in zip(wanted, step.targets) if target) and any(step.targets):
            unclaimed.append(step.name)
            continue
        try:
            results = step.rule.operation.to_canonical(torch.empty(info.shape, device="meta"), config)
        except (RuntimeError, IndexError):
            results = ()
        shapes = [tuple(result.shape) for result in results]
        if len(shapes) != len(wanted) or any(w is not None and s != w for s, w in zip(shapes, wanted)):
            fit = ", ".join(f"{target} {list(w)}" for target, w in zip(step.targets, wanted) if w is not None)
            problems.append(f"{step.name} has the shape {list(info.shape)}, which does not give {fit}")
            continue
        for target in filter(None, step.targets):
            if target in produced:
                problems.append(f"{step.name} and {produced[target]} both stand for {target}")
            produced[target] = step.name
    if unclaimed:
        problems.append(f"tensors that this configuration has no place for: {listing(unclaimed)}")
    attempted = {target for step in steps for target in step.targets}
    missing = [name for name in expected if name not in attempted]
    if missing:
        problems.append(f"tensors missing for: {listing(missing)}")
    if problems:
        raise ConversionError("the weights do not fit config.json: " + "; ".join(problems[:8]))
    return steps


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
        assert isinstance(config, MQAConfig)
        shapes = canonical_shapes(config)
        return [Step(name, Rule(name, (name,)), (name,)) for name in shapes], shapes
    with torch.device("meta"):
        shapes = model_shapes(AutoModelForCausalLM.from_config(config))
    steps, unclaimed = match(shapes, family)
    unfilled = [s.name for s in steps if not set(s.targets) & available and not s.name.endswith(".bias")]
    nameless = unclaimed + unfilled
    assert not nameless, f"{config.model_type}: no canonical tensor for {nameless}"
    return steps, shapes


def layer_of(step: Step) -> int | None:
    """The layer of a step, `None` for embeddings, final norm and head."""
    return template(step.name)[1]
