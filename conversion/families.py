"""The table of families: where each canonical tensor lives in a source checkpoint, and what its config means.

Adding a family is adding a row here and a line in `tests/conversion/test_families.py`; CONTRIBUTING.md walks through
it. Names in the rules are without the base model's prefix on either side; `{}` is the layer.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GPTBigCodeConfig, PhiConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mqa_hf.configuration_mqa import MQAConfig

from .errors import ConversionError
from .operations import (
    Copy,
    DeinterleaveRotary,
    DropRows,
    Operation,
    SplitBigCode,
    SplitPerHead,
    SplitStacked,
    Transpose,
)

COPY = Copy()


@dataclass(frozen=True)
class Rule:
    """A source tensor and the canonical tensors it becomes; a target of `None` is dropped (zeros on the way back)."""

    source: str
    targets: tuple[str | None, ...]
    operation: Operation = COPY


class SourceConfig:
    """A source configuration that remembers which of its switches were read.

    A switch in `config.json` that no one reads would change the model's function unnoticed; see
    [`canonical_config`].
    """

    def __init__(self, config: PreTrainedConfig):
        self._config = config
        self._read: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self._read.add(name)
        return getattr(self._config, name)

    def require(self, name: str, value: Any, reason: str) -> None:
        """Refuse any other value of a switch that the canonical model has no place for."""
        found = getattr(self._config, name, value)
        self._read.add(name)
        if found != value:
            raise ConversionError(
                f"{self._config.model_type}: {name}={found!r} is not supported ({reason}); only {value!r} is"
            )


@dataclass(frozen=True)
class Family:
    """One model type of transformers.

    Attributes:
        prefixes: of the base model's tensors, as checkpoints of the full model and of the base model spell it.
        config: the canonical configuration's fields from the source's configuration.
        rules: where the tensors are.
        ignored: tensors of older checkpoints that hold no weights (masks, rotary tables).
        inert: switches without effect on the function of the model in evaluation.
        query_scale: factor on a layer's queries that the canonical model has no switch for.
        native: the class of transformers that holds the pooled model, or `None`; takes the source's configuration
            and the converted one, gives that class's configuration.
    """

    prefixes: tuple[str, ...]
    config: Callable[[SourceConfig], dict[str, Any]]
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    inert: frozenset[str] = frozenset()
    query_scale: Callable[[PreTrainedConfig, int], float] | None = None
    native: Callable[[PreTrainedConfig, MQAConfig], PreTrainedConfig] | None = field(default=None, repr=False)


# -- configurations ----------------------------------------------------------------------------------------------


def _shared(c: SourceConfig, **fields: Any) -> dict[str, Any]:
    """What every family spells alike."""
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "max_position_embeddings": c.max_position_embeddings,
        "tie_word_embeddings": c.tie_word_embeddings,
        "initializer_range": getattr(c, "initializer_range", 0.02),
        "bos_token_id": c.bos_token_id,
        "eos_token_id": c.eos_token_id,
        "pad_token_id": c.pad_token_id,
        **fields,
    }


def _head_dim(c: SourceConfig) -> int:
    return getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads


def _rope(c: SourceConfig, partial: bool = False) -> dict[str, Any]:
    parameters = dict(c.rope_parameters)
    if "rope_type" not in parameters:
        raise ConversionError("rope_parameters differ per layer type, which no canonical model has")
    if parameters["rope_type"] not in ("default", *ROPE_INIT_FUNCTIONS):
        raise ConversionError(f"transformers has no rope_type {parameters['rope_type']!r}")
    if not partial and parameters.pop("partial_rotary_factor", 1.0) != 1.0 and parameters["rope_type"] != "default":
        raise ConversionError("partial_rotary_factor with a scaled rope type: the source's class cannot run it")
    return {"position_embedding": "rotary", "rope_parameters": parameters}


def _llama(c: SourceConfig, *, qkv_bias: bool, output_bias: bool, mlp_bias: bool, **fields: Any) -> dict[str, Any]:
    """Llama's layer: RMS norms before attention and MLP, rotary positions, a gated MLP."""
    return _shared(
        c,
        **{
            "intermediate_size": c.intermediate_size,
            "num_key_value_heads": c.num_key_value_heads,
            "head_dim": _head_dim(c),
            "norm_eps": getattr(c, "rms_norm_eps", None),
            "hidden_act": c.hidden_act,
            "query_bias": qkv_bias,
            "key_bias": qkv_bias,
            "value_bias": qkv_bias,
            "output_bias": output_bias,
            "mlp_bias": mlp_bias,
            "attention_dropout": getattr(c, "attention_dropout", None) or 0.0,
            **_rope(c),
            **fields,
        },
    )


