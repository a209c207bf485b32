"""The target's examples: read, drawn, turned into inputs, and put in batches."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svdmerge.errors import TrainingError
from svdmerge.recipe import TuneConfig
from svdmerge.storage.checkpoint import Checkpoint
from svdmerge.storage.filesystem import Folder
from svdmerge.training.backbone import Inputs
from svdmerge.training.columns import Column, check_classes, read_columns, stacked
from svdmerge.training.images import Scaling, read_images
from svdmerge.training.tokens import MODEL_COLUMNS, tokenise


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Examples:
    """Inputs and labels. A text is a mapping of token columns, of its own length; else a tensor."""

    inputs: Tensor | Sequence[dict[str, Tensor]]
    labels: Tensor
    """Zeros where the task has none."""
    padding: dict[str, int]
    """What shorter texts are filled with, by token column."""
    scaling: Scaling | None = None
    """Of images, which are kept as bytes."""

    def __len__(self) -> int:
        return self.labels.shape[0]

    def batch(self, rows: Sequence[int]) -> Inputs:
        """Inputs of some examples; texts padded to the longest of them."""
        if isinstance(self.inputs, Tensor):
            inputs = self.inputs[list(rows)]
            return inputs if self.scaling is None else self.scaling(inputs)
        texts = [self.inputs[i] for i in rows]
        return {
            column: torch.nn.utils.rnn.pad_sequence(
                [text[column] for text in texts], batch_first=True, padding_value=fill
            )
            for column, fill in self.padding.items()
        }

    def by_length(self) -> list[int]:
        """All rows, like lengths together, so that batches hold little padding."""
        if isinstance(self.inputs, Tensor):
            return list(range(len(self)))
        lengths = [len(text["input_ids"]) for text in self.inputs]
        return sorted(range(len(self)), key=lambda i: (lengths[i], i))

    def take(self, rows: Sequence[int]) -> "Examples":
        """Some of the examples, in this order."""
        inputs = self.inputs
        return Examples(
            inputs=inputs[list(rows)] if isinstance(inputs, Tensor) else [inputs[i] for i in rows],
            labels=self.labels[list(rows)],
            padding=self.padding,
            scaling=self.scaling,
        )

    def digest(self) -> str:
        """sha256 of inputs and labels, as the backbone sees them."""
        digest = hashlib.sha256(self.labels.numpy().tobytes())
        if self.scaling is not None:
            digest.update(repr(self.scaling).encode())
        if isinstance(self.inputs, Tensor):
            digest.update(f"{list(self.inputs.shape)}".encode())
            digest.update(self.inputs.contiguous().numpy().tobytes())
            return digest.hexdigest()
        for text in self.inputs:
            for column in sorted(text):
                digest.update(f"{column}{len(text[column])}".encode())
                digest.update(text[column].numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Target:
    """The drawn training examples, the test examples and the number of classes."""

    train: Examples
    test: Examples
    num_classes: int
    """0 of a language target."""
    notes: tuple[str, ...]
    classes: tuple[str, ...] = ()
    """Their names, where sub-folders give them."""


def load_target(config: TuneConfig, *, base: Checkpoint) -> Target:
    """The target's examples.

    Raises:
        TrainingError: a file or column is missing or unfit, a class has no example, or a test label
            is not among the training labels.
    """
    drawn = draw_training(config)
    test = read_columns(config.test, config=config, classes=drawn.classes)
    num_classes = 0 if config.task == "causal_lm" else int(drawn.labels.max()) + 1
    if num_classes:
        _check_test(test, num_classes=num_classes, config=config)
    train_examples, test_examples = (
        prepare(part, config=config, base=base) for part in (drawn, test)
    )
    return Target(
        train=train_examples,
        test=test_examples,
        num_classes=num_classes,
        notes=(
            *_same(config),
            *(_short_classes(drawn.labels, per_class=config.per_class) if num_classes else ()),
            *_cut(train_examples, "training", max_length=config.max_length),
            *_cut(test_examples, "test", max_length=config.max_length),
        ),
        classes=drawn.classes,
    )


def _same(config: TuneConfig) -> Iterator[str]:
    if Folder.at(config.train) == Folder.at(config.test):
        yield "`test` is the file of `train`: what is measured on it says nothing of new examples"


def load_training(config: TuneConfig, *, base: Checkpoint) -> Examples:
    """The drawn training examples alone: what a training process needs. Raises as `load_target`."""
    return prepare(draw_training(config), config=config, base=base)


def draw_training(config: TuneConfig) -> Column:
    """The drawn training examples as they are stored. Raises as `load_target`."""
    everything = read_columns(config.train, config=config)
    if config.task != "causal_lm":
        check_classes(everything, label=config.label)
    rows = draw(everything.labels, per_class=config.per_class, seed=config.seed)
    return everything.take(rows)


def _check_test(test: Column, *, num_classes: int, config: TuneConfig) -> None:
    outside = test.labels[(test.labels < 0) | (test.labels >= num_classes)]
    if len(outside):
        raise TrainingError(
            f"{test.path}: column `{config.label}` holds the label {outside[0]}",
            f"The training examples have classes 0 to {num_classes - 1}.",
            "Use one numbering for both files.",
        )


def draw(labels: np.ndarray, *, per_class: int | None, seed: int) -> list[int]:
    """Rows of `per_class` examples of every class, ascending; all rows without `per_class`.

    Rows are ranked by a hash of seed and row, which no library version can change.
    """
    if per_class is None:
        return list(range(len(labels)))

    rows: list[int] = []
    for label in np.unique(labels):
        found: list[int] = np.flatnonzero(labels == label).tolist()
        rows += sorted(found, key=lambda row: _hash(seed, row))[:per_class]
    return sorted(rows)


def hold_out(labels: np.ndarray, *, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Rows to train on and rows held out, both ascending: of every class alike, one stays at least.

    Raises:
        TrainingError: the share is so small that it comes to no example at all.
    """
    # Another order than the draw's, so that what is held out is no matter of how many were drawn.
    held: list[int] = []
    for label in np.unique(labels):
        rows = sorted(np.flatnonzero(labels == label).tolist(), key=lambda row: _hash(~seed, row))
        held += rows[: min(int(share * len(rows) + 0.5), len(rows) - 1)]
    if share > 0 and not held:
        raise TrainingError(
            f"validation_share: {share:.3g} of each class comes to no example",
            f"{len(labels)} training examples of {len(np.unique(labels))} classes.",
            "Raise it, give more examples, or leave it out.",
        )
    return sorted(set(range(len(labels))) - set(held)), sorted(held)


