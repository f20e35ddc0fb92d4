"""Configuration of a canonical stack of layers: a decoder-only model, or the encoder or decoder of a seq2seq model.

One configuration describes GPT-2, OPT, GPT-NeoX, BLOOM, Llama, T5, BART and their relatives. Differences that
conversion cannot fold into the weights (position embeddings, order of norms, biases) are fields here.
"""

from typing import Any, ClassVar

from .compat_mqa import offer_default_targets  # first: it raises if transformers is too old

# isort: split

from transformers.configuration_utils import PreTrainedConfig

from .configuration_checks_mqa import BY_LENGTH, LATENTS, WIDTHS, check, check_sizes, of_layer
from .parallel_mqa import PIPELINE, tensor_plan

AUTO_MAP = {
    "AutoConfig": "configuration_mqa.MQAConfig",
    "AutoModel": "modeling_mqa.MQAModel",
    **{
        f"AutoModelFor{task}": f"modeling_mqa.MQAFor{task}"
        for task in ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
    },
}


class MQAConfig(PreTrainedConfig):
    r"""
    Configuration of [`MQAModel`] and [`MQAForCausalLM`].

    The defaults are those of a small Llama with one key/value head.

    Args:
        vocab_size (`int`): Rows of the embedding.
        hidden_size (`int`): Width `d` of the residual stream.
        embedding_size (`int`, *optional*): Width of the token embedding and of the input of `lm_head`. If it differs
            from `hidden_size`, `project_in` and `project_out` map between the two (OPT-350m). Default: `hidden_size`.
        intermediate_size (`int`): Width of the feed-forward layer.
        num_hidden_layers (`int`): Number of layers.
        num_attention_heads (`int`): Number of query heads `H`.
        num_key_value_heads (`int`): Number of key/value heads `G`; a divisor of `H`. 1 is multi-query attention
            (Shazeer 2019, arXiv 1911.02150), `H` is multi-head attention.
        head_dim (`int`, *optional*): Head width of the source. It sets the rotary frequencies and the default
            `attention_scale`. Default: `hidden_size // num_attention_heads`.
        qk_head_dim (`int` or `list[int]`, *optional*): Width of a query head and of a stored key head, for all layers
            or per layer. Default: `head_dim`.
        v_head_dim (`int` or `list[int]`, *optional*): Width of a stored value head, likewise. Default: `head_dim`.
        cross_qk_head_dim, cross_v_head_dim (`int` or `list[int]`, *optional*): Same, for cross-attention.
        kv_latent_dim (`int` or `list[int]`, *optional*): Width `r` of the latent that replaces the keys and values of
            a token, for all layers or per layer. `kv_latent_heads` value heads of width `v_head_dim` are computed
            from it, and `qk_head_dim` rotated key components, shared by all query heads, are rebuilt from it. A query
            head has width `head_dim`. Default: no latent.
        cross_kv_latent_dim (`int` or `list[int]`, *optional*): Same, for cross-attention, which rebuilds no keys.
        kv_latent_heads (`int`, *optional*): Key/value heads that the latent replaces, a divisor of `H`. Default: `H`.
        kv_latent_bits (`int`): Bits per stored number of the latent: 16, 8 or 4. With 8 and 4, each latent has a
            scale and an offset in the model's type, and is rounded the same way without a cache.
        attention_scale (`float`, *optional*): Factor on the attention logits. Default: `head_dim ** -0.5`.
        attention_softcap (`float`, *optional*): Cap c of the attention logits, c · tanh(logit / c) (Gemma 2). Default:
            no cap.
        attention_sinks (`bool`): Whether each query head has a learned logit that takes part in the softmax and has no
            value (gpt-oss).
        attention_gate (`bool`): Whether the output of attention is multiplied by sigmoids of its input before the
            output projection (AFMoE).
        clip_qkv (`float`, *optional*): Queries, keys and values are clipped to ± this number after their projection
            (DBRX). Default: they are not.
        qk_norm (`str`, *optional*): Norm of queries and keys: `"head"`, of each head by itself (Qwen3), or `"joint"`,
            of all heads together (OLMo 2). Its weight has a row per head either way. With a latent or `query_maps`,
            only queries have it. Default: none.
        qk_norm_type (`str`, *optional*): `"rms_norm"` or `"layer_norm"`. Default: `norm_type`.
        qk_norm_affine, qk_norm_bias (`bool`): Whether this norm has weights, and biases.
        qk_norm_after_rotation (`bool`): Whether queries and keys are normalised after their rotation (HunYuan) instead
            of before it.
        query_maps (`bool`): Whether a linear map of each query head takes its normalised queries from `head_dim` to
            `qk_head_dim` components, and keys are not normalised. Heads fitted to normalised ones need it.
        query_scaling_beta (`float`, *optional*): Queries at position p are multiplied by
            1 + beta · log(1 + ⌊p / `query_scaling_length`⌋) (Ministral 3). Default: they are not.
        query_scaling_length (`int`, *optional*): Positions up to which this factor is 1.
        position_embedding (`str`): `"rotary"` (arXiv 2104.09864), `"learned"`, `"sinusoidal"` (arXiv 1706.03762),
            `"alibi"` (arXiv 2108.12409), `"relative"` (learned biases of bucketed distances, arXiv 1910.10683) or
            `"none"`.
        rope_parameters (`dict`, *optional*): Rotary parameters as transformers defines them, for all layers or by
            layer type (Gemma 3); used with `"rotary"`.
        rope_frequencies (`list[list[int]]`, *optional*): Per layer, the index of each rotated pair's frequency among
            the model's `rotary_dim / 2`. With n entries, component j < n is paired with j + n, and components from 2n
            on are not rotated. Default: all frequencies in order, repeated every `head_dim` components.
        rope_layers (`list[bool]`, *optional*): Per layer, whether queries and keys are rotated. Default: all are.
        rope_recompute (`bool`): Whether generation recomputes the cache when a text outgrows the
            `original_max_position_embeddings` of `"longrope"`, beyond which all keys are rotated by other frequencies
            (Phi-3).
        max_position_embeddings (`int`): Context length; the rows of a learned position embedding.
        positions_from_mask (`bool`): Without `position_ids`, count learned or sinusoidal positions from the first
            attended token of the 2D attention mask (OPT) instead of from the first column (GPT-2); with ALiBi, the
            positions of keys (BLOOM).
        position_offset (`int`): Sinusoidal position of the first token.
        sinusoidal_endpoint (`bool`): Whether the lowest of the `n` sinusoidal frequencies is 1/10000 (M2M-100) instead
            of 1/10000 to the power of (n - 1)/n (Marian, the paper).
        alibi_slopes (`list[float]`, *optional*): Slope of each query head; used with `"alibi"`.
        alibi_bfloat16 (`bool`): Whether slopes and their products with key positions are rounded to bfloat16 before
            `attention_scale` is applied, as Falcon's class does.
        relative_buckets, relative_max_distance (`int`): Buckets and largest distance of the `"relative"` bias.
        relative_per_layer (`bool`): Whether each layer has its own relative bias (UMT5) instead of sharing that of
            the first layer (T5).
        causal (`bool`): `False` for an encoder.
        cross_num_key_value_heads (`int`, *optional*): Key/value heads of the cross-attention in each layer. Default:
            no cross-attention.
        num_mel_bins (`int`, *optional*): Channels of the log-mel spectrogram that an audio encoder reads instead of
            tokens (Whisper).
        embedding_scale (`float`): Factor on the token embeddings.
        scale_inputs_embeds (`bool`): Whether `embedding_scale` also applies to `inputs_embeds` (Granite).
        embedding_norm (`bool`): Whether a norm follows the embeddings.
        embedding_norm_first (`bool`): Whether it precedes the addition of positions (BlenderbotSmall's decoder).
        head_transform (`str`, *optional*): Activation of a layer before the head, norm(act(dense(x))) (ModernBERT's
            decoder). Default: no such layer.
        head_transform_bias (`bool`): Whether `dense` has a bias.
        logit_scale (`float`): Factor on the logits.
        logit_softcap (`float`, *optional*): Cap c of the logits, c · tanh(logit / c), after `logit_scale`. Default: no
            cap.
        norm_type (`str`): `"rms_norm"` or `"layer_norm"`.
        norm_eps (`float`): Epsilon of every norm.
        norm_affine (`bool`): Whether norms have learned weights.
        norm_bias (`bool`): Whether layer norms with learned weights have biases.
        first_norm (`bool`): Whether the first layer has a norm before its attention.
        final_norm (`bool`): Whether a norm follows the last layer.
        residual (`str`): `"sequential"` (norm, attention, add; norm, MLP, add), `"post_norm"` (attention, add, norm;
            MLP, add, norm), `"sandwich"` (as `"sequential"`, with another norm before each addition; Gemma 2),
            `"output_norm"` (only the norms before the additions; OLMo 2), `"parallel"` (attention and MLP read the
            same input, each with its own norm) or `"parallel_shared_norm"` (one norm for both).
        residual_multiplier (`float`): Factor on the outputs of attention and MLP before they are added to the residual
            stream (Granite).
        hidden_act (`str`): Activation of the MLP, a key of transformers' `ACT2FN`.
        gated_mlp (`bool`): `down(act(gate(x)) * up(x))` instead of `down(act(up(x)))`.
        expert_layers (`list[bool]`, *optional*): Per layer, whether a mixture of experts replaces the MLP. Default: in
            all layers if there are experts.
        num_experts (`int`, *optional*): Experts of a mixture, gated MLPs without biases. Default: no experts.
        num_experts_per_tok (`int`): Experts chosen per token.
        expert_intermediate_size (`int`, *optional*): Width of the inner layer of an expert.
        shared_expert_intermediate_size (`int`, *optional*): Same, of an expert that all tokens share. Default: none.
        shared_expert_gate (`bool`): Whether the shared expert's output is multiplied by a sigmoid of the token.
        expert_bias (`bool`): Whether the experts' projections have biases.
        expert_limit (`float`, *optional*): Limit l of the inner layer of experts that is
            g · sigmoid(1.702 g) · (u + 1), with g at most l and u within ±l (gpt-oss), instead of `hidden_act`(g) · u.
            Default: none.
        router_scores (`str`): Scores of the experts: `"softmax"` or `"sigmoid"` of the router's logits, or
            `"sparsemixer"`, a softmax for each choice without those experts whose logits are far below it (PhiMoE).
            Without PhiMoE's sampling while training, a router gets no gradient where one expert remains.
        router_jitter (`float`): With `"sparsemixer"`, half the relative distance of the logits that are far.
        router_bias (`bool`): Whether the router's logits have a bias.
        router_renormalise (`bool`): Whether the scores of the chosen experts are divided by their sum.
        router_scale (`float`): Factor on these weights.
        router_choice (`str`): What experts are chosen by: `"scores"` or `"logits"` (Kolibri).
        router_correction (`bool`): Whether a learned bias is added to these for the choice of experts.
        router_groups, router_groups_kept (`int`): Groups of experts, and the number of them that a token chooses from.
        query_bias, key_bias, value_bias, output_bias, mlp_bias, lm_head_bias (`bool`): Which projections have a bias;
            `output_bias` may be a list with an entry per layer.
        clamp_float16 (`bool`): Whether the output of a layer is clamped to the range of float16 (T5, BART's encoder).
        layer_types (`list[str]`, *optional*): Per layer `"full_attention"` or `"sliding_attention"`.
        sliding_window (`int`, *optional*): Positions that a sliding layer sees, the current one included.
        attention_dropout, hidden_dropout, embedding_dropout, activation_dropout (`float`): Dropout in training on the
            attention weights, the output of each sub-layer, the embeddings, and inside the MLP.

    Raises:
        ValueError: if heads do not divide, widths are not multiples, or a value is not one of those listed.
    """

    model_type = "mqa"
    base_model_tp_plan: ClassVar[Any]  # depends on the fields, so each configuration has its own
    base_model_pp_plan: ClassVar[Any] = PIPELINE
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    # `__post_init__` derives defaults of `None` from the other fields.
    vocab_size: int = 32000
    hidden_size: int = 512
    embedding_size: int = None  # type: ignore[assignment]
    intermediate_size: int = 1408
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 1
    head_dim: int = None  # type: ignore[assignment]
    qk_head_dim: int | list[int] = None  # type: ignore[assignment]
    v_head_dim: int | list[int] = None  # type: ignore[assignment]
    cross_qk_head_dim: int | list[int] = None  # type: ignore[assignment]
    cross_v_head_dim: int | list[int] = None  # type: ignore[assignment]
    kv_latent_dim: int | list[int] | None = None
    cross_kv_latent_dim: int | list[int] | None = None
    kv_latent_heads: int | None = None
    kv_latent_bits: int = 16
    attention_scale: float = None  # type: ignore[assignment]
    attention_softcap: float | None = None
    attention_sinks: bool = False
    attention_gate: bool = False
    clip_qkv: float | None = None
    qk_norm: str | None = None
    qk_norm_type: str = None  # type: ignore[assignment]
    qk_norm_affine: bool = True
    qk_norm_bias: bool = False
    qk_norm_after_rotation: bool = False
    query_maps: bool = False
    query_scaling_beta: float | None = None
    query_scaling_length: int | None = None
    position_embedding: str = "rotary"
    rope_parameters: dict = None  # type: ignore[assignment]
    rope_frequencies: list[list[int]] | None = None
    rope_layers: list[bool] = None  # type: ignore[assignment]
    rope_recompute: bool = False
    max_position_embeddings: int = 2048
    positions_from_mask: bool = False
    position_offset: int = 0
    sinusoidal_endpoint: bool = False
    alibi_slopes: list[float] | None = None
    alibi_bfloat16: bool = False
    relative_buckets: int = 32
    relative_max_distance: int = 128
    relative_per_layer: bool = False
    causal: bool = True
    cross_num_key_value_heads: int | None = None
    num_mel_bins: int | None = None
    embedding_scale: float = 1.0
    scale_inputs_embeds: bool = False
    embedding_norm: bool = False
    embedding_norm_first: bool = False
    head_transform: str | None = None
    head_transform_bias: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    norm_type: str = "rms_norm"
    norm_eps: float = 1e-6
    norm_affine: bool = True
    norm_bias: bool = True
    first_norm: bool = True
    final_norm: bool = True
    residual: str = "sequential"
    residual_multiplier: float = 1.0
    hidden_act: str = "silu"
    gated_mlp: bool = True
    expert_layers: list[bool] = None  # type: ignore[assignment]
    num_experts: int | None = None
    num_experts_per_tok: int = 2
    expert_intermediate_size: int | None = None
    shared_expert_intermediate_size: int | None = None
    shared_expert_gate: bool = False
    expert_bias: bool = False
    expert_limit: float | None = None
    router_scores: str = "softmax"
    router_jitter: float = 0.01
    router_bias: bool = False
    router_renormalise: bool = True
    router_scale: float = 1.0
    router_choice: str = "scores"
    router_correction: bool = False
    router_groups: int = 1
    router_groups_kept: int = 1
    query_bias: bool = False
    key_bias: bool = False
    value_bias: bool = False
    output_bias: bool | list[bool] = False
    mlp_bias: bool = False
    lm_head_bias: bool = False
    clamp_float16: bool = False
    layer_types: list[str] = None  # type: ignore[assignment]
    sliding_window: int | None = None
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    embedding_dropout: float = 0.0
    activation_dropout: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        check_sizes(self)
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.kv_latent_heads is None and self.latent:
            self.kv_latent_heads = self.num_attention_heads
        for name in WIDTHS:
            if getattr(self, name) is None:
                setattr(self, name, self.head_dim)
        if self.attention_scale is None:
            self.attention_scale = self.head_dim**-0.5
        if self.qk_norm_type is None:
            self.qk_norm_type = self.norm_type
        if self.rope_layers is None:
            self.rope_layers = [self.position_embedding == "rotary"] * self.num_hidden_layers
        if self.expert_layers is None:
            self.expert_layers = [self.num_experts is not None] * self.num_hidden_layers
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        check(self)
        # Lets a saved checkpoint load without the package; `save_pretrained` copies the files that these names refer
        # to beside the weights (see `mqa_hf/__init__.py`).
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        self.base_model_tp_plan = tensor_plan(self)  # type: ignore[misc]  # before transformers adds to it
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict:
        offer_default_targets()  # PEFT reads the configuration with this method before it looks for them
        return super().to_dict()

    def convert_rope_params_to_dict(self, **kwargs):
        if self.position_embedding != "rotary":
            self.rope_parameters = None  # type: ignore[assignment]
            return kwargs
        if self.rope_by_type:
            # transformers would add a `rope_theta` beside the layer types, and refuse it when it reads the file.
            self.rope_parameters = self.rope_by_type
            self.standardize_rope_params()
            return kwargs
        return super().convert_rope_params_to_dict(**kwargs)

    @property
    def rope_by_type(self) -> dict[str, dict]:
        """Rotary parameters by layer type, in the order of their frequencies; empty if all layers have the same."""
        kinds = {name: one for name, one in (self.rope_parameters or {}).items() if isinstance(one, dict)}
        return {name: kinds[name] for name in sorted(kinds)}

    @property
    def rotary_dim(self) -> int:
        """Rotated components of a head with rotary positions: the first of every `head_dim`."""
        one = next(iter(self.rope_by_type.values()), self.rope_parameters or {})
        return int(self.head_dim * one.get("partial_rotary_factor", 1.0))

    @property
    def rope_by_length(self) -> bool:
        """Whether rotary frequencies depend on the length of the text."""
        one = self.rope_parameters or {}
        same = one.get("rope_type") == "longrope" and one.get("short_factor") == one.get("long_factor")  # PhiMoE
        return one.get("rope_type") in BY_LENGTH and not same

    def first_frequency(self, layer: int) -> int:
        """Index of the first frequency of a layer's type among those of all types."""
        if not self.rope_by_type:
            return 0
        return list(self.rope_by_type).index(self.layer_types[layer]) * (self.rotary_dim // 2)

    def layer_frequencies(self, layer: int) -> list[int] | None:
        """Indices of the frequencies of a layer's rotated pairs; `None` if they are all, in order."""
        if self.rope_frequencies is not None:
            return self.rope_frequencies[layer]
        if not self.rope_by_type:
            return None
        first = self.first_frequency(layer)
        return list(range(first, first + self.rotary_dim // 2))

    @property
    def folds_value_bias(self) -> bool:
        """Whether a bias of values can become one of the output: not if attention weights add up to less than 1."""
        return not (self.attention_sinks and self.value_bias)

    @property
    def latent(self) -> bool:
        """Whether any attention caches a latent instead of keys and values."""
        return any(getattr(self, name) is not None for name in LATENTS)

    @property
    def kv_bytes_per_token(self) -> int:
        """Cache bytes per token over all self-attention layers, as if none were sliding: keys and values at 16 bits
        per number, latents at `kv_latent_bits` with their scales and offsets."""
        if self.kv_latent_dim is not None:
            return self._latent_bytes(self.kv_latent_dim)
        return self._kv_bytes(self.num_key_value_heads, "qk_head_dim", "v_head_dim")

    @property
    def cross_kv_bytes_per_token(self) -> int:
        """Cache bytes per source token over all cross-attention layers."""
        if self.cross_kv_latent_dim is not None:
            return self._latent_bytes(self.cross_kv_latent_dim)
        return self._kv_bytes(self.cross_num_key_value_heads or 0, "cross_qk_head_dim", "cross_v_head_dim")

    def _kv_bytes(self, heads: int, *widths: str) -> int:
        layers = range(self.num_hidden_layers)
        return 2 * heads * sum(of_layer(getattr(self, name), i) for name in widths for i in layers)

    def _latent_bytes(self, widths: int | list[int]) -> int:
        r = sum(of_layer(widths, i) for i in range(self.num_hidden_layers))
        scales = 0 if self.kv_latent_bits == 16 else 2 * 2 * self.num_hidden_layers
        return r * self.kv_latent_bits // 8 + scales