def _windows(c: SourceConfig, layer_types: list[str] | None = None) -> dict[str, Any]:
    layer_types, window = list(layer_types or c.layer_types), c.sliding_window
    return {"layer_types": layer_types, "sliding_window": window if "sliding_attention" in layer_types else None}


def llama(c: SourceConfig) -> dict[str, Any]:
    return _llama(c, qkv_bias=c.attention_bias, output_bias=c.attention_bias, mlp_bias=c.mlp_bias)


def mistral(c: SourceConfig) -> dict[str, Any]:
    kind = "full_attention" if c.sliding_window is None else "sliding_attention"
    windows = _windows(c, [kind] * c.num_hidden_layers)
    return _llama(c, qkv_bias=False, output_bias=False, mlp_bias=False, **windows)


def ministral(c: SourceConfig) -> dict[str, Any]:
    return _llama(c, qkv_bias=False, output_bias=False, mlp_bias=False, **_windows(c))


def qwen2(c: SourceConfig) -> dict[str, Any]:
    _ = c.use_sliding_window, c.max_window_layers  # both are settled in layer_types
    return _llama(c, qkv_bias=True, output_bias=False, mlp_bias=False, **_windows(c))


def cwm(c: SourceConfig) -> dict[str, Any]:
    return _llama(c, qkv_bias=False, output_bias=False, mlp_bias=c.mlp_bias, **_windows(c))


def seed_oss(c: SourceConfig) -> dict[str, Any]:
    return _llama(
        c,
        qkv_bias=c.attention_bias,
        output_bias=c.attention_out_bias,
        mlp_bias=c.mlp_bias,
        hidden_dropout=c.residual_dropout,
    )


def smollm3(c: SourceConfig) -> dict[str, Any]:
    _ = c.no_rope_layer_interval, c.use_sliding_window  # settled in no_rope_layers and layer_types
    return {**llama(c), **_windows(c), "rope_layers": [bool(rotary) for rotary in c.no_rope_layers]}


def arcee(c: SourceConfig) -> dict[str, Any]:
    return {**llama(c), "gated_mlp": False}


def jais2(c: SourceConfig) -> dict[str, Any]:
    return {**llama(c), "gated_mlp": False, "norm_type": "layer_norm", "norm_eps": c.layer_norm_eps}


def ernie4_5(c: SourceConfig) -> dict[str, Any]:
    return _llama(c, qkv_bias=c.use_bias, output_bias=c.use_bias, mlp_bias=c.use_bias)


def helium(c: SourceConfig) -> dict[str, Any]:
    return _llama(c, qkv_bias=c.attention_bias, output_bias=False, mlp_bias=c.mlp_bias)


def _gpt(c: SourceConfig, key_value_heads: int) -> dict[str, Any]:
    """GPT-2's layer: layer norms before attention and MLP, learned positions, biases everywhere."""
    c.require("add_cross_attention", False, "it is the decoder of an encoder-decoder model")
    head_dim = c.hidden_size // c.num_attention_heads
    return _shared(
        c,
        intermediate_size=c.n_inner or 4 * c.hidden_size,
        num_key_value_heads=key_value_heads,
        attention_scale=head_dim**-0.5 if c.scale_attn_weights else 1.0,
        position_embedding="learned",
        norm_type="layer_norm",
        norm_eps=c.layer_norm_epsilon,
        hidden_act=c.activation_function,
        gated_mlp=False,
        query_bias=True,
        value_bias=True,
        output_bias=True,
        mlp_bias=True,
        attention_dropout=c.attn_pdrop,
        hidden_dropout=c.resid_pdrop,
        embedding_dropout=c.embd_pdrop,
    )


