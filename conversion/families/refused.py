"""Model types of transformers' causal and sequence-to-sequence mappings that are not converted, and why.

A reason completes the sentence "... cannot be converted: ".
"""

ENCODER = (
    "it is an encoder of BERT's kind, which the mapping lets run with a causal mask; its class has as many key/value "
    "heads as query heads, and the family table has no row for encoders"
)
NO_ATTENTION = "its layers are recurrent or state-space models and have no keys and values to share"
LATENT = (
    "its attention is multi-head latent attention: keys and values are cached as one latent vector for all heads "
    "already"
)
LATENT_HYBRID = f"{LATENT}, and its other layers are linear attention"
MULTIMODAL = (
    "it is a multimodal model around a language model; convert the language model, saved as a checkpoint of its own"
)
MULTIMODAL_OTHER = "it is a multimodal model around a language model that has no place in the tables either"
MULTIMODAL_TEXT = (
    "it is a multimodal model around a language model, which AutoModelForCausalLM loads by itself; save that and "
    "convert it"
)
AUDIO = "it is a model of audio codes, several for each step, not of text"
OWN_HEADS = (
    "its class has as many key/value heads as query heads, and the family table has no row that makes it canonical"
)
SPEECH_AND_TEXT = f"it is the text part of a model of speech and text; {OWN_HEADS}"
ENCODER_DECODER_EXPERTS = (
    "it is an encoder-decoder with mixtures of experts; its class has as many key/value heads as query heads"
)
LOCAL_ENCODER = (
    "its encoder attends to windows or blocks and to global tokens, and its class has as many key/value heads as "
    "query heads"
)
TWO_CONFIGURATIONS = (
    "its encoder and decoder have a configuration each, with key/value heads of their own; only models of one stack "
    "are converted in their own class"
)
WRAPPER = (
    "it is any encoder joined to any decoder, with no layers of its own; its decoder would have to be converted "
    "together with its cross-attention"
)
UNEVEN = "its layers differ in the number and width of their key/value heads, and values may be the keys themselves"
LOOPED = "some of its layers run several times, with keys and values of their own each time"
FUSED_IN_FILES = (
    "its files hold queries, keys and values in one tensor, which its class takes apart when it loads them"
)
KEY_CONVOLUTION = "each key and value head passes a short convolution of its own"

REFUSED: dict[str, str] = {
    "audioflamingo3": MULTIMODAL,
    "axk1": LATENT,
    "axk2": LATENT,
    "bailing_hybrid": LATENT_HYBRID,
    "bert": ENCODER,
    "bert-generation": ENCODER,
    "big_bird": ENCODER,
    "bigbird_pegasus": LOCAL_ENCODER,
    "blenderbot-small": "its decoder normalises the embeddings before the positions are added, its encoder after",
    "blt": "it is a model of bytes: encoder, decoder and patcher around a transformer, each with attention of its own",
    "camembert": ENCODER,
    "cpmant": f"it attends in both directions within a prompt; {OWN_HEADS}",
    "ctrl": OWN_HEADS,
    "data2vec-text": ENCODER,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "deepseek_v4": "its attention has one key/value head for all query heads already",
    "diffllama": "its differential attention pairs key/value heads, of which its class needs an even number",
    "doge": "each key/value head has a learned mask of its own, computed from all the values",
    "dory": LOOPED,
    "dots3_note": f"it is a multimodal model around a language model; {LATENT}",
    "dots3_note_text": LATENT,
    "electra": ENCODER,
    "emu3": MULTIMODAL_OTHER,
    "encoder-decoder": WRAPPER,
    "ernie": ENCODER,
    "falcon_mamba": NO_ATTENTION,
    "fsmt": OWN_HEADS,
    "fuyu": MULTIMODAL,
    "gemma3": MULTIMODAL,
    "gemma3n": MULTIMODAL,
    "gemma4": MULTIMODAL_OTHER,
    "gemma4_assistant": "it drafts for another model, whose keys and values it reads; it has none of its own",
    "gemma4_text": UNEVEN,
    "gemma4_unified": MULTIMODAL_OTHER,
    "gemma4_unified_assistant": "it drafts for another model, whose keys and values it reads; it has none of its own",
    "gemma4_unified_text": UNEVEN,
    "git": "it is a captioning model: BERT's layers behind an image encoder, with as many key/value as query heads",
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "glmasr": MULTIMODAL,
    "got_ocr2": MULTIMODAL,
    "gpt_neox_japanese": OWN_HEADS,
    "granite_speech": MULTIMODAL,
    "granite_speech_plus": MULTIMODAL,
    "hrm_text": f"it passes two stacks of layers again and again, with a cache for each pass; {OWN_HEADS}",
    "hy_v4": LATENT,
    "inkling2_loop_text": KEY_CONVOLUTION,
    "inkling2_text": KEY_CONVOLUTION,
    "inkling_text": KEY_CONVOLUTION,
    "jetmoe": "each expert of its attention holds a query head for every key/value head: the two numbers are tied",
    "kimi_linear": LATENT_HYBRID,
    "led": LOCAL_ENCODER,
    "llama4": MULTIMODAL_TEXT,
    "longcat_flash": LATENT,
    "longt5": LOCAL_ENCODER,
    "mamba": NO_ATTENTION,
    "mamba2": NO_ATTENTION,
    "megatron-bert": ENCODER,
    "mimo_v2_flash": "its sliding layers have twice the key/value heads of the others, so none can have a single one",
    "minicpm3": LATENT,
    "minimax_m3_vl_text": "its sparse attention picks keys by an index head for each key/value head",
    "mllama": MULTIMODAL_OTHER,
    "modernbert-decoder": OWN_HEADS,
    "moshi": AUDIO,
    "moss_transcribe_diarize": MULTIMODAL,
    "musicflamingo": MULTIMODAL,
    "musicgen": AUDIO,
    "musicgen_melody": AUDIO,
    "nemo_speechlm": MULTIMODAL,
    "nllb-moe": ENCODER_DECODER_EXPERTS,
    "omniasr": MULTIMODAL,
    "pegasus_x": LOCAL_ENCODER,
    "phi4_multimodal": "it is a multimodal model, with image and audio encoders and adapters for each in its layers",
    "prophetnet": f"its decoder predicts several tokens ahead with a stream of attention for each; {OWN_HEADS}",
    "qwen2_audio": MULTIMODAL,
    "qwen3_5": MULTIMODAL_TEXT,
    "qwen3_5_moe": MULTIMODAL_TEXT,
    "qwen3_asr": MULTIMODAL,
    "qwen4_exp": MULTIMODAL_TEXT,
    "reformer": "its attention picks keys by hashing and keeps no keys and values",
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
    "zaya": "it mixes queries and keys in convolutions and takes half of each value from the token before",
}
