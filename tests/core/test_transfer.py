"""The closed-form ridge head against brute force."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from svdmerge.core.transfer import PENALTIES, LinearHead, ridge
from svdmerge.errors import TrainingError


def problem(b: int, d: int, y: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(b) % y
    centres = torch.randn(y, d, generator=generator, dtype=torch.float64)
    noise = torch.randn(b, d, generator=generator, dtype=torch.float64)
    return centres[labels] + noise + 3.0, labels


def solve(x: Tensor, labels: Tensor, *, penalty: float, y: int) -> LinearHead:
    """Ridge with an unpenalised intercept by its normal equations."""
    one_hot = torch.nn.functional.one_hot(labels, y).double()
    mean, target = x.mean(0), one_hot.mean(0)
    gram = (x - mean).T @ (x - mean) + penalty * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(gram, (x - mean).T @ (one_hot - target)).T
    return LinearHead(weight=weight, bias=target - weight @ mean)


SHAPES = [(30, 4, 3), (12, 40, 2), (9, 8, 4), (8, 8, 2), (9, 9, 3)]


@pytest.mark.parametrize(("b", "d", "y"), SHAPES)
def test_left_out_scores_are_those_of_refitting_without_each_example(
    b: int, d: int, y: int
) -> None:
    x, labels = problem(b, d, y)
    found = ridge(x, labels=labels, num_classes=y)
    one_hot = torch.nn.functional.one_hot(labels, y).double()
    for i in range(b):
        rest = torch.arange(b) != i
        head = solve(x[rest], labels[rest], penalty=found.penalty, y=y)
        torch.testing.assert_close(found.left_out[i], head.scores(x[i : i + 1])[0])
        error = (head.scores(x[i : i + 1])[0] - one_hot[i]).square().mean()
        torch.testing.assert_close(found.loo_error[i], error)


@pytest.mark.parametrize(("b", "d", "y"), SHAPES)
def test_the_head_solves_the_normal_equations_at_the_chosen_penalty(b: int, d: int, y: int) -> None:
    x, labels = problem(b, d, y, seed=1)
    found = ridge(x, labels=labels, num_classes=y)
    expected = solve(x, labels, penalty=found.penalty, y=y)
    torch.testing.assert_close(found.head.weight, expected.weight)
    torch.testing.assert_close(found.head.bias, expected.bias)


def test_the_penalty_is_the_one_with_the_least_left_out_error() -> None:
    x, labels = problem(14, 6, 2, seed=2)
    found = ridge(x, labels=labels, num_classes=2)
    one_hot = torch.nn.functional.one_hot(labels, 2).double()
    unit = torch.linalg.svdvals(x - x.mean(0)).square().mean()

    def error(penalty: float) -> float:
        total = 0.0
        for i in range(14):
            rest = torch.arange(14) != i
            head = solve(x[rest], labels[rest], penalty=penalty, y=2)
            total += float((head.scores(x[i : i + 1])[0] - one_hot[i]).square().sum())
        return total

    errors = {float(unit * p): error(float(unit * p)) for p in PENALTIES}
    assert found.penalty == pytest.approx(min(errors, key=lambda p: errors[p]))


@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-100, 100), seed=st.integers(0, 50))
def test_scaling_and_shifting_features_changes_no_decision(
    scale: float, shift: float, seed: int
) -> None:
    x, labels = problem(20, 5, 3, seed)
    plain, moved = (ridge(f, labels=labels, num_classes=3) for f in (x, x * scale + shift))
    torch.testing.assert_close(plain.loo_error, moved.loo_error, rtol=1e-6, atol=1e-9)


@given(seed=st.integers(0, 50))
def test_the_order_of_examples_does_not_matter(seed: int) -> None:
    x, labels = problem(15, 20, 3, seed)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(seed))
    plain = ridge(x, labels=labels, num_classes=3)
    shuffled = ridge(x[order], labels=labels[order], num_classes=3)
    torch.testing.assert_close(plain.loo_error[order], shuffled.loo_error)


def test_features_of_half_precision_are_solved_in_float64() -> None:
    x, labels = problem(20, 6, 2)
    assert ridge(x.half(), labels=labels, num_classes=2).head.weight.dtype == torch.float64


def test_constant_features_score_every_class_by_its_share() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    found = ridge(torch.ones(4, 3), labels=labels, num_classes=2)
    torch.testing.assert_close(
        found.head.scores(torch.ones(1, 3))[0], torch.tensor([0.75, 0.25], dtype=torch.float64)
    )


def test_a_class_of_one_example_and_separable_classes_give_finite_errors() -> None:
    x = torch.tensor([[0.0, 0.0], [0.0, 0.1], [9.0, 9.0], [9.0, 9.1], [50.0, -50.0]])
    found = ridge(x, labels=torch.tensor([0, 0, 1, 1, 2]), num_classes=3)
    assert bool(torch.isfinite(found.loo_error).all())


@pytest.mark.parametrize(
    ("features", "message"),
    [(torch.zeros(1, 3), "1 training examples"), (torch.tensor([[1.0], [torch.nan]]), "NaN")],
)
def test_unusable_features_are_refused(features: Tensor, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        ridge(features, labels=torch.zeros(len(features), dtype=torch.int64), num_classes=2)


def test_accuracy_is_the_share_of_right_answers() -> None:
    head = LinearHead(weight=torch.eye(2), bias=torch.zeros(2))
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    assert head.accuracy(features, labels=torch.tensor([0, 1, 0, 1])) == 0.75