def gpt2(c: SourceConfig) -> dict[str, Any]:
    _ = c.scale_attn_by_inverse_layer_idx  # folded into the queries, see gpt2_query_scale
    return _gpt(c, c.num_attention_heads)


def gpt_bigcode(c: SourceConfig) -> dict[str, Any]:
    return _gpt(c, 1 if c.multi_query else c.num_attention_heads)


def gpt2_query_scale(config: PreTrainedConfig, layer: int) -> float:
    return 1.0 / (layer + 1) if config.scale_attn_by_inverse_layer_idx else 1.0


def opt(c: SourceConfig) -> dict[str, Any]:
    _ = c.layerdrop  # skips whole layers while training only
    pre_norm, no_final_norm = c.do_layer_norm_before, c._remove_final_layer_norm
    return _shared(
        c,
        embedding_size=c.word_embed_proj_dim,
        intermediate_size=c.ffn_dim,
        num_key_value_heads=c.num_attention_heads,
        position_embedding="learned",
        positions_from_mask=True,
        norm_type="layer_norm",
        norm_eps=1e-5,
        norm_affine=c.layer_norm_elementwise_affine,
        final_norm=pre_norm and not no_final_norm,
        residual="sequential" if pre_norm else "post_norm",
        hidden_act=c.activation_function,
        gated_mlp=False,
        query_bias=c.enable_bias,
        value_bias=c.enable_bias,
        output_bias=c.enable_bias,
        mlp_bias=c.enable_bias,
        attention_dropout=c.attention_dropout,
        hidden_dropout=c.dropout,
        initializer_range=c.init_std,
    )


def gpt_neox(c: SourceConfig) -> dict[str, Any]:
    return _shared(
        c,
        intermediate_size=c.intermediate_size,
        num_key_value_heads=c.num_attention_heads,
        norm_type="layer_norm",
        norm_eps=c.layer_norm_eps,
        residual="parallel" if c.use_parallel_residual else "sequential",
        hidden_act=c.hidden_act,
        gated_mlp=False,
        query_bias=c.attention_bias,
        key_bias=c.attention_bias,
        value_bias=c.attention_bias,
        output_bias=c.attention_bias,
        mlp_bias=True,
        attention_dropout=c.attention_dropout,
        hidden_dropout=c.hidden_dropout,
        embedding_dropout=c.hidden_dropout,
        **_rope(c, partial=True),
    )


def gptj(c: SourceConfig) -> dict[str, Any]:
    head_dim = c.hidden_size // c.num_attention_heads
    if not c.rotary_dim or c.rotary_dim > head_dim or c.rotary_dim % 2:
        raise ConversionError(f"gptj: rotary_dim={c.rotary_dim!r} must be an even number of at most {head_dim}")
    return _shared(
        c,
        intermediate_size=c.n_inner or 4 * c.hidden_size,
        num_key_value_heads=c.num_attention_heads,
        norm_type="layer_norm",
        norm_eps=c.layer_norm_epsilon,
        residual="parallel_shared_norm",
        hidden_act=c.activation_function,
        gated_mlp=False,
        mlp_bias=True,
        lm_head_bias=True,
        attention_dropout=c.attn_pdrop,
        hidden_dropout=c.resid_pdrop,
        embedding_dropout=c.embd_pdrop,
        position_embedding="rotary",
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": partial_factor(c.rotary_dim, head_dim),
        },
    )


def phi(c: SourceConfig) -> dict[str, Any]:
    c.require("qk_layernorm", False, "a norm across each query and key head does not commute with pooling")
    return _shared(
        c,
        intermediate_size=c.intermediate_size,
        num_key_value_heads=c.num_key_value_heads,
        norm_type="layer_norm",
        norm_eps=c.layer_norm_eps,
        residual="parallel_shared_norm",
        hidden_act=c.hidden_act,
        gated_mlp=False,
        query_bias=True,
        key_bias=True,
        value_bias=True,
        output_bias=True,
        mlp_bias=True,
        lm_head_bias=True,
        attention_dropout=c.attention_dropout or 0.0,
        hidden_dropout=c.resid_pdrop,
        embedding_dropout=c.embd_pdrop,
        **_rope(c, partial=True),
    )


