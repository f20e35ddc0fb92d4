"""Match tensor names to the rules of their family, and derive conversion steps."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .families import COPY, FAMILIES, Family
from .operations import Flatten, Operation, SinusoidTable

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")
_CANONICAL_LAYER = re.compile(r"model\.(?:(encoder|decoder)\.)?layers\.(\d+)\.")

Layer = tuple[str, int]  # the stack, "" in a decoder-only model, and the number


@dataclass(frozen=True)
class TensorStep:
    """The conversion of one tensor.

    Attributes:
        name: its name in the checkpoint.
        targets: canonical names; results for `None` are dropped.
        operation: the operation between the two.
        layer: the layer of the targets; `None` outside the layers.
    """

    name: str
    targets: tuple[str | None, ...]
    operation: Operation = COPY
    layer: Layer | None = None


def template(name: str) -> tuple[str, int | None]:
    """("h.{}.ln_1.weight", 3) of "h.3.ln_1.weight"; the layer is the first number standing alone."""
    match = _LAYER.search(name)
    return (name, None) if match is None else (_LAYER.sub("{}", name, count=1), int(match.group()))


def layer_of(name: str) -> Layer | None:
    """The layer of a canonical tensor."""
    found = _CANONICAL_LAYER.match(name)
    return found and (found.group(1) or "", int(found.group(2)))


def canonical_name(target: str, layer: int | None) -> str:
    """The canonical name of a target for a layer."""
    name = target if layer is None else target.format(layer)
    return name if name.startswith("lm_head.") else f"model.{name}"


def spelled(name: str, family: Family) -> tuple[str, int | None]:
    """A tensor's name as the family's rules spell it, and its layer."""
    prefix = next((p for p in family.prefixes if name.startswith(p)), "")
    return template(name.removeprefix(prefix))


def match(names: Iterable[str], family: Family) -> tuple[list[TensorStep], list[str]]:
    """The steps of the tensor names that a rule of the family matches, and the names without a rule."""
    if family.canonical:
        return [TensorStep(name, (name,), layer=layer_of(name)) for name in names], []
    rules = {rule.source: rule for rule in family.rules}
    steps, unclaimed = [], []
    for name in names:
        source, number = spelled(name, family)
        if source in family.ignored:
            continue
        if source in rules:
            rule = rules[source]
            targets = tuple(t and canonical_name(t, number) for t in rule.targets)
            layer = next((layer_of(t) for t in targets if t), None)
            steps.append(TensorStep(name, targets, rule.operation, layer))
        else:
            unclaimed.append(name)
    return steps, unclaimed


def is_unused(name: str, model_type: str) -> bool:
    """Whether a tensor is in older files of a family but not used by any class, such as a mask."""
    family = FAMILIES.get(model_type)
    return family is not None and spelled(name, family)[0] in family.ignored


def is_optional(name: str, model_type: str) -> bool:
    """Whether a tensor may be missing: the class computes it (sinusoids) or uses zeros (BART's bias)."""
    family = FAMILIES.get(model_type)
    if family is None:
        return False
    optional = {rule.source for rule in family.rules if isinstance(rule.operation, SinusoidTable | Flatten)}
    return spelled(name, family)[0] in optional
