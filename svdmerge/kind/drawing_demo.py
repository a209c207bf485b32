"""Train, split, recombine and transfer on real data: the handwritten digits of scikit-learn.

A small diffusion transformer learns to draw the digits 0 to 6, each by the learngenes and its own
tailors. It goes to the store, and comes back as a model of two digits; its learngenes go on to draw
7 to 9. What is drawn is judged by a classifier that learnt from the same training images.
"""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdmerge.core.dit import DiTConfig
from svdmerge.core.kind.gate import disjoint
from svdmerge.core.kind.replace import Spec
from svdmerge.demo_models import SIDE
from svdmerge.engine.runtime import open_runtime
from svdmerge.kind.diffusion import train_diffusion
from svdmerge.kind.digits import write_digits
from svdmerge.kind.folder import Model, load, read
from svdmerge.kind.recombine import Cost, compared, recombined
from svdmerge.kind.split import place_of, stored
from svdmerge.kind.train import Learngenes
from svdmerge.progress import SILENT, Progress, Stage
from svdmerge.storage.filesystem import Folder
from svdmerge.training.image_classifier import (
    ClassifierTraining,
    accuracy,
    train_classifier,
)
from svdmerge.training.kind.denoising import held_out_losses, samples
from svdmerge.training.kind.diffusion import Diffusion
from svdmerge.training.kind.objective import Settings
from svdmerge.training.labelled_images import LabelledImages, read_labelled_images
from svdmerge.training.pictures import grid, png_bytes

