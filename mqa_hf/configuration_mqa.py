"""Configuration of the canonical decoder-only model that every converted checkpoint becomes.

One configuration describes GPT-2, OPT, GPT-NeoX, GPT-J, Phi, Llama and their relatives: what cannot be settled in
the weights at conversion (how positions enter, where norms stand, which biases exist) is a field here.
"""

from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

POSITION_EMBEDDINGS = ("rotary", "learned", "none")
NORM_TYPES = ("rms_norm", "layer_norm")
AUTO_MAP = {
    "AutoConfig": "configuration_mqa.MQAConfig",
    "AutoModel": "modeling_mqa.MQAModel",
    "AutoModelForCausalLM": "modeling_mqa.MQAForCausalLM",
}
RESIDUALS = ("sequential", "post_norm", "parallel", "parallel_shared_norm")


class MQAConfig(PreTrainedConfig):
    r"""
    Configuration of [`MQAModel`] and [`MQAForCausalLM`].

    The defaults are those of a small Llama with one key/value head.

    Args:
        vocab_size (`int`): Rows of the embedding.
        hidden_size (`int`): Width `d` of the residual stream.
        embedding_size (`int`, *optional*): Width of the token embedding and of the input of `lm_head`, projected to
            and from `hidden_size` by `project_in` and `project_out` where it differs (OPT-350m). Default:
            `hidden_size`.
        intermediate_size (`int`): Width of the feed-forward layer.
        num_hidden_layers (`int`): Number of layers.
        num_attention_heads (`int`): Number of query heads `H`.
        num_key_value_heads (`int`): Number of key/value heads `G`; a divisor of `H`. 1 is multi-query attention
            (Shazeer 2019, arXiv 1911.02150), `H` is multi-head attention.
        head_dim (`int`, *optional*): Head width of the source model. It sets the rotary frequencies and the default
            `attention_scale`. Default: `hidden_size // num_attention_heads`.
        qk_head_dim (`int`, *optional*): Width of a query and of a stored key head, a multiple of `head_dim`: the
            rotary frequencies repeat every `head_dim` components. Default: `head_dim`.
        v_head_dim (`int`, *optional*): Width of a stored value head. Default: `head_dim`.
        attention_scale (`float`, *optional*): Factor on the attention logits. Default: `head_dim ** -0.5`.
        position_embedding (`str`): `"rotary"`, `"learned"` or `"none"`.
        rope_parameters (`dict`, *optional*): Rotary parameters as transformers defines them; used with `"rotary"`.
        rope_layers (`list[bool]`, *optional*): Per layer, whether queries and keys are rotated. Default: all are.
        max_position_embeddings (`int`): Context length; the rows of a learned position embedding.
        positions_from_mask (`bool`): Count learned positions from the first attended token of the 2D attention mask
            (OPT) instead of from the first column (GPT-2) where the caller gives no `position_ids`.
        norm_type (`str`): `"rms_norm"` or `"layer_norm"`.
        norm_eps (`float`): Epsilon of every norm.
        norm_affine (`bool`): Whether norms have learned weights.
        final_norm (`bool`): Whether a norm follows the last layer.
        residual (`str`): `"sequential"` (norm, attention, add; norm, MLP, add), `"post_norm"` (attention, add, norm;
            MLP, add, norm), `"parallel"` (attention and MLP of the same input, each with its own norm) or
            `"parallel_shared_norm"` (one norm for both).
        hidden_act (`str`): Activation of the MLP, a key of transformers' `ACT2FN`.
        gated_mlp (`bool`): `down(act(gate(x)) * up(x))` instead of `down(act(up(x)))`.
        query_bias, key_bias, value_bias, output_bias, mlp_bias, lm_head_bias (`bool`): Which projections have a bias.
        layer_types (`list[str]`, *optional*): Per layer `"full_attention"` or `"sliding_attention"`.
        sliding_window (`int`, *optional*): Positions that a sliding layer sees, the current one included.
        attention_dropout, hidden_dropout, embedding_dropout (`float`): Dropout while training, of the attention
            weights, of what each sub-layer adds to the residual stream, and of the embeddings.

    Raises:
        ValueError: where heads do not divide, widths are not multiples, or a value is none of those listed.
    """

    model_type = "mqa"
    keys_to_ignore_at_inference = ["past_key_values"]

    # Where the default is `None`, `__post_init__` derives it from the other fields.
    vocab_size: int = 32000
    hidden_size: int = 512
    embedding_size: int = None  # type: ignore[assignment]
    intermediate_size: int = 1408
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 1
    head_dim: int = None  # type: ignore[assignment]
    qk_head_dim: int = None  # type: ignore[assignment]
    v_head_dim: int = None  # type: ignore[assignment]
    attention_scale: float = None  # type: ignore[assignment]
    position_embedding: str = "rotary"
    rope_parameters: dict = None  # type: ignore[assignment]
    rope_layers: list[bool] = None  # type: ignore[assignment]
    max_position_embeddings: int = 2048
    positions_from_mask: bool = False
    norm_type: str = "rms_norm"
    norm_eps: float = 1e-6
    norm_affine: bool = True
    final_norm: bool = True
    residual: str = "sequential"
    hidden_act: str = "silu"
    gated_mlp: bool = True
    query_bias: bool = False
    key_bias: bool = False
    value_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    lm_head_bias: bool = False
    layer_types: list[str] = None  # type: ignore[assignment]
    sliding_window: int | None = None
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    embedding_dropout: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        self._check_sizes()
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.qk_head_dim is None:
            self.qk_head_dim = self.head_dim
        if self.v_head_dim is None:
            self.v_head_dim = self.head_dim
        if self.attention_scale is None:
            self.attention_scale = self.head_dim**-0.5
        if self.rope_layers is None:
            self.rope_layers = [self.position_embedding == "rotary"] * self.num_hidden_layers
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        self._check()
        # Lets a checkpoint saved from this class load where the package is not installed; the files that these names
        # stand for are copied beside the weights by `save_pretrained` (see `mqa_hf/__init__.py`).
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)

    def convert_rope_params_to_dict(self, **kwargs):
        if self.position_embedding != "rotary":
            self.rope_parameters = None  # type: ignore[assignment]
            return kwargs
        return super().convert_rope_params_to_dict(**kwargs)

    def _check_sizes(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
        ):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)!r}")

    def _check(self):
        for name, allowed in (
            ("position_embedding", POSITION_EMBEDDINGS),
            ("norm_type", NORM_TYPES),
            ("residual", RESIDUALS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be one of {', '.join(ACT2FN)}, got {self.hidden_act!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be divisible by num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if self.position_embedding == "rotary" and self.qk_head_dim % self.head_dim:
            raise ValueError(f"qk_head_dim ({self.qk_head_dim}) must be a multiple of head_dim ({self.head_dim})")
        for name in ("rope_layers", "layer_types"):
            if len(getattr(self, name)) != self.num_hidden_layers:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries for {self.num_hidden_layers} layers; give one each"
                )
        if "sliding_attention" in self.layer_types and not self.sliding_window:
            raise ValueError("layer_types has sliding_attention layers, but sliding_window is not set")

    @property
    def kv_bytes_per_token(self) -> int:
        """Cache bytes that one token takes at 16 bits a value, all layers together (no layer sliding)."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * (self.qk_head_dim + self.v_head_dim)
