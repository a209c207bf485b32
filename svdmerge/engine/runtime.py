"""A bounded map of units over Ray tasks, or in this process. Ray stays here, and in `tally`.

Through Ray go units (URIs, names, numbers) and receipts, never weights.
"""

import heapq
import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from svdmerge.engine.retry import Failure, GiveUp, RetryPolicy
from svdmerge.engine.tally import QUEUE_DEPTH, UNITS, Tally, count_retry, counted_step, last_line
from svdmerge.errors import ResourceError, RetryableError, SvdmergeError
from svdmerge.progress import Progress


class Unit(Protocol):
    """A unit of work: what it is called in errors, and the memory and threads it may use."""

    @property
    def name(self) -> str: ...
    @property
    def memory_bytes(self) -> int: ...
    @property
    def threads(self) -> int: ...


# Workers give back what large tensors took once these are gone, but for 64 MiB (glibc reads this as
# a process starts): by default its heap is in pieces soon, and a worker grew to thrice what its
# tasks hold at once. To give back everything would cost as much as what is computed.
WORKER_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(16 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}

# Seconds between looks at how large a cluster is: an autoscaler adds machines for what waits.
RESIZE_S = 10.0

U = TypeVar("U", bound=Unit)
R = TypeVar("R")


class Runtime(Protocol):
    """Where units run."""

    @property
    def address(self) -> str: ...
    @property
    def tally(self) -> Tally: ...

    def map(
        self,
        task: Callable[[U], R],
        units: Sequence[U],
        *,
        stage: str,
        progress: Progress,
        failed: Callable[[U, SvdmergeError], R] | None = None,
        num_gpus: float = 0,
    ) -> list[R]:
        """The task's results, in the order of the units.

        What a unit raised for good is raised; with `failed`, that gives its result instead and the
        others go on. `num_gpus` are reserved for each unit where a cluster reserves them.
        """
        ...


@contextmanager
def open_runtime(address: str) -> Generator[Runtime]:
    """A runtime at an address: `none`, `local` (an embedded Ray), `auto`, or a cluster's address.

    A Ray that this call started is shut down at the end; one that was there is left alone.
    """
    if address == "none":
        yield InProcess()
        return
    # Ray retries a task killed for memory forever; ours climbs a ladder and then fails by name.
    os.environ.setdefault("RAY_task_oom_retries", "1")
    # Tasks carry no CUDA work here, and Ray would otherwise hide devices from plain processes.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ |= {k: os.environ.get(k, v) for k, v in WORKER_ENVIRONMENT.items()}
    import ray

    ours = not ray.is_initialized()
    if ours:
        _init(address)
    try:
        yield RayTasks(address)
    finally:
        if ours:
            ray.shutdown()


def _init(address: str) -> None:
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if address == "local":
        options["include_dashboard"] = False
    else:
        # Workers of a cluster run the driver's code, not whatever their image holds.
        package = str(Path(__file__).resolve().parent.parent)
        options["runtime_env"] = {"py_modules": [package], "env_vars": WORKER_ENVIRONMENT}
    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ResourceError(
            f"--address {address}: no Ray cluster answers",
            str(error).splitlines()[0] if str(error) else "",
            "Use `local` for an embedded Ray, or `none` to run in this process.",
        ) from error


class InProcess:
    """Units one after another, in this process."""

    address = "none"

    def __init__(self) -> None:
        self.tally = Tally()

    def map(
        self,
        task: Callable[[U], R],
        units: Sequence[U],
        *,
        stage: str,
        progress: Progress,
        failed: Callable[[U, SvdmergeError], R] | None = None,
        num_gpus: float = 0,
    ) -> list[R]:
        """The task's results, in the order of the units."""
        if units and num_gpus:
            _check_gpu_here()
        results: list[R] = []
        with counted_step(self.tally, stage, len(units), progress) as bar:
            for unit in units:
                try:
                    result, seconds = _with_retries(task, unit, tally=self.tally, stage=stage)
                    self.tally.add_unit(stage, result, seconds=seconds)
                    results.append(result)
                except SvdmergeError as error:
                    self.tally.add(UNITS, step=stage, state="failed")
                    if failed is None:
                        raise
                    results.append(failed(unit, error))
                bar.advance()
        return results