def _hash(seed: int, row: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{row}".encode()).digest()


def _short_classes(labels: np.ndarray, *, per_class: int | None) -> Iterator[str]:
    counts = np.bincount(labels)
    short = np.flatnonzero(counts < (per_class or 0))
    if len(short):
        first = short[0]
        yield (
            f"{len(short)} classes have fewer than {per_class} training examples; "
            f"class {first} has {counts[first]}"
        )


def _cut(examples: Examples, part: str, *, max_length: int) -> Iterator[str]:
    """A note on texts as long as they may be: what was behind is not seen."""
    if isinstance(examples.inputs, Tensor):
        return
    if count := sum(len(text["input_ids"]) >= max_length for text in examples.inputs):
        yield (
            f"{count} of {len(examples)} {part} texts have {max_length} tokens or more and are cut "
            "there (`max_length`)"
        )


def prepare(column: Column, *, config: TuneConfig, base: Checkpoint) -> Examples:
    """Inputs and labels as the backbone takes them: tokens, pixels, or the numbers as they are.

    Raises:
        TrainingError: a row cannot be turned into an input; its place is named.
    """
    labels = torch.from_numpy(column.labels)
    if config.task == "tensor":
        return Examples(inputs=stacked(column, config.input), labels=labels, padding={})
    items: list[Any] = column.inputs.to_pylist()
    if config.task == "image":
        folder = Folder.at(column.path)
        folder = folder if folder.fs.isdir(folder.path()) else folder.parent
        pixels, scaling = read_images(items, base=base, folder=folder, places=column.places)
        return Examples(inputs=pixels, labels=labels, padding={}, scaling=scaling)
    texts, padding = tokenise(items, base=base, max_length=config.max_length)
    if config.task == "causal_lm":
        _check_predictable(texts, places=column.places)
        texts = [{name: text[name] for name in MODEL_COLUMNS} for text in texts]
        padding = {name: padding[name] for name in MODEL_COLUMNS}
    return Examples(inputs=texts, labels=labels, padding=padding)


def _check_predictable(texts: Sequence[dict[str, Tensor]], *, places: Sequence[str]) -> None:
    for text, place in zip(texts, places, strict=True):
        if len(text["input_ids"]) < 2:
            raise TrainingError(
                f"{place}: its text has {len(text['input_ids'])} tokens",
                "A language model foretells each token from those before it: two at least.",
                "Drop empty texts, and keep `max_length` above 1.",
            )


def epoch_order(num_examples: int, *, seed: int, epoch: int) -> list[int]:
    """The order of an epoch's examples, from (seed, epoch) alone, so that a resume repeats it."""
    text = f"{seed}\0{epoch}".encode()
    number = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
    generator = torch.Generator().manual_seed(number)
    return torch.randperm(num_examples, generator=generator).tolist()


def global_batches(order: Sequence[int], *, batch_size: int) -> list[Sequence[int]]:
    """An epoch's batches over all workers; the last may be smaller."""
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def share(batch: Sequence[int], *, rank: int, world: int) -> Sequence[int]:
    """One worker's part of a global batch: empty where there are more workers than examples."""
    return batch[rank::world]
