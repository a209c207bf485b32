"""Both forms of a factored layer against autograd on the dense formula, and its directions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from svdmerge.core.components import RankOneComponents
from svdmerge.core.factored import (
    FactoredLinear,
    complete,
    install,
    linear_of,
    num_trained,
    rebuild_is_cheaper,
    trained_directions,
)
from svdmerge.errors import TrainingError

FORMS = ("low_rank", "rebuilt")


def components(m: int, n: int, k: int, seed: int = 0) -> RankOneComponents:
    """Orthonormal components with descending values."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(size, k, generator=generator, dtype=torch.float64)).Q
        for size in (m, n)
    )
    return RankOneComponents(
        u=u, s=torch.linspace(1.0, 0.1, k, dtype=torch.float64), vh=v.T.contiguous()
    )


def layer(m: int, n: int, k: int, *, bias: bool = True, seed: int = 0) -> FactoredLinear:
    torch.manual_seed(seed)
    linear = nn.Linear(n, m, bias=bias, dtype=torch.float64)
    built = FactoredLinear(linear, directions=components(m, n, k, seed))
    with torch.no_grad():
        built.sigma_change.copy_(torch.randn(k, dtype=torch.float64))
    return built


def dense(built: FactoredLinear, x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """The formula as it is written."""
    y = x @ (built.weight + built.u @ torch.diag(d) @ built.vh).T
    return y if built.bias is None else y + built.bias


@given(
    m=st.integers(1, 7),
    n=st.integers(1, 7),
    share=st.floats(0, 1),
    rows=st.sampled_from([(1,), (5,), (2, 3), (2, 1, 4), (0,)]),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize("form", FORMS)
def test_a_form_equals_the_dense_formula_in_value_and_gradient(
    form: str, m: int, n: int, share: float, rows: tuple[int, ...], bias: bool, seed: int
) -> None:
    built = layer(m, n, max(1, round(share * min(m, n))), bias=bias, seed=seed)
    x = torch.randn(*rows, n, dtype=torch.float64, requires_grad=True)
    d = built.sigma_change.detach().clone().requires_grad_()
    got, expected = getattr(built, form)(x), dense(built, x, d)
    torch.testing.assert_close(got, expected)
    weights = torch.randn_like(expected)
    got_x, got_d = torch.autograd.grad((got * weights).sum(), [x, built.sigma_change])
    expected_x, expected_d = torch.autograd.grad((expected * weights).sum(), [x, d])
    torch.testing.assert_close(got_x, expected_x)
    torch.testing.assert_close(got_d, expected_d)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_pass_the_finite_difference_check(form: str) -> None:
    built = layer(5, 4, 3)

    def call(x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(_Form(built, form), {"layer.sigma_change": d}, (x,))

    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    d = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, d))


class _Form(nn.Module):
    def __init__(self, built: FactoredLinear, form: str) -> None:
        super().__init__()
        self.layer, self.form = built, form

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self.layer, self.form)(x)


@pytest.mark.parametrize("form", FORMS)
def test_an_input_without_gradient_still_gives_the_values_theirs(form: str) -> None:
    built = layer(6, 4, 2)
    getattr(built, form)(torch.randn(3, 4, dtype=torch.float64)).sum().backward()
    assert built.sigma_change.grad is not None
    assert bool(built.sigma_change.grad.abs().sum() > 0)


@given(rows=st.integers(1, 500), m=st.integers(1, 300), n=st.integers(1, 300), k=st.integers(1, 40))
def test_the_rule_picks_the_form_of_fewer_flops_whatever_k(
    rows: int, m: int, n: int, k: int
) -> None:
    low_rank = 4 * rows * k * (m + n)
    rebuilt = 2 * m * n * k + 2 * rows * k * (m + n)
    assert rebuild_is_cheaper(num_rows=rows, m=m, n=n) == (rebuilt < low_rank)


