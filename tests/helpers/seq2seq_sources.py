"""Tiny encoder-decoder models, with the switches of the published checkpoints; see `sources.py`."""

import json

import torch
from sources import VOCAB, rescale
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq, PreTrainedModel

T5 = {
    "vocab_size": VOCAB,
    "d_model": 48,
    "d_kv": 8,
    "d_ff": 80,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 6,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
BART = {
    "vocab_size": VOCAB,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 96,
    "decoder_start_token_id": 2,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "forced_eos_token_id": None,
    "activation_function": "gelu",
}
WHISPER = {
    **{k: v for k, v in BART.items() if k not in ("max_position_embeddings", "forced_eos_token_id")},
    "num_mel_bins": 16,
    "max_source_positions": 20,
    "max_target_positions": 96,
    "begin_suppress_tokens": None,
}

FSMT = {**{k: v for k, v in BART.items() if k != "vocab_size"}, "activation_function": "relu"}

SEQ2SEQ_CASES: list[tuple[str, str, dict]] = [
    ("t5", "v1.0", {**T5, "feed_forward_proj": "relu"}),
    ("t5", "v1.1 and Flan, gated", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    ("t5", "wide heads, five of them", {**T5, "num_heads": 5, "d_kv": 16}),
    ("mt5", "gated", {**T5, "feed_forward_proj": "gated-gelu"}),
    ("umt5", "a bias for each layer", {**T5, "feed_forward_proj": "gated-gelu"}),
    ("bart", "as published", BART),
    ("bart", "scaled, fewer decoder heads", {**BART, "scale_embedding": True, "decoder_attention_heads": 4}),
    ("mbart", "as published", {**BART, "scale_embedding": True}),
    ("plbart", "as published", {**BART, "scale_embedding": True}),
    ("mvp", "without prompts", BART),
    ("marian", "as published", {**BART, "activation_function": "swish", "scale_embedding": True}),
    (
        "marian",
        "two vocabularies",
        {**BART, "share_encoder_decoder_embeddings": False, "decoder_vocab_size": 89, "activation_function": "relu"},
    ),
    ("blenderbot-small", "as published", BART),
    (
        "blenderbot-small",
        "scaled, fewer decoder heads",
        {**BART, "scale_embedding": True, "decoder_attention_heads": 4, "activation_function": "relu"},
    ),
    ("fsmt", "two vocabularies", {**FSMT, "src_vocab_size": VOCAB, "tgt_vocab_size": 89}),
    (
        "fsmt",
        "one vocabulary, tied",
        {
            **FSMT,
            "src_vocab_size": VOCAB,
            "tgt_vocab_size": VOCAB,
            "tie_word_embeddings": True,
            "scale_embedding": False,
            "activation_function": "gelu",
        },
    ),
    ("pegasus", "as published", {**BART, "activation_function": "relu", "scale_embedding": True, "pad_token_id": 0}),
    ("m2m_100", "NLLB", {**BART, "activation_function": "relu", "scale_embedding": True}),
    ("blenderbot", "3B", {**BART, "scale_embedding": True}),
    ("blenderbot", "unscaled", BART),
    ("whisper", "tiny", WHISPER),
    ("whisper", "scaled, fewer decoder heads", {**WHISPER, "scale_embedding": True, "decoder_attention_heads": 3}),
]
SEQ2SEQ_IDS = [f"{family}: {what}" for family, what, _ in SEQ2SEQ_CASES]


def make_seq2seq(model_type: str, config: dict) -> PreTrainedModel:
    """A model of random weights; a head of its own where the configuration says so."""
    fields = json.loads(json.dumps(config))
    configuration = AutoConfig.for_model(model_type, **fields, dtype="float32")
    auto = AutoModelForSpeechSeq2Seq if model_type == "whisper" else AutoModelForSeq2SeqLM
    model = auto.from_config(configuration).eval()
    if config.get("tie_word_embeddings") is False:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    for module in model.modules():
        if type(module).__name__ == "SinusoidalPositionalEmbedding" and config.get("tie_word_embeddings"):
            module.weight.requires_grad = False  # which keeps the formula
    rescale(model)
    for name, buffer in model.named_buffers():
        if name == "final_logits_bias":
            buffer.normal_(generator=torch.Generator().manual_seed(3))
    return model


def inputs(model: PreTrainedModel, padding: str | None = None) -> dict[str, torch.Tensor]:
    """Arguments of a forward pass: three rows, the last two with 3 and 6 columns of padding on the given side."""
    config, generator = model.config, torch.Generator().manual_seed(2)
    target = torch.randint(3, 80, (3, 9), generator=generator)
    target[:, 0] = config.decoder_start_token_id
    if getattr(config, "num_mel_bins", None):
        frames = 2 * config.max_source_positions
        features = torch.randn(3, config.num_mel_bins, frames, generator=generator)
        return {"input_features": features, "decoder_input_ids": target}
    ids = torch.randint(3, 80, (3, 13), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(3):
        if padding == "left":
            mask[row, : 3 * row] = 0
        elif padding == "right":
            mask[row, 13 - 3 * row :] = 0
    ids = ids.masked_fill(mask == 0, config.pad_token_id)
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": target}


@torch.no_grad()
def seq2seq_difference(ours: PreTrainedModel, theirs: PreTrainedModel) -> tuple[float, float]:
    """(largest logit difference, largest logit) over full, right-padded and left-padded sources."""
    difference = size = 0.0
    for padding in (None, "right", "left"):
        arguments = inputs(theirs, padding)
        if theirs.config.model_type == "fsmt":
            arguments["use_cache"] = False  # with a cache, its class masks nothing in a pass over several tokens
        expected = theirs(**arguments).logits
        difference = max(difference, (ours(**arguments).logits - expected).abs().max().item())
        size = max(size, expected.abs().max().item())
    return difference, size


@torch.no_grad()
def overwrite_with_mean(model: PreTrainedModel, kv_heads: int, attentions: tuple[str, ...]) -> None:
    """Give a source model's K/V heads the mean of their group, in its own class, where `attentions` says."""
    for name, parameter in model.named_parameters():
        if ".encoder." in f".{name}":
            attention = "encoder"
        else:
            attention = "cross" if "encoder_attn" in name or "EncDecAttention" in name else "decoder"
        parts = name.split(".")
        if attention not in attentions or parts[-2] not in ("k", "v", "k_proj", "v_proj"):
            continue
        side = "encoder" if attention == "encoder" else "decoder"
        heads = getattr(model.config, f"{side}_attention_heads", None) or model.config.num_heads
        for group in parameter.view(heads, -1, *parameter.shape[1:]).chunk(kv_heads):
            group.copy_(group.mean(0, keepdim=True).expand_as(group))
