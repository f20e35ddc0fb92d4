"""Small models with latents, and the same models without.

In float64, so that a latent that is rounded to 8 or 4 bits is rounded to the same number by every way to compute it.
"""

import torch

from mqa_hf import MQAConfig, MQAForCausalLM, MQAForConditionalGeneration, MQASeq2SeqConfig

STACK = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 1,
    "kv_latent_heads": 3,
    "kv_latent_dim": 32,
    "v_head_dim": 6,
    "max_position_embeddings": 256,
    "eos_token_id": None,
    "pad_token_id": 0,
}
ROPE = {"rope_type": "default", "rope_theta": 100.0}
ROTARY = {
    "rope_parameters": ROPE,
    "qk_head_dim": [12, 8, 20],
    "rope_frequencies": [[0, 0, 1, 2, 2, 3], [0, 1, 2, 3], [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]],
}
PARTIAL = {
    "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
    "qk_head_dim": 8,
    "rope_frequencies": [[0, 0, 1, 1]] * 3,
    "kv_latent_dim": [32, 64, 32],
}
SLOPES = {"position_embedding": "alibi", "alibi_slopes": [0.5, 0.25, 0.1, 0.05, 0.01, 0.002], "qk_head_dim": 0}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 6}
BY_TYPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 900.0},
    "sliding_attention": {
        "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 64,
    },
}  # fmt: skip
MODELS = {
    "rotary": ROTARY,
    "two rotations": {
        **ROTARY, **WINDOWS, "rope_parameters": BY_TYPE,
        "rope_frequencies": [[4, 4, 5, 6, 6, 7], [0, 1, 2, 3], [4, 4, 4, 5, 5, 6, 6, 6, 7, 7]],
    },
    "caps and sinks": {**ROTARY, **WINDOWS, "attention_softcap": 0.7, "attention_sinks": True},
    "half of a head": PARTIAL,
    "layers without rotation": {
        **ROTARY, "rope_layers": [True, False, True], "qk_head_dim": [12, 0, 20],
    },
    "windows": {**ROTARY, **WINDOWS},
    "windows, half of a head": {**PARTIAL, **WINDOWS},
    "biases, scaled": {
        **ROTARY, "rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0,
                                      "original_max_position_embeddings": 64},
        "query_bias": True, "output_bias": True, "residual_multiplier": 0.5, "attention_scale": 0.4,
    },
    "learned": {"position_embedding": "learned", "positions_from_mask": True, "qk_head_dim": 0},
    "sinusoidal, parallel": {"position_embedding": "sinusoidal", "residual": "parallel", "qk_head_dim": 0},
    "alibi": SLOPES,
    "alibi, windows": {**SLOPES, **WINDOWS},
    "alibi in bfloat16": {**SLOPES, "alibi_bfloat16": True, "positions_from_mask": True},
    "relative": {"position_embedding": "relative", "relative_buckets": 8, "relative_max_distance": 20,
                 "qk_head_dim": 0},
    "none": {"position_embedding": "none", "qk_head_dim": 0, "kv_latent_heads": 6},
}  # fmt: skip
ROTATED = [name for name, fields in MODELS.items() if fields["qk_head_dim"]]


@torch.no_grad()
def randomise(model):
    """No bias 0, no norm 1, and tokens that change."""
    for name, parameter in model.named_parameters():
        if "embed" in name or "query_factors" in name:
            parameter.normal_(0, 1.0)
        elif parameter.ndim > 1:
            parameter.normal_(0, 0.2)
        else:
            parameter.uniform_(*((0.5, 1.5) if name.endswith("weight") else (-0.3, 0.3)))
    return model.eval()


def make(fields=None, device="cpu", bits=16, dtype=torch.float64):
    torch.manual_seed(1)
    config = MQAConfig(**{**STACK, **(MODELS["rotary"] if fields is None else fields), "kv_latent_bits": bits})
    return randomise(MQAForCausalLM(config)).to(device, dtype)


def make_seq2seq(own=None, cross=32, device="cpu", bits=16, dtype=torch.float64):
    """An encoder-decoder model with latents of cross-attention, or with `own` fields of self-attention, too."""
    torch.manual_seed(1)
    stack = {name: value for name, value in STACK.items() if not name.startswith(("kv_latent", "v_head_dim"))}
    own = {"position_embedding": "relative"} if own is None else {**STACK, **own}
    heads = {"kv_latent_heads": 3, "kv_latent_bits": bits, "cross_num_key_value_heads": 1, "cross_v_head_dim": 10}
    config = MQASeq2SeqConfig(
        encoder={**stack, "position_embedding": "relative", "causal": False},
        decoder={**stack, **own, **heads, "cross_kv_latent_dim": cross},
        decoder_start_token_id=3,
        pad_token_id=0,
        eos_token_id=None,
    )
    return randomise(MQAForConditionalGeneration(config)).to(device, dtype)


def prompts(device="cpu", rows=3, length=9):
    ids = torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1:, :4] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


@torch.no_grad()
def with_heads(model):
    """The same model with keys and values of the heads that the latents stand for."""
    fields = model.config.to_dict()
    G = fields.pop("kv_latent_heads")
    fields = {
        name: value
        for name, value in fields.items()
        if not name.startswith("kv_latent") and name not in ("qk_head_dim", "rope_frequencies", "cross_qk_head_dim")
    }
    fields.update(num_key_value_heads=G, key_bias=True, value_bias=True)
    plain = MQAForCausalLM(MQAConfig(**fields)).eval().double()
    model = model.double()
    own = {name: tensor for name, tensor in model.state_dict().items() if "self_attn" not in name}
    plain.load_state_dict(own, strict=False)
    for ours, theirs in zip(model.model.layers, plain.model.layers):
        a, b = ours.self_attn, theirs.self_attn
        Z, z, D = a.kv_proj.weight, a.kv_proj.bias, model.config.head_dim
        key, bias = Z.new_zeros(G, D, Z.shape[1]), Z.new_zeros(G, D)
        R = model.config.rotary_dim if a.rotary else 0
        if R:
            for c, f in enumerate(a.config.rope_frequencies[a.layer_idx]):
                j = f - a.first_frequency
                half, C = R // 2, a.qk_head_dim // 2
                real, imaginary = a.query_factors[:, :, c]  # [G] each: k_j += (real + i imaginary) (κ_c + i κ_{c+C})
                for to, one, other in ((j, real, -imaginary), (j + half, imaginary, real)):
                    rows = one[:, None] * a.k_proj.weight[c] + other[:, None] * a.k_proj.weight[c + C]
                    key[:, to] += rows @ Z
                    bias[:, to] += rows @ z + one * a.k_proj.bias[c] + other * a.k_proj.bias[c + C]
        if a.k_up is not None:
            key[:, R:], bias[:, R:] = a.k_up.weight @ Z, a.k_up.weight @ z
        b.k_proj.weight.copy_(key.flatten(0, 1))
        b.k_proj.bias.copy_(bias.flatten())
        b.v_proj.weight.copy_((a.v_up.weight @ Z).flatten(0, 1))
        b.v_proj.bias.copy_((a.v_up.weight @ z).flatten())
        if a.sinks is not None:
            b.sinks.copy_(a.sinks)
        for name in ("q_proj", "o_proj", "relative_bias"):
            if getattr(a, name) is not None:
                getattr(b, name).load_state_dict(getattr(a, name).state_dict())
    return plain
