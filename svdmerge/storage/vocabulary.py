"""Vocabularies of models, and which rows of their embeddings belong to the same tokens."""

import json
from collections.abc import Mapping
from typing import Any, cast

from svdmerge.errors import CheckpointError
from svdmerge.storage.filesystem import Folder

# As they are looked for.
FILES = ("tokenizer.json", "vocab.json", "vocab.txt")
# Those of a quarter of a million tokens have 35 MB.
MAX_BYTES = 64 << 20


def read_vocabulary(folder: Folder) -> dict[str, int]:
    """The tokens of a model's tokenizer and their numbers.

    Raises:
        CheckpointError: there is no tokenizer, or none that is known.
    """
    name = next((n for n in FILES if folder.stat(n) is not None), None)
    if name is None:
        raise CheckpointError(
            f"{folder.uri}: has no tokenizer",
            f"Rows of tokens are matched by {', '.join(FILES[:-1])} or {FILES[-1]}.",
            "Put it beside the weights, or use `mismatch: base`.",
        )
    place = f"{folder.uri}/{name}"
    try:
        text = folder.read(name, start=0, stop=MAX_BYTES).decode()
        found = _numbered(text) if name.endswith(".txt") else _in_json(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{place}: no vocabulary", str(error), "Fetch it again.") from None
    if not found or any(type(n) is not int or n < 0 for n in found.values()):
        raise CheckpointError(f"{place}: no vocabulary", "Tokens have no numbers.")
    return found


def _numbered(text: str) -> dict[str, int]:
    # Not splitlines: some vocabularies hold characters that it takes for line ends.
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    return {token: i for i, token in enumerate(lines)}


def _in_json(raw: Any) -> dict[str, int]:
    """A plain mapping, or what the tokenizers library writes, whose Unigram models are lists of
    tokens and scores."""
    if "model" not in raw or not isinstance(raw["model"], dict):
        return dict(cast(Mapping[str, int], raw))
    vocab: Any = raw["model"]["vocab"]
    if isinstance(vocab, list):
        vocab = {str(token): i for i, (token, _) in enumerate(cast(list[Any], vocab))}
    added = {str(t["content"]): t["id"] for t in raw.get("added_tokens") or ()}
    return {**vocab, **added}


def common_rows(
    base: Mapping[str, int], source: Mapping[str, int], *, num_base: int, num_source: int
) -> list[tuple[bool, int, int]]:
    """Runs that the base's rows, in order, are made of: the source's rows first..stop-1 (True), of
    the same tokens, or where it has none (and of padding) the base's own first..stop-1 (False)."""
    tokens = {number: token for token, number in base.items()}
    runs: list[tuple[bool, int, int]] = []
    for row in range(num_base):
        number = source.get(tokens[row], num_source) if row in tokens else num_source
        known = number < num_source
        start = number if known else row
        if runs and runs[-1][0] == known and runs[-1][2] == start:
            runs[-1] = (known, runs[-1][1], start + 1)
        else:
            runs.append((known, start, start + 1))
    return runs
