"""The references that the kernels are compared with, against the model's own modules and PyTorch's."""

import pytest
import torch
from torch import nn

from mqa_hf import MQAConfig
from mqa_hf.attention_mqa import eager_attention_forward
from mqa_hf.cache_mqa import FLOAT8, from_float8
from mqa_hf.kernel_append_mqa import naive_append
from mqa_hf.kernel_attend_mqa import naive_attend
from mqa_hf.kernel_linear_mqa import naive_linear
from mqa_hf.layer_mqa import MQAMLP, MQAAttention
from mqa_hf.modeling_mqa import MQAModel
from mqa_hf.positions_mqa import distance_bias
from mqa_hf.weights_mqa import HeadNorms

STACK = {"hidden_size": 48, "intermediate_size": 72, "num_attention_heads": 6, "num_key_value_heads": 2}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
SLOPES = [0.5, 0.25, 0.1, 0.05, 0.01, 0.002]
POSITIONS = {
    "none": {"position_embedding": "none"},
    "alibi": {"position_embedding": "alibi", "alibi_slopes": SLOPES},
    "alibi in bfloat16": {"position_embedding": "alibi", "alibi_slopes": SLOPES, "alibi_bfloat16": True},
    "relative": {"position_embedding": "relative", "relative_buckets": 8, "relative_max_distance": 20},
    "window": {"position_embedding": "none", "layer_types": ["sliding_attention"], "sliding_window": 5},
}