OLD, NOVEL, KEPT = (0, 1, 2, 3, 4, 5, 6), (7, 8, 9), (2, 5)
NUM_TRAIN = 1300
SHOWN_EACH = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawingSettings:
    """Sizes of the demo."""

    width: int = 48
    depth: int = 2
    steps: int = 1200
    transfer_steps: int = 400
    learning_rate: float = 5e-3
    num_learngenes: int = 18
    tailors_each: int = 2
    sample_steps: int = 25
    classifier_epochs: int = 12
    seed: int = 0

    def network(self, num_classes: int) -> DiTConfig:
        """The diffusion transformer's sizes."""
        return DiTConfig(
            image_size=SIDE, channels=1, patch=2, width=self.width, depth=self.depth, heads=2,
            num_classes=num_classes,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawingRow:
    """A model and what it draws."""

    name: str
    digits: str
    parameters: int
    held_out_loss: float
    accuracy: float
    """Share of its drawings that the classifier reads as the digit meant."""
    flops: int | None = None
    latency_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawingResult:
    """What the demo found, and where everything lies."""

    rows: tuple[DrawingRow, ...]
    classifier_accuracy: float
    """On real test images."""
    max_difference: float
    """Of outputs of the recombined model to the full one's."""
    seconds: float
    pictures: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def run_drawing_demo(
    out: str | Path,
    *,
    address: str = "local",
    progress: Progress = SILENT,
    settings: DrawingSettings | None = None,
) -> DrawingResult:
    """Train on seven digits, recombine for two, transfer to three; what an earlier call trained in
    `out` is used again.

    Raises:
        ResourceError: scikit-learn is missing.
        SvdmergeError: whatever training or the store meets.
    """
    start = time.monotonic()
    with open_runtime(address):
        demo = _Work(Folder.at(out), settings or DrawingSettings(), progress, address != "none")
        return _demonstrated(demo, start=start)


def _demonstrated(demo: "_Work", *, start: float) -> DrawingResult:
    full = demo.trained(OLD, name="model", steps=demo.settings.steps)
    kept = stored(demo.store, full)
    names = [str(c) for c in KEPT]
    _, small, _ = recombined(kept, classes=names, budget=None)
    costs = compared(load(full), small, example=full.example, classes=names)
    learngenes = Learngenes(store=demo.store, place=place_of(full))
    novel = [
        demo.trained(NOVEL, name=name, steps=demo.settings.transfer_steps, learngenes=given)
        for name, given in (("transferred", learngenes), ("scratch", None))
    ]
    rows = [
        demo.row("trained", load(full), OLD),
        replace(demo.row("the same, two digits", load(full), KEPT, among=OLD), **_cost(costs[0])),
        replace(demo.row("recombined", small, KEPT, among=OLD, gated_as=KEPT), **_cost(costs[1])),
        demo.row("learngenes, novel digits", load(novel[0]), NOVEL),
        demo.row("from scratch", load(novel[1]), NOVEL),
    ]
    return DrawingResult(
        rows=tuple(rows),
        classifier_accuracy=demo.right_on_tests,
        max_difference=costs[2],
        seconds=time.monotonic() - start,
        pictures=tuple(demo.pictures),
    )


class _Work:
    """Everything that is made in the demo's folder."""

    def __init__(
        self, out: Folder, settings: DrawingSettings, progress: Progress, use_ray: bool
    ) -> None:
        self.settings, self.store = settings, out.child("store")
        self.pictures: list[str] = []
        self._out, self._progress, self._use_ray = out, progress, use_ray
        self._places = write_digits(out, num_train=NUM_TRAIN)
        self._train, self._test = (
            read_labelled_images(place, channels=1, size=SIDE) for place in self._places
        )
        training = ClassifierTraining(epochs=settings.classifier_epochs, mirrored=False)
        self._classifier = train_classifier(self._train, num_classes=10, training=training)
        self.right_on_tests = accuracy(
            self._classifier, self._test.scaled(), labels=self._test.labels
        )

    def trained(
        self,
        digits: tuple[int, ...],
        *,
        name: str,
        steps: int,
        learngenes: Learngenes | None = None,
    ) -> Model:
        """A model that draws some digits, in the folder `name`."""
        s, names = self.settings, [str(c) for c in digits]
        spec = Spec(
            gate=disjoint(names), num_learngenes=s.num_learngenes,
            num_tailors=s.tailors_each * len(digits), seed=s.seed,
        )  # fmt: skip
        diffusion = Diffusion(
            network=s.network(len(digits)), train=self._places[0], classes=digits, spec=spec,
            seed=s.seed,
        )  # fmt: skip
        settings = Settings(
            steps=steps, batch_size=32, learning_rate=s.learning_rate, warmup_steps=50, ema=0.99
        )
        with self._progress.stage(name, steps) as bar:
            train_diffusion(
                diffusion, settings=settings, names=names, out=self._out.child(name),
                store=self.store, use_ray=self._use_ray, learngenes=learngenes,
                on_step=_Advance(bar),
            )  # fmt: skip
        return read(self._out.child(name))

    def row(
        self,
        name: str,
        model: nn.Module,
        digits: tuple[int, ...],
        *,
        among: tuple[int, ...] | None = None,
        gated_as: tuple[int, ...] | None = None,
    ) -> DrawingRow:
        """A model measured on digits; `among` are those its embedding numbers, `gated_as` those
        its gate does, if others."""
        embedded, switched = among or digits, gated_as or among or digits
        held = self._test.of_classes(digits)
        labels, gates = (
            torch.tensor([numbers.index(digits[c]) for c in held.labels.tolist()])
            for numbers in (embedded, switched)
        )
        loss = held_out_losses(
            model, LabelledImages(pixels=held.pixels, labels=labels), gates=gates
        ).mean()
        drawn = [c for c in digits for _ in range(SHOWN_EACH)]
        made = samples(
            model, [embedded.index(c) for c in drawn], shape=(1, SIDE, SIDE),
            num_steps=self.settings.sample_steps, seed=self.settings.seed,
            gates=[switched.index(c) for c in drawn],
        )  # fmt: skip
        self._draw(name, made)
        return DrawingRow(
            name=name,
            digits=" ".join(map(str, digits)),
            parameters=sum(p.numel() for p in model.parameters()),
            held_out_loss=float(loss),
            accuracy=accuracy(self._classifier, made, labels=torch.tensor(drawn)),
        )

    def _draw(self, name: str, made: Tensor) -> None:
        file = f"pictures/{name.replace(',', '').replace(' ', '-')}.png"
        self._out.put(file, png_bytes(grid(made, columns=SHOWN_EACH, scale=4)))
        self.pictures.append(f"{self._out.uri}/{file}")


class _Advance:
    """Moves a bar to the step that is told."""

    def __init__(self, bar: Stage) -> None:
        self._bar, self._step = bar, 0

    def __call__(self, step: int) -> None:
        self._bar.advance(step - self._step)
        self._step = step


def _cost(cost: Cost) -> dict[str, Any]:
    return {"flops": cost.flops, "latency_ms": cost.latency_ms}
