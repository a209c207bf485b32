"""A small convolutional classifier of images, whose features generated images are judged by."""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdmerge.training.data import epoch_order
from svdmerge.training.labelled_images import LabelledImages

_BATCH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifierTraining:
    """Sizes and pace: about a minute of one core for 15,000 images of 32 x 32."""

    num_features: int = 64
    epochs: int = 6
    learning_rate: float = 3e-3
    mirrored: bool = True
    """Whether a mirrored image is still one of its class."""
    seed: int = 0


class ImageClassifier(nn.Module):
    """Three convolutions, each at half the resolution, and a linear head on their mean."""

    def __init__(self, *, channels: int, num_classes: int, num_features: int) -> None:
        super().__init__()
        sizes = (channels, num_features // 2, num_features, num_features)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(n, m, 3, stride=2, padding=1) for n, m in itertools.pairwise(sizes)
        )
        # Batch statistics would make one image's features depend on the others'.
        self.norms = nn.ModuleList(nn.GroupNorm(8, m) for m in sizes[1:])
        self.head = nn.Linear(num_features, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """(b, num_features) of images (b, channels, h, w) from -1 to 1."""
        x = images
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.silu(norm(convolution(x)))
        return x.mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Scores (b, num_classes)."""
        return self.head(self.features(images))


def train_classifier(
    images: LabelledImages, *, num_classes: int, training: ClassifierTraining
) -> ImageClassifier:
    """A classifier of the images' labels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        model = ImageClassifier(
            channels=images.pixels.shape[1], num_classes=num_classes,
            num_features=training.num_features,
        )  # fmt: skip
    steps = training.epochs * -(-len(images) // _BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.learning_rate, total_steps=steps, pct_start=0.2
    )
    for epoch in range(training.epochs):
        order = torch.tensor(epoch_order(len(images), seed=training.seed, epoch=epoch))
        for number, rows in enumerate(order.split(_BATCH)):
            seen = images.scaled(rows.tolist())
            # Every other batch: each image is then seen either way over the epochs.
            if training.mirrored and (number + epoch) % 2:
                seen = seen.flip(-1)
            optimizer.zero_grad()
            F.cross_entropy(model(seen), images.labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def features_of(model: ImageClassifier, images: Tensor) -> Tensor:
    """Features (n, d) of images from -1 to 1."""
    return torch.cat([model.features(part) for part in images.split(256)])


@torch.no_grad()
def accuracy(model: ImageClassifier, images: Tensor, *, labels: Tensor) -> float:
    """The share of images that the classifier takes for what they are meant to be."""
    found = torch.cat([model(part).argmax(dim=1) for part in images.split(256)])
    return float((found == labels).double().mean())
