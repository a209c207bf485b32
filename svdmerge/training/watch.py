"""Progress of workers elsewhere, by a small file in the job's folder: any store can carry it."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Generator
from typing import Protocol

from svdmerge.errors import SvdmergeError
from svdmerge.storage.filesystem import Folder
from svdmerge.training.loop import Point

PROGRESS = "progress.json"
# Seconds between writes, and between looks: a bar needs no more, and stores charge by the request.
WRITE_S, LOOK_S = 1.0, 1.0


class Told(Protocol):
    """A training run as it is told of: how far it is, and its curve."""

    epoch: int
    curve: list[Point]

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        ...


class Teller:
    """Writes the curve so far, at most once a second; for the first worker to call each epoch."""

    def __init__(self, folder: Folder) -> None:
        self._folder, self._written_at = folder, 0.0

    def __call__(self, loop: Told) -> None:
        """Tell of an epoch."""
        now = time.monotonic()
        if now - self._written_at < WRITE_S and not loop.done:
            return
        self._written_at = now
        content = json.dumps({"epoch": loop.epoch, "curve": loop.curve}).encode()
        # Told is not needed: a store's hiccup here must not end the training.
        with contextlib.suppress(SvdmergeError, OSError):
            self._folder.put(PROGRESS, content)


@contextlib.contextmanager
def watching(folder: Folder, on_epoch: Callable[[int], None]) -> Generator[None]:
    """Call `on_epoch` with each newly told epoch, from a thread, while the block runs."""
    stop, seen = threading.Event(), [0]

    def look() -> None:
        while not stop.wait(LOOK_S):
            seen[0] = _tell(folder, on_epoch, after=seen[0])

    thread = threading.Thread(target=look, name="svdmerge-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    _tell(folder, on_epoch, after=seen[0])


def _tell(folder: Folder, on_epoch: Callable[[int], None], *, after: int) -> int:
    try:
        epoch = int(json.loads(folder.read(PROGRESS))["epoch"])
    except (SvdmergeError, OSError, ValueError):
        return after
    if epoch > after:
        on_epoch(epoch)
    return max(epoch, after)
