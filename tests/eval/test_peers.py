"""Peers of the comparison of methods do what their papers say."""

import copy

import pytest
import torch
from sources import BLOOM, GPT, LLAMA, MHA, VOCAB, make_model
from torch import nn

from mqa_hf.attention_mqa import eager_attention_forward
from mqa_hf.conversion.convert import convert
from mqa_hf.eval.peers import (
    PEERS,
    ROTARY_PEERS,
    Calibration,
    common,
    low_rank,
    mha2mla,
    peers_of,
    quantised,
    swapped,
    transmla,
)

GROUPED = {**LLAMA, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "attention_bias": True}
SOURCES = {
    "grouped, biases": ("llama", GROUPED),
    "wide heads": ("llama", {**LLAMA, "num_key_value_heads": 3, "head_dim": 32}),
    "rotated in part": ("gpt_neox", {**MHA, "hidden_size": 96, "rotary_pct": 0.5}),
    "sliding": ("mistral", {**LLAMA, "num_key_value_heads": 3, "sliding_window": 5}),
    "learned": ("gpt2", GPT),
    "alibi": ("bloom", BLOOM),
}
ROTARY = [name for name in SOURCES if name not in ("learned", "alibi")]


def canonical(name):
    """A model of the canonical class with all its heads, and calibration tokens."""
    source = make_model(*SOURCES[name])
    config = source.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    model = convert(source, kv_heads=heads)
    assert model.config.num_key_value_heads == heads
    return model, torch.randint(3, VOCAB, (20, 48), generator=torch.Generator().manual_seed(3))


def logits(model, rows, attentions=None):
    with torch.no_grad(), swapped(model, attentions or common.attentions_of(model)):
        return model(rows[:4], use_cache=False).logits


