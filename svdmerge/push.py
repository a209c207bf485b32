"""Uploading an output to the hub: checked first, in one commit, resumed by the same command."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from svdmerge.errors import OutputError, RetryableError, StoreError
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.layout import MANIFEST
from svdmerge.storage.output import damaged_files, read_manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """What was uploaded, or would be."""

    repo: str
    files: tuple[str, ...]
    nbytes: int
    url: str | None
    """Of the commit; None after a dry run."""

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)


def push(
    out: str, repo: str, *, private: bool = False, revision: str = "main", dry_run: bool = False
) -> Pushed:
    """Upload an output whole, as one commit, to a model repository, which is made if need be.

    The hub keeps what was uploaded before an interruption: the same command again sends the rest.
    Its rate limits are waited for. The token is HF_TOKEN's, or that of `hf auth login`.

    Raises:
        OutputError: it is no output of svdmerge, or not what its manifest claims.
        StoreError: the hub refuses.
        RetryableError: the hub does not answer.
    """
    _check_name(repo)
    folder = Folder.at(out)
    manifest = read_manifest(folder)
    if manifest is None or not folder.is_local:
        raise OutputError(
            f"{folder.uri}: is no local output of svdmerge",
            f"Expected a folder with a {MANIFEST}.",
            "Give the `out` of a run.",
        )
    if faults := damaged_files(folder, manifest):
        raise OutputError(
            f"{folder.uri}: is not what its manifest claims",
            "; ".join(faults[:3]),
            "Run its recipe again.",
        )
    names = (*manifest.files, MANIFEST)
    nbytes = sum(Path(folder.path(name)).stat().st_size for name in names)
    url = None if dry_run else _upload(folder, repo, names, private=private, revision=revision)
    return Pushed(repo=repo, files=names, nbytes=nbytes, url=url)


def _check_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise StoreError(
            f"{repo}: is no name of a repository", str(error), "Use org/name."
        ) from None


def _upload(
    folder: Folder, repo: str, names: tuple[str, ...], *, private: bool, revision: str
) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api: Any = HfApi()
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder.path(),
            revision=revision,
            allow_patterns=list(names),
            commit_message="Upload a merge by svdmerge",
        )
    except HfHubHTTPError as error:
        status = error.response.status_code
        told = str(error).strip().splitlines()[0]
        if status in (429, 500, 502, 503, 504):
            raise RetryableError(
                f"{repo}: the hub is busy", told, "Run the same command again later."
            ) from None
        raise StoreError(
            f"{repo}: the hub refuses the upload",
            told,
            "Check the name, and that HF_TOKEN may write there.",
        ) from None
    except OSError as error:
        raise RetryableError(
            f"{repo}: the hub does not answer", str(error), "Run the same command again."
        ) from None
    return str(done.commit_url)
