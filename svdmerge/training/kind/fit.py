"""Where decomposable models train: in this process, or in Ray Train's workers."""

import sys
from collections.abc import Callable
from typing import Any

import torch

from svdmerge.errors import TrainingError
from svdmerge.storage.filesystem import Folder
from svdmerge.training.checkpointing import (
    FolderCheckpoints,
    RayCheckpoints,
    State,
    load_file,
    save_file,
)
from svdmerge.training.fit import TRAINED, Placement, fit_workers, own_device, package_path
from svdmerge.training.kind.loop import KindLoop, train_kind
from svdmerge.training.kind.objective import Objective, Settings
from svdmerge.training.loop import Group
from svdmerge.training.watch import Teller

Opener = Callable[[], Objective]
"""Opens the objective in a process of its own: it pickles, and holds places instead of data."""


def fit_kind(
    opener: Opener,
    *,
    settings: Settings,
    folder: Folder,
    use_ray: bool,
    on_step: Callable[[int], None],
    search_path: str = "",
) -> State:
    """The trained state; `folder` keeps checkpoints, by which the same call again resumes.

    `search_path` names a package, as in a blueprint's `model`, that workers must find.

    Raises:
        TrainingError: training failed, or its workers were lost too often.
    """
    if folder.stat(TRAINED) is not None:
        return load_file(folder, TRAINED)
    if use_ray:
        state = fit_workers(
            _worker,
            {
                "opener": opener,
                "settings": settings,
                "folder": folder,
                "search_paths": [package_path(search_path)] if search_path else [],
            },
            placement=Placement(
                folder=folder,
                num_workers=settings.num_workers,
                use_gpu=settings.use_gpu,
                threads=settings.threads,
            ),
            datasets={},
            on_epoch=on_step,
        )
    else:
        device = own_device(use_gpu=settings.use_gpu)
        loop = KindLoop(opener(), settings=settings, group=Group(), device=device)
        checkpoints = FolderCheckpoints(folder.child("checkpoints"))
        state = train_kind(loop, checkpoints=checkpoints, on_step=lambda loop: on_step(loop.epoch))
    save_file(folder, TRAINED, state)
    return state


def _worker(given: dict[str, Any]) -> tuple[str, ...] | None:
    """One training process. An error of the training itself is returned: all workers meet it, and
    restarting them would only repeat it."""
    from ray import train as ray_train
    from ray.train.torch import get_device

    sys.path += [path for path in given["search_paths"] if path not in sys.path]
    settings: Settings = given["settings"]
    torch.set_num_threads(settings.threads)
    device = get_device() if settings.use_gpu else torch.device("cpu")
    context = ray_train.get_context()
    group = Group(rank=context.get_world_rank(), world=context.get_world_size())
    try:
        loop = KindLoop(given["opener"](), settings=settings, group=group, device=device)
        tell = Teller(given["folder"]) if group.rank == 0 else _silent
        train_kind(loop, checkpoints=RayCheckpoints(), on_step=tell)
    except TrainingError as error:
        return error.args
    return None


def _silent(loop: KindLoop) -> None:
    """Tell nothing: the first worker tells for all."""
    del loop
