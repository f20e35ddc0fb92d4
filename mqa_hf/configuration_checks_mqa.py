"""Checks of the configuration of a stack of layers, and the values that its fields may have."""

from typing import Any

from transformers.activations import ACT2FN

POSITION_EMBEDDINGS = ("rotary", "learned", "sinusoidal", "alibi", "relative", "none")
NORM_TYPES = ("rms_norm", "layer_norm")
WIDTHS = ("qk_head_dim", "v_head_dim", "cross_qk_head_dim", "cross_v_head_dim")
LATENTS = ("kv_latent_dim", "cross_kv_latent_dim")
PER_LAYER = ("rope_layers", "layer_types", "expert_layers", "rope_frequencies", "output_bias", *WIDTHS, *LATENTS)
BIAS_POSITIONS = ("alibi", "relative")  # those that add to the attention logits
BY_LENGTH = ("dynamic", "longrope")  # rope types whose frequencies depend on the length of the text
LATENT_BLOCK = 32  # a latent stored in 8 or 4 bits has a multiple of this width
RESIDUALS = ("sequential", "post_norm", "sandwich", "output_norm", "parallel", "parallel_shared_norm")
QK_NORMS = (None, "head", "joint")
ROUTERS = ("softmax", "sigmoid", "sparsemixer")
CHOICES = ("scores", "logits")


def of_layer(value: Any, layer: int) -> Any:
    """Value of a field for one layer; fields are one value for all layers or a list with one per layer."""
    return value[layer] if isinstance(value, (list, tuple)) else value


def check_sizes(config: Any) -> None:
    """Raise ValueError unless sizes are positive integers."""
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
    ):
        if not isinstance(getattr(config, name), int) or getattr(config, name) < 1:
            raise ValueError(f"{name} must be a positive integer, got {getattr(config, name)!r}")


def check(config: Any) -> None:
    """Raise ValueError for values that are not allowed or do not fit each other."""
    for name, allowed in (
        ("position_embedding", POSITION_EMBEDDINGS),
        ("norm_type", NORM_TYPES),
        ("residual", RESIDUALS),
        ("qk_norm", QK_NORMS),
        ("qk_norm_type", NORM_TYPES),
        ("router_scores", ROUTERS),
        ("router_choice", CHOICES),
    ):
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {getattr(config, name)!r}")
    for name in ("attention_softcap", "logit_softcap", "query_scaling_length", "expert_limit", "clip_qkv"):
        if getattr(config, name) is not None and not getattr(config, name) > 0:
            raise ValueError(f"{name} must be positive, got {getattr(config, name)!r}")
    if (config.query_scaling_beta is None) != (config.query_scaling_length is None):
        raise ValueError(
            f"query_scaling_beta ({config.query_scaling_beta}) needs query_scaling_length "
            f"({config.query_scaling_length}), and the other way round"
        )
    for name in ("hidden_act", "head_transform"):
        if getattr(config, name) not in ACT2FN and not (name == "head_transform" and config.head_transform is None):
            raise ValueError(f"{name} must be one of {', '.join(ACT2FN)}, got {getattr(config, name)!r}")
    if config.head_transform is not None and config.embedding_size != config.hidden_size:
        raise ValueError(
            f"head_transform needs an embedding_size equal to hidden_size, got {config.embedding_size} and "
            f"{config.hidden_size}"
        )
    for name in ("num_key_value_heads", "cross_num_key_value_heads", "kv_latent_heads"):
        if config.num_attention_heads % (getattr(config, name) or 1):
            raise ValueError(
                f"num_attention_heads ({config.num_attention_heads}) must be divisible by {name} "
                f"({getattr(config, name)})"
            )
    _rope_by_type(config)
    _experts(config)
    if config.cross_num_key_value_heads and config.residual not in ("sequential", "post_norm"):
        raise ValueError(f"cross-attention needs sequential or post_norm residuals, got {config.residual!r}")
    buckets = config.relative_buckets // (2 if config.causal else 4)
    if config.position_embedding == "relative" and not 0 < buckets < config.relative_max_distance:
        raise ValueError(
            f"relative_max_distance must be above {buckets}, the distances with a bucket each "
            f"(relative_buckets={config.relative_buckets}), got {config.relative_max_distance}"
        )
    if config.position_embedding == "alibi" and len(config.alibi_slopes or ()) != config.num_attention_heads:
        raise ValueError(
            f"alibi_slopes has {len(config.alibi_slopes or ())} entries for {config.num_attention_heads} query heads"
        )
    for name in PER_LAYER:
        value = getattr(config, name)
        if isinstance(value, (list, tuple)) and len(value) != config.num_hidden_layers:
            raise ValueError(
                f"{name} has {len(value)} entries for {config.num_hidden_layers} layers; give one per layer"
            )
    _latents(config)
    for i in range(config.num_hidden_layers):
        _widths(config, i)
    if "sliding_attention" in config.layer_types and (config.sliding_window or 0) < 2:
        # transformers' caches keep the window without the current position, and everything if that is empty.
        raise ValueError(
            f"sliding_window must be at least 2 with sliding_attention layers (the current position and the one "
            f"before), got {config.sliding_window}"
        )


