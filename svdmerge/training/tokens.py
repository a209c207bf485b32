"""Texts to tokens, by the tokenizer that lies beside the base model."""

import contextlib
import tempfile
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from svdmerge.errors import TrainingError
from svdmerge.storage.checkpoint import Checkpoint
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.side_files import copy_side_files

# What a language model takes; others, as token types, would be added to its embeddings.
MODEL_COLUMNS = ("input_ids", "attention_mask")
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", ".model", ".tiktoken")


def tokenise(
    texts: Sequence[str], *, base: Checkpoint, max_length: int
) -> tuple[list[dict[str, Tensor]], dict[str, int]]:
    """Each text's token columns, cut at `max_length`, and what each column is padded with.

    Raises:
        TrainingError: no tokenizer lies in the base's folder, or it cannot be loaded.
    """
    tokenizer = load_tokenizer(base)
    columns: dict[str, list[list[int]]] = dict(
        tokenizer(
            list(texts), truncation=True, max_length=max_length, padding=False,
            return_attention_mask=True,
        )
    )  # fmt: skip
    # Padded positions are masked, so any valid token serves where a tokenizer names none.
    padding = dict.fromkeys(columns, 0) | {"input_ids": tokenizer.pad_token_id or 0}
    rows = [
        {column: torch.tensor(values[i], dtype=torch.int64) for column, values in columns.items()}
        for i in range(len(texts))
    ]
    return rows, padding


def load_tokenizer(base: Checkpoint) -> Any:
    """The base's tokenizer; never from the hub, never with code of the model's. Raises as above."""
    from transformers import AutoTokenizer

    try:
        # Without these, transformers makes an empty tokenizer from config.json, and no error.
        if not any(name.endswith(VOCABULARIES) for name in base.folder.names()):
            raise OSError("none of its files is a vocabulary")
        with local_copy(base) as path:
            return AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise TrainingError(
            f"{base.reference}: its tokenizer cannot be loaded",
            str(error).splitlines()[0] if str(error) else type(error).__name__,
            "Put tokenizer.json and tokenizer_config.json beside the base model's weights.",
        ) from error


@contextlib.contextmanager
def local_copy(base: Checkpoint) -> Generator[str]:
    """A local folder with the base's small files: transformers reads no URIs."""
    if base.folder.is_local:
        yield base.folder.path()
        return
    with tempfile.TemporaryDirectory(prefix="svdmerge-tokenizer-") as path:
        copy_side_files(base, Folder.at(path))
        yield path
