"""The closed forms of latents against brute force."""

import copy

import pytest
import torch

from mqa_hf.configuration_mqa import MQAConfig
from mqa_hf.conversion import latent_fitting
from mqa_hf.conversion.heads import fit_heads
from mqa_hf.conversion.latent_fitting import Loss
from mqa_hf.conversion.latent_moments import logit_effects
from mqa_hf.conversion.latents import rebuilt_keys
from mqa_hf.conversion.moments import Seen
from mqa_hf.conversion.normalised import Vectors
from mqa_hf.conversion.widths import map_queries
from mqa_hf.layer_mqa import MQAAttention, project
from mqa_hf.packing_mqa import pack_latent, unpack_latent
from mqa_hf.positions_mqa import rotate

d, D, G, H = 8, 6, 2, 4


def random(*shape) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def positive(*shape) -> torch.Tensor:
    x = random(*shape, 3 * shape[-1]) / (3 * shape[-1]) ** 0.5
    return x @ x.mT


def descend(loss: Loss, rank: int, starts: int = 6) -> float:
    """The least that gradient descent over Z finds, from several starts."""
    found = []
    for _ in range(starts):
        Z = random(rank, d).requires_grad_()
        optimizer = torch.optim.LBFGS([Z], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

        def value(Z=Z, optimizer=optimizer):
            optimizer.zero_grad()
            cross = loss.moments @ Z.mT
            kept = cross @ torch.linalg.solve(Z @ cross, cross.mT)
            left = (loss.metrics * (loss.moments - kept)).sum()
            left.backward()
            return left

        optimizer.step(value)
        found.append(float(value().detach()))
    return min(found)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_with_the_same_inputs_for_all_terms_the_encoder_is_the_best(rank):
    C = positive(d)
    loss = Loss(torch.stack((positive(d), positive(d))), torch.stack((C, C)))
    Z, energies = latent_fitting.encoder(loss, C, rank)
    left = float(loss.left(Z).sum())
    assert left == pytest.approx(descend(loss, rank), rel=1e-6)
    assert left == pytest.approx(float(energies[rank:].sum()))
    torch.testing.assert_close(Z @ C @ Z.mT, torch.eye(rank, dtype=torch.float64))


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_with_other_inputs_for_each_term_descent_finds_what_there_is(rank):
    loss = Loss(torch.stack([positive(d) for _ in range(4)]), torch.stack([positive(d) for _ in range(4)]))
    C = loss.moments.mean(0)
    Z, _ = latent_fitting.encoder(loss, C, rank)
    better = latent_fitting.descended(loss, C, Z, steps=200)
    left = float(loss.left(better).sum())
    assert left <= float(loss.left(Z).sum())
    assert left <= descend(loss, rank) * 1.05  # (of several minima)
    torch.testing.assert_close(better @ C @ better.mT, torch.eye(rank, dtype=torch.float64))


def test_the_decoder_is_least_squares_and_what_is_left_is_its_error():
    W, C, Z = random(3, d), positive(d), random(4, d)
    found = latent_fitting.decoder(W, C, Z)
    x = random(20_000, d) @ torch.linalg.cholesky(C).mT
    x = (
        x @ torch.linalg.inv(torch.linalg.cholesky(x.mT @ x / len(x))).mT @ torch.linalg.cholesky(C).mT
    )  # its moment is C
    best = torch.linalg.lstsq(x @ Z.mT, x @ W.mT).solution.mT
    torch.testing.assert_close(found, best)
    loss = Loss((W.mT @ W)[None], C[None])
    error = (x @ W.mT - x @ Z.mT @ found.mT).square().sum(1).mean()
    torch.testing.assert_close(loss.left(Z)[0], error)


def test_the_metric_of_keys_is_what_rotated_queries_do_to_errors_of_keys():
    """Against rotating every query and every key, at every offset."""
    T, R = 5, 4
    theta = torch.tensor([1.0, 0.3], dtype=torch.float64)
    angles = torch.arange(T, dtype=torch.float64)[:, None] * theta
    cos, sin = torch.cat((angles.cos(), angles.cos()), -1), torch.cat((-angles.sin(), angles.sin()), -1)
    queries, error, effects = random(H, 50, D), random(G, D), torch.rand(H, dtype=torch.float64)
    share = torch.arange(T, 0, -1, dtype=torch.float64)
    share /= share.sum()
    moments = queries.mT @ queries / 50
    M = latent_fitting.turned_moments(latent_fitting.key_metric(moments, effects, G, 0.7), (cos, sin), share)
    found = torch.einsum("ga,gab,gb->", error, M, error)
    expected = 0.0

    def turned(x, at):
        return rotate(x.view(1, 1, -1, D), cos[at].view(1, 1, 1, R), sin[at].view(1, 1, 1, R), D)[0, 0]

    pairs = [(n, t) for n in range(T) for t in range(n + 1)]
    for n, t in pairs:
        for h in range(H):
            logits = 0.7 * turned(queries[h], n) @ turned(error[h // (H // G)], t)[0]
            expected += effects[h] * logits.square().mean() / len(pairs)
    torch.testing.assert_close(found, expected)


def test_the_effects_of_logits_are_those_of_a_derivative():
    config = MQAConfig(
        vocab_size=8, hidden_size=12, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, position_embedding="none",
    )  # fmt: skip
    attention = MQAAttention(config, 0)
    logits, values = torch.randn(1, 4, 1, 5), torch.randn(1, 2, 5, 3)
    found = logit_effects(attention, logits.softmax(-1), values)

    def output(logits):
        mixed = logits.softmax(-1) @ values.repeat_interleave(2, 1)  # [1, 4, 1, 3]
        return attention.o_proj(mixed.transpose(1, 2).flatten())

    jacobian = torch.autograd.functional.jacobian(output, logits)  # [12, 1, 4, 1, 5]
    torch.testing.assert_close(found, jacobian.square().sum(0), rtol=1e-4, atol=1e-6)


def test_with_all_components_rebuilt_keys_are_the_keys():
    r, J = 5, 3
    keys = random(G, 2 * J, r + 1)
    spread = positive(J, G).to(torch.complex128)
    rows, factors, frequencies = rebuilt_keys(keys, spread, torch.rand(J, G, dtype=torch.float64) + 0.1, 2 * J * G)
    real, imaginary = rows.chunk(2)
    components, b = torch.complex(real, imaginary), torch.complex(*factors)
    again = torch.zeros(G, J, r + 1, dtype=torch.complex128)
    again.index_add_(1, torch.tensor(frequencies), b[..., None] * components)
    torch.testing.assert_close(again, torch.complex(keys[:, :J], keys[:, J:]))
    assert frequencies == sorted(frequencies)


def test_a_basis_for_rounding_loses_less_than_a_white_one():
    r, generator = 64, torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(random(r, r))[0]
    importance = axes @ torch.diag(torch.logspace(0, -4, r, dtype=torch.float64)) @ axes.mT
    c = random(4000, r)
    lost = {}
    for name, T in (
        ("white", torch.eye(r, dtype=torch.float64)),
        ("chosen", latent_fitting.for_rounding(importance, generator)),
    ):
        error = unpack_latent(*pack_latent(c @ T.mT, 4), 4) @ torch.linalg.inv(T).mT - c
        lost[name] = float(torch.einsum("na,ab,nb->n", error, importance, error).mean())
    # (Σ √λ)² / r of Σ λ is what equal steps in all directions can bring.
    roots = torch.logspace(0, -2, r, dtype=torch.float64)
    assert lost["chosen"] / lost["white"] == pytest.approx(
        float(roots.sum() ** 2 / r / roots.square().sum()), rel=0.15
    )


@pytest.mark.parametrize("rotated", [D, 4, 0])
@pytest.mark.parametrize("affine", ["", "weight", "bias"])
@pytest.mark.parametrize("after", [False, True])
def test_a_head_as_wide_as_all_has_the_logits_of_the_regressed_keys(rotated, affine, after):
    """Through the new attention's modules, before the rotation and with it: any relative position gives the same."""
    if after and (affine or rotated != D):
        pytest.skip("gains that follow a rotation are only kept as their means")
    config = MQAConfig(
        vocab_size=9, hidden_size=d, num_attention_heads=H, num_key_value_heads=G, head_dim=D, num_hidden_layers=1,
        qk_norm="head", qk_norm_type="layer_norm" if affine == "bias" else "rms_norm", qk_norm_affine=bool(affine),
        qk_norm_bias=affine == "bias", qk_norm_after_rotation=after, rope_layers=[rotated > 0],
        rope_parameters={"rope_type": "default", "rope_theta": 9.0, "partial_rotary_factor": max(rotated, 2) / D},
    )  # fmt: skip
    attention = MQAAttention(config, 0).double()
    for parameter in (*attention.q_norm.parameters(), *attention.k_norm.parameters()):
        parameter.data.copy_(random(*parameter.shape))
    x = random(3, 40, d)
    known = torch.ones(3, 40, dtype=torch.bool)
    vectors = Vectors(attention, 1.0, torch.device("cpu"))
    with torch.no_grad():
        vectors.add(x, x, known, known)
        vectors.finish(120, 120)
        inputs = torch.nn.functional.pad(x, (0, 1), value=1.0)
        moment = inputs.flatten(0, 1).mT @ inputs.flatten(0, 1) / 120
        J = rotated // 2
        spread = positive(1, J, G).to(torch.complex128) if J else None
        energy = torch.rand(G, J, dtype=torch.float64) + 0.5 if J else None
        seen = Seen(moment, moment, positive(1, d), spread, energy, vectors, 120, d)
        fit = fit_heads(attention, seen, G * D, G * D, choose=True)
        new = copy.deepcopy(config)
        new.num_key_value_heads, new.qk_head_dim, new.v_head_dim = 1, G * D, G * D
        new.rope_frequencies = [fit.frequencies]
        map_queries(new)
        fitted = MQAAttention(new, 0).double()
        fitted.load_state_dict(fit.tensors)
        keys = torch.einsum("gad,bsd->bgsa", vectors.regression(moment[None]), inputs)
        queries = attention.q_norm(project(attention.q_proj, x, D))
        mapped = fitted.own_queries(project(fitted.q_proj, x, D))
        found = project(fitted.k_proj, x, G * D)
        if rotated:
            angles = torch.rand(1, 1, 40, J, dtype=torch.float64) * 6
            cos, sin = (torch.cat((part, part), -1) for part in (angles.cos(), angles.sin()))
            sin = torch.cat((-sin[..., :J], sin[..., J:]), -1)
            queries, keys = (rotate(y, cos, sin, D) for y in (queries, keys))
            mapped, found = fitted.rotate(mapped, (cos, sin)), fitted.rotate(found, (cos, sin))
    expected = queries @ keys.repeat_interleave(H // G, 1).mT
    logits = mapped @ found.mT
    if rotated < D:  # softmax ignores what all keys share of the part without rotation
        expected, logits = (y - y.mean(-1, keepdim=True) for y in (expected, logits))
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("felt", [0.0, 1.0])
@pytest.mark.parametrize("joint", ["head", "joint"])
def test_normalised_keys_are_regressed_on_the_input(joint, felt):
    """Against least squares on all tokens, weighted by what their logits do to the output."""
    config = MQAConfig(
        vocab_size=9, hidden_size=d, num_attention_heads=H, num_key_value_heads=G, head_dim=D, num_hidden_layers=1,
        qk_norm=joint,
    )  # fmt: skip
    attention = MQAAttention(config, 0).double()
    for norm in (attention.q_norm, attention.k_norm):
        norm.weight.data.copy_(random(*norm.weight.shape))
    B, T = 3, 40
    x, weight = random(B, T, d), torch.rand(B, 1, T, dtype=torch.float64)
    known = torch.ones(B, T, dtype=torch.bool)
    known[0, 30:] = False
    weight[0, :, 30:] = 0
    vectors = Vectors(attention, 1.0, torch.device("cpu"))
    with torch.no_grad():
        vectors.add(x, x, known, known, weight)
        keys = attention.k_norm(attention.k_proj(x).view(B, T, G, D).transpose(1, 2)).transpose(1, 2)[known]
        queries = attention.q_norm(attention.q_proj(x).view(B, T, H, D).transpose(1, 2)).transpose(1, 2)[known]
    inputs = torch.nn.functional.pad(x[known], (0, 1), value=1.0)
    vectors.finish(len(inputs), len(inputs), weight.sum((0, 2)))
    root = (weight[:, 0][known] if felt else torch.ones(len(inputs), dtype=torch.float64)).sqrt()[:, None]
    moment = (inputs * root).mT @ (inputs * root) / root.square().sum()
    maps = vectors.regression(moment[None], felt)
    expected = torch.linalg.lstsq(inputs * root, (keys * root[..., None]).flatten(1)).solution.mT.view(G, D, d + 1)
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(vectors.queries, torch.einsum("nha,nhb->hab", queries, queries) / len(inputs))
    if not felt:
        left = (keys - torch.einsum("gad,nd->nga", maps, inputs)).square().sum() / keys.square().sum()
        assert vectors.unexplained(maps, moment) == pytest.approx(float(left))
