"""References to models: what recipes name, and the places that they stand for.

A reference is a folder, a `.safetensors` file, an fsspec URI of either, or a hub id with
`@revision`; `+adapter` after it, a reference too, puts a LoRA adapter on that model.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdmerge.errors import CheckpointError, RetryableError

# `org/name`, as the hub allows them, and a branch, tag or commit.
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*(@[^@\s]+)?")
_HUB, _BUCKETS = "hf://", "hf://buckets/"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """The places of a model and of the adapter that is put on it, as paths or URIs."""

    model: str
    adapter: str | None = None


def parse_reference(text: str) -> ModelRef:
    """Where a reference points, revisions of the hub not resolved yet. Nothing remote is asked.

    What exists as a path is that path, whatever signs are in it.
    """
    if _is_path(text):
        return ModelRef(model=text)
    model, plus, adapter = text.rpartition("+")
    if plus and model and adapter:
        return ModelRef(model=_place(model), adapter=_place(adapter))
    return ModelRef(model=_place(text))


def pinned(place: str) -> str:
    """The place with a hub's branch or tag replaced by the commit it names now.

    Raises:
        CheckpointError: the hub has no such model or revision, or does not show it.
        RetryableError: the hub does not answer.
    """
    if not place.startswith(_HUB) or place.startswith(_BUCKETS):  # buckets have no commits
        return place
    from huggingface_hub import HfApi, HfFileSystem
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        found: Any = HfFileSystem().resolve_path(place)
        info = HfApi().repo_info(found.repo_id, repo_type=found.repo_type, revision=found.revision)
    except (FileNotFoundError, RepositoryNotFoundError) as error:
        raise CheckpointError(
            f"{place}: the hub shows no such model or revision",
            _first_line(error),
            "Check its name; a private or gated model needs HF_TOKEN in the environment.",
        ) from None
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise CheckpointError(
                f"{place}: the hub refuses access",
                _first_line(error),
                "Accept the model's terms, and give HF_TOKEN in the environment.",
            ) from None
        raise RetryableError(f"{place}: the hub does not answer", _first_line(error)) from None
    except Exception as error:  # of the network's libraries, each of its own kind
        raise RetryableError(
            f"{place}: the hub does not answer",
            _first_line(error),
            "Check the network, or point at a local folder.",
        ) from error
    kind = {"model": "", "dataset": "datasets/", "space": "spaces/"}[found.repo_type]
    below = f"/{found.path_in_repo}" if found.path_in_repo else ""
    return f"{_HUB}{kind}{found.repo_id}@{info.sha}{below}"


def listed_on_hub(
    base: str, *, relation: str, author: str | None, tags: tuple[str, ...]
) -> list[str]:
    """References of the hub's models that name a base as theirs, by name.

    Raises:
        RetryableError: the hub does not answer.
    """
    from huggingface_hub import HfApi

    wanted = [f"base_model:{relation}:{base}", *tags]
    try:
        found = [model.id for model in HfApi().list_models(filter=wanted, author=author)]
    except Exception as error:  # of the network's libraries, each of its own kind
        raise RetryableError(
            f"the hub does not list models of {base}", _first_line(error), "Check the network."
        ) from error
    return [f"{_HUB}{name}" for name in sorted(found)]


def is_hub_id(text: str) -> bool:
    """Whether a reference is `org/name`, with or without a revision, and no path."""
    return _place(text) != text


def _place(text: str) -> str:
    """A path or URI: a hub id becomes one, unless a path of that name exists."""
    if "://" in text or _is_path(text) or not _HUB_ID.fullmatch(text):
        return text
    model, at, revision = text.partition("@")
    # A branch may have slashes in its name, which a path of the hub must not.
    return f"{_HUB}{model}{at}{revision.replace('/', '%2F')}"


def _is_path(text: str) -> bool:
    try:
        return "://" not in text and Path(text).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long a name, no such user, NUL
        return False


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
