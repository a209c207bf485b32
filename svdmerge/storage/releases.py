"""Releases: numbered records, each put once; the highest number is the current one.

Many drivers may work at once. What they store is named by content or put once, and each writes its
output to a folder of its own, so they meet in one place only: here. No lease, clock or heartbeat is
needed for that. A driver takes an *epoch*, a number put once, before it looks at the sources. It
releases as number n + 1, put once, only if n, the current release, has a smaller epoch: of two that
race, one is told, looks again, and either follows the other or, if it has looked at the sources
earlier, is refused. So epochs rise from release to release, and a driver that slept through
another's release cannot undo it. A filesystem that does not enforce put-once
(`Folder.enforces_put_once`) takes one driver at a time.
"""

import contextlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from svdmerge.errors import OutputError, StoreError
from svdmerge.storage.filesystem import Folder

EPOCHS, REFUSED = "epochs", "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A record: what is released, what changed since the one before, and why it may be."""

    n: int
    epoch: int
    content: str
    """Digest of all that the model depends on."""
    plan_hash: str
    out: str
    """The recipe's `out`: whose releases these are."""
    model: str
    """The folder of the merged model."""
    tuned: str | None
    """The folder of the tuned one."""
    base: str
    sources: dict[str, str]
    """Revisions by reference."""
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    """Sources since the release before: of other content now, or another weight."""
    skipped: dict[str, str] = field(default_factory=dict[str, str])
    """Sources that could not be used, and why."""
    why: str = ""
    measures: dict[str, float] = field(default_factory=dict[str, float])
    """On the gate's examples: this one's, and the one's before."""
    released_at: str = ""
    """UTC."""

    def to_json(self) -> bytes:
        """The record's bytes."""
        return (json.dumps(asdict(self), indent=1, sort_keys=True) + "\n").encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Releases:
    """The releases in a folder."""

    folder: Folder

    def numbers(self) -> list[int]:
        """Those there are, ascending."""
        return _numbers(self.folder)

    def read(self, n: int) -> Release:
        """Release n. Raises: StoreError, if there is none or it is malformed."""
        place = f"{self.folder.uri}/{n}.json"
        try:
            raw: dict[str, Any] = json.loads(self.folder.read(f"{n}.json"))
            raw |= {key: tuple(raw[key]) for key in ("added", "removed", "changed")}
            return Release(**raw)
        except FileNotFoundError:
            there = ", ".join(map(str, self.numbers()[-10:])) or "none"
            raise StoreError(f"{place}: there is no release {n}", f"There are: {there}.") from None
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{place}: malformed release record", str(error)) from None

    def current(self) -> Release | None:
        """The release of the highest number."""
        numbers = self.numbers()
        return self.read(numbers[-1]) if numbers else None

    def take_epoch(self) -> int:
        """A number above all taken so far, which nobody else gets."""
        epochs = self.folder.child(EPOCHS)
        for epoch in itertools.count(max(_numbers(epochs), default=0) + 1):
            if epochs.put_once(f"{epoch}.json", b"{}\n"):
                return epoch
        raise AssertionError("unreachable")

    def publish(self, release: Release) -> bool:
        """Put a record, numbered as following the current one; False if its number is taken by now.

        Raises:
            OutputError: the current one is of a later epoch.
        """
        current = self.current()
        if current is not None and current.epoch == release.epoch:
            return True  # an answer that was lost, not the record
        if current is not None and current.epoch > release.epoch:
            raise OutputError(
                f"release {current.n} came between",
                "It was begun after this one, and knows newer sources.",
                "Run the same command again.",
            )
        if release.n != (1 if current is None else current.n + 1):
            return False
        return self.folder.put_once(f"{release.n}.json", release.to_json())

    def refusal(self, content: str) -> dict[str, Any] | None:
        """What was noted of a content that may not be released; None if nothing was."""
        with contextlib.suppress(FileNotFoundError):
            return json.loads(self.folder.read(f"{REFUSED}/{content}.json"))
        return None

    def refuse(
        self, content: str, *, status: str, why: str, given: list[str] | None = None
    ) -> None:
        """Note that a content may not be released: ever, or given what else it was judged by."""
        note = {"status": status, "why": why, "given": given}
        self.folder.put(f"{REFUSED}/{content}.json", json.dumps(note, indent=1).encode())


def _numbers(folder: Folder) -> list[int]:
    """Numbers that name the folder's records, ascending."""
    stems = (name.removesuffix(".json") for name in folder.names() if name.endswith(".json"))
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def kept_models(releases: Sequence[Release], *, keep: int) -> set[str]:
    """Folders of models that the last so many of these name."""
    last = releases[-keep:]
    return {place for r in last for place in (r.model, r.tuned) if place is not None}


def changes_between(
    before: Mapping[str, str], after: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """Sources added, removed, and of other content, by their revisions."""
    both = before.keys() & after.keys()
    return {
        "added": tuple(sorted(after.keys() - before.keys())),
        "removed": tuple(sorted(before.keys() - after.keys())),
        "changed": tuple(sorted(name for name in both if before[name] != after[name])),
    }


def told_of(changes: Mapping[str, tuple[str, ...]], current: Release | None) -> str:
    """What is new since the current release."""
    if current is None:
        return "first release"
    parts = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in changes.items()
        if names
    ]
    return ", ".join(parts) or "the same sources, merged by another recipe or version"


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