@pytest.mark.parametrize(("rows", "expected"), [(1, "low_rank"), (64, "rebuilt")])
def test_forward_takes_the_cheaper_form(
    rows: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, called = layer(8, 8, 2), []
    for form in FORMS:
        original = getattr(built, form)
        monkeypatch.setattr(
            built, form, lambda x, form=form, call=original: called.append(form) or call(x)
        )
    built(torch.randn(rows, 8, dtype=torch.float64))
    assert called == [expected]


def test_a_fresh_layer_is_the_merged_one_and_the_adapted_weight_is_what_it_applies() -> None:
    linear = nn.Linear(6, 5)
    built = FactoredLinear(linear, directions=components(5, 6, 3).to(torch.float32))
    x = torch.randn(7, 6)
    torch.testing.assert_close(built(x), linear(x))
    with torch.no_grad():
        built.sigma_change.copy_(torch.tensor([0.5, -1.0, 2.0]))
    torch.testing.assert_close(
        built(x), torch.nn.functional.linear(x, built.adapted_weight(), linear.bias)
    )


@given(m=st.integers(2, 12), n=st.integers(2, 12), data=st.data(), seed=st.integers(0, 2**63 - 1))
def test_completed_directions_are_orthonormal_and_leave_the_given_ones_alone(
    m: int, n: int, data: st.DataObject, seed: int
) -> None:
    k = data.draw(st.integers(0, min(m, n)))
    num_values = data.draw(st.integers(k, min(m, n)))
    given_ones = components(m, n, k)
    full = complete(given_ones, num_values=num_values, seed=seed)
    assert len(full) == num_values
    eye = torch.eye(num_values, dtype=torch.float64)
    torch.testing.assert_close(full.u.T @ full.u, eye, atol=1e-12, rtol=0)
    torch.testing.assert_close(full.vh @ full.vh.T, eye, atol=1e-12, rtol=0)
    assert torch.equal(full.u[:, :k], given_ones.u)
    assert torch.equal(full.vh[:k], given_ones.vh)
    assert not full.s[k:].any()
    again = complete(given_ones, num_values=num_values, seed=seed)
    assert torch.equal(full.u, again.u)
    assert torch.equal(full.vh, again.vh)


def test_other_seeds_give_other_null_space_directions() -> None:
    given_ones = components(9, 8, 2)
    first, second = (complete(given_ones, num_values=5, seed=seed) for seed in (0, 1))
    assert not torch.allclose(first.u, second.u)


def test_more_directions_than_a_matrix_has_are_refused() -> None:
    with pytest.raises(TrainingError, match="6 singular values of a 8 x 5 matrix"):
        complete(components(8, 5, 2), num_values=6, seed=0)


@pytest.mark.parametrize(
    ("num_values", "null_space", "expected"),
    [(2, False, 2), (2, True, 2), (3, False, 3), (5, False, 3), (5, True, 5)],
)
def test_without_null_space_no_more_train_than_were_merged(
    num_values: int, null_space: bool, expected: int
) -> None:
    merged = components(6, 7, 3)
    found = trained_directions(merged, num_values=num_values, null_space=null_space, seed=0)
    assert len(found) == expected
    assert torch.equal(found.u[:, : min(3, expected)], merged.u[:, : min(3, expected)])


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 3)), nn.Conv2d(1, 1, 2))


def test_installing_freezes_everything_but_the_changes() -> None:
    net = model()
    chosen = {"0.weight": components(6, 4, 2), "1.0.weight": components(3, 6, 3)}
    layers = install(net, directions=chosen)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {"0.sigma_change", "1.0.sigma_change"}
    assert num_trained(layers.values()) == 5
    assert net[0] is layers["0.weight"]


def test_only_weights_of_linear_layers_can_be_factored() -> None:
    net = model()
    assert linear_of(net, "1.0.weight") is net[1][0]  # pyright: ignore
    for name in ("2.weight", "0.bias", "9.weight", "0"):
        assert linear_of(net, name) is None
        with pytest.raises(TrainingError, match="not the weight of a linear layer"):
            install(net, directions={name: components(2, 2, 1)})


def test_directions_of_another_shape_are_refused() -> None:
    with pytest.raises(TrainingError, match="factors are of a 5 x 4 matrix"):
        install(model(), directions={"0.weight": components(5, 4, 2)})