def partial_factor(rotary_dim: int, head_dim: int) -> float:
    """The factor of which transformers' `int(head_dim * factor)` is `rotary_dim`, whatever the rounding."""
    factor = rotary_dim / head_dim
    return factor if int(head_dim * factor) == rotary_dim else (rotary_dim + 0.5) / head_dim


# -- native homes ------------------------------------------------------------------------------------------------


def native_same_class(source: PreTrainedConfig, config: MQAConfig) -> PreTrainedConfig:
    """The source's own class, with fewer key/value heads."""
    native = copy.deepcopy(source)
    native.num_key_value_heads = config.num_key_value_heads
    return native


def native_bigcode(source: PreTrainedConfig, config: MQAConfig) -> PreTrainedConfig:
    """GPT-BigCode is GPT-2 with one shared key/value head; a pre-norm OPT fits too."""
    reasons = {
        f"{config.num_key_value_heads} key/value heads (it has 1)": config.num_key_value_heads != 1,
        "norms after each sub-layer (do_layer_norm_before=False)": config.residual != "sequential",
        "no final norm": not config.final_norm,
        "norms without weights": not config.norm_affine,
        "projected embeddings (word_embed_proj_dim)": config.embedding_size != config.hidden_size,
    }
    _refuse("gpt_bigcode", reasons)
    return GPTBigCodeConfig(
        **_common_fields(config),
        n_positions=config.max_position_embeddings,
        n_embd=config.hidden_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_inner=config.intermediate_size,
        activation_function=config.hidden_act,
        layer_norm_epsilon=config.norm_eps,
        scale_attn_weights=config.attention_scale != 1.0,
        multi_query=True,
        attn_pdrop=config.attention_dropout,
        resid_pdrop=config.hidden_dropout,
        embd_pdrop=config.embedding_dropout,
    )


def native_phi(source: PreTrainedConfig, config: MQAConfig) -> PreTrainedConfig:
    """GPT-J's layer is Phi's, once the rotary rows are in the half-split order."""
    return PhiConfig(
        **_common_fields(config),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
        hidden_act=config.hidden_act,
        layer_norm_eps=config.norm_eps,
        rope_parameters=config.rope_parameters,
        attention_dropout=config.attention_dropout,
        resid_pdrop=config.hidden_dropout,
        embd_pdrop=config.embedding_dropout,
    )


