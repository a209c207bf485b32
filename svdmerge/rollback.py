"""Going back: an older release's model under the next number, copying nothing."""

from dataclasses import replace

from svdmerge.errors import OutputError, StoreError
from svdmerge.recipe import Recipe
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.output import read_manifest
from svdmerge.storage.releases import Release, Releases, changes_between, now
from svdmerge.tick import TickResult, releases_of, tell


def rollback(recipe: Recipe, n: int | None = None) -> TickResult:
    """Release an older content again: that of release n, or the last one unlike the current.

    What it takes the place of is not released by a tick again until a source changes.

    Raises:
        StoreError: there is no such release.
        OutputError: its model is gone.
    """
    releases = releases_of(recipe)
    epoch, current = releases.take_epoch(), releases.current()
    target = _older(releases, current, n)
    _check_whole(target)
    if current is None or target.content == current.content:
        raise StoreError("that is the current release already", "", "See `svdmerge releases`.")
    for other in map(releases.read, range(target.n + 1, current.n + 1)):
        if other.content != target.content:
            why = f"release {other.n} was rolled back to {target.n}"
            releases.refuse(other.content, status="held", why=why)
    changes = changes_between(current.sources, target.sources)
    release = replace(
        target, n=current.n + 1, epoch=epoch, why=f"rollback to release {target.n}",
        released_at=now(), **changes,
    )  # fmt: skip
    if not releases.publish(release):
        raise OutputError(f"release {release.n} came between", "", "Look at it, and run again.")
    result = TickResult(status="released", why=release.why, release=release)
    tell(recipe, result)
    return result


def _check_whole(release: Release) -> None:
    """Raise OutputError unless the model's files have their sizes."""

    folder = Folder.at(release.model)
    manifest, sizes = read_manifest(folder), folder.find()
    claims = {} if manifest is None else manifest.files
    if not claims or any(sizes.get(name) != claim["size"] for name, claim in claims.items()):
        raise OutputError(
            f"{folder.uri}: release {release.n}'s model is gone or not whole",
            "Models of the last `tick.keep` releases are kept.",
            "Choose another: `svdmerge releases`.",
        )


def _older(releases: Releases, current: Release | None, n: int | None) -> Release:
    """The release to go back to."""
    if n is not None:
        return releases.read(n)
    for number in reversed(releases.numbers()):
        release = releases.read(number)
        if current is not None and release.content != current.content:
            return release
    raise StoreError(
        f"{releases.folder.uri}: holds no other release", "There is nothing to go back to."
    )
