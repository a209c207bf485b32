"""Which head a frozen model gets, and that it is the one that was judged."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from svdmerge.core.discriminant import discriminant
from svdmerge.core.transfer import LinearHead
from svdmerge.training.head import FOLDS, fitted_head


def examples(num_classes: int, *, per_class: int, skewed: bool) -> tuple[Tensor, Tensor]:
    """Gaussian classes; skewed ones have a few directions of each class's own large variance."""
    generator = torch.Generator().manual_seed(num_classes)
    labels = torch.arange(num_classes).repeat_interleave(per_class)
    means = torch.randn(num_classes, 24, generator=generator)
    noise = torch.randn(len(labels), 24, generator=generator)
    if skewed:
        noise = noise.sign() * noise.abs() ** 4
    return means[labels] + 0.7 * noise, labels


def head_of(features: Tensor, labels: Tensor) -> tuple[LinearHead, LinearHead]:
    """The head, and that in closed form."""
    closed = discriminant(features, labels=labels, num_classes=int(labels.max()) + 1)
    return fitted_head(features, labels=labels, closed=closed), closed.head


def test_where_the_closed_form_does_as_well_it_stays() -> None:
    features, labels = examples(3, per_class=12, skewed=False)
    head, closed = head_of(features, labels)
    assert head is closed


@pytest.mark.parametrize("num_classes", [2, 12])
def test_logistic_regression_comes_in_the_features_own_units(num_classes: int) -> None:
    features, labels = examples(num_classes, per_class=9, skewed=True)
    features = 5.0 + 3.0 * features
    head, closed = head_of(features, labels)
    assert head is not closed
    scaler = StandardScaler().fit(features.numpy())
    scores = head.scores(features.double())
    same = [
        np.array_equal(
            LogisticRegression(C=c, max_iter=200)
            .fit(scaler.transform(features.double().numpy()), labels.numpy())
            .predict(scaler.transform(features.double().numpy())),
            scores.argmax(dim=1).numpy(),
        )
        for c in (1e-3, 1e-2, 1e-1, 1.0)
    ]
    assert any(same)


def test_two_classes_keep_their_odds() -> None:
    features, labels = examples(2, per_class=9, skewed=True)
    head, _ = head_of(features, labels)
    scores = head.scores(features.double())
    assert torch.allclose(scores[:, 0], -scores[:, 1])


def test_classes_too_small_for_folds_get_the_closed_form() -> None:
    features, labels = examples(12, per_class=FOLDS - 1, skewed=True)
    head, closed = head_of(features, labels)
    assert head is closed


def test_the_same_examples_give_the_same_head() -> None:
    features, labels = examples(12, per_class=9, skewed=True)
    one, other = head_of(features, labels)[0], head_of(features, labels)[0]
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.bias, other.bias)
