"""Where training runs: in this process, or in Ray Train's workers."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svdmerge.errors import TrainingError
from svdmerge.recipe import TuneConfig
from svdmerge.storage.filesystem import Folder
from svdmerge.training.checkpointing import (
    FolderCheckpoints,
    RayCheckpoints,
    State,
    load_file,
    read_state,
    save_file,
)
from svdmerge.training.data import Examples
from svdmerge.training.loop import Group, Loop, chosen, train
from svdmerge.training.objective import objective_of
from svdmerge.training.stream import dataset, received
from svdmerge.training.trainee import Job, build_trainee
from svdmerge.training.watch import Teller, watching

TRAINED = "trained.pt"
# A worker lost to its node or to memory comes back this often; more often points at the job itself.
MAX_FAILURES = 3


def fit(
    job: Job, *, examples: Examples, use_ray: bool, on_epoch: Callable[[int], None]
) -> tuple[State, bool]:
    """The trained state, and whether it, or a part of it, comes from an earlier attempt.

    Raises:
        TrainingError: training failed, or its workers were lost more than `MAX_FAILURES` times.
    """
    if job.folder.stat(TRAINED) is not None:
        return load_file(job.folder, TRAINED), True
    work = _fit_on_ray if use_ray else _fit_here
    state = chosen(work(job, examples=examples, on_epoch=on_epoch))
    save_file(job.folder, TRAINED, state)
    return state, state["resumes"] > 0


def _fit_here(job: Job, *, examples: Examples, on_epoch: Callable[[int], None]) -> State:
    trainee = build_trainee(
        job,
        examples=examples,
        objective=objective_of(job.config),
        device=own_device(use_gpu=job.config.use_gpu),
    )
    loop = Loop(trainee, examples=examples, config=job.config, group=Group())
    checkpoints = FolderCheckpoints(job.folder.child("checkpoints"))
    return train(loop, checkpoints=checkpoints, on_epoch=lambda loop: on_epoch(loop.epoch))


def own_device(*, use_gpu: bool) -> torch.device:
    """This process's device. Raises: TrainingError, if the recipe wants a GPU it does not have."""
    if use_gpu and not torch.cuda.is_available():
        raise TrainingError(
            "use_gpu: this process has no GPU", "", "Set `use_gpu: false`, or use a cluster."
        )
    return torch.device("cuda" if use_gpu else "cpu")


