"""How good sampled images are, by the features of a classifier of the same data."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svdmerge.comparison.kind.study import Study
from svdmerge.core.image_quality import frechet_distance, kernel_distance, precision_recall
from svdmerge.training.image_classifier import (
    ClassifierTraining,
    ImageClassifier,
    accuracy,
    features_of,
    train_classifier,
)
from svdmerge.training.kind.denoising import samples
from svdmerge.training.labelled_images import LabelledImages
from svdmerge.training.pictures import grid, png_bytes

NUM_EACH = 50
NUM_STEPS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Of generated images beside the test images of the same classes."""

    kernel: float
    frechet: float
    precision: float
    recall: float
    accuracy: float
    """Share that the classifier takes for the class they were made as."""


def classifier(study: Study) -> tuple[ImageClassifier, float]:
    """A classifier of all classes, trained on the training images, and its test accuracy."""
    training = ClassifierTraining(epochs=study.classifier_epochs, mirrored=study.mirrored)

    def work() -> dict[str, Tensor]:
        return train_classifier(
            study.seen, num_classes=len(study.names), training=training
        ).state_dict()

    model = ImageClassifier(
        channels=study.channels, num_classes=len(study.names), num_features=training.num_features
    )
    model.load_state_dict(study.measured("classifier", work))
    model.eval().requires_grad_(False)
    return model, accuracy(model, study.tested.scaled(), labels=study.tested.labels)


def quality(
    study: Study, name: str, model: nn.Module, *, classes: tuple[int, ...], seed: int
) -> Quality:
    """A model's samples of its classes; their grid is written to `pictures/<name>.png`."""

    def work() -> dict[str, Tensor]:
        return {"samples": _sampled(study, name, model, num_classes=len(classes), seed=seed)}

    made = study.measured(f"samples-{name}", work)["samples"]
    labels = torch.tensor([classes[c] for c in _labels(len(classes))])
    return _judged(study, made, labels=labels, real=study.tested.of_classes(classes))


def real_quality(study: Study, classes: tuple[int, ...]) -> Quality:
    """What as many training images reach: the floor of the distances."""
    images = study.seen.of_classes(classes)
    rows = [
        row
        for c in range(len(classes))
        for row in (images.labels == c).nonzero()[:NUM_EACH, 0].tolist()
    ]
    labels = torch.tensor([classes[c] for c in images.labels[rows].tolist()])
    return _judged(study, images.scaled(rows), labels=labels, real=study.tested.of_classes(classes))


def _labels(num_classes: int) -> list[int]:
    return [c for c in range(num_classes) for _ in range(NUM_EACH)]


def _sampled(study: Study, name: str, model: nn.Module, *, num_classes: int, seed: int) -> Tensor:
    shape = (study.channels, study.size, study.size)
    made = samples(
        model.to(study.device), _labels(num_classes), shape=shape, num_steps=NUM_STEPS, seed=seed
    )
    shown = made.unflatten(0, (num_classes, NUM_EACH))[:, :10].flatten(0, 1)
    study.folder.put(f"pictures/{name}.png", png_bytes(grid(shown, columns=10)))
    return made


def _judged(study: Study, made: Tensor, *, labels: Tensor, real: LabelledImages) -> Quality:
    model, _ = classifier(study)
    # As many real images as generated ones, the same of each class: distances depend on numbers.
    rows = [
        row
        for c in range(int(real.labels.max()) + 1)
        for row in (real.labels == c).nonzero()[:NUM_EACH, 0].tolist()
    ]
    x, y = features_of(model, real.scaled(rows)), features_of(model, made)
    shares = precision_recall(x, y)
    return Quality(
        kernel=kernel_distance(x, y),
        frechet=frechet_distance(x, y),
        precision=shares.precision,
        recall=shares.recall,
        accuracy=accuracy(model, made, labels=labels),
    )


def nearest_old(study: Study) -> list[tuple[str, float]]:
    """Of each novel class the old class nearest to it, and the Frechet distance to that."""
    model, _ = classifier(study)
    features = {
        c: features_of(model, study.seen.of_classes((c,)).scaled())
        for c in (*study.old, *study.novel)
    }
    return [
        min(
            (
                (study.names[old], frechet_distance(features[old], features[new]))
                for old in study.old
            ),
            key=lambda pair: pair[1],
        )
        for new in study.novel
    ]