def _check_gpu_here() -> None:
    import torch

    if not torch.cuda.is_available():
        raise no_gpu("--address none")


def _with_retries(task: Callable[[U], R], unit: U, *, tally: Tally, stage: str) -> tuple[R, float]:
    policy, times = RetryPolicy(), 0
    while True:
        try:
            return timed(task, unit)
        except RetryableError as error:
            times += 1
            decision = policy.decide(
                Failure.RETRYABLE, times=times, memory_bytes=0, memory_limit_bytes=0
            )
            if isinstance(decision, GiveUp):
                raise
            count_retry(
                tally, unit.name, Failure.RETRYABLE, decision, times=times, stage=stage, error=error
            )
            time.sleep(decision.pause_s)


def timed(task: Callable[[U], R], unit: U) -> tuple[R, float]:
    """What `call` gives, and the seconds it took."""
    start = time.perf_counter()
    return call(task, unit), time.perf_counter() - start


def call(task: Callable[[U], R], unit: U) -> R:
    """Run a unit with its own number of threads: a worker keeps whatever it was last set to."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(unit.threads)
    try:
        return task(unit)
    finally:
        torch.set_num_threads(before)


class RayTasks:
    """Units as Ray tasks: a bounded window, retries by policy, results in the units' order."""

    def __init__(self, address: str, *, policy: RetryPolicy | None = None) -> None:
        self.address = address
        self.tally = Tally(export=True)
        self._policy = policy or RetryPolicy()

    def map(
        self,
        task: Callable[[U], R],
        units: Sequence[U],
        *,
        stage: str,
        progress: Progress,
        failed: Callable[[U, SvdmergeError], R] | None = None,
        num_gpus: float = 0,
    ) -> list[R]:
        """The task's results, in the order of the units."""
        import ray

        limits = _limits()
        for unit in units:
            _check_fits(unit, limits)
        if units and num_gpus > limits["GPU"]:
            raise no_gpu(f"--address {self.address}")
        window = _Window(
            task, units, policy=self._policy, limits=limits, failed=failed, num_gpus=num_gpus,
            tally=self.tally, stage=stage,
        )  # fmt: skip
        try:
            with counted_step(self.tally, stage, len(units), progress) as bar:
                while window.step():
                    bar.advance()
        except BaseException:
            # The worker ends with its task: interrupted in the middle of an import it would go on
            # with half a module ("pandas has no attribute core") and fail the next task to use it.
            for ref in window.running:
                ray.cancel(ref, force=True)
            raise
        return window.results()


