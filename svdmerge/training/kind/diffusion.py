"""Class-conditional denoising diffusion as an objective: a DiT learns to denoise images."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from svdmerge.core.diffusion import denoising_losses
from svdmerge.core.dit import DiT, DiTConfig
from svdmerge.core.kind.replace import Spec, decomposable
from svdmerge.errors import TrainingError
from svdmerge.storage.filesystem import Folder
from svdmerge.training.kind.denoising import held_out_losses, predict, samples
from svdmerge.training.labelled_images import LabelledImages, read_labelled_images
from svdmerge.training.pictures import grid, png_bytes


@dataclass(frozen=True, kw_only=True)
class Diffusion:
    """Denoising images of some classes; implements `Objective`. Plain data, so that it travels.

    Class i of the model, of its embedding and of its gate, is `classes[i]` of the files' labels.
    """

    network: DiTConfig
    train: str
    """Path or URI of a table of images and labels, as `read_labelled_images` takes it."""
    classes: tuple[int, ...]
    spec: Spec | None
    """How the network is made decomposable; None trains it dense."""
    seed: int = 0
    """Of the network's start, and of times and noise."""
    test: str = ""
    """A table like `train` whose mean denoising loss is measured; empty measures none."""
    pictures: str = ""
    """Folder that sample grids are written to, a row for each class; empty writes none."""
    prepare: Callable[[nn.Module], None] | None = None
    """Changes the fresh model in place before it trains, as where learngenes are carried over."""
    random_gate: bool = False
    """A control: each image uses the tailors of a class drawn anew in every step."""

    def __post_init__(self) -> None:
        if self.network.num_classes != len(self.classes):
            raise TrainingError(
                f"classes: a network of {self.network.num_classes} classes for {len(self.classes)}",
                "Every class has its own embedding.",
                "Make `num_classes` the number of classes.",
            )

    @property
    def num_examples(self) -> int:
        """Images to train on."""
        return len(self._images)

    @property
    def labels(self) -> Tensor:
        """The model's class of each image to train on (n,)."""
        return self._images.labels

    @cached_property
    def _images(self) -> LabelledImages:
        return self._read(self.train)

    def _read(self, path: str) -> LabelledImages:
        size, channels = self.network.image_size, self.network.channels
        return read_labelled_images(path, channels=channels, size=size).of_classes(self.classes)

    def model(self) -> nn.Module:
        """A fresh DiT, prepared."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = DiT(self.network)
        if self.spec is not None:
            decomposable(model, self.spec)
        if self.prepare is not None:
            self.prepare(model)
        return model

    def losses(self, model: nn.Module, rows: Sequence[int], *, step: int) -> Tensor:
        """Denoising losses (b,) of some images at times and with noise drawn for each."""
        images, labels = self._images.scaled(rows), self._images.labels[list(rows)]
        drawn = [self._draw(row, step=step) for row in rows]
        gates = torch.tensor([gate for gate, _, _ in drawn]) if self.random_gate else labels
        device = next(model.parameters()).device
        return denoising_losses(
            predict(model, labels.to(device), gates=gates.to(device)),
            images.to(device),
            noise=torch.stack([noise for _, _, noise in drawn]).to(device),
            times=torch.stack([time for _, time, _ in drawn]).to(device),
        )

    def measure(self, model: nn.Module, *, step: int) -> dict[str, float]:
        """The held-out denoising loss; a grid of samples is written beside it."""
        if self.pictures:
            shape = self._images.pixels.shape[1:]
            labels = [c for c in range(len(self.classes)) for _ in range(8)]
            made = samples(model, labels, shape=tuple(shape), num_steps=50, seed=self.seed)
            picture = png_bytes(grid(made, columns=8, scale=max(1, 64 // shape[-1])))
            Folder.at(self.pictures).put(f"samples-{step:06d}.png", picture)
        if not self.test:
            return {}
        return {"held_out_loss": float(held_out_losses(model, self._read(self.test)).mean())}

    def _draw(self, row: int, *, step: int) -> tuple[int, Tensor, Tensor]:
        """A class for the random gate, a time and noise, from (seed, step, row) alone."""
        digest = hashlib.sha256(f"{self.seed}\0{step}\0{row}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        time = torch.rand((), generator=generator)
        noise = torch.randn(self._images.pixels.shape[1:], generator=generator)
        gate = int(torch.randint(len(self.classes), (), generator=generator))
        return gate, time, noise


def unread(diffusion: Diffusion) -> Diffusion:
    """The same objective without the images it may have read: each process reads its own."""
    return replace(diffusion)
