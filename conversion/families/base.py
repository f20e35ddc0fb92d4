"""The types of the family table and the helpers that its rows share."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mqa_hf.base.errors import ConversionError
from mqa_hf.configuration_mqa import MQAConfig

from ..operations import Copy, HeadNormWeights, Operation

COPY = Copy()


@dataclass(frozen=True)
class Rule:
    """A source tensor and the canonical tensors it becomes; a target of `None` is dropped (zeros when reversed)."""

    source: str
    targets: tuple[str | None, ...]
    operation: Operation = COPY


class SourceConfig:
    """A source configuration that records which of its switches were read.

    An unread switch in `config.json` could change the model's outputs unnoticed; see [`canonical_config`].
    """

    def __init__(self, config: PreTrainedConfig):
        self._config = config
        self._read: set[str] = set()
        self.required: dict[str, tuple[Any, str]] = {}

    def __getattr__(self, name: str) -> Any:
        self._read.add(name)
        return getattr(self._config, name)

    def require(self, name: str, value: Any, reason: str) -> None:
        """Raise ConversionError unless a switch has the only supported value; `None` counts as `False`."""
        self.required[name] = (value, reason)
        found = getattr(self._config, name, value)
        self._read.add(name)
        if found != value and not (found is None and value is False):
            raise ConversionError(
                f"{self._config.model_type}: {name}={found!r} is not supported ({reason}); only {value!r} is"
            )


@dataclass(frozen=True)
class Stacked:
    """A module with numbered children, such as an expert or the norm of a head.

    Attributes:
        module: its name, with `{}` for the layer.
        joined: for each name "t" of a joined tensor "module.t", the tensors of each child that are its rows, one below
            the other; those of all children are then stacked.
        numbered: `False` if the tensors are the module's own, as of a single child.
    """

    module: str
    joined: dict[str, tuple[str, ...]]
    numbered: bool = True


@dataclass(frozen=True)
class Family:
    """One model type of transformers.

    Attributes:
        prefixes: of tensor names in checkpoints of the full model and of the base model.
        config: maps the source's configuration to the canonical fields.
        rules: map the source's tensors to canonical ones.
        ignored: tensors of older checkpoints that hold no weights (masks, rotary tables).
        inert: switches that do not change the model's outputs in evaluation mode.
        stacked: modules whose children are numbered; the rules read the children's tensors as one.
        scales: returns the factors on a layer's projections, by projection name, that have no canonical switch.
        canonical: whether names and configuration are already canonical; `rules` is then empty.
        native: takes the source's and the converted configuration and returns that of the transformers class that
            holds the pooled model; `None` if no class can.
    """

    prefixes: tuple[str, ...]
    config: Callable[[SourceConfig], dict[str, Any]]
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    inert: frozenset[str] = frozenset()
    stacked: tuple["Stacked", ...] = ()
    scales: Callable[[PreTrainedConfig, int], dict[str, float]] | None = None
    canonical: bool = False
    native: Callable[[PreTrainedConfig, MQAConfig], PreTrainedConfig] | None = field(default=None, repr=False)


# The layer of GPT-2, BLOOM, BART and their relatives: layer norms, a plain MLP, biases (softmax cancels a key's).
BIASED_LAYER = {
    "norm_type": "layer_norm",
    "gated_mlp": False,
    "query_bias": True,
    "value_bias": True,
    "output_bias": True,
    "mlp_bias": True,
}


# -- configurations ----------------------------------------------------------------------------------------------


def shared(c: SourceConfig, **fields: Any) -> dict[str, Any]:
    """Return the fields that every family names alike."""
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "max_position_embeddings": fields.get("max_position_embeddings") or c.max_position_embeddings,
        "tie_word_embeddings": c.tie_word_embeddings,
        "initializer_range": getattr(c, "initializer_range", 0.02),
        "bos_token_id": c.bos_token_id,
        "eos_token_id": c.eos_token_id,
        "pad_token_id": getattr(c, "pad_token_id", None),
        **fields,
    }


def head_dim(c: SourceConfig) -> int:
    return getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads


def rope(c: SourceConfig, partial: bool = False) -> dict[str, Any]:
    parameters = dict(c.rope_parameters)
    by_type = {name: one for name, one in parameters.items() if name in set(getattr(c, "layer_types", None) or ())}
    if "rope_type" not in parameters and by_type:
        each = [_rope(one, partial) for one in by_type.values()]
        alike = all(one == each[0] for one in each)
        parameters = each[0] if alike else dict(zip(by_type, each))
    else:
        parameters = _rope(parameters, partial)
    return {"position_embedding": "rotary", "rope_parameters": parameters}


def _rope(parameters: dict[str, Any], partial: bool) -> dict[str, Any]:
    parameters = dict(parameters)
    if parameters.get("rope_type") not in ("default", *ROPE_INIT_FUNCTIONS):
        raise ConversionError(f"transformers has no rope_type {parameters.get('rope_type')!r}")
    if not partial and parameters.pop("partial_rotary_factor", 1.0) != 1.0 and parameters["rope_type"] != "default":
        raise ConversionError("partial_rotary_factor with a scaled rope type: the source's class cannot run it")
    return parameters


def windows(c: SourceConfig, layer_types: list[str] | None = None) -> dict[str, Any]:
    layer_types, window = list(layer_types or c.layer_types), c.sliding_window
    return {"layer_types": layer_types, "sliding_window": window if "sliding_attention" in layer_types else None}


def one_window(c: SourceConfig) -> dict[str, Any]:
    """Return the windows of a family with identical layers: all slide if a window is set."""
    kind = "full_attention" if c.sliding_window is None else "sliding_attention"
    return windows(c, [kind] * c.num_hidden_layers)


def partial_factor(rotary_dim: int, head_dim: int) -> float:
    """Return a factor for which transformers' `int(head_dim * factor)` is exactly `rotary_dim`."""
    factor = rotary_dim / head_dim
    return factor if int(head_dim * factor) == rotary_dim else (rotary_dim + 0.5) / head_dim


