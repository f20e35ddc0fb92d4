"""Folded attention against a float64 reference that loops over query heads."""

import pytest
import torch
from torch import nn

from mqa_hf import attention_mqa
from mqa_hf.attention_mqa import eager_attention_forward, mqa_attention_forward

B, H, D, DV = 2, 6, 10, 7


def reference(query, key, value, allowed, scaling):
    """Softmax attention head by head in float64; `allowed` [B, H, T, S] is boolean."""
    query, key, value = query.double(), key.double(), value.double()
    heads_per_group = query.shape[1] // key.shape[1]
    out = []
    for h in range(query.shape[1]):
        logits = query[:, h] @ key[:, h // heads_per_group].transpose(1, 2) * scaling
        weights = logits.masked_fill(~allowed[:, h], -torch.inf).softmax(-1)
        out.append(weights @ value[:, h // heads_per_group])
    return torch.stack(out, dim=2)


def inputs(G, T, S):
    return torch.randn(B, H, T, D), torch.randn(B, G, S, D), torch.randn(B, G, S, DV)


def module():
    layer = nn.Module()
    layer.is_causal = True
    return layer.eval()


@pytest.mark.parametrize("implementation", [mqa_attention_forward, eager_attention_forward])
@pytest.mark.parametrize("G", [1, 2, 3, 6])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 9), (5, 5), (5, 9)], ids=["first", "decode", "prefill", "chunk"])
@pytest.mark.parametrize("mask", ["none", "boolean", "additive", "per head"])
def test_against_float64(implementation, G, T, S, mask):
    query, key, value = inputs(G, T, S)
    causal = torch.ones(T, S, dtype=torch.bool).tril(S - T).expand(B, H, T, S)
    if mask == "none":
        # Upper-left aligned without a mask: the prefill of a static cache that is longer than its content.
        allowed = causal if T in (1, S) else torch.ones(T, S, dtype=torch.bool).tril().expand(B, H, T, S)
        given = None
    else:
        padding = torch.zeros(B, S, dtype=torch.bool)
        padding[1, : S // 3] = True
        allowed = causal & ~padding[:, None, None]
        if mask == "per head":
            allowed = allowed & (torch.rand(B, H, T, S) > 0.3)
        allowed = allowed | (torch.arange(S) == S - 1)  # no row without any key
        given = allowed if mask == "per head" else allowed[:, :1]
        if mask == "additive":
            given = torch.zeros(given.shape).masked_fill(~given, torch.finfo(torch.float32).min)
    out, weights = implementation(module(), query, key, value, given, scaling=0.37)
    torch.testing.assert_close(out.double(), reference(query, key, value, allowed, 0.37), atol=1e-5, rtol=1e-5)
    if weights is not None:
        torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, T))


@pytest.mark.parametrize("is_causal", [None, True, False])
@pytest.mark.parametrize("at_once", [1, 40, 2**26])
@pytest.mark.parametrize(("T", "S"), [(1, 9), (5, 5), (5, 9)])
@pytest.mark.parametrize(("cap", "sunk"), [(0.5, False), (0.5, True), (None, True)])
def test_caps_and_sinks_against_float64(cap, sunk, T, S, at_once, is_causal, monkeypatch):
    """A few rows at once too; a cache that is longer than its contents is aligned to the upper left."""
    monkeypatch.setattr(attention_mqa, "AT_ONCE", at_once)
    query, key, value = inputs(2, T, S)
    sinks = torch.randn(H) if sunk else None
    allowed = torch.ones(T, S, dtype=torch.bool)
    if T > 1 and is_causal is not False:
        allowed = allowed.tril()
    found, _ = mqa_attention_forward(
        module(), query, key, value, None, scaling=0.37, is_causal=is_causal, softcap=cap, s_aux=sinks
    )
    logits = query.double() @ key.repeat_interleave(H // 2, 1).double().transpose(2, 3) * 0.37
    if cap is not None:
        logits = (logits / cap).tanh() * cap
    powers = logits.exp() * allowed
    total = powers.sum(-1, keepdim=True) + (sinks.double().exp()[:, None, None] if sunk else 0.0)
    expected = (powers / total) @ value.repeat_interleave(H // 2, 1).double()
    torch.testing.assert_close(found.double(), expected.transpose(1, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("T", [1, 5])
def test_weights_are_returned_when_asked_for(T):
    query, key, value = inputs(2, T, T)
    plain, none = mqa_attention_forward(module(), query, key, value, None, scaling=0.5)
    out, weights = mqa_attention_forward(module(), query, key, value, None, scaling=0.5, output_attentions=True)
    assert none is None
    assert weights.shape == (B, H, T, T)
    torch.testing.assert_close(out, plain)


def test_gradients_agree_with_the_eager_form():
    gradients = []
    for implementation in (mqa_attention_forward, eager_attention_forward):
        torch.manual_seed(3)
        tensors = [t.requires_grad_() for t in inputs(2, 5, 5)]
        implementation(module(), *tensors, None, scaling=0.5)[0].square().sum().backward()
        gradients.append([t.grad for t in tensors])
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("T", [1, 8])
def test_keys_and_values_are_not_repeated(T, monkeypatch):
    """Whatever PyTorch's kernel is given shares the memory of the cache."""
    given = []
    sdpa = nn.functional.scaled_dot_product_attention

    def record(query, key, value, *args, **kwargs):
        given.append((key, value))
        return sdpa(query, key, value, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", record)
    query, key, value = inputs(2, T, 8)
    mask = torch.ones(B, 1, T, 8, dtype=torch.bool)
    mqa_attention_forward(module(), query, key, value, mask)
    assert given
    for seen_key, seen_value in given:
        assert seen_key.untyped_storage().data_ptr() == key.untyped_storage().data_ptr()
        assert seen_value.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
