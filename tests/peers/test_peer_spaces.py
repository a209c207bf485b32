"""Each comparator's space: where it starts, what trains, and that training it helps."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from toy_target import INNER, MATRICES, SETTINGS, WIDTH, Target, components, differences

from svdmerge.core.components import RankOneComponents, none
from svdmerge.core.merge import recompress
from svdmerge.errors import MismatchError, TrainingError
from svdmerge.peers.atlas import Atlas
from svdmerge.peers.bolt import ALPHAS, bolt, bolt_bases
from svdmerge.peers.diagonal import random_factors, sigma_merged, sigma_w0, with_null_space
from svdmerge.peers.free import bitfit, full
from svdmerge.peers.lora import Lora, LoraXs, lora_cost, lora_xs_cost, ranks_within
from svdmerge.peers.space import Weights, WeightSpace, choose, trained_values

TARGET = Target()
BASE = TARGET.base
SOURCES = [differences(BASE, seed=seed) for seed in (11, 12)]
COMPONENTS = [components(source) for source in SOURCES]
FACTORS = {n: recompress(COMPONENTS[0][n].slice(0, 4)).to(torch.float32) for n in MATRICES}
MERGED = {n: BASE[n] + FACTORS[n].dense() for n in MATRICES} | {
    n: BASE[n] + SOURCES[0][n] for n in BASE if n not in MATRICES
}
BASES = bolt_bases(COMPONENTS, per_source=3)
BOLT_START = {
    n: (BASE[n].double() + c.u @ (3.0 * c.s).clamp(min=0).diag() @ c.vh).float()
    for n, c in BASES.items()
}
NUM_BIASES = 3 * WIDTH + WIDTH + WIDTH + INNER + WIDTH
SHAPES = {n: tuple(BASE[n].shape) for n in MATRICES}
SUM = sum(m + n for m, n in SHAPES.values())


def with_ranks(rank: int) -> dict[str, int]:
    return dict.fromkeys(MATRICES, rank)


# What each space is made by, how many values train, and the weights that it starts from.
Make = Callable[[Weights, Weights], WeightSpace]
SPACES: dict[str, tuple[Make, int, Weights]] = {
    "atlas": (lambda w, _: Atlas(w, differences=SOURCES), 2 * len(BASE), BASE),
    "bolt": (lambda w, _: bolt(w, bases=BASES, alpha=3.0), 4 * 6, BOLT_START),
    "lora": (lambda w, _: Lora(w, ranks=with_ranks(2), seed=0), 2 * SUM, BASE),
    "lora_xs": (lambda w, _: LoraXs(w, ranks=with_ranks(3)), 4 * 9, BASE),
    "bitfit": (lambda w, _: bitfit(w), NUM_BIASES, BASE),
    "sigma_w0": (lambda w, _: sigma_w0(w, names=MATRICES, num_values=5), 4 * 5, BASE),
    "random": (
        lambda _, w: random_factors(w, names=MATRICES, num_values=5, seed=0), 4 * 5, MERGED,
    ),
    "sigma_merged": (lambda _, w: sigma_merged(w, factors=FACTORS, num_values=3), 4 * 3, MERGED),
    "full": (lambda w, _: full(w, names=MATRICES), sum(BASE[n].numel() for n in MATRICES), BASE),
}  # fmt: skip


def make(name: str) -> WeightSpace:
    return SPACES[name][0](BASE, MERGED)


everywhere = pytest.mark.parametrize("name", SPACES)


@everywhere
def test_a_space_starts_where_it_should(name: str) -> None:
    start = SPACES[name][2]
    found = make(name).weights()
    assert found
    for parameter, weight in found.items():
        # BOLT's start is a sum, computed another way here; all others are given and kept as given.
        tolerance = 1e-6 if name == "bolt" else 0.0
        torch.testing.assert_close(weight, start[parameter], rtol=0, atol=tolerance)
    if name in ("random", "sigma_merged"):
        assert set(found) == set(BASE)  # averaged vectors travel along


@everywhere
def test_the_count_of_trained_values_is_exact(name: str) -> None:
    space, count = make(name), SPACES[name][1]
    assert space.num_trained == count
    size = trained_values(space, head=TARGET.head)
    assert size.without_head == count
    assert size.with_head == count + 3 * WIDTH + 3
    assert size.stored_bytes == 4 * count


@everywhere
def test_gradients_reach_the_trained_values_and_nothing_else(name: str) -> None:
    # A caller who left its module trainable pays nothing for it.
    base, merged = (
        {n: w.clone().requires_grad_() for n, w in given.items()} for given in (BASE, MERGED)
    )
    space = SPACES[name][0](base, merged)
    TARGET.features(space.weights(), list(range(12))).square().sum().backward()
    grads = [value.grad for value in space.values()]
    assert None not in grads
    # LoRA's A waits for B to leave zero; elsewhere every value matters from the first step.
    assert any(bool(grad.abs().sum() > 0) for grad in grads if grad is not None)
    assert not any(tensor.requires_grad for tensor in space.frozen())
    assert all(w.grad is None for given in (base, merged) for w in given.values())


@everywhere
def test_training_lowers_the_loss_and_leaves_the_base_alone(name: str) -> None:
    before = {n: w.clone() for n, w in BASE.items()}
    trained = TARGET.train(make(name))
    assert len(trained.losses) == 18
    assert sum(trained.losses[-3:]) < 0.8 * sum(trained.losses[:3])
    assert not any(weight.requires_grad for weight in trained.weights.values())
    for parameter, weight in BASE.items():
        torch.testing.assert_close(weight, before[parameter], rtol=0, atol=0)


@everywhere
def test_the_same_seed_gives_the_same_bits(name: str) -> None:
    first, second = (TARGET.train(make(name)) for _ in range(2))
    assert first.losses == second.losses
    for parameter, weight in first.weights.items():
        assert torch.equal(weight, second.weights[parameter])


def test_atlas_is_the_sum_of_its_scaled_differences() -> None:
    space = Atlas(BASE, differences=SOURCES)
    coefficients = torch.randn(2, len(BASE), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        space.values()[0].copy_(coefficients)
    for b, (name, weight) in enumerate(space.weights().items()):
        expected = BASE[name] + sum(
            c[b] * d[name] for c, d in zip(coefficients, SOURCES, strict=True)
        )
        torch.testing.assert_close(weight, expected)


def test_only_atlas_holds_more_with_more_sources() -> None:
    def held(space: WeightSpace) -> int:
        return trained_values(space, head=TARGET.head).held_bytes

    whole = 4 * sum(w.numel() for w in BASE.values())
    assert [held(Atlas(BASE, differences=SOURCES[:1] * n)) for n in (1, 8)] == [
        2 * whole,
        9 * whole,
    ]
    merged = held(sigma_merged(MERGED, factors=FACTORS, num_values=3))
    assert merged == whole + 4 * 3 * sum(m + n + 1 for m, n in SHAPES.values())


def test_sources_of_other_parameters_are_refused() -> None:
    lacking = {n: d for n, d in SOURCES[1].items() if n != "up.weight"}
    with pytest.raises(MismatchError, match=r"up\.weight is not in both"):
        Atlas(BASE, differences=[SOURCES[0], lacking])
    with pytest.raises(MismatchError, match="source 2 of 2"):
        bolt_bases([COMPONENTS[0], {}])
    with pytest.raises(MismatchError, match="no sources"):
        Atlas(BASE, differences=[])
    with pytest.raises(MismatchError, match="elsewhere"):
        full(BASE, names=["elsewhere"])


def test_bolt_starts_from_the_mean_diagonal_between_orthonormal_bases() -> None:
    for name, c in BASES.items():
        assert len(c) == 6
        eye = torch.eye(6, dtype=torch.float64)
        torch.testing.assert_close(c.u.T @ c.u, eye)
        torch.testing.assert_close(c.vh @ c.vh.T, eye)
        inside = [c.u.T @ d[name].double() @ c.vh.T for d in SOURCES]
        torch.testing.assert_close(c.s, (inside[0] + inside[1]).diagonal() / 2, atol=1e-6, rtol=0)
        # The nearest orthonormal columns: the polar factor H = U^T C is symmetric and positive.
        columns = torch.cat([source[name].u[:, :3] for source in COMPONENTS], dim=1)
        h = c.u.T @ columns
        torch.testing.assert_close(h, h.T)
        assert bool((torch.linalg.eigvalsh(h) > 0).all())


def test_bolt_trains_relu_of_s() -> None:
    c = RankOneComponents(
        u=torch.eye(INNER, 2), s=torch.tensor([1.0, -1.0]), vh=torch.eye(2, WIDTH)
    )
    space = bolt({"up.weight": torch.zeros(INNER, WIDTH)}, bases={"up.weight": c}, alpha=2.0)
    (change,) = space.values()
    for moved, expected in (([0.0, 0.0], [2, 0]), ([-3.0, 1.0], [0, 0]), ([1.0, 3.0], [3, 1])):
        with torch.no_grad():
            change.copy_(torch.tensor(moved))
        found = space.weights()["up.weight"]
        torch.testing.assert_close(found.diagonal()[:2], torch.tensor(expected).float())


def test_bolt_takes_fewer_directions_where_sources_are_many() -> None:
    many = [components(differences(BASE, seed=seed)) for seed in range(5)]
    assert {len(c) for c in bolt_bases(many).values()} == {5 * (WIDTH // 5)}
    with pytest.raises(TrainingError, match="13 sources"):
        bolt_bases(many[:1] * 13)


def test_bolt_ignores_components_that_are_not_there() -> None:
    name = MATRICES[0]
    part, nothing = COMPONENTS[0][name], none(*SHAPES[name])
    (c,) = bolt_bases([{name: part}, {name: nothing}], per_source=4).values()
    torch.testing.assert_close(c.s, part.s[:4] / 2)


def test_the_best_scored_start_is_chosen_and_the_first_of_equals() -> None:
    spaces = [bolt(BASE, bases=BASES, alpha=alpha) for alpha in ALPHAS]
    scores = iter([0.2, 0.9, 0.1, 0.9, 0.3])
    assert choose(spaces, score=lambda weights: next(scores)) is spaces[1]


def test_lora_xs_moves_only_within_the_leading_factors_of_the_base() -> None:
    space = LoraXs(BASE, ranks={"up.weight": 3})
    (r,) = space.values()
    assert r.shape == (3, 3)
    with torch.no_grad():
        r.copy_(torch.arange(9.0).reshape(3, 3))
    u, s, vh = torch.linalg.svd(BASE["up.weight"].double(), full_matrices=False)
    inside = u[:, :3].T @ (space.weights()["up.weight"] - BASE["up.weight"]).double() @ vh[:3].T
    # Up to the signs of the singular vectors, which R would absorb.
    torch.testing.assert_close(inside.abs(), r.detach().double() * s[:3], atol=1e-5, rtol=1e-5)


def test_lora_starts_as_its_authors_code_does_and_differs_by_matrix_and_seed() -> None:
    square = {"a": torch.zeros(50, 50), "b": torch.zeros(50, 50)}
    first, second = (v.detach() for v in Lora(square, ranks={"a": 4, "b": 4}, seed=0).values()[:2])
    assert first.shape == (4, 50)
    assert float(first.abs().max()) <= 50**-0.5
    assert abs(float(first.std()) * (3 * 50) ** 0.5 - 1.0) < 0.15
    assert not torch.equal(first, second)
    assert not torch.equal(first, Lora(square, ranks={"a": 4}, seed=1).values()[0])


@pytest.mark.parametrize("num_values", [15, 40, 200, 333, 10_000])
@pytest.mark.parametrize("cost", [lora_cost, lora_xs_cost])
def test_ranks_fit_the_size_and_leave_less_than_one_rank(
    num_values: int, cost: Callable[[int, int, int], int]
) -> None:
    ranks = with_ranks(0) | ranks_within(num_values, weights=BASE, names=MATRICES, cost=cost)
    used = sum(cost(rank, *SHAPES[n]) for n, rank in ranks.items())
    assert used <= num_values
    for name, rank in ranks.items():
        one_more = used - cost(rank, *SHAPES[name]) + cost(rank + 1, *SHAPES[name])
        assert rank == min(SHAPES[name]) or one_more > num_values
    assert max(ranks.values()) - min(ranks.values()) <= 1


def test_a_size_below_one_adapter_is_told_when_it_should_train() -> None:
    ranks = ranks_within(10, weights=BASE, names=MATRICES, cost=lora_cost)
    assert ranks == {}
    with pytest.raises(TrainingError, match="no value to train"):
        TARGET.train(Lora(BASE, ranks=ranks, seed=0))
    # The last matrix is nearest to the features, so it comes first.
    assert ranks_within(40, weights=BASE, names=MATRICES, cost=lora_cost) == {MATRICES[-1]: 1}


def test_bitfit_takes_every_bias_of_attention_and_norm_and_refuses_none() -> None:
    found = set(bitfit(BASE).weights())
    # MultiheadAttention's own `in_proj_bias` counts as one.
    assert found == {n for n in BASE if n.endswith("bias")}
    assert len(found) == 5
    with pytest.raises(MismatchError, match="is a bias"):
        bitfit({"up.weight": BASE["up.weight"]})


def test_sigma_w0_moves_the_leading_singular_values() -> None:
    space = sigma_w0(BASE, names=["up.weight"], num_values=2)
    (change,) = space.values()
    with torch.no_grad():
        change.copy_(torch.tensor([1.0, -100.0]))
    expected = torch.linalg.svdvals(BASE["up.weight"])
    moved = torch.linalg.svdvals(space.weights()["up.weight"])
    expected[0] += 1.0
    expected[1] = 0.0  # rectified
    torch.testing.assert_close(moved, expected.sort(descending=True).values)


def test_random_factors_are_orthonormal_and_differ_by_matrix_and_seed() -> None:
    square = {"a": torch.zeros(9, 9), "b": torch.zeros(9, 9)}

    def change(seed: int) -> dict[str, Tensor]:
        space = random_factors(square, names=square, num_values=4, seed=seed)
        with torch.no_grad():
            for value in space.values():
                value.fill_(1.0)
        return space.weights()

    first = change(0)
    torch.testing.assert_close(
        torch.linalg.svdvals(first["a"]), torch.tensor([1.0] * 4 + [0.0] * 5), atol=1e-6, rtol=0
    )
    assert torch.equal(first["a"], change(0)["a"])
    assert not torch.allclose(first["a"], first["b"])
    assert not torch.allclose(first["a"], change(1)["a"])


def test_the_null_space_adds_directions_orthogonal_to_the_merged_ones() -> None:
    filled = with_null_space(FACTORS, num_values=7, seed=0)
    for name, c in filled.items():
        assert len(c) == 7
        torch.testing.assert_close(c.u.T @ c.u, torch.eye(7), atol=1e-5, rtol=0)
        torch.testing.assert_close(c.dense(), FACTORS[name].dense())
    assert sigma_merged(MERGED, factors=filled, num_values=7).num_trained == 4 * 7
    assert with_null_space(FACTORS, num_values=2, seed=0) == FACTORS


def test_a_merged_matrix_of_no_factors_stays_as_it_is() -> None:
    factors = FACTORS | {"up.weight": none(*SHAPES["up.weight"])}
    space = sigma_merged(MERGED, factors=factors, num_values=2)
    assert space.num_trained == 3 * 2
    assert torch.equal(TARGET.train(space).weights["up.weight"], MERGED["up.weight"])


def test_kernels_train_as_outputs_by_the_rest() -> None:
    kernel = {"k": torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(0))}
    ranks = ranks_within(48, weights=kernel, names=kernel, cost=lora_cost)
    assert ranks == {"k": 2}
    for space in (
        sigma_w0(kernel, names=kernel, num_values=2),
        random_factors(kernel, names=kernel, num_values=2, seed=0),
        Lora(kernel, ranks=ranks, seed=0),
        LoraXs(kernel, ranks=ranks),
    ):
        torch.testing.assert_close(space.weights()["k"], kernel["k"])
    assert SETTINGS.num_steps(24) == 18