# -- native classes ----------------------------------------------------------------------------------------------


def native_same_class(source: PreTrainedConfig, config: MQAConfig) -> PreTrainedConfig:
    """Return the configuration of the source's own class with fewer key/value heads."""
    native = copy.deepcopy(source)
    native.num_key_value_heads = config.num_key_value_heads
    return native


def common_fields(config: MQAConfig) -> dict[str, Any]:
    names = ("vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(config, name) for name in names}


def refuse(target: str, reasons: dict[str, bool]) -> None:
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ConversionError(
            f"`target` native: {target} cannot hold this model: {'; '.join(found)}; use `target` mqa"
        )


# -- tensors -----------------------------------------------------------------------------------------------------


def module_rules(source: str, *targets: str | None, operation: Operation = COPY, bias: Operation | None = None):
    """Return the rules of a module's weight and bias; `bias` defaults to `operation`."""
    return tuple(
        Rule(f"{source}.{kind}", tuple(target and f"{target}.{kind}" for target in targets), op)
        for kind, op in (("weight", operation), ("bias", bias or operation))
    )


def renamed(*pairs: tuple[str, str]) -> tuple[Rule, ...]:
    return tuple(rule for source, target in pairs for rule in module_rules(source, target))


def head_layer_norms() -> tuple[Rule, ...]:
    """Return the rules of layer norms of queries and keys whose weights all heads share."""
    return tuple(
        rule
        for name in "qk"
        for rule in module_rules(
            f"{ATTENTION}{name}_layernorm", f"{ATTENTION}{name}_norm", operation=HeadNormWeights(name == "k")
        )
    )


ATTENTION = "layers.{}.self_attn."
QKV = tuple(f"{ATTENTION}{name}_proj" for name in "qkv")
