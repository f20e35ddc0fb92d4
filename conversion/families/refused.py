"""Model types in transformers' causal and sequence-to-sequence mappings that cannot be converted, and why.

A reason completes the message "... cannot be converted: ".
"""

ENCODER = (
    "it is a BERT-like encoder that can also run with a causal mask; its class has as many key/value heads as query "
    "heads, and encoders are not supported"
)
NO_ATTENTION = "its layers are recurrent or state-space models, which have no keys and values to share"
LATENT = "it uses multi-head latent attention, which already caches one latent vector for all heads"
LATENT_HYBRID = f"{LATENT}, and its other layers use linear attention"
MULTIMODAL = "it is multimodal; save its language model as a separate checkpoint and convert that"
MULTIMODAL_OTHER = "it is multimodal, and its language model is not supported either"
MULTIMODAL_TEXT = "it is multimodal; load its language model with AutoModelForCausalLM, save it and convert that"
AUDIO = "it models audio codes, several per step, not text"
OWN_HEADS = (
    "its class has as many key/value heads as query heads, and no mapping to the canonical model is implemented"
)
SPEECH_AND_TEXT = f"it is the text part of a speech and text model; {OWN_HEADS}"
ENCODER_DECODER_EXPERTS = (
    "it is an encoder-decoder with mixtures of experts; its class has as many key/value heads as query heads"
)
LOCAL_ENCODER = (
    "its encoder attends to windows or blocks and to global tokens, and its class has as many key/value heads as "
    "query heads"
)
TWO_CONFIGURATIONS = (
    "its encoder and decoder have separate configurations and key/value heads; only single-stack models can be "
    "converted in their own class"
)
WRAPPER = (
    "it joins any encoder to any decoder and has no layers of its own; the decoder would have to be converted "
    "together with its cross-attention"
)
UNEVEN = "its layers differ in the number and width of key/value heads, and keys may also serve as values"
LOOPED = "some of its layers run several times, with separate keys and values each time"
FUSED_IN_FILES = "its files store queries, keys and values in one tensor, which its class splits when loading"
KEY_CONVOLUTION = "each key and value head has its own short convolution"

REFUSED: dict[str, str] = {
    "audioflamingo3": MULTIMODAL,
    "axk1": LATENT,
    "axk2": LATENT,
    "bailing_hybrid": LATENT_HYBRID,
    "bert": ENCODER,
    "bert-generation": ENCODER,
    "big_bird": ENCODER,
    "bigbird_pegasus": LOCAL_ENCODER,
    "blt": "it is a byte model; its encoder, decoder and patcher each have their own attention",
    "camembert": ENCODER,
    "cpmant": f"its attention is bidirectional within a prompt; {OWN_HEADS}",
    "data2vec-text": ENCODER,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "deepseek_v4": "its attention already has one key/value head for all query heads",
    "diffllama": "its differential attention pairs key/value heads, so its class needs an even number of them",
    "doge": "each key/value head has its own learned mask, computed from all values",
    "dory": LOOPED,
    "dots3_note": f"it is multimodal, and {LATENT}",
    "dots3_note_text": LATENT,
    "electra": ENCODER,
    "emu3": MULTIMODAL_OTHER,
    "encoder-decoder": WRAPPER,
    "ernie": ENCODER,
    "falcon_mamba": NO_ATTENTION,
    "fuyu": MULTIMODAL,
    "gemma3n": MULTIMODAL,
    "gemma4": MULTIMODAL_OTHER,
    "gemma4_assistant": "it is a draft model that reads another model's keys and values instead of its own",
    "gemma4_text": UNEVEN,
    "gemma4_unified": MULTIMODAL_OTHER,
    "gemma4_unified_assistant": "it is a draft model that reads another model's keys and values instead of its own",
    "gemma4_unified_text": UNEVEN,
    "git": "it is a captioning model: BERT layers and an image encoder, with as many key/value heads as query heads",
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "glmasr": MULTIMODAL,
    "granite_speech": MULTIMODAL,
    "granite_speech_plus": MULTIMODAL,
    "hrm_text": f"it runs two stacks of layers repeatedly, with a cache for each pass; {OWN_HEADS}",
    "hy_v4": LATENT,
    "inkling2_loop_text": KEY_CONVOLUTION,
    "inkling2_text": KEY_CONVOLUTION,
    "inkling_text": KEY_CONVOLUTION,
    "jetmoe": "each of its attention experts has one query head per key/value head, so the two numbers are tied",
    "kimi_linear": LATENT_HYBRID,
    "led": LOCAL_ENCODER,
    "longcat_flash": LATENT,
    "longt5": LOCAL_ENCODER,
    "mamba": NO_ATTENTION,
    "mamba2": NO_ATTENTION,
    "megatron-bert": ENCODER,
    "mimo_v2_flash": "its sliding layers have twice as many key/value heads as the others, so they cannot have one",
    "minicpm3": LATENT,
    "minimax_m3_vl_text": "its sparse attention selects keys with one index head per key/value head",
    "mllama": MULTIMODAL_OTHER,
    "moshi": AUDIO,
    "moss_transcribe_diarize": MULTIMODAL,
    "musicflamingo": MULTIMODAL,
    "musicgen": AUDIO,
    "musicgen_melody": AUDIO,
    "nemo_speechlm": MULTIMODAL,
    "nllb-moe": ENCODER_DECODER_EXPERTS,
    "omniasr": MULTIMODAL,
    "pegasus_x": LOCAL_ENCODER,
    "phi4_multimodal": "it is multimodal, and its layers contain adapters for its image and audio encoders",
    "prophetnet": f"its decoder predicts several tokens ahead, with one attention stream for each; {OWN_HEADS}",
    "qwen2_audio": MULTIMODAL,
    "qwen3_asr": MULTIMODAL,
    "qwen4_exp": MULTIMODAL_TEXT,
    "reformer": "its attention selects keys by hashing and caches no keys or values",
    "rembert": ENCODER,
    "roberta": ENCODER,
    "roberta-prelayernorm": ENCODER,
    "roc_bert": ENCODER,
    "roformer": ENCODER,
    "rwkv": NO_ATTENTION,
    "sarvam_mla": LATENT,
    "sarvam_moe": FUSED_IN_FILES,
    "seamless_m4t": SPEECH_AND_TEXT,
    "seamless_m4t_v2": SPEECH_AND_TEXT,
    "switch_transformers": ENCODER_DECODER_EXPERTS,
    "t5gemma": TWO_CONFIGURATIONS,
    "t5gemma2": TWO_CONFIGURATIONS,
    "trocr": f"it is the decoder of an image-to-text model, with cross-attention to the image; {OWN_HEADS}",
    "vibevoice_asr": MULTIMODAL,
    "voxtral": MULTIMODAL,
    "voxtral_realtime": MULTIMODAL_OTHER,
    "xlm": OWN_HEADS,
    "xlm-roberta": ENCODER,
    "xlm-roberta-xl": ENCODER,
    "xlnet": f"its attention has two streams, with relative positions and segments; {OWN_HEADS}",
    "xlstm": NO_ATTENTION,
    "xmod": ENCODER,
    "youtu": LATENT,
    "zaya": "it mixes queries and keys with convolutions and takes half of each value from the previous token",
}