def assert_same(model, rows, attentions):
    torch.testing.assert_close(logits(model, rows, attentions), logits(model, rows), rtol=0, atol=2e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dim", [1, 2])
def test_a_group_has_its_levels_and_each_number_the_nearest(bits, dim):
    x = torch.randn(2, 64, 80)
    found = quantised.rounded(x, bits, dim)
    for values, kept in zip(x.movedim(dim, -1).flatten(0, 1), found.movedim(dim, -1).flatten(0, 1)):
        for group, rounded in zip(values.split(32), kept.split(32)):
            levels = torch.linspace(float(group.min()), float(group.max()), 2**bits)
            nearest = (group[:, None] - levels).abs().amin(1)
            assert len(rounded.unique()) <= 2**bits
            assert ((group - rounded).abs() <= nearest + 5e-3).all()


def test_numbers_that_are_all_alike_stay():
    x = torch.full((1, 64), 0.5)
    assert torch.equal(quantised.rounded(x, 2), x)


def decoded(query, key, value, bits, window):
    """KIVI token by token, with a cache as its algorithm 1 has it; [B, T, H, D]."""
    B, H, T, D = query.shape
    G = key.shape[1]
    done_k, full_k, done_v, full_v = (torch.zeros(B, G, 0, D) for _ in range(4))
    outputs = []
    for t in range(T):
        full_k, full_v = torch.cat((full_k, key[:, :, t : t + 1]), 2), torch.cat((full_v, value[:, :, t : t + 1]), 2)
        k, v = (torch.cat(both, 2).repeat_interleave(H // G, 1) for both in ((done_k, full_k), (done_v, full_v)))
        weights = (query[:, :, t : t + 1] @ k.mT * D**-0.5).softmax(-1)
        outputs.append(weights @ v)
        if full_k.shape[2] == window:
            done_k, full_k = torch.cat((done_k, quantised.rounded(full_k, bits, 2)), 2), full_k[:, :, :0]
        if full_v.shape[2] > window:
            done_v, full_v = torch.cat((done_v, quantised.rounded(full_v[:, :, :1], bits)), 2), full_v[:, :, 1:]
    return torch.cat(outputs, 2).transpose(1, 2)


@pytest.mark.parametrize("window", [32, 64])
def test_kivi_over_a_whole_text_is_kivi_token_by_token(window):
    query, key, value = torch.randn(2, 6, 150, 16), torch.randn(2, 3, 150, 16), torch.randn(2, 3, 150, 16)
    module = nn.Module().eval()
    module.is_causal = True
    found, _ = quantised.kivi(2, window)(module, query, key, value, None, scaling=0.25)
    torch.testing.assert_close(found, decoded(query, key, value, 2, window), rtol=0, atol=1e-5)
    exact, _ = eager_attention_forward(module, query, key, value, None, 0.25)
    assert (found - exact).abs().max() > 0.05


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("attend", [quantised.by_token(15), quantised.kivi(15, 32)])
def test_with_fifteen_bits_a_rounded_cache_loses_next_to_nothing(name, attend):
    model, rows = canonical(name)
    made = quantised.with_attention(model, "rounded_for_a_test", attend)
    torch.testing.assert_close(logits(model, rows, made), logits(model, rows), rtol=0, atol=3e-2)


def test_fewer_bits_cost_more(monkeypatch):
    monkeypatch.setattr(quantised, "WINDOWS", (32,))  # rows are shorter than the other
    model, rows = canonical("wide heads")
    calibration, full = Calibration(model, rows), model.config.kv_bytes_per_token
    for make in (quantised.token_peers, quantised.kivi_peers):
        peers = {peer.name: peer for peer in make(calibration)}
        errors = [
            float((logits(model, rows, p.attentions) - logits(model, rows)).abs().mean()) for p in peers.values()
        ]
        assert all(errors[i] < errors[i + 1] for i in range(len(errors) - 1) if (i + 1) % len(quantised.BITS))
        for peer, bits in zip(peers.values(), quantised.BITS * len(quantised.WINDOWS)):
            assert peer.name.endswith(f"{bits} bits")
            assert peer.cache_bytes == full * (bits + 1) // 16  # 32 bits for 32 numbers


def test_low_rank_factors_are_the_best_of_their_rank():
    W, root = torch.randn(24, 16, dtype=torch.float64), torch.randn(16, 16, dtype=torch.float64)
    C = root @ root.mT

    def error(A, B):
        left = W - A @ B
        return torch.einsum("ad,de,ae->", left, C, left)

    A, B = low_rank.factors(W, C, 5)
    least = error(A, B)
    # Eckart and Young: what the singular values of W L beyond the rank hold.
    beyond = torch.linalg.svdvals(W @ torch.linalg.cholesky(C))[5:].square().sum()
    torch.testing.assert_close(least, beyond)
    for _ in range(20):
        assert error(A + 1e-2 * torch.randn_like(A), B + 1e-2 * torch.randn_like(B)) > least
    found = [torch.randn(24, 5, dtype=W.dtype).requires_grad_(), torch.randn(5, 16, dtype=W.dtype).requires_grad_()]
    optimizer = torch.optim.LBFGS(found, max_iter=500, line_search_fn="strong_wolfe")

    def step():
        optimizer.zero_grad()
        loss = error(*found)
        loss.backward()
        return loss

    optimizer.step(step)
    torch.testing.assert_close(error(*found).detach(), least, rtol=1e-3, atol=0)
    torch.testing.assert_close(low_rank.factors(W, C, 16)[0] @ low_rank.factors(W, C, 16)[1], W)


def test_ranks_follow_importance_within_their_bounds():
    ranks = low_rank.by_importance(torch.tensor([1.0, 2.0, 4.0, 100.0]), 100, 64)
    assert sum(ranks) == 100
    assert ranks[3] == 64
    assert 1 <= ranks[0] < ranks[1] < ranks[2]
    assert low_rank.by_importance(torch.ones(4), 100, 25) == [25] * 4


def test_cares_ranks_go_to_early_layers_and_slow_spectra():
    flat, steep = torch.ones(32), 0.5 ** torch.arange(32)
    ranks = low_rank.greedy([flat] * 4, 40)
    assert sum(ranks) == 40
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] > ranks[3]
    assert all(5 <= rank <= 20 for rank in low_rank.greedy([steep, flat, flat, steep], 40))


def test_moments_are_those_of_what_attentions_read():
    model, rows = canonical("grouped, biases")
    attention, seen = model.model.layers[1].self_attn, []
    with torch.no_grad():
        handle = attention.k_proj.register_forward_hook(lambda module, args, output: seen.append(output))
        model(rows, use_cache=False)
        handle.remove()
    keys = torch.cat(seen).flatten(0, 1).double()
    W = common.affine(attention.k_proj)
    S = common.moments(model, rows)[1]
    torch.testing.assert_close(W @ S @ W.mT, keys.mT @ keys / len(keys), rtol=1e-4, atol=1e-4)


def test_fisher_information_is_the_gradients_that_backward_gives():
    model, rows = canonical("grouped, biases")
    found, twin = common.fisher(model, rows[:3]), copy.deepcopy(model).requires_grad_(True)
    squares = 0
    for row in rows[:3].split(1):
        twin.zero_grad()
        prediction = twin(row, use_cache=False).logits[0, :-1]
        nn.functional.cross_entropy(prediction, row[0, 1:]).backward()
        squares = squares + twin.model.layers[2].self_attn.v_proj.weight.grad.square()
    torch.testing.assert_close(found[2, 1], (squares / 3).sqrt().mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("peer", [name for name in PEERS if name not in ("by token", "KIVI")])
def test_with_the_whole_cache_nothing_is_lost(name, peer, monkeypatch):
    if peer in ROTARY_PEERS and name not in ROTARY:
        pytest.skip("there are no rotary positions")
    for module in (low_rank, mha2mla, transmla):
        monkeypatch.setattr(module, "SHARES", (1.0,))
    monkeypatch.setattr(mha2mla, "FRACTIONS", (1,))  # all frequencies stay
    model, rows = canonical(name)
    made = [p for p in PEERS[peer](Calibration(model, rows)) if "bits" not in p.name]
    assert all(p.cache_bytes <= model.config.kv_bytes_per_token for p in made)
    if peer == "TransMLA":  # one rotary key for all heads loses something; its joint latent does not
        J = model.config.rotary_dim // 2
        for attention, S in zip(common.attentions_of(model), common.moments(model, rows)):
            basis = transmla.rotary_basis(common.affine(attention.k_proj), S, model.config.num_key_value_heads, J, 1)
            parted = transmla.decoupled(attention, *basis)
            joined = transmla.compressed(parted, 2 * J, S, 10**6)
            for one in ("k_proj", "v_proj"):
                ours, theirs = getattr(joined, one), getattr(parted, one)
                torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=1e-5)
        return
    assert_same(model, rows, made[0].attentions)


@pytest.mark.parametrize("name", SOURCES)
def test_a_smaller_cache_loses_more_and_has_its_bytes(name, monkeypatch):
    monkeypatch.setattr(quantised, "WINDOWS", (32,))
    model, rows = canonical(name)
    before, full = logits(model, rows), model.config.kv_bytes_per_token
    errors = {}
    for peer in peers_of(model, rows):
        method, _, setting = peer.name.partition(", ")
        errors.setdefault(method, []).append(float((logits(model, rows, peer.attentions) - before).square().mean()))
        if setting.endswith("%"):
            assert -0.1 < peer.cache_bytes / full - float(setting.rstrip("%")) / 100 < 0.01
    assert torch.equal(logits(model, rows), before)
    known = [peer for peer in PEERS if name in ROTARY or peer not in ROTARY_PEERS]
    assert list(dict.fromkeys(method.partition(" at")[0].partition(" (")[0] for method in errors)) == known
    for found in errors.values():
        assert 0 <= found[0] < found[-1]  # CARE's first rank for wide heads is the hidden size: nothing is lost
        assert found[1] > 0


@pytest.mark.parametrize("name", ROTARY)
def test_mha2mla_keeps_the_frequencies_that_a_head_uses(name):
    model, rows = canonical(name)
    G, J = model.config.num_key_value_heads, model.config.rotary_dim // 2
    used = [[(g + i) % J for i in range(2)] for g in range(G)]
    with torch.no_grad():
        for attention in common.attentions_of(model):
            keep = torch.zeros(G, attention.qk_head_dim, dtype=torch.bool)
            keep[:, 2 * J :] = True
            for g in range(G):
                keep[g, used[g]] = keep[g, [j + J for j in used[g]]] = True
            attention.k_proj.weight[~keep.flatten()] = 0
            if attention.k_proj.bias is not None:
                attention.k_proj.bias[~keep.flatten()] = 0
    found = mha2mla.contributions(model, rows)
    kept = [mha2mla.kept_components(contribution, 2) for contribution in found]
    assert all(sorted(used[g]) == head[:J].nonzero()[:, 0].tolist() for one in kept for g, head in enumerate(one))
    made = [mha2mla.partly_rotary(a, k, 10**6) for a, k in zip(common.attentions_of(model), kept)]
    assert_same(model, rows, made)
    wrong = [mha2mla.partly_rotary(a, k.roll(1, 1), 10**6) for a, k in zip(common.attentions_of(model), kept)]
    assert (logits(model, rows, wrong) - logits(model, rows)).abs().max() > 1e-2


@pytest.mark.parametrize("name", ROTARY)
def test_transmlas_rotation_among_heads_changes_no_logit(name):
    model, rows = canonical(name)
    G, J = model.config.num_key_value_heads, model.config.rotary_dim // 2
    made = []
    for attention, S in zip(common.attentions_of(model), common.moments(model, rows)):
        B, frequencies = transmla.rotary_basis(common.affine(attention.k_proj), S, G, J, fold=1, kept=G)
        torch.testing.assert_close(B.mT @ B, torch.eye(2 * G * J, dtype=B.dtype))
        made.append(transmla.decoupled(attention, B, frequencies))
    assert_same(model, rows, made)


@pytest.mark.parametrize("name", ROTARY)
def test_one_rotary_key_holds_heads_that_are_multiples_of_each_other(name):
    model, rows = canonical(name)
    G, J = model.config.num_key_value_heads, model.config.rotary_dim // 2
    factors = 1.0 + torch.arange(G)
    with torch.no_grad():
        for projection in (attention.k_proj for attention in common.attentions_of(model)):
            for held in (p for p in (projection.weight, projection.bias) if p is not None):
                first = held.view(G, -1)[0]
                held.copy_((factors[:, None] * first).view(held.shape) / 3)
    made = [
        transmla.decoupled(attention, *transmla.rotary_basis(common.affine(attention.k_proj), S, G, J, fold=1))
        for attention, S in zip(common.attentions_of(model), common.moments(model, rows))
    ]
    assert made[0].qk_head_dim == common.attentions_of(model)[0].qk_head_dim + 2 * J
    assert_same(model, rows, made)


def test_folded_frequencies_are_every_so_many_th_of_them():
    W, S = torch.randn(4 * 16, 33, dtype=torch.float64), torch.eye(33, dtype=torch.float64)
    for fold, collapse, expected in (
        (1, 1, range(8)),
        (4, 1, range(8)),
        (4, 2, range(0, 8, 2)),
        (2, 2, range(0, 8, 2)),
    ):
        B, frequencies = transmla.rotary_basis(W, S, 4, 8, fold, collapse)
        assert frequencies.tolist() == list(expected)
        assert B.shape == (64, 2 * len(expected))
        torch.testing.assert_close(B.mT @ B, torch.eye(B.shape[1], dtype=B.dtype))
        m = len(expected)
        for n, j in enumerate(expected):  # a component is of frequencies of its fold, and of real or imaginary parts
            places = B[:, n].nonzero()[:, 0] % 16
            assert {int(p) // fold for p in places} == {j // fold}
            assert {int(p) - 8 for p in B[:, m + n].nonzero()[:, 0] % 16} == set(places.tolist())


def test_balanced_keys_weigh_as_much_as_values():
    S = torch.eye(9, dtype=torch.float64)
    keys, values = torch.randn(6, 9, dtype=torch.float64), torch.randn(6, 9, dtype=torch.float64)
    found = transmla.joint(keys, values, S, 4)
    larger = transmla.joint(1000 * keys, values, S, 4)
    torch.testing.assert_close(larger[0] / 1000, found[0])
    torch.testing.assert_close(larger[1], found[1])
