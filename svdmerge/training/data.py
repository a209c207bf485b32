"""The target's examples: read from parquet, drawn, turned into inputs, and put in batches."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from svdmerge.errors import TrainingError
from svdmerge.recipe import TuneConfig
from svdmerge.storage.checkpoint import Checkpoint
from svdmerge.storage.filesystem import Folder
from svdmerge.training.backbone import Inputs
from svdmerge.training.tokens import tokenise


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Examples:
    """Inputs and labels. A text is a mapping of token columns, of its own length; else a tensor."""

    inputs: Tensor | Sequence[dict[str, Tensor]]
    labels: Tensor
    padding: dict[str, int]
    """What shorter texts are filled with, by token column."""

    def __len__(self) -> int:
        return self.labels.shape[0]

    def batch(self, rows: Sequence[int]) -> Inputs:
        """Inputs of some examples; texts padded to the longest of them."""
        if isinstance(self.inputs, Tensor):
            return self.inputs[list(rows)]
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

    def digest(self) -> str:
        """sha256 of inputs and labels, as the backbone sees them."""
        digest = hashlib.sha256(self.labels.numpy().tobytes())
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
class Column:
    """Raw inputs and labels of one parquet file."""

    path: str
    inputs: pa.ChunkedArray
    labels: np.ndarray

    def take(self, rows: Sequence[int]) -> "Column":
        """Some of the rows."""
        index = np.asarray(rows, dtype=np.int64)
        return Column(path=self.path, inputs=self.inputs.take(index), labels=self.labels[index])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Target:
    """The drawn training examples, the test examples and the number of classes."""

    train: Examples
    test: Examples
    num_classes: int
    notes: tuple[str, ...]


def load_target(config: TuneConfig, *, base: Checkpoint) -> Target:
    """The target's examples.

    Raises:
        TrainingError: a file or column is missing or unfit, a class has no example, or a test label
            is not among the training labels.
    """
    everything = read_columns(config.train, config=config)
    num_classes = check_classes(everything, label=config.label)
    drawn = everything.take(draw(everything.labels, per_class=config.per_class, seed=config.seed))
    test = read_columns(config.test, config=config)
    _check_test(test, num_classes=num_classes, config=config)
    train_examples, test_examples = (
        _examples(part, config=config, base=base) for part in (drawn, test)
    )
    return Target(
        train=train_examples,
        test=test_examples,
        num_classes=num_classes,
        notes=tuple(_short_classes(drawn.labels, per_class=config.per_class)),
    )


def load_training(config: TuneConfig, *, base: Checkpoint) -> Examples:
    """The drawn training examples alone: what a training process needs. Raises as `load_target`."""
    everything = read_columns(config.train, config=config)
    check_classes(everything, label=config.label)
    rows = draw(everything.labels, per_class=config.per_class, seed=config.seed)
    return _examples(everything.take(rows), config=config, base=base)


def read_columns(path: str, *, config: TuneConfig) -> Column:
    """Inputs and labels of a parquet file at a path or fsspec URI.

    Raises:
        TrainingError: the file cannot be read or is empty, or a column is missing, holds nulls, or
            is of the wrong kind.
    """
    file = Folder.at(path)
    try:
        with file.fs.open(file.path(), "rb") as opened:
            table = pq.read_table(opened)
    except (OSError, pa.ArrowException) as error:
        raise TrainingError(
            f"{path}: cannot be read as parquet", str(error), "Check the path."
        ) from error
    for name in (config.input, config.label):
        if name not in table.column_names:
            raise TrainingError(
                f"{path}: has no column `{name}`",
                f"Its columns: {', '.join(table.column_names)}.",
                "Set `input` and `label` to the columns of your file.",
            )
        if nulls := table.column(name).null_count:
            raise TrainingError(
                f"{path}: column `{name}` holds {nulls} nulls", "", "Fill or drop those rows."
            )
    if not table.num_rows:
        raise TrainingError(f"{path}: has no rows", "", "Give a file with examples.")
    inputs, labels = table.column(config.input), table.column(config.label)
    _check_kinds(path, inputs=inputs, labels=labels, config=config)
    return Column(path=path, inputs=inputs, labels=labels.to_numpy().astype(np.int64))


def _check_kinds(
    path: str, *, inputs: pa.ChunkedArray, labels: pa.ChunkedArray, config: TuneConfig
) -> None:
    if not pa.types.is_integer(labels.type):
        raise TrainingError(
            f"{path}: column `{config.label}` is {labels.type}",
            "Labels are whole numbers from 0 to classes - 1.",
            "Number the classes.",
        )
    is_text = pa.types.is_string(inputs.type) or pa.types.is_large_string(inputs.type)
    if config.task == "text" and not is_text:
        raise TrainingError(
            f"{path}: column `{config.input}` is {inputs.type}",
            "`task: text` needs strings.",
            "Set `input` to a column of strings, or `task: tensor`.",
        )


def check_classes(column: Column, *, label: str) -> int:
    """The number of classes. Raises: TrainingError, unless labels are exactly 0 to classes - 1."""
    found, place = np.unique(column.labels), f"{column.path}: column `{label}`"
    if found[0] < 0:
        raise TrainingError(
            f"{place}: holds the label {found[0]}", "Labels start at 0.", "Number the classes."
        )
    if len(found) != found[-1] + 1:
        absent = int(np.setdiff1d(np.arange(found[-1] + 1), found)[0])
        raise TrainingError(
            f"{place}: no example of class {absent}",
            f"{len(found)} classes, yet the largest label is {found[-1]}.",
            "Number the classes without gaps.",
        )
    if len(found) < 2:
        raise TrainingError(f"{place}: holds one class", "", "Give examples of two at least.")
    return len(found)


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

    def rank(row: int) -> bytes:
        return hashlib.sha256(f"{seed}\0{row}".encode()).digest()

    rows: list[int] = []
    for label in np.unique(labels):
        rows += sorted(np.flatnonzero(labels == label).tolist(), key=rank)[:per_class]
    return sorted(rows)


def _short_classes(labels: np.ndarray, *, per_class: int | None) -> Iterator[str]:
    counts = np.bincount(labels)
    short = np.flatnonzero(counts < (per_class or 0))
    if len(short):
        first = short[0]
        yield (
            f"{len(short)} classes have fewer than {per_class} training examples; "
            f"class {first} has {counts[first]}"
        )


def _examples(column: Column, *, config: TuneConfig, base: Checkpoint) -> Examples:
    labels = torch.from_numpy(column.labels)
    if config.task == "tensor":
        return Examples(inputs=_stack(column, config.input), labels=labels, padding={})
    texts, padding = tokenise(column.inputs.to_pylist(), base=base, max_length=config.max_length)
    return Examples(inputs=texts, labels=labels, padding=padding)


def _stack(column: Column, name: str) -> Tensor:
    """A (possibly nested) list column as one float32 tensor."""
    values: Any = column.inputs.combine_chunks()
    shape = [len(values)]
    while pa.types.is_nested(values.type):
        lengths = [int(n) for n in set(values.value_lengths().to_pylist())]
        if len(lengths) != 1:
            raise TrainingError(
                f"{column.path}: column `{name}` holds lists of {len(lengths)} lengths",
                "`task: tensor` stacks all examples, so their shapes must agree.",
                "Pad or crop them to one shape.",
            )
        shape.append(lengths[0])
        values = values.flatten()
    if not (pa.types.is_floating(values.type) or pa.types.is_integer(values.type)):
        raise TrainingError(
            f"{column.path}: column `{name}` holds {values.type}",
            "`task: tensor` needs lists of numbers.",
            "Decode it to numbers first.",
        )
    array = values.to_numpy(zero_copy_only=False).astype(np.float32)
    return torch.from_numpy(array.reshape(shape))


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