def _fit_on_ray(job: Job, *, examples: Examples, on_epoch: Callable[[int], None]) -> State:
    return fit_workers(
        _worker,
        {
            "job": job,
            "like": examples.take([]),
            "search_paths": [backbone_path(job.config), package_path(job.config.loss)],
        },
        placement=Placement(
            folder=job.folder,
            num_workers=job.config.num_workers,
            use_gpu=job.config.use_gpu,
            threads=job.threads,
        ),
        # Every worker draws from all rows: see `stream`.
        datasets={"train": dataset(job.config, base=job.base)},
        on_epoch=on_epoch,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a training's state lies, and what its workers may use."""

    folder: Folder
    num_workers: int | tuple[int, int]
    use_gpu: bool
    threads: int


def fit_workers(
    worker: Callable[[dict[str, Any]], tuple[str, ...] | None],
    settings: dict[str, Any],
    *,
    placement: Placement,
    datasets: dict[str, Any],
    on_epoch: Callable[[int], None],
) -> State:
    """The last state that Ray Train's workers saved; `worker` returns what a TrainingError holds.

    Raises:
        TrainingError: training failed, or its workers were lost more than `MAX_FAILURES` times.
    """
    trainer = _trainer(worker, settings, placement=placement, datasets=datasets)
    with watching(placement.folder, on_epoch):
        fitted = _fitted(trainer)
    if fitted.return_value is not None:
        raise TrainingError(*fitted.return_value)
    checkpoint = fitted.checkpoint
    if checkpoint is None:
        raise TrainingError(
            "tuning: the workers ended without a checkpoint", "", "See the workers' logs."
        )
    with checkpoint.as_directory() as path:
        return read_state(path)


def _trainer(
    worker: Callable[[dict[str, Any]], tuple[str, ...] | None],
    settings: dict[str, Any],
    *,
    placement: Placement,
    datasets: dict[str, Any],
) -> Any:
    from ray import train as ray_train
    from ray.train.torch import TorchTrainer

    workers = placement.num_workers
    most = workers if isinstance(workers, int) else workers[1]
    return TorchTrainer(
        worker,
        train_loop_config=settings,
        datasets=datasets,
        dataset_config=ray_train.DataConfig(datasets_to_split=[]),
        scaling_config=ray_train.ScalingConfig(
            num_workers=workers,
            use_gpu=placement.use_gpu,
            resources_per_worker={"CPU": _cpus(placement.threads, workers=most)}
            | ({"GPU": 1.0} if placement.use_gpu else {}),
        ),
        # One name for one job: fitting again, as after the driver died, resumes by itself.
        run_config=ray_train.RunConfig(
            name="ray",
            storage_path=placement.folder.path(),
            storage_filesystem=_arrow_filesystem(placement.folder),
            failure_config=ray_train.FailureConfig(max_failures=MAX_FAILURES),
            # Two: the newest may not be committed yet when a worker asks for one.
            checkpoint_config=ray_train.CheckpointConfig(num_to_keep=2),
        ),
    )


def _fitted(trainer: Any) -> Any:
    from ray.train import TrainingFailedError

    try:
        return trainer.fit()
    except TrainingFailedError as error:
        failures: dict[int, Exception] = getattr(error, "worker_failures", {})
        for failure in failures.values():
            cause = getattr(failure, "cause", failure)
            if isinstance(cause, TrainingError):
                raise cause from None
        raise TrainingError(
            f"tuning: its workers failed, and again after {MAX_FAILURES} restarts",
            next((f"{type(f).__name__}: {f}" for f in failures.values()), str(error)),
            "See the workers' logs; the same command resumes from the last checkpoint.",
        ) from error


def _worker(settings: dict[str, Any]) -> tuple[str, ...] | None:
    """One training process: places come in the job, state leaves by checkpoints alone.

    Returned is an error of the training itself: the model, and the loss as a sum over all workers,
    are the same for each of them, so all meet it, and restarting them, as Ray does after an
    exception, would only repeat it.
    """
    from ray import train as ray_train
    from ray.train.torch import get_device

    sys.path += [path for path in settings["search_paths"] if path not in sys.path]
    job: Job = settings["job"]
    # A worker process keeps whatever number of threads it was last set to.
    torch.set_num_threads(job.threads)
    device = get_device() if job.config.use_gpu else torch.device("cpu")
    examples = received(ray_train.get_dataset_shard("train"), like=settings["like"])
    context = ray_train.get_context()
    group = Group(rank=context.get_world_rank(), world=context.get_world_size())
    try:
        trainee = build_trainee(
            job, examples=examples, objective=objective_of(job.config), device=device,
            sharded=job.config.shard,
        )  # fmt: skip
        loop = Loop(trainee, examples=examples, config=job.config, group=group)
        tell = Teller(job.folder) if group.rank == 0 else _silent
        train(loop, checkpoints=RayCheckpoints(), on_epoch=tell)
    except TrainingError as error:
        return error.args
    return None


def _silent(loop: Loop) -> None:
    """Tell nothing: the first worker tells for all."""
    del loop


def backbone_path(config: TuneConfig) -> str:
    """The folder that the backbone's package was imported from here.

    Workers on this machine do not inherit all of this process's search path; elsewhere the package
    comes with the cluster's environment, and a path that is not there does no harm.
    """
    return package_path(config.model)


def package_path(name: str) -> str:
    """The folder that the package of `package.module:name` was imported from here."""
    found = importlib.util.find_spec(name.partition(":")[0].partition(".")[0])
    if found is None:
        return ""
    # Also of a package without an `__init__`, which has no origin.
    place = next(iter(found.submodule_search_locations or [found.origin or ""]))
    return str(Path(place).parent) if place else ""


def _cpus(threads: int, *, workers: int) -> float:
    """CPUs a worker asks for: its threads, or its part of a cluster that has fewer.

    Ray would wait forever for CPUs that no node has, and workers that hold all of them would wait
    forever for the tasks of Ray Data that prepare their examples: one, or half, is left to those.
    """
    import ray

    total = float(ray.cluster_resources().get("CPU", 0.0))
    left = total - 1.0 if total > 1 else total / 2
    return min(float(threads), left / workers) if total else float(threads)


def _arrow_filesystem(folder: Folder) -> Any:
    """The folder's filesystem as Ray takes it; None for local files, which it opens itself."""
    if folder.is_local:
        return None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return PyFileSystem(FSSpecHandler(folder.fs))
