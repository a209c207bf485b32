"""Inputs and labels of a file or folder, as they are stored, with what is wrong told by place."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from svdmerge.errors import TrainingError
from svdmerge.recipe import TuneConfig
from svdmerge.training.formats import is_image_folder, list_images, read_table
from svdmerge.training.images import is_image_column


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Column:
    """Raw inputs and labels of one file or folder."""

    path: str
    inputs: pa.ChunkedArray
    labels: np.ndarray
    numbers: np.ndarray
    """Which row of the file each is, from 0, for what is told about it."""
    classes: tuple[str, ...] = ()
    """Names by label, where sub-folders give them."""

    def take(self, rows: Sequence[int]) -> "Column":
        """Some of the rows."""
        index = np.asarray(rows, dtype=np.int64)
        return Column(
            path=self.path,
            inputs=self.inputs.take(index),
            labels=self.labels[index],
            numbers=self.numbers[index],
            classes=self.classes,
        )

    @property
    def places(self) -> list[str]:
        """Where each row is, as errors name it."""
        return [f"{self.path}, row {n}" for n in self.numbers]


def read_columns(path: str, *, config: TuneConfig, classes: tuple[str, ...] = ()) -> Column:
    """Inputs and labels of a file or folder at a path or fsspec URI.

    `classes` are the names that a folder of images may use; by default its own, sorted.

    Raises:
        TrainingError: the file cannot be read or is empty, or a column is missing, holds nulls, or
            is of the wrong kind.
    """
    if config.task == "image" and is_image_folder(path):
        return _image_folder(path, classes=classes)
    has_labels = config.task != "causal_lm"
    table = read_table(path, columns=(config.input, *((config.label,) if has_labels else ())))
    _check_input(path, inputs=table.column(config.input), config=config)
    count = table.num_rows
    labels = np.zeros(count, dtype=np.int64)
    if has_labels:
        _check_labels(path, labels=table.column(config.label), name=config.label)
        labels = table.column(config.label).to_numpy().astype(np.int64)
    return Column(
        path=path, inputs=table.column(config.input), labels=labels, numbers=np.arange(count)
    )


def _image_folder(path: str, *, classes: tuple[str, ...]) -> Column:
    uris, names = list_images(path)
    classes = classes or tuple(sorted(set(names)))
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise TrainingError(
            f"{path}: the sub-folder {unknown[0]} is no class of the training examples",
            f"Their classes: {', '.join(classes[:8])}{', ...' if len(classes) > 8 else ''}.",
            "Use one set of names for both folders.",
        )
    numbers = {name: i for i, name in enumerate(classes)}
    return Column(
        path=path,
        inputs=pa.chunked_array([pa.array(uris)]),
        labels=np.array([numbers[name] for name in names], dtype=np.int64),
        numbers=np.arange(len(uris)),
        classes=classes,
    )


def _check_labels(path: str, *, labels: pa.ChunkedArray, name: str) -> None:
    if not pa.types.is_integer(labels.type):
        raise TrainingError(
            f"{path}: column `{name}` is {labels.type}",
            "Labels are whole numbers from 0 to classes - 1.",
            "Number the classes.",
        )


def _check_input(path: str, *, inputs: pa.ChunkedArray, config: TuneConfig) -> None:
    kind = inputs.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    fits, needs = {
        "text": (is_text, "strings"),
        "causal_lm": (is_text, "strings"),
        "image": (is_image_column(kind), "encoded images, {bytes, path}, or paths"),
        "tensor": (True, ""),
    }[config.task]
    if not fits:
        raise TrainingError(
            f"{path}: column `{config.input}` is {kind}",
            f"`task: {config.task}` needs {needs}.",
            "Set `input` to such a column, or `task` to what the column holds.",
        )


def check_classes(column: Column, *, label: str) -> int:
    """The number of classes. Raises: TrainingError, unless labels are exactly 0 to classes - 1."""
    found, place = np.unique(column.labels), f"{column.path}: column `{label}`"
    if found[0] < 0:
        raise TrainingError(
            f"{place}: holds the label {found[0]}", "Labels start at 0.", "Number the classes."
        )
    if len(found) != found[-1] + 1:
        # The first class out of step: the largest label may be any number at all.
        absent = int(np.flatnonzero(found[:-1] + 1 != found[1:])[0]) + 1 if found[0] == 0 else 0
        raise TrainingError(
            f"{place}: no example of class {absent}",
            f"{len(found)} classes, yet the largest label is {found[-1]}.",
            "Number the classes without gaps.",
        )
    if len(found) < 2:
        raise TrainingError(f"{place}: holds one class", "", "Give examples of two at least.")
    return len(found)


def stacked(column: Column, name: str) -> Tensor:
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
    array = values.to_numpy(zero_copy_only=False).astype(np.float32).reshape(shape)
    finite = np.isfinite(array.reshape(shape[0], -1)).all(axis=1)
    if not finite.all():
        raise TrainingError(
            f"{column.places[int(np.argmin(finite))]}: column `{name}` holds NaN, Inf or nulls",
            f"{int((~finite).sum())} rows do.",
            "Fill or drop those rows.",
        )
    return torch.from_numpy(array)
