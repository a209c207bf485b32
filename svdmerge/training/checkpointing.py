"""Training state in files: written whole, read without running code, the latest one resumed."""

import io
import tempfile
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from svdmerge.storage.filesystem import Folder

# Tensors and plain numbers by name; what `torch.load(weights_only=True)` admits.
State = dict[str, Any]
STATE = "state.pt"
_PREFIX = "checkpoint-"


def untrained(head: dict[str, Tensor]) -> State:
    """The state where nothing was there to train: the head as it started."""
    return {
        "epoch": 0, "sigma_change": {}, "head": head, "curve": [], "start": {}, "best": {},
        "seconds": 0.0, "resumes": 0,
    }  # fmt: skip


class Checkpoints(Protocol):
    """Where a training process saves its state and finds the latest."""

    def latest(self) -> State | None:
        """The last state saved; None at the very start."""
        ...

    def save(self, state: State) -> None:
        """Keep a state. Called by every worker, at the same epochs."""
        ...


class FolderCheckpoints:
    """States as files of a folder: for training in this process."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def latest(self) -> State | None:
        """The state of the highest epoch."""
        names = self._names()
        return load_file(self._folder, names[-1]) if names else None

    def save(self, state: State) -> None:
        """Write the state, then delete those before the previous one."""
        save_file(self._folder, f"{_PREFIX}{state['epoch']:06d}.pt", state)
        for name in self._names()[:-2]:
            self._folder.remove(name)

    def _names(self) -> list[str]:
        return [n for n in self._folder.names() if n.startswith(_PREFIX)]


class RayCheckpoints:
    """States reported to Ray Train, which commits them and hands the last to a restarted worker."""

    def latest(self) -> State | None:
        """The last state that was committed, maybe an epoch or two before the last reported."""
        from ray import train

        checkpoint = train.get_checkpoint()
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as path:
            return read_state(path)

    def save(self, state: State) -> None:
        """Report the state. States are equal on all workers, so the first one's is kept."""
        from ray import train

        metrics = {"epoch": state["epoch"], **(state["curve"][-1] if state["curve"] else {})}
        if train.get_context().get_world_rank() != 0:
            train.report(metrics)
            return
        with tempfile.TemporaryDirectory(prefix="svdmerge-state-") as path:
            save_file(Folder.at(path), STATE, state)
            train.report(metrics, checkpoint=train.Checkpoint.from_directory(path))


def read_state(path: str) -> State:
    """The state in a Ray checkpoint's local folder."""
    return load_file(Folder.at(Path(path)), STATE)


def save_file(folder: Folder, name: str, state: State) -> None:
    """Write a state whole."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    folder.put(name, buffer.getvalue())


def load_file(folder: Folder, name: str) -> State:
    """Read a state, onto the CPU. Only tensors and plain values are admitted: no code can run."""
    return torch.load(io.BytesIO(folder.read(name)), map_location="cpu", weights_only=True)
