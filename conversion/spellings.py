"""`config.json` of a class of transformers, as transformers 5 and transformers 4 both read it.

transformers 5 writes `rope_parameters`, `dtype` and new names of layer types. transformers 4, and servers built on it,
do not know them and silently use the defaults of the class. transformers 5 also reads the old spellings, so
the file has both.
"""

import math
from typing import Any

from transformers import PreTrainedConfig

from .families.native_only import IMAGE_TEXT

# Names of layer types in transformers 4, which transformers 5 translates when it reads them.
_MAMBA = {"linear_attention": "mamba"}
_OLD_LAYER_TYPES = {
    "granitemoehybrid": ("layer_types", {**_MAMBA, "full_attention": "attention"}),
    # Some versions of transformers 5 write the old name, others the new one.
    "lfm2": ("layer_types", {"linear_attention": "conv"}),
    "lfm2_moe": ("layer_types", {"linear_attention": "conv"}),
    "zamba": ("layers_block_type", _MAMBA),
    "zamba2": ("layers_block_type", _MAMBA),
}
_OLD_NAMES = {kind: {"num_local_experts": "num_experts"} for kind in ("qwen3_moe", "qwen3_vl_moe_text")}

_OLD_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
# Rope types of these classes in transformers 4, which lack some of the types above.
_ROPE_TYPES = {
    "dbrx": ("default",),
    "llama4_text": ("default", "llama3"),
    "nemotron": ("default",),
    "recurrent_gemma": ("default",),
}
# Switches that transformers 4 lacks, and the values that it uses instead.
_NEW_SWITCHES: dict[str, dict[str, tuple]] = {
    "bamba": {"time_step_limit": ([0.0, math.inf], None)},
    "falcon_h1": {"time_step_limit": ([0.0, math.inf], None)},
    "gemma": {"use_bidirectional_attention": (None, False)},
    "gemma2": {"use_bidirectional_attention": (None, False)},
    "gpt_oss": {"swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)},
    "granitemoehybrid": {"time_step_limit": ([0.0, math.inf], None)},
}
_LOCAL_AND_GLOBAL = ("gemma3_text", "gemma3n_text")


def both_spellings(config: PreTrainedConfig) -> dict[str, Any]:
    """The content of `config.json` for transformers 5, with the old spellings added."""
    written = config.to_diff_dict()
    if written.get("dtype") is not None:
        written["torch_dtype"] = written["dtype"]
    _add_old_names(config.model_type, written)
    for name in config.sub_configs if config.model_type == "dbrx" else ():  # transformers 4 rejects unknown fields
        defaults = type(getattr(config, name))().to_dict() | {"hidden_size": written[name].get("hidden_size")}
        written[name] = {k: v for k, v in written[name].items() if k not in defaults or v != defaults[k]}
    text = config.get_text_config(decoder=True)
    for name in config.sub_configs:
        if getattr(config, name) is text and isinstance(written.get(name), dict):  # of a multimodal model
            _add_old_names(text.model_type, written[name])
            written[name] |= _old_rope(text.model_type, written[name])
    return written | _old_rope(config.model_type, written)


def _add_old_names(kind: str, written: dict[str, Any]) -> None:
    """Add fields and layer types under their names in transformers 4, in place."""
    for new, old in _OLD_NAMES.get(kind, {}).items():
        if new in written:
            written[old] = written[new]
    if kind in _OLD_LAYER_TYPES and _OLD_LAYER_TYPES[kind][0] in written:
        name, old_names = _OLD_LAYER_TYPES[kind]
        written[name] = [old_names.get(layer, layer) for layer in written[name]]


def lost_in_transformers4(config: PreTrainedConfig) -> list[str]:
    """What transformers 4 cannot represent of a configuration of transformers 5, a sentence each."""
    text = config.get_text_config(decoder=True)
    if text is not config and config.model_type in IMAGE_TEXT:
        return lost_in_transformers4(text)
    kind, written = config.model_type, config.to_diff_dict()
    lost = _lost_rope(kind, written.get("rope_parameters") or {})
    for name, values in _NEW_SWITCHES.get(kind, {}).items():
        if name in written and written[name] not in values:
            lost.append(f"has no switch {name}, which is {written[name]!r}")
    theta = getattr(getattr(config, "attn_config", None), "rope_theta", None)
    if kind == "dbrx" and theta != config.rope_parameters["rope_theta"]:
        lost.append(f"has the rope_theta of attn_config ({theta}), not that of rope_parameters")
    if kind == "qwen2_moe" and "sliding_attention" in (written.get("layer_types") or ()):
        lost.append("applies windows to other layers than transformers 5 does")
    return [
        f"transformers 4 refuses the result or computes something else: its {kind} {what}; load it with transformers 5"
        for what in lost
    ]


def _lost_rope(kind: str, parameters: dict[str, Any]) -> list[str]:
    if not parameters:
        return []
    if "rope_type" in parameters:
        rope_type = parameters["rope_type"]
        if rope_type not in _ROPE_TYPES.get(kind, _OLD_ROPE_TYPES):
            return [f"has no rope_type {rope_type!r}"]
        if kind == "phi3" and rope_type != "default" and not _is_phi3_longrope(parameters):
            return ["reads only short_factor and long_factor of longrope"]
        return []
    full, sliding = (parameters.get(name) or {} for name in ("full_attention", "sliding_attention"))
    plain = sliding.get("rope_type") == "default"
    if kind in _LOCAL_AND_GLOBAL and not plain:
        return ["scales no positions of sliding_attention"]
    if kind == "olmo3" and not (plain and sliding["rope_theta"] == full["rope_theta"]):
        return ["has one rope_theta for all layers and scales no positions of sliding_attention"]
    return []


def _old_rope(kind: str, written: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and related fields; empty if transformers 4 has no fields for them."""
    parameters = written.get("rope_parameters") or {}
    if "rope_type" in parameters:
        old = _flat_rope(kind, parameters)
        return {**old, "rope_parameters": {**parameters, **(old["rope_scaling"] or {})}}
    if kind not in (*_LOCAL_AND_GLOBAL, "olmo3") or _lost_rope(kind, parameters):
        return {}
    old = _flat_rope(kind, parameters["full_attention"])
    if kind in _LOCAL_AND_GLOBAL:
        old["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
    return old


def _flat_rope(kind: str, parameters: dict[str, Any]) -> dict[str, Any]:
    scaling = dict(parameters)
    old: dict[str, Any] = {
        name: scaling.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in scaling
    }
    if "type" in scaling:  # the oldest name of rope_type, with older names of types
        scaling["type"] = scaling["rope_type"]
    # Null is written, too, because some classes of transformers 4 scale by default.
    plain = scaling["rope_type"] == "default" and "mrope_section" not in scaling
    old["rope_scaling"] = None if plain else scaling
    if scaling["rope_type"] == "longrope":
        original = scaling["original_max_position_embeddings"]
        old["original_max_position_embeddings"] = original
        if kind == "phi3" and _is_phi3_longrope(parameters):  # whose class rejects other fields
            old["rope_scaling"] = {"type": "longrope"} | {n: scaling[n] for n in ("short_factor", "long_factor")}
        elif scaling.get("factor") and scaling.get("attention_factor") is None:
            # transformers 4 derives it from the lengths, whatever the factor.
            growth = math.log(max(scaling["factor"], 1.0)) / math.log(original)
            scaling["attention_factor"] = math.sqrt(1 + growth)
    return old


def _is_phi3_longrope(parameters: dict[str, Any]) -> bool:
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
    return parameters["rope_type"] == "longrope" and set(parameters) <= known | {"short_factor", "long_factor"}