def _common_fields(config: MQAConfig) -> dict[str, Any]:
    names = ("vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(config, name) for name in names}


def _refuse(target: str, reasons: dict[str, bool]) -> None:
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ConversionError(
            f"--target native: {target}, the class that could hold this model, cannot: {'; '.join(found)}. "
            "Use --target mqa"
        )


# -- tensors -----------------------------------------------------------------------------------------------------


def _module(source: str, *targets: str | None, operation: Operation = COPY, bias: Operation | None = None):
    """The rules of a module's weight and bias; the bias takes the same operation unless another is given."""
    return tuple(
        Rule(f"{source}.{kind}", tuple(target and f"{target}.{kind}" for target in targets), op)
        for kind, op in (("weight", operation), ("bias", bias or operation))
    )


def _renamed(*pairs: tuple[str, str]) -> tuple[Rule, ...]:
    return tuple(rule for source, target in pairs for rule in _module(source, target))


ATTENTION = "layers.{}.self_attn."
QKV = tuple(f"{ATTENTION}{name}_proj" for name in "qkv")

_LLAMA_MODULES = (
    "embed_tokens",
    "layers.{}.input_layernorm",
    "layers.{}.post_attention_layernorm",
    *(f"{ATTENTION}{name}_proj" for name in "qkvo"),
    *(f"layers.{{}}.mlp.{name}_proj" for name in ("gate", "up", "down")),
    "norm",
    "lm_head",
)
LLAMA_RULES = _renamed(*((name, name) for name in _LLAMA_MODULES))

INTERLEAVED_LLAMA_RULES = (
    *(rule for rule in LLAMA_RULES if ".q_proj." not in rule.source and ".k_proj." not in rule.source),
    *_module(QKV[0], QKV[0], operation=DeinterleaveRotary()),
    *_module(QKV[1], QKV[1], operation=DeinterleaveRotary()),
)

_GPT_NAMES = (
    ("wte", "embed_tokens"),
    ("wpe", "embed_positions"),
    ("h.{}.ln_1", "layers.{}.input_layernorm"),
    ("h.{}.ln_2", "layers.{}.post_attention_layernorm"),
    ("ln_f", "norm"),
    ("lm_head", "lm_head"),
)


def _gpt_rules(linear: Operation, fused: Operation, fused_bias: Operation) -> tuple[Rule, ...]:
    # Without rotary positions softmax does not see a constant added to every key: its bias is dropped.
    return (
        *_renamed(*_GPT_NAMES),
        Rule("h.{}.attn.c_attn.weight", tuple(f"{name}.weight" for name in QKV), fused),
        Rule("h.{}.attn.c_attn.bias", (f"{QKV[0]}.bias", None, f"{QKV[2]}.bias"), fused_bias),
        *_module("h.{}.attn.c_proj", f"{ATTENTION}o_proj", operation=linear, bias=COPY),
        *_module("h.{}.mlp.c_fc", "layers.{}.mlp.up_proj", operation=linear, bias=COPY),
        *_module("h.{}.mlp.c_proj", "layers.{}.mlp.down_proj", operation=linear, bias=COPY),
    )


OPT_RULES = (
    Rule("embed_positions.weight", ("embed_positions.weight",), DropRows(2)),
    *_renamed(
        ("embed_tokens", "embed_tokens"),
        ("project_in", "project_in"),
        ("project_out", "project_out"),
        (QKV[0], QKV[0]),
        (QKV[2], QKV[2]),
        (f"{ATTENTION}out_proj", f"{ATTENTION}o_proj"),
        ("layers.{}.self_attn_layer_norm", "layers.{}.input_layernorm"),
        ("layers.{}.final_layer_norm", "layers.{}.post_attention_layernorm"),
        ("layers.{}.fc1", "layers.{}.mlp.up_proj"),
        ("layers.{}.fc2", "layers.{}.mlp.down_proj"),
        ("final_layer_norm", "norm"),
        ("lm_head", "lm_head"),
    ),
    Rule(f"{QKV[1]}.weight", (f"{QKV[1]}.weight",)),
    Rule(f"{QKV[1]}.bias", (None,)),
)

GPT_NEOX_RULES = (
    *_renamed(
        ("embed_in", "embed_tokens"),
        ("layers.{}.input_layernorm", "layers.{}.input_layernorm"),
        ("layers.{}.post_attention_layernorm", "layers.{}.post_attention_layernorm"),
        ("layers.{}.attention.dense", f"{ATTENTION}o_proj"),
        ("layers.{}.mlp.dense_h_to_4h", "layers.{}.mlp.up_proj"),
        ("layers.{}.mlp.dense_4h_to_h", "layers.{}.mlp.down_proj"),
        ("final_layer_norm", "norm"),
        ("embed_out", "lm_head"),  # its name before transformers 5
        ("lm_head", "lm_head"),
    ),
    *_module("layers.{}.attention.query_key_value", *QKV, operation=SplitPerHead()),
)

GPTJ_RULES = (
    *_renamed(
        ("wte", "embed_tokens"),
        ("h.{}.ln_1", "layers.{}.input_layernorm"),
        ("h.{}.attn.v_proj", QKV[2]),
        ("h.{}.attn.out_proj", f"{ATTENTION}o_proj"),
        ("h.{}.mlp.fc_in", "layers.{}.mlp.up_proj"),
        ("h.{}.mlp.fc_out", "layers.{}.mlp.down_proj"),
        ("ln_f", "norm"),
        ("lm_head", "lm_head"),
    ),
    *_module("h.{}.attn.q_proj", QKV[0], operation=DeinterleaveRotary()),
    *_module("h.{}.attn.k_proj", QKV[1], operation=DeinterleaveRotary()),
)

PHI_RULES = _renamed(
    ("embed_tokens", "embed_tokens"),
    ("layers.{}.input_layernorm", "layers.{}.input_layernorm"),
    *((name, name) for name in QKV),
    (f"{ATTENTION}dense", f"{ATTENTION}o_proj"),
    ("layers.{}.mlp.fc1", "layers.{}.mlp.up_proj"),
    ("layers.{}.mlp.fc2", "layers.{}.mlp.down_proj"),
    ("final_layernorm", "norm"),
    ("lm_head", "lm_head"),
)


# -- the table ---------------------------------------------------------------------------------------------------


def _llama_family(
    config: Callable, rules: tuple[Rule, ...] = LLAMA_RULES, inert: frozenset[str] = frozenset()
) -> Family:
    return Family(
        prefixes=("model.",),
        config=config,
        rules=rules,
        ignored=("layers.{}.self_attn.rotary_emb.inv_freq",),
        # The last two stand in SmolLM2's files; the class reads neither.
        inert=inert | {"pretraining_tp", "is_llama_config", "rope_interleaved"},
        native=native_same_class,
    )


_SUMMARY = frozenset(
    f"summary_{name}" for name in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout")
)
_GPT_MASKS = ("h.{}.attn.bias", "h.{}.attn.masked_bias")

FAMILIES: dict[str, Family] = {
    "arcee": _llama_family(arcee),
    "cwm": _llama_family(cwm),
    "ernie4_5": _llama_family(ernie4_5, INTERLEAVED_LLAMA_RULES),
    "gpt2": Family(
        prefixes=("transformer.",),
        config=gpt2,
        rules=_gpt_rules(Transpose(), SplitStacked(transposed=True), SplitStacked()),
        ignored=_GPT_MASKS,
        inert=_SUMMARY | {"reorder_and_upcast_attn", "n_ctx", "n_special", "predict_special_tokens", "output_past"},
        query_scale=gpt2_query_scale,
        native=native_bigcode,
    ),
    "gpt_bigcode": Family(
        prefixes=("transformer.",),
        config=gpt_bigcode,
        rules=_gpt_rules(Copy(), SplitBigCode(), SplitBigCode()),
        ignored=_GPT_MASKS,
        # The last two lines stand in the files of SantaCoder and StarCoder; the class reads none of them.
        inert=_SUMMARY
        | {"attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "num_key_value_heads", "n_ctx"}
        | {"inference_runner", "max_batch_size", "max_sequence_length", "pad_key_length", "pre_allocate_kv_cache"}
        | {"validate_runner_input"},
        native=native_bigcode,
    ),
    "gpt_neox": Family(
        prefixes=("gpt_neox.",),
        config=gpt_neox,
        rules=GPT_NEOX_RULES,
        ignored=(
            "layers.{}.attention.bias",
            "layers.{}.attention.masked_bias",
            "layers.{}.attention.rotary_emb.inv_freq",
        ),
        # rotary_* are in rope_parameters; the *_prob are names that the class does not read.
        inert=frozenset(
            {
                "attention_probs_dropout_prob",
                "classifier_dropout",
                "hidden_dropout_prob",
                "rotary_emb_base",
                "rotary_pct",
            }
        ),
    ),
    "gptj": Family(
        prefixes=("transformer.",),
        config=gptj,
        rules=GPTJ_RULES,
        ignored=(*_GPT_MASKS, "h.{}.attn.embed_positions"),
        # "rotary" and "scale_attn_weights" stand in published files, and the class never reads them.
        inert=_SUMMARY | {"rotary", "scale_attn_weights"},
        native=native_phi,
    ),
    "helium": _llama_family(helium, INTERLEAVED_LLAMA_RULES),
    "jais2": _llama_family(jais2),
    "llama": _llama_family(llama),
    "ministral": _llama_family(ministral),
    "mistral": _llama_family(mistral),
    "opt": Family(
        prefixes=("model.decoder.", "decoder."),
        config=opt,
        rules=OPT_RULES,
        ignored=("version",),
        inert=frozenset({"activation_dropout"}),
        native=native_bigcode,
    ),
    "phi": Family(
        prefixes=("model.",),
        config=phi,
        rules=PHI_RULES,
        ignored=("layers.{}.self_attn.rotary_emb.inv_freq",),
        native=native_same_class,
    ),
    "qwen2": _llama_family(qwen2, inert=frozenset({"use_mrope"})),
    "seed_oss": _llama_family(seed_oss),
    "smollm3": _llama_family(smollm3, inert=frozenset({"max_window_layers"})),
}

# Switches that no decoder-only model's function depends on, wherever they stand.
INERT = frozenset(PreTrainedConfig().to_dict()) | {
    "auto_map",
    "custom_pipelines",
    "finetuning_task",
    "gradient_checkpointing",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "prefix",
    "task_specific_params",
    "tie_encoder_decoder",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "use_bfloat16",
    "use_cache",
}
_ROPE_SPELLINGS = {"rope_theta", "rope_scaling", "partial_rotary_factor"}


def family_of(model_type: Any) -> Family:
    """The row of a model type; raises ConversionError where there is none."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        if model_type == MQAConfig.model_type:
            raise ConversionError("the source is a converted checkpoint already; convert the original instead")
        raise ConversionError(
            f"no family {model_type!r} in the table; it has {', '.join(sorted(FAMILIES))}. "
            "CONTRIBUTING.md says how to add one"
        )
    return FAMILIES[model_type]


def canonical_config(source: PreTrainedConfig, raw: dict[str, Any], ignore: frozenset[str] = frozenset()) -> MQAConfig:
    """The canonical configuration of a source, with all the K/V heads that the source has.

    Args:
        source: the configuration as transformers reads it.
        raw: `config.json` as it stands.
        ignore: switches that the caller knows to have no effect.

    Raises:
        ConversionError: for an unknown family, a switch that nothing reads, or one without a canonical equivalent.
    """
    family = family_of(source.model_type)
    if raw.get("quantization_config"):
        raise ConversionError(
            "the source's weights are quantised (quantization_config); dequantise them or convert the original"
        )
    recorder = SourceConfig(source)
    try:
        config = MQAConfig(**family.config(recorder), dtype=source.dtype)
    except ConversionError:
        raise
    except (ValueError, ArithmeticError, AttributeError, TypeError, KeyError) as error:
        raise ConversionError(f"{source.model_type}: config.json describes no model: {error}") from error
    aliases = dict(source.attribute_map)
    read = recorder._read | {aliases.get(name, name) for name in recorder._read}
    if "rope_parameters" in read:
        read |= _ROPE_SPELLINGS
    # Names that start with an underscore and are no field of the class are notes of whoever wrote the file.
    notes = {name for name in raw if name.startswith("_") and name not in type(source).__dataclass_fields__}
    tokens = {name for name in raw if name.endswith("_token_id")}
    unknown = set(raw) - read - family.inert - INERT - notes - tokens - ignore
    if unknown:
        switches = ", ".join(f"{name}={raw[name]!r}" for name in sorted(unknown))
        raise ConversionError(
            f"{source.model_type}: nothing is known of these switches in config.json: {switches}. If they do not "
            "change what the model computes, name them with --ignore-switch"
        )
    return config


def fold_query_scale(family: Family, source: PreTrainedConfig, layer: int, tensors: dict[str, torch.Tensor]) -> None:
    """Multiply a layer's query projection by what the canonical model has no switch for, in place."""
    scale = 1.0 if family.query_scale is None else family.query_scale(source, layer)
    if scale != 1.0:
        for name, tensor in tensors.items():
            if ".q_proj." in name:
                tensors[name] = (tensor.float() * scale).to(tensor.dtype)
