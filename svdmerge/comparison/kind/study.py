"""The benchmark's settings and its models, each trained once and kept."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from svdmerge.core.dit import DiTConfig
from svdmerge.core.kind.gate import ClassGate, disjoint, gate_of
from svdmerge.core.kind.replace import Spec
from svdmerge.storage.filesystem import Folder
from svdmerge.training.checkpointing import FolderCheckpoints, State, load_file, save_file
from svdmerge.training.kind.denoising import held_out_losses
from svdmerge.training.kind.diffusion import Diffusion
from svdmerge.training.kind.loop import KindLoop, train_kind
from svdmerge.training.kind.objective import Objective, Settings
from svdmerge.training.labelled_images import LabelledImages, read_labelled_images
from svdmerge.training.loop import Group


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is trained on what. The defaults take about a minute of one core a model."""

    train: str
    """Table of images and labels to train on."""
    test: str
    out: Path
    """Folder that models and measurements are kept in."""
    names: tuple[str, ...]
    """Of the labels 0, 1, ..."""
    old: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6)
    novel: tuple[int, ...] = (7, 8, 9)
    pairs: tuple[tuple[int, int], ...] = ((0, 1), (3, 5), (4, 6))
    """Old classes to recombine for, one pair for each seed."""
    size: int = 32
    """Pixels of a side."""
    channels: int = 3
    patch: int = 4
    width: int = 64
    depth: int = 3
    heads: int = 2
    num_learngenes: int = 21
    """With as many tailors, 42 components: as many parameters as dense layers have, at any width
    three halves of it: 18 width x 42 against 12 width^2."""
    num_tailors: int = 21
    new_tailors: int = 0
    """Of the novel classes together; 0 for as many as the old ones have."""
    sharing: Literal["none", "pairs", "next"] = "none"
    """Whether old classes share tailors: not at all, two by two, or each with the next as well."""
    steps: int = 900
    learning_rate: float = 6e-3
    """Of gated models: on CIFAR-10 the best of 1e-3, 3e-3, 6e-3 by training loss, for dense ones
    too; on digits the best of 6e-3 and 1.2e-2."""
    dense_rate: float = 6e-3
    """Of dense models."""
    batch_size: int = 16
    """At equal processor time, 600 steps of 16 reach 0.181 where 300 of 32 reach 0.213."""
    num_draws: int = 4
    """Noisings of each test image."""
    transfer_steps: int = 300
    classifier_epochs: int = 6
    mirrored: bool = True
    """Whether mirrored images are of their class, as the classifier is told."""
    num_few: int = 100
    """Test images of each class where many losses are taken: of every gate, and along curves."""
    device: str = "cpu"
    """Where models train and are measured; what is kept is on the CPU."""

    @cached_property
    def folder(self) -> Folder:
        """Where all is kept."""
        return Folder.at(self.out)

    @cached_property
    def tested(self) -> LabelledImages:
        """All test images."""
        return read_labelled_images(self.test, channels=self.channels, size=self.size)

    @cached_property
    def seen(self) -> LabelledImages:
        """All training images."""
        return read_labelled_images(self.train, channels=self.channels, size=self.size)

    def few(self, classes: tuple[int, ...]) -> LabelledImages:
        """Some test images of each of these classes."""
        found = self.tested.of_classes(classes)
        rows = [
            row
            for c in range(len(classes))
            for row in (found.labels == c).nonzero()[: self.num_few, 0].tolist()
        ]
        return LabelledImages(pixels=found.pixels[rows], labels=found.labels[rows])

    def network(self, num_classes: int, *, width: int | None = None) -> DiTConfig:
        """The DiT's sizes."""
        return DiTConfig(
            image_size=self.size, channels=self.channels, patch=self.patch,
            width=width or self.width, depth=self.depth, heads=self.heads, num_classes=num_classes,
        )  # fmt: skip

    @property
    def num_new(self) -> int:
        """Tailors of each novel class."""
        return (self.new_tailors or self.num_tailors) // len(self.novel)

    def shared_gate(self, classes: tuple[int, ...]) -> ClassGate:
        """The gate of classes to pre-train on."""
        names, num = [self.names[c] for c in classes], len(classes)
        if self.sharing == "none":
            return disjoint(names)
        if self.sharing == "pairs":
            return gate_of({name: [f"pair {i // 2}"] for i, name in enumerate(names)})
        return gate_of({name: [name, names[(i + 1) % num]] for i, name in enumerate(names)})

    def gate(self, classes: tuple[int, ...]) -> ClassGate:
        """A tailor group for each class."""
        return disjoint([self.names[c] for c in classes])

    def spec(self, classes: tuple[int, ...], *, seed: int) -> Spec:
        """The split; every class has as many tailors whatever the number of classes."""
        own = self.num_tailors // len(self.old)
        return Spec(
            gate=self.shared_gate(classes), num_learngenes=self.num_learngenes,
            num_tailors=own * len(classes), seed=seed,
        )  # fmt: skip

    def objective(
        self, classes: tuple[int, ...], *, spec: Spec | None, seed: int, width: int | None = None,
        random_gate: bool = False,
    ) -> Diffusion:  # fmt: skip
        """Denoising these classes."""
        return Diffusion(
            network=self.network(len(classes), width=width), train=self.train, classes=classes,
            spec=spec, seed=seed, random_gate=random_gate,
        )  # fmt: skip

    def gated(self, seed: int, classes: tuple[int, ...] | None = None) -> nn.Module:
        """A KIND model."""
        chosen = classes or self.old
        name = "gated" if chosen == self.old else f"gated-{'-'.join(map(str, chosen))}"
        spec = self.spec(chosen, seed=seed)
        return self.trained(f"{name}-{seed}", self.objective(chosen, spec=spec, seed=seed))

    def random_gate(self, seed: int) -> nn.Module:
        """The control of equal capacity whose gate knows nothing of classes."""
        spec = self.spec(self.old, seed=seed)
        objective = self.objective(self.old, spec=spec, seed=seed, random_gate=True)
        return self.trained(f"random-gate-{seed}", objective)

    def dense(self, seed: int) -> nn.Module:
        """A dense model of the gated one's parameters."""
        objective = self.objective(self.old, spec=None, seed=seed)
        return self.trained(f"dense-{seed}", objective, settings=self.dense_settings)

    def dense_pair(self, seed: int, *, width: int, as_seen: bool = False) -> nn.Module:
        """A dense model of another width, trained on a pair's images alone; `as_seen` for as many
        steps as show it each as often as models of all classes see it."""
        objective = self.objective(self.pairs[seed], spec=None, seed=seed, width=width)
        name, settings = f"dense-pair-{seed}-{width}", self.dense_settings
        if as_seen:
            name = f"{name}-as-seen"
            settings = replace(settings, steps=round(self.steps * 2 / len(self.old)))
        return self.trained(name, objective, settings=settings)

    def trained(
        self, name: str, objective: Objective, *, settings: Settings | None = None
    ) -> nn.Module:
        """The objective's model with averaged trained weights; trained now, or read."""
        kept = f"models/{name}.pt"
        if self.folder.stat(kept) is None:
            settings = settings or self.settings
            save_file(self.folder, kept, self._train(name, objective, settings=settings))
        model = objective.model()
        model.load_state_dict(load_file(self.folder, kept)["model"])
        return model.eval().requires_grad_(False)

    def late_loss(self, name: str, *, seed: int) -> float:
        """The mean training loss of a model that is kept, over the second half of its steps."""
        curve = load_file(self.folder, f"models/{name}-{seed}.pt")["curve"]
        losses = [point["loss"] for point in curve if "loss" in point]
        late = losses[len(losses) // 2 :]
        return sum(late) / len(late)

    @property
    def settings(self) -> Settings:
        """How models are pre-trained."""
        return Settings(
            steps=self.steps, batch_size=self.batch_size, learning_rate=self.learning_rate,
            warmup_steps=50, ema=0.99,
        )  # fmt: skip

    @property
    def dense_settings(self) -> Settings:
        """The same for dense models."""
        return replace(self.settings, learning_rate=self.dense_rate)

    def _train(self, name: str, objective: Objective, *, settings: Settings) -> State:
        loop = KindLoop(
            objective, settings=settings, group=Group(), device=torch.device(self.device)
        )
        checkpoints = FolderCheckpoints(self.folder.child(f"checkpoints/{name}"))
        state = train_kind(loop, checkpoints=checkpoints, on_step=_unseen)
        return {"model": loop.averaged(), "curve": state["curve"], "seconds": state["seconds"]}

    def losses(
        self, model: nn.Module, images: LabelledImages, *, num_draws: int | None = None,
        gates: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Held-out losses (n,) of a model, which is moved to the study's device."""
        return held_out_losses(
            model.to(self.device), images, num_draws=num_draws or self.num_draws, gates=gates
        )

    def measured(self, name: str, work: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `work` measures, or what it measured before under this name."""
        kept = f"measured/{name}.pt"
        if self.folder.stat(kept) is None:
            save_file(self.folder, kept, dict(work()))
        return load_file(self.folder, kept)


def one_thread() -> None:
    """Take one core: the bits of a figure are then those of any machine of its kind."""
    torch.set_num_threads(1)


def _unseen(loop: KindLoop) -> None:
    del loop


def num_parameters(model: nn.Module) -> int:
    """All of them."""
    return sum(p.numel() for p in model.parameters())
