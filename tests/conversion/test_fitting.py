"""The closed forms against brute force, and what must be lossless."""

import itertools

import pytest
import torch

from mqa_hf.conversion import fitting
from mqa_hf.conversion.latent_moments import weighted_moment
from mqa_hf.conversion.moments import Spread, numerical_rank, second_moment

torch.set_default_dtype(torch.float32)
d, D, m, n = 10, 6, 3, 6
HEAD_OF = torch.arange(n) // (n // m)


def random(*shape) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture
def moment():
    x = torch.cat((random(400, d) @ random(d, d), torch.ones(400, 1, dtype=torch.float64)), dim=1)
    return x.mT @ x / 400


def complex_rows(w):
    return torch.complex(w[..., : w.shape[-2] // 2, :], w[..., w.shape[-2] // 2 :, :])


def rotary_moments(w_k, w_q, moment):
    """What `rotary_keys` takes, were the keys of every query spread as the inputs are."""
    keys, queries, S = complex_rows(w_k), complex_rows(w_q), moment.to(torch.complex128)
    spread = torch.einsum("ajx,xy,bjy->jab", keys, S, keys.conj())
    power = torch.einsum("njx,xy,njy->nj", queries, S, queries.conj()).real
    energy = torch.zeros(m, D // 2, dtype=torch.float64).index_add_(0, HEAD_OF, power)
    return spread, energy.T


def fit_rotary(w_k, w_q, moment, counts):
    return fitting.rotary_keys(w_k, w_q, HEAD_OF, *rotary_moments(w_k, w_q, moment), torch.tensor(counts))


def components(w, counts):
    """Complex rows by frequency [count, ...] of fitted keys or queries."""
    return complex_rows(w).split(counts, dim=-2)


def rotary_objective(w_k, w_q, keys, moment, counts):
    """Σ over query heads and frequencies of E|q|² E|k_a − b α|², the key energy that the fit weighs."""
    old, total = complex_rows(w_k), 0.0
    q = complex_rows(w_q)
    for j, (new, q_new) in enumerate(zip(components(keys.w_k, counts), components(keys.w_q, counts))):
        for h in range(n):
            energy = (q[h, j] @ moment.to(q.dtype) @ q[h, j].conj()).real
            anchor = q[h, j].abs().argmax()
            b = (q_new[h, :, anchor] / q[h, j, anchor]).conj()
            rest = old[HEAD_OF[h], j] - b @ new
            total += energy * (rest @ moment.to(rest.dtype) @ rest.conj()).real
    return float(total)


@pytest.mark.parametrize("counts", [[1, 1, 1], [2, 2, 2], [1, 1, 2]])
def test_rotary_keys_are_the_best_of_any(moment, counts):
    """Gradient descent over all shared rows and factors finds nothing better."""
    w_k, w_q = random(m, D, d + 1), random(n, D, d + 1)
    keys = fit_rotary(w_k, w_q, moment, counts)
    fitted = rotary_objective(w_k, w_q, keys, moment, counts)
    old = complex_rows(w_k)
    S = moment.to(old.dtype)
    energy = rotary_moments(w_k, w_q, moment)[1]
    best = 0.0
    for j, count in enumerate(counts):
        alpha = torch.randn(count, d + 1, dtype=old.dtype).requires_grad_()
        b = torch.randn(m, count, dtype=old.dtype).requires_grad_()
        optimizer = torch.optim.LBFGS([alpha, b], max_iter=2000, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def loss(j=j, alpha=alpha, b=b, optimizer=optimizer):
            optimizer.zero_grad()
            rest = old[:, j] - b @ alpha
            value = (energy[j] * torch.einsum("ad,de,ae->a", rest, S, rest.conj()).real).sum()
            value.backward()
            return value

        optimizer.step(loss)
        best += float(loss())
    assert fitted == pytest.approx(best, rel=1e-5)
    assert 0 < keys.discarded < 1


def test_the_components_are_shared_out_to_the_frequencies_as_well_as_can_be(moment):
    w_k, w_q = random(m, D, d + 1), random(n, D, d + 1)
    w_k[:, 0], w_k[:, D // 2] = 0.01 * w_k[:, 0], 0.01 * w_k[:, D // 2]  # a frequency of little weight
    gram = fitting.rotary_gram(*rotary_moments(w_k, w_q, moment))
    counts = fitting.choose_frequencies(torch.linalg.eigvalsh(gram).flip(-1), 3).tolist()
    assert sum(counts) == 3
    assert counts[0] == 0
    every = [c for c in itertools.product(range(m + 1), repeat=D // 2) if sum(c) == 3]
    left = {c: fit_rotary(w_k, w_q, moment, c).discarded for c in every}
    assert left[tuple(counts)] == pytest.approx(min(left.values()))


def plain_objective(w_k, w_q, w_k_new, w_q_new, moment):
    """Σ_h E over independent queries and centred keys of (q k − q̂ k̂)²."""
    C, total = fitting.covariance(moment), 0.0
    for h in range(n):
        A = w_q[h].mT @ w_k[HEAD_OF[h]][:, :-1] - w_q_new[h].mT @ w_k_new[:, :-1]
        total += float(torch.einsum("xa,xy,yb,ab->", A, moment, A, C))
    return total


@pytest.mark.parametrize("width", [1, 2])
def test_plain_keys_are_the_best_of_any(moment, width):
    w_k, w_q = random(m, D, d + 1), random(n, D, d + 1)
    w_k[..., -1] = 0
    small = slice(0, 2)  # so that the rank is a limit: two components of each head
    w_k, w_q = w_k[:, small], w_q[:, small]
    keys = fitting.plain_keys(w_k, w_q, HEAD_OF, fitting.query_moments(w_q, moment), moment, 2 * width)
    fitted = plain_objective(w_k, w_q, keys.w_k, keys.w_q, moment)
    a = random(2 * width, d).requires_grad_()
    b = random(n, 2 * width, d + 1).requires_grad_()
    C = fitting.covariance(moment)
    optimizer = torch.optim.LBFGS([a, b], max_iter=4000, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        A = torch.einsum("hrx,hra->hxa", w_q, w_k[HEAD_OF][..., :-1]) - torch.einsum("hrx,ra->hxa", b, a)
        value = torch.einsum("hxa,xy,hyb,ab->", A, moment, A, C)
        value.backward()
        return value

    optimizer.step(loss)
    assert fitted <= float(loss()) * (1 + 1e-4)


@pytest.mark.parametrize("width", [1, 2])
def test_values_are_the_best_of_any(width):
    w_v, w_o = random(m, 2, d), random(n, d, 2)
    mixed = random(d, 30)
    mixed = mixed @ mixed.mT / 30
    found = fitting.values(w_v, w_o, HEAD_OF, mixed, 2 * width)

    def objective(a, b):
        rest = w_o @ w_v[HEAD_OF] - b @ a
        return torch.einsum("hda,ae,hde->", rest, mixed, rest)

    a, b = random(2 * width, d).requires_grad_(), random(n, d, 2 * width).requires_grad_()
    optimizer = torch.optim.LBFGS([a, b], max_iter=4000, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = objective(a, b)
        value.backward()
        return value

    optimizer.step(loss)
    assert float(objective(found.w_v, found.w_o)) <= float(loss()) * (1 + 1e-4)


def test_the_fit_beats_the_mean_on_its_own_objective(moment):
    w_k, w_q = random(m, D, d + 1), random(n, D, d + 1)
    mean = fitting.Keys(w_k.mean(0), w_q, 0.0)
    once = [1] * (D // 2)
    fitted = fit_rotary(w_k, w_q, moment, once)
    assert rotary_objective(w_k, w_q, fitted, moment, once) < rotary_objective(w_k, w_q, mean, moment, once)
    w_k[..., -1] = 0
    plain = fitting.plain_keys(w_k, w_q, HEAD_OF, fitting.query_moments(w_q, moment), moment, D)
    assert plain_objective(w_k, w_q, plain.w_k, plain.w_q, moment) < plain_objective(
        w_k, w_q, w_k.mean(0), w_q, moment
    )


def logits(w_k, w_q, x, y):
    return torch.einsum("nax,tx,nay,sy->nts", w_q, x, w_k, y)


@pytest.mark.parametrize("gauge", ["equal up to a gauge", "full width"])
def test_plain_keys_find_heads_that_are_one(gauge, moment):
    w_k, w_q = random(m, D, d + 1), random(n, D, d + 1)
    w_k[..., -1] = 0
    if gauge != "full width":
        w_k = random(m, D, D) @ w_k[:1]
    keys = fitting.plain_keys(
        w_k, w_q, HEAD_OF, fitting.query_moments(w_q, moment), moment, m * D if gauge == "full width" else D
    )
    x, y = random(7, d + 1), random(8, d + 1)
    expected, found = logits(w_k[HEAD_OF], w_q, x, y), logits(keys.w_k.expand(n, -1, -1), keys.w_q, x, y)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    assert keys.discarded < 1e-9


@pytest.mark.parametrize("gauge", ["equal up to a gauge", "full width"])
def test_rotary_keys_find_heads_that_are_one(gauge, moment):
    w_k, w_q = random(m, D, d + 1), random(n, D, d + 1)
    if gauge != "full width":
        factors = torch.randn(m, D // 2, 1, dtype=torch.complex128)
        turned = factors * complex_rows(w_k[0])
        w_k = torch.cat((turned.real, turned.imag), dim=1)
    counts = [m if gauge == "full width" else 1] * (D // 2)
    keys = fit_rotary(w_k, w_q, moment, counts)
    x, y = random(7, d + 1), random(8, d + 1)
    # The products of each frequency, which is what any rotation is made of.
    q, k = complex_rows(w_q) @ x.mT.to(torch.complex128), complex_rows(w_k)[HEAD_OF] @ y.mT.to(torch.complex128)
    expected = torch.einsum("njt,njs->njts", q.conj(), k)
    pairs = zip(components(keys.w_q, counts), components(keys.w_k, counts))
    products = [torch.einsum("nct,cs->nts", (a @ x.mT.to(a.dtype)).conj(), b @ y.mT.to(b.dtype)) for a, b in pairs]
    found = torch.stack(products, dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    assert keys.discarded < 1e-9


def test_values_find_heads_that_are_one():
    w_v = random(m, 4, 4) @ random(1, 4, d)
    w_o, x = random(n, d, 4), random(50, d)
    found = fitting.values(w_v, w_o, HEAD_OF, x.mT @ x / 50, 4)
    torch.testing.assert_close(found.w_o @ found.w_v, w_o @ w_v[HEAD_OF], rtol=1e-7, atol=1e-7)


def test_dead_heads_and_moments_without_rank_do_no_harm():
    w_k, w_q = random(m, D, d + 1), random(n, D, d + 1)
    w_k[1], w_q[:2] = 0, 0
    w_k[..., -1] = 0
    x = torch.cat((random(3, d), torch.ones(3, 1, dtype=torch.float64)), dim=1)  # three tokens for ten dimensions
    moment = x.mT @ x / 3
    for keys in (
        fit_rotary(w_k, w_q, moment, [2] * (D // 2)),
        fitting.plain_keys(w_k, w_q, HEAD_OF, fitting.query_moments(w_q, moment), moment, 2 * D),
    ):
        assert torch.isfinite(keys.w_k).all()
        assert torch.isfinite(keys.w_q).all()
        assert (keys.w_q[:2] == 0).all()
    found = fitting.values(0 * w_k[..., :-1], random(n, d, D), HEAD_OF, moment[:-1, :-1], D)
    assert torch.isfinite(found.w_v).all()
    assert found.discarded == 0


def test_the_refit_is_ridge_regression_towards_the_old_projection():
    z, y, weight = random(100, 5), random(100, 3), random(3, 5)
    strength = 1e-3 * (z.mT @ z / 100).diagonal().mean()
    errors = y - z @ weight.mT
    found = weight + fitting.refit(z.mT @ z / 100, errors.mT @ z / 100)
    stacked = torch.cat((z / 10, strength.sqrt() * torch.eye(5, dtype=torch.float64)))
    target = torch.cat((y / 10, strength.sqrt() * weight.mT))
    torch.testing.assert_close(found, torch.linalg.lstsq(stacked, target).solution.mT)
    assert (fitting.refit(0 * z.mT @ z, 0 * y.mT @ z) == 0).all()


def test_the_rank_of_a_moment():
    x = torch.randn(400, 30, generator=torch.Generator().manual_seed(2)).double()
    assert numerical_rank(x.mT @ x) == 30
    x[:, 20:] = x[:, :10] * 3.0
    assert numerical_rank(x.mT @ x) == 20
    assert numerical_rank(torch.zeros(5, 5, dtype=torch.float64)) == 0


def test_the_spread_is_that_of_the_keys_that_each_query_sees():
    generator = torch.Generator().manual_seed(3)
    B, H, G, J, S, n = 2, 4, 4, 3, 9, 5
    query, key = (torch.randn(B, heads, T, 2 * J, generator=generator) for heads, T in ((H, n), (G, S)))
    chosen, ok = torch.tensor([8, 2, 5, 0, 7]), torch.rand(B, n, generator=generator) > 0.3
    later = torch.arange(S) > chosen[:, None]
    mask = torch.zeros(n, S).masked_fill(later, torch.finfo(torch.float).min)[None, None]
    found = Spread(2, G, J, torch.device("cpu"))
    blind = torch.cat((ok, torch.zeros(B, 1, dtype=torch.bool)), 1)  # a row of padding may see nothing
    nothing = torch.full((1, 1, 1, S), torch.finfo(torch.float).min)
    found.add(torch.cat((query, query[:, :, :1]), 2), key, torch.cat((mask, nothing), 2), blind)
    expected = torch.zeros(2, J, 2, 2, dtype=torch.complex128)
    k = torch.complex(key[..., :J].double(), key[..., J:].double())
    for b, i in ok.nonzero().tolist():
        seen = k[b, :, : chosen[i] + 1].unflatten(0, (2, 2))  # [K, m, seen, J]
        away = seen - seen.mean(2, keepdim=True)
        expected += torch.einsum("kasj,kbsj->kjab", away, away.conj()) / seen.shape[2]
    torch.testing.assert_close(found.spread, expected)
    assert found.count == int(ok.sum())
    energy = (query.double().square() * ok[:, None, :, None]).sum((0, 2)).view(G, 2, J).sum(1)
    torch.testing.assert_close(found.energy, energy)


def test_weighted_moments_are_those_of_inputs_with_an_end():
    generator = torch.Generator().manual_seed(4)
    x, weights, ends = (torch.rand(2, 7, *more, generator=generator) for more in ((5,), (), ()))
    y = (torch.cat((x, ends[..., None]), -1) * weights[..., None]).flatten(0, 1).double()
    torch.testing.assert_close(weighted_moment(x, weights, ends), y.mT @ y, rtol=0, atol=1e-5)
    kept = torch.rand(2, 7, generator=generator) > 0.3
    y = torch.nn.functional.pad(x[kept], (0, 1), value=1.0).double()
    torch.testing.assert_close(second_moment(x, kept), y.mT @ y, rtol=0, atol=1e-5)
