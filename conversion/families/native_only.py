"""Model types that the canonical model cannot express, but whose own class supports fewer key/value heads.

`--target native` pools their key and value projections and copies everything else byte for byte. A row gives
the reason to refuse `--target mqa` and the names of the projections.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class NativeOnly:
    """One model type of transformers.

    Attributes:
        why: what the canonical model cannot express, as a clause.
        key, value: name suffixes of a layer's projections; `{}` is the layer number. Rows are heads.
        key_norm: a norm over all heads of a key together, with one weight per row of `key`. With equal heads its mean
            square is that of one head, so pooling it like a bias is exact.
        fused: one projection with the rows of queries, keys and values in this order, in place of `key` and `value`.
        heads: the configuration field with the number of key/value heads.
        off: switches that rule out pooling, and why.
        image_text: whether it is a multimodal class, whose language model is pooled; `heads` is then in the
            configuration of that.
    """

    why: str
    key: str = "layers.{}.self_attn.k_proj"
    value: str = "layers.{}.self_attn.v_proj"
    key_norm: str | None = None
    fused: str | None = None
    heads: str = "num_key_value_heads"
    off: tuple[tuple[str, str], ...] = ()
    image_text: bool = False


_JOINT_NORM = "layers.{}.self_attn.k_norm"

EXPERTS = NativeOnly("its feed-forward layers are mixtures of experts")
JOINT_NORM_EXPERTS = NativeOnly(EXPERTS.why, key_norm=_JOINT_NORM)
GATED = NativeOnly("it gates the attention output and has mixture-of-experts layers")
STATE_SPACE = NativeOnly("some of its layers are state-space models")
CONVOLUTIONS = NativeOnly("some of its layers are convolutions")
LINEAR = NativeOnly("some of its layers use linear attention")

NATIVE_ONLY: dict[str, NativeOnly] = {
    "apertus1p5_text": NativeOnly("its head has fewer rows than its embedding"),
    "bamba": STATE_SPACE,
    "beam": GATED,
    "bitnet": NativeOnly("it normalises before the output projection of attention and in its feed-forward layers"),
    "cohere_compass_text": NativeOnly("its rotary positions are multimodal, with several axes"),
    "falcon_h1": NativeOnly("its layers combine attention with a state-space model"),
    "gemma3n_text": NativeOnly("its layers have several residual streams and share keys and values"),
    "granitemoehybrid": STATE_SPACE,
    "jamba": STATE_SPACE,
    "laguna": GATED,
    "lara_mini": LINEAR,
    "lfm2": CONVOLUTIONS,
    "lfm2_moe": CONVOLUTIONS,
    "lfm3": CONVOLUTIONS,
    "llama4_text": NativeOnly("it attends in chunks and has mixture-of-experts layers"),
    "minimax": LINEAR,
    "nemotron_h": NativeOnly(STATE_SPACE.why, key="layers.{}.mixer.k_proj", value="layers.{}.mixer.v_proj"),
    "olmo_hybrid": NativeOnly(LINEAR.why, key_norm=_JOINT_NORM),
    "qwen3_5_moe_text": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR,
    "qwen4_exp_text": NativeOnly(
        "some of its layers use linear attention, others attend to keys selected by an index"
    ),
    "recurrent_gemma": NativeOnly(
        "some of its layers are recurrent",
        key="layers.{}.temporal_block.k_proj",
        value="layers.{}.temporal_block.v_proj",
    ),
    "zamba": NativeOnly(
        STATE_SPACE.why,
        key="layers.{}.shared_transf.self_attn.k_proj",
        value="layers.{}.shared_transf.self_attn.v_proj",
    ),
    "zamba2": NativeOnly(
        STATE_SPACE.why,
        key="layers.{}.shared_transformer.self_attn.k_proj",
        value="layers.{}.shared_transformer.self_attn.v_proj",
        off=(("use_shared_attention_adapter", "its adapters add to the keys and values of all heads"),),
    ),
}

# Multimodal types: the language model within them is pooled.
_LANGUAGE = NativeOnly("it is multimodal; its language model is converted in place", image_text=True)
IMAGE_TEXT: dict[str, NativeOnly] = dict.fromkeys(
    (
        "apertus1p5", "aria", "aya_vision", "cohere2_vision", "deepseek_vl", "deepseek_vl_hybrid", "ernie4_5_vl_moe",
        "exaone4_5", "gemma3", "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "got_ocr2", "granite_docling",
        "hyperclovax_vision_v2", "idefics2", "idefics3", "internvl", "janus", "lfm2_vl", "lighton_ocr", "llama4",
        "llava", "llava_next", "llava_next_video", "llava_onevision", "mistral3", "ovis2", "paddleocr_vl",
        "paligemma", "qianfan_ocr", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe",
        "smolvlm", "video_llama_3", "vipllava",
    ),
    _LANGUAGE,
)  # fmt: skip

# Types that are canonical as well, but whose own class stores experts in another form; the same for `--target native`.
MIXTURES: dict[str, NativeOnly] = {
    "afmoe": EXPERTS,
    "aria_text": EXPERTS,
    "dbrx": NativeOnly(EXPERTS.why, fused="blocks.{}.norm_attn_norm.attn.Wqkv", heads="attn_config.kv_n_heads"),
    "flint": EXPERTS,
    "gpt_oss": EXPERTS,
    "kolibri1": EXPERTS,
    "phimoe": EXPERTS,
    "cohere2_moe": EXPERTS,
    "granitemoe": EXPERTS,
    "granitemoe_swa": EXPERTS,
    "granitemoeshared": EXPERTS,
    "hy_v3": EXPERTS,
    "mellum": EXPERTS,
    "dots1": EXPERTS,
    "ernie4_5_moe": EXPERTS,
    "exaone_moe": EXPERTS,
    "flex_olmo": JOINT_NORM_EXPERTS,
    "glm4_moe": EXPERTS,
    "hunyuan_v1_moe": EXPERTS,
    "minimax_m2": JOINT_NORM_EXPERTS,
    "mixtral": EXPERTS,
    "olmoe": JOINT_NORM_EXPERTS,
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "solar_open": EXPERTS,
}
ONLY_OWN_CLASS = {**NATIVE_ONLY, **IMAGE_TEXT}
OWN_CLASS = {**ONLY_OWN_CLASS, **MIXTURES}
