"""Which rule of its family a tensor's name is claimed by, and the step that follows from it."""

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
    """What becomes of one tensor.

    Attributes:
        name: on the checkpoint's side.
        targets: canonical names; of `None` nothing is kept.
        operation: between the two.
        layer: that the targets are in; `None` outside the layers.
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
    """The layer that a canonical tensor is in."""
    found = _CANONICAL_LAYER.match(name)
    return found and (found.group(1) or "", int(found.group(2)))


def canonical_name(target: str, layer: int | None) -> str:
    name = target if layer is None else target.format(layer)
    return name if name.startswith("lm_head.") else f"model.{name}"


def spelled(name: str, family: Family) -> tuple[str, int | None]:
    """A tensor's name as the family's rules spell it, and its layer."""
    prefix = next((p for p in family.prefixes if name.startswith(p)), "")
    return template(name.removeprefix(prefix))


def match(names: Iterable[str], family: Family) -> tuple[list[TensorStep], list[str]]:
    """The steps that the family's rules make of tensor names, and the names that no rule claims."""
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
    """Whether a tensor is one that older files of a family hold and no class uses, such as a mask."""
    family = FAMILIES.get(model_type)
    return family is not None and spelled(name, family)[0] in family.ignored


def is_optional(name: str, model_type: str) -> bool:
    """Whether a tensor need not be in a file: the class computes it (sinusoids), or takes zeros (BART's bias)."""
    family = FAMILIES.get(model_type)
    if family is None:
        return False
    optional = {rule.source for rule in family.rules if isinstance(rule.operation, SinusoidTable | Flatten)}
    return spelled(name, family)[0] in optional