def _experts(config: Any) -> None:
    if not any(config.expert_layers):
        return
    E, k, groups = config.num_experts or 0, config.num_experts_per_tok, config.router_groups
    if E < 1 or not 1 <= k <= E:
        raise ValueError(f"num_experts_per_tok must be between 1 and num_experts ({config.num_experts}), got {k}")
    if not config.expert_intermediate_size:
        raise ValueError(f"experts need expert_intermediate_size, got {config.expert_intermediate_size}")
    if not config.gated_mlp or config.mlp_bias or config.activation_dropout or config.hidden_act == "xielu":
        raise ValueError(
            f"experts are gated MLPs without biases, dropout or the activation xielu; got gated_mlp="
            f"{config.gated_mlp}, mlp_bias={config.mlp_bias}, activation_dropout={config.activation_dropout}, "
            f"hidden_act={config.hidden_act!r}"
        )
    if config.router_scores == "sparsemixer" and (config.router_correction or groups > 1 or config.router_renormalise):
        raise ValueError(
            "the scores sparsemixer take no router_correction, router_groups or router_renormalise; got "
            f"{config.router_correction}, {groups}, {config.router_renormalise}"
        )
    if groups < 1 or E % groups or not 1 <= config.router_groups_kept <= groups:
        raise ValueError(
            f"router_groups ({groups}) must divide num_experts ({E}), and router_groups_kept "
            f"({config.router_groups_kept}) be at most that many"
        )
    kept = config.router_groups_kept * (E // groups)
    if config.router_groups_kept < groups and (E // groups < 2 or k > kept):
        raise ValueError(
            f"groups of at least two experts, and as many experts in those that are kept ({kept}) as a token has "
            f"({k}), are needed; got num_experts {E}, router_groups {groups}"
        )


def _rope_by_type(config: Any) -> None:
    if not config.rope_by_type:
        return
    kinds = {kind for kind, turned in zip(config.layer_types, config.rope_layers) if turned}
    missing = kinds - set(config.rope_by_type)
    if missing:
        raise ValueError(f"rope_parameters has no parameters for {', '.join(sorted(missing))} layers")
    if len({one.get("partial_rotary_factor", 1.0) for one in config.rope_by_type.values()}) > 1:
        raise ValueError("rope_parameters by layer type must have the same partial_rotary_factor in all of them")
    if any(one.get("rope_type") in BY_LENGTH for one in config.rope_by_type.values()):
        raise ValueError(f"rope_parameters by layer type cannot be {' or '.join(BY_LENGTH)}")


def _latents(config: Any) -> None:
    if config.query_maps and (config.qk_norm is None or config.qk_norm_after_rotation or config.latent):
        raise ValueError(
            f"query_maps need queries that are normalised (qk_norm is {config.qk_norm}) before they are rotated "
            f"(qk_norm_after_rotation is {config.qk_norm_after_rotation}), and no latent"
        )
    if config.latent and config.qk_norm and config.qk_norm_after_rotation:
        raise ValueError(
            "a latent needs queries that are normalised before they are rotated; qk_norm_after_rotation is True"
        )
    for field in ("attention_gate", "clip_qkv"):
        if config.latent and getattr(config, field):
            raise ValueError(f"a latent cannot have {field}; got {getattr(config, field)}")
    if config.kv_latent_bits not in (16, 8, 4):
        raise ValueError(f"kv_latent_bits must be 16, 8 or 4, got {config.kv_latent_bits!r}")
    if config.latent and (not isinstance(config.kv_latent_heads, int) or config.kv_latent_heads < 1):
        raise ValueError(f"kv_latent_heads must be a positive whole number, got {config.kv_latent_heads!r}")
    for name, heads in zip(LATENTS, ("num_key_value_heads", "cross_num_key_value_heads")):
        if getattr(config, name) is None:
            continue
        if getattr(config, heads) != 1:
            raise ValueError(
                f"{heads} must be 1 with {name}, because all query heads share one latent; got "
                f"{getattr(config, heads)}"
            )
        for r in (of_layer(getattr(config, name), i) for i in range(config.num_hidden_layers)):
            if type(r) is not int or r < 1 or (config.kv_latent_bits < 16 and r % LATENT_BLOCK):
                multiple = f" and a multiple of {LATENT_BLOCK}" if config.kv_latent_bits < 16 else ""
                raise ValueError(f"{name} must be a positive whole number{multiple}, got {r!r}")


def _widths(config: Any, layer: int) -> None:
    rotated = config.position_embedding == "rotary" and config.rope_layers[layer]
    for name in WIDTHS:
        least = 0 if name == "qk_head_dim" and config.kv_latent_dim is not None and not rotated else 1
        if of_layer(getattr(config, name), layer) < least:
            raise ValueError(f"{name} must be positive, got {of_layer(getattr(config, name), layer)}")
    width = of_layer(config.qk_head_dim, layer)
    if config.kv_latent_dim is not None:
        pairs = config.rope_frequencies[layer] if config.rope_frequencies is not None and rotated else ()
        if rotated and config.rope_frequencies is None:
            raise ValueError("kv_latent_dim needs rope_frequencies, the frequency of each rebuilt pair")
        if 2 * len(pairs) != width:
            raise ValueError(
                f"qk_head_dim of layer {layer} must be twice the {len(pairs)} pairs of rope_frequencies that are "
                f"rebuilt from the latent, got {width}"
            )
    if not rotated:
        return
    if config.rope_frequencies is None:
        if width % config.head_dim:
            raise ValueError(
                f"qk_head_dim ({width}) must be a multiple of head_dim ({config.head_dim}); otherwise set "
                "rope_frequencies"
            )
    else:
        pairs, known = config.rope_frequencies[layer], config.rotary_dim // 2 * max(1, len(config.rope_by_type))
        if 2 * len(pairs) > width or any(not 0 <= j < known for j in pairs):
            raise ValueError(
                f"rope_frequencies of layer {layer} must be at most {width // 2} numbers below {known}, got "
                f"{len(pairs)}, the largest {max(pairs, default=None)}"
            )