@pytest.mark.parametrize("name", POSITIONS)
@torch.no_grad()
def test_attention_is_that_of_the_last_token(name):
    model = MQAModel(MQAConfig(vocab_size=9, num_hidden_layers=1, **STACK, **POSITIONS[name])).double()
    model.set_attn_implementation("eager")
    config, layer = model.config, model.layers[0]
    mask = torch.ones(3, 30)
    mask[1, :4] = 0
    x = torch.randn(3, 30, 48, dtype=torch.float64)
    ready = model.make_masks(x, mask, torch.arange(30)[None], None)
    bias = model.position_bias(ready, mask, x, None)(layer, config.layer_types[0])
    q, k, v = (torch.randn(3, heads, 30, 8, dtype=torch.float64) for heads in (6, 2, 2))
    expected = eager_attention_forward(layer.self_attn, q, k, v, bias, config.attention_scale)[0][:, -1]
    options = {"start": torch.tensor([0, 4, 0]), "window": config.sliding_window}
    if name.startswith("alibi"):
        options["slopes"] = torch.tensor(SLOPES)
    if config.alibi_bfloat16:
        options["slopes"] = (options["slopes"] / config.attention_scale).bfloat16().float()
        options["bfloat16_from_start"] = config.positions_from_mask
    if name == "relative":
        options["table"] = distance_bias(config, layer.self_attn.relative_bias)
    keys, values = (nn.functional.pad(states, (0, 0, 0, 7), value=torch.nan) for states in (k, v))
    length = torch.tensor([30])
    found = naive_attend(q[:, :, -1], keys, values, length, config.attention_scale, capacity=37, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_attention_of_rows_that_share_a_source():
    """Folded query rows, and rows of the cache that are chosen position by position."""
    q = torch.randn(6, 4, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 11, 8, dtype=torch.float64), torch.randn(2, 2, 11, 5, dtype=torch.float64)
    length = torch.tensor([11, 7])
    folded = naive_attend(q, k, v, length, 0.3, capacity=11, fold=3)
    for row in range(6):
        one = slice(row // 3, row // 3 + 1)
        alone = nn.functional.scaled_dot_product_attention(
            q[row : row + 1, :, None], k[one, :, : length[row // 3]], v[one, :, : length[row // 3]],
            scale=0.3, enable_gqa=True,
        )  # fmt: skip
        torch.testing.assert_close(folded[row], alone[0, :, 0])
    rows = torch.randint(0, 2, (2, 11))
    mixed = [states[rows, :, torch.arange(11)].transpose(1, 2) for states in (k, v)]
    found = naive_attend(q[:2], k, v, length[:1], 0.3, capacity=11, rows=rows)
    torch.testing.assert_close(found, naive_attend(q[:2], *mixed, length[:1], 0.3, capacity=11))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"qk_head_dim": 24, "v_head_dim": 12},
        {"qk_head_dim": 12, "rope_frequencies": [[0, 3, 3]]},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {
            "rope_parameters": {"full_attention": DEFAULT, "sliding_attention": {**DEFAULT, "rope_theta": 100.0}},
            "qk_head_dim": 16,
        },
        {"qk_norm": "head"},
        {"qk_norm": "joint", "qk_norm_type": "layer_norm", "qk_norm_after_rotation": True, "qk_norm_bias": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("store", [torch.float64, FLOAT8], ids=str)
@torch.no_grad()
def test_norm_and_rotation_are_those_of_the_model(fields, store):
    config = MQAConfig(vocab_size=9, num_hidden_layers=1, **STACK, **fields)
    model = MQAModel(config).double()
    attention: MQAAttention = model.layers[0].self_attn
    D, Dv, positions = attention.qk_head_dim, attention.v_head_dim, torch.tensor([3, 0, 17])
    cos, sin = (x[0, 0] for x in model.rotary_emb(torch.empty(0, dtype=torch.float64), torch.arange(20)[None]))
    for parameter in (*attention.q_norm.parameters(), *attention.k_norm.parameters()) if config.qk_norm else ():
        parameter.normal_()
    projected = torch.randn(3, 6 * D + 2 * (D + Dv), dtype=torch.float64)
    keys, values = (torch.zeros(3, 2, 10, width, dtype=torch.float64).to(store) for width in (D, Dv))
    scales = {}
    if store == FLOAT8:
        scales = {name: torch.zeros(3, 2, 10) for name in ("key_scales", "value_scales")}
    norms = HeadNorms()
    norms.prepare([attention])
    query = naive_append(
        projected, 6, keys, values, torch.tensor([5]), cos=cos, sin=sin, positions=positions,
        head=attention.rotated_width, frequency=attention.rotated, **scales, **norms(attention),
    )  # fmt: skip
    if store == FLOAT8:
        keys = from_float8(keys, scales["key_scales"], torch.float64)
        values = from_float8(values, scales["value_scales"], torch.float64)
    q, k, v = projected.split([6 * D, 2 * D, 2 * Dv], -1)
    angles = cos[positions][:, None, None], sin[positions][:, None, None]
    expected_query, expected_key = attention.placed(q.view(3, 6, 1, D), k.view(3, 2, 1, D), angles)
    torch.testing.assert_close(query, expected_query.squeeze(2))
    bound = {"rtol": 0.07, "atol": 0.01} if store == FLOAT8 else {}
    torch.testing.assert_close(keys[:, :, 4], expected_key.squeeze(2), **bound)
    torch.testing.assert_close(values[:, :, 4], v.view(3, 2, Dv), **bound)
    assert not keys[:, :, :4].any()
    assert not keys[:, :, 5:].any()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm", None])
@torch.no_grad()
def test_a_projection_is_norm_linear_activation_and_residual(kind, gated):
    config = MQAConfig(vocab_size=9, num_hidden_layers=1, **STACK, gated_mlp=gated, mlp_bias=True)
    mlp, x = MQAMLP(config).double(), torch.randn(3, 48, dtype=torch.float64)
    norm = {"rms_norm": nn.RMSNorm(48, 1e-5), "layer_norm": nn.LayerNorm(48, 1e-5), None: nn.Identity()}[kind].double()
    for parameter in (*norm.parameters(), *mlp.parameters()):
        parameter.normal_()
    modules = (mlp.gate_proj, mlp.up_proj) if gated else (mlp.up_proj,)
    weight, bias = torch.cat([m.weight for m in modules]), torch.cat([m.bias for m in modules])
    normal = (None, None, None) if kind is None else (kind, norm.weight, getattr(norm, "bias", None))
    inner = naive_linear(x, weight, bias, *normal, 1e-5, activation=config.hidden_act, gated=gated)
    out = naive_linear(inner, mlp.down_proj.weight, mlp.down_proj.bias, residual=x)
    torch.testing.assert_close(out, x + mlp(norm(x)))
