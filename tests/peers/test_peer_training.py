"""The trainer that all comparators share, and the two losses it minimises."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from toy_target import CLASSES, MATRICES, SETTINGS, Target

from svdmerge.core.transfer import ridge
from svdmerge.errors import TrainingError
from svdmerge.peers.diagonal import sigma_w0
from svdmerge.peers.free import full
from svdmerge.peers.objectives import Classification, ContrastivePairs
from svdmerge.peers.train import Trained, TrainSettings, train

TARGET = Target()
ROWS = list(range(len(TARGET.labels)))


def trained(settings: TrainSettings = SETTINGS) -> Trained:
    return TARGET.train(sigma_w0(TARGET.base, names=MATRICES, num_values=4), settings)


def test_steps_are_epochs_of_batches_up_to_the_cap() -> None:
    settings = replace(SETTINGS, epochs=3, batch_size=10)
    assert len(trained(settings).losses) == settings.num_steps(24) == 9
    assert len(trained(replace(settings, max_steps=5)).losses) == 5
    assert len(trained(replace(settings, max_steps=50)).losses) == 9


def test_another_seed_is_another_order() -> None:
    assert trained().losses != trained(replace(SETTINGS, seed=1)).losses


def test_the_first_step_is_one_of_adam_at_the_full_rate_and_the_rate_falls() -> None:
    settings = replace(SETTINGS, batch_size=24, epochs=1)
    space = full(TARGET.base, names=["up.weight"])
    moved = TARGET.train(space, settings).weights["up.weight"] - TARGET.base["up.weight"]
    # Adam's first step is the rate times the gradient's sign, but where that is next to zero.
    torch.testing.assert_close(
        moved.abs().median(), torch.tensor(settings.learning_rate), rtol=1e-3, atol=0
    )
    # Constant gradients: steps of rate * (cos(pi t / 4) + 1) / 2 add up to 2.5 rates.
    value, linear = full({"w": torch.zeros(1)}, names=["w"]), _Linear()
    end = train(
        lambda weights, rows: weights["w"][None],
        space=value,
        objective=linear,
        settings=TrainSettings(epochs=4, batch_size=1, learning_rate=0.1, head_learning_rate=0.0),
    )
    torch.testing.assert_close(end.weights["w"], torch.tensor([-0.25]), rtol=1e-4, atol=0)


class _Linear(ContrastivePairs):
    """A loss whose gradient is 1 everywhere."""

    def __init__(self) -> None:
        super().__init__(torch.tensor([0, 1]), seed=0, rounds=1)

    @property
    def num_items(self) -> int:
        return 1

    def loss(self, features, *, items):  # type: ignore[no-untyped-def]
        return features(items).sum()


def test_weight_decay_pulls_the_values_and_leaves_the_head_alone() -> None:
    # Rates so small that a step is decay alone: 1 - 1e-9 * 1e8 of what was.
    settings = TrainSettings(
        epochs=1, batch_size=24, learning_rate=1e-9, head_learning_rate=1e-9, weight_decay=1e8
    )
    objective, space = TARGET.objective(), full(TARGET.base, names=["up.weight"])
    end = train(TARGET.features, space=space, objective=objective, settings=settings)
    expected = 0.9 * TARGET.base["up.weight"]
    torch.testing.assert_close(end.weights["up.weight"], expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        objective.head().weight, TARGET.head.weight.float(), atol=1e-6, rtol=0
    )


def test_what_was_returned_stays_when_the_space_trains_on() -> None:
    space = full(TARGET.base, names=["up.weight"])
    found = TARGET.train(space).weights["up.weight"]
    before = found.clone()
    assert not torch.equal(TARGET.train(space).weights["up.weight"], before)
    assert torch.equal(found, before)


def test_the_head_trains_along_from_its_start() -> None:
    fit = ridge(TARGET.features({}, ROWS), labels=TARGET.labels, num_classes=CLASSES)
    objective = Classification(TARGET.labels, head=fit.head)
    torch.testing.assert_close(objective.head().weight.double(), fit.head.weight)
    start = objective.loss(lambda rows: TARGET.features({}, rows), items=ROWS)
    space = sigma_w0(TARGET.base, names=MATRICES, num_values=2)
    end = train(TARGET.features, space=space, objective=objective, settings=SETTINGS)
    assert not torch.allclose(objective.head().weight.double(), fit.head.weight)
    loss = objective.loss(lambda rows: TARGET.features(end.weights, rows), items=ROWS)
    assert float(loss.detach()) < float(start.detach())


def test_a_loss_that_explodes_is_told_with_its_rates() -> None:
    with pytest.raises(TrainingError, match="learning_rate 1e\\+30"):
        trained(replace(SETTINGS, learning_rate=1e30))


def test_pairs_are_of_both_kinds_never_of_an_example_with_itself() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    seen: list[tuple[int, int, float]] = []
    objective = ContrastivePairs(labels, seed=0, rounds=5)
    # Class 2 has one example, so no positive pairs.
    assert objective.num_items == 2 * 5 * 5 + 5
    for item in range(objective.num_items):
        rows: list[list[int]] = []

        def features(asked: list[int], rows: list[list[int]] = rows) -> torch.Tensor:
            rows.append(asked)
            return F.one_hot(labels[asked], 3).float()

        # One-hot features of the class fit the targets perfectly: cosine 1 within, 0 across.
        assert float(objective.loss(features, items=[item])) == pytest.approx(0.0, abs=1e-6)
        (pair,) = rows
        assert len(set(pair)) == 2
        seen.append((pair[0], pair[1], float(labels[pair[0]] == labels[pair[1]])))
    assert {kind for _, _, kind in seen} == {0.0, 1.0}
    assert len(set(seen)) > 5


def test_an_example_in_several_pairs_of_a_step_passes_through_the_model_once() -> None:
    objective = ContrastivePairs(TARGET.labels, seed=0, rounds=3)
    asked: list[list[int]] = []

    def features(rows: list[int]) -> torch.Tensor:
        asked.append(rows)
        return TARGET.features({}, rows)

    objective.loss(features, items=list(range(objective.num_items)))
    assert asked == [ROWS]


def test_contrastive_tuning_draws_classes_together_and_apart() -> None:
    same = (TARGET.labels[:, None] == TARGET.labels).float()

    def error(weights: dict[str, torch.Tensor]) -> float:
        x = F.normalize(TARGET.features(weights, ROWS))
        return float((x @ x.T - same).square().mean())

    settings = replace(SETTINGS, epochs=1, batch_size=16, learning_rate=1e-3)
    ends = [
        train(
            TARGET.features,
            space=full(TARGET.base, names=list(TARGET.base)),
            objective=ContrastivePairs(TARGET.labels, seed=4),
            settings=settings,
        )
        for _ in range(2)
    ]
    assert error(ends[0].weights) < 0.2 * error({})
    assert ends[0].losses == ends[1].losses


def test_one_class_has_no_contrast() -> None:
    with pytest.raises(TrainingError, match="two classes"):
        ContrastivePairs(torch.zeros(4, dtype=torch.int64), seed=0)