class _Window:
    """The units in flight, waiting and done."""

    def __init__(
        self, task: Callable[[Any], Any], units: Sequence[Unit], *, policy: RetryPolicy,
        limits: dict[str, float], failed: Callable[[Any, SvdmergeError], Any] | None,
        num_gpus: float, tally: Tally, stage: str,
    ) -> None:  # fmt: skip
        import ray

        self._remote = ray.remote(timed)
        self._tally, self._stage = tally, stage
        self._task, self._units, self._policy = task, units, policy
        self._failed_result, self._num_gpus = failed, num_gpus
        self._threads = max((unit.threads for unit in units), default=1)
        self._resize(limits)
        self._memory = [unit.memory_bytes for unit in units]
        self._failures: Counter[tuple[int, Failure]] = Counter()
        self._waiting: list[tuple[float, int]] = [(0.0, i) for i in range(len(units))]
        self._done: dict[int, Any] = {}
        self.running: dict[Any, int] = {}

    def _resize(self, limits: dict[str, float]) -> None:
        self._memory_limit = int(limits["memory"])
        # Twice the slots: the next units' arguments travel while these run.
        self._size = max(2, 2 * int(limits["CPU"]) // self._threads)
        self._resize_at = time.monotonic() + RESIZE_S

    def step(self) -> bool:
        """Wait until one more unit is done; False when all are."""
        import ray

        before = len(self._done)
        while len(self._done) == before:
            if not self.running and not self._waiting:
                return False
            pause = self._submit()
            self._tell_depth()
            if not self.running:
                time.sleep(pause)
                continue
            # One second: retries that pause are submitted in time.
            ready, _ = ray.wait(list(self.running), num_returns=1, timeout=1.0)
            for ref in ready:
                self._collect(ref)
        return True

    def _tell_depth(self) -> None:
        depths = {"waiting": len(self._waiting), "running": len(self.running)}
        for state, depth in depths.items():
            self._tally.put(QUEUE_DEPTH, depth, step=self._stage, state=state)

    def results(self) -> list[Any]:
        """What the units returned, in their order."""
        return [self._done[i] for i in range(len(self._units))]

    def _submit(self) -> float:
        """Fill the window with units whose pause is over; seconds until the next one's is."""
        if time.monotonic() >= self._resize_at:
            self._resize(_limits())
        while self._waiting and len(self.running) < self._size:
            due, i = self._waiting[0]
            if due > time.monotonic():
                return due - time.monotonic()
            heapq.heappop(self._waiting)
            unit = self._units[i]
            options = {"num_cpus": unit.threads, "memory": self._memory[i], "max_retries": 0}
            options |= {"num_gpus": self._num_gpus} if self._num_gpus else {}
            remote = self._remote.options(name=f"{unit.name}", **options)
            self.running[remote.remote(self._task, unit)] = i
        return 0.0

    def _collect(self, ref: Any) -> None:
        import ray
        from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

        i = self.running.pop(ref)
        try:
            self._done[i], seconds = ray.get(ref)
            self._tally.add_unit(self._stage, self._done[i], seconds=seconds)
        except OutOfMemoryError as error:
            self._failed(i, Failure.OUT_OF_MEMORY, error)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, SvdmergeError) else error
            kind = Failure.RETRYABLE if isinstance(cause, RetryableError) else Failure.FATAL
            self._failed(i, kind, cause)
        except RayError as error:
            self._failed(i, Failure.LOST, error)

    def _failed(self, i: int, failure: Failure, error: Exception) -> None:
        self._failures[i, failure] += 1
        decision = self._policy.decide(
            failure,
            times=self._failures[i, failure],
            memory_bytes=self._memory[i],
            memory_limit_bytes=self._memory_limit,
        )
        if isinstance(decision, GiveUp):
            self._tally.add(UNITS, step=self._stage, state="failed")
            told = self._told(i, failure, error)
            if self._failed_result is None:
                raise told from error
            self._done[i] = self._failed_result(self._units[i], told)
            return
        count_retry(
            self._tally, self._units[i].name, failure, decision, times=self._failures[i, failure],
            stage=self._stage, error=error,
        )  # fmt: skip
        self._memory[i] = decision.memory_bytes
        heapq.heappush(self._waiting, (time.monotonic() + decision.pause_s, i))

    def _told(self, i: int, failure: Failure, error: Exception) -> SvdmergeError:
        if isinstance(error, SvdmergeError):
            return error
        return ResourceError(
            f"{self._units[i].name}: {failure.value}",
            f"It failed {self._failures[i, failure]} times, last with "
            f"{self._memory[i] >> 20} MiB reserved: {last_line(error)}",
            "What is done is kept: run the same command again when the cause is gone.",
        )


def _limits() -> dict[str, float]:
    """CPUs of the cluster, and the memory of its largest node."""
    import ray

    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    return {
        "CPU": sum(n.get("CPU", 0.0) for n in nodes),
        "GPU": sum(n.get("GPU", 0.0) for n in nodes),
        "memory": max((n.get("memory", 0.0) for n in nodes), default=0.0),
    }


def no_gpu(place: str) -> ResourceError:
    """The error where a GPU is asked for and none is there."""
    return ResourceError(
        f"{place}: no GPU",
        "The recipe asks for one.",
        "Use a machine that has one, or `resources: {device: cpu}`; for tuning `use_gpu: false`.",
    )


def _check_fits(unit: Unit, limits: dict[str, float]) -> None:
    """A task that fits no node would wait forever."""
    if unit.memory_bytes > limits["memory"]:
        raise ResourceError(
            f"{unit.name}: needs {unit.memory_bytes >> 20} MiB",
            f"The largest node offers {int(limits['memory']) >> 20} MiB.",
            "Use a larger machine.",
        )
    if unit.threads > limits["CPU"]:
        raise ResourceError(
            f"{unit.name}: wants {unit.threads} threads",
            f"The cluster has {limits['CPU']:.0f} CPUs.",
            "Lower `resources.threads`.",
        )
