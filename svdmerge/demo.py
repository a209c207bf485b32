"""The whole workflow on real data: 1,797 handwritten digits that ship with scikit-learn.

A base learns which way up a digit stands. Eight sources are fine-tuned from it, each on one yes/no
question about the digit. The target is to read the digit itself, from five examples of each: labels
that neither the base nor any source saw, and that no single question settles. The images fall into
three disjoint parts: what base and sources learn from, the target's examples, and the test images,
which nothing is ever trained on.
"""

import contextlib
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from svdmerge.core.discriminant import discriminant
from svdmerge.demo_models import (
    Training,
    build,
    digit_images,
    examples_bytes,
    load_model,
    read_examples,
    train_model,
)
from svdmerge.engine.runtime import open_runtime
from svdmerge.progress import SILENT, Progress
from svdmerge.recipe import load_recipe
from svdmerge.report.run_report import RunReport
from svdmerge.reporting import PAGE, reported
from svdmerge.storage.filesystem import Folder
from svdmerge.training.head import fitted_head
from svdmerge.workflow import run

__all__ = ["DemoResult", "DemoRow", "DemoSettings", "build", "run_demo"]

NUM_CLASSES = 10
# The digits whose answer is yes. All eight answers together tell the ten digits apart.
QUESTIONS: Mapping[str, tuple[int, ...]] = {
    "odd": (1, 3, 5, 7, 9),
    "at-least-5": (5, 6, 7, 8, 9),
    "prime": (2, 3, 5, 7),
    "has-a-loop": (0, 4, 6, 8, 9),
    "multiple-of-3": (0, 3, 6, 9),
    "square": (0, 1, 4, 9),
    "fibonacci": (1, 2, 3, 5, 8),
    "between-3-and-6": (3, 4, 5, 6),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    """Sizes of the demo. The defaults were chosen on other splits of the images."""

    width: int = 96
    depth: int = 3
    num_train: int = 1000
    """Images that base and sources learn from."""
    num_test: int = 497
    """Images that accuracy is measured on."""
    shots: int = 5
    """Examples of each digit for the target, from the remaining images."""
    base_epochs: int = 8
    base_learning_rate: float = 2e-3
    source_epochs: int = 10
    source_learning_rate: float = 1e-3
    batch_size: int = 64
    k: str = "20%"
    scale: float = 0.6
    """Below 1: sources of one domain share directions, and their plain sum overshoots."""
    tune_epochs: int = 40
    tune_learning_rate: float = 0.01
    head_learning_rate: float = 0.001
    """A tenth of the default: fifty examples overfit a head that moves fast."""
    seed: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoRow:
    """A model on the target's test images."""

    name: str
    accuracy: float
    trained: int
    """Values trained for the target inside the model; its linear head not counted."""
    trained_with_head: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """What the demo found, and where everything lies."""

    rows: tuple[DemoRow, ...]
    """Base; the best source by the examples, and in hindsight; merged; tuned. One head solver."""
    sources: tuple[DemoRow, ...]
    """Every source by itself."""
    seconds: Mapping[str, float]
    """By step."""
    paths: Mapping[str, str]
    report: RunReport
    """Of the merge and the tuning, as `svdmerge run` reports it."""

    def to_json(self) -> dict[str, Any]:
        """The result as plain values."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "sources": [asdict(row) for row in self.sources],
            "seconds": dict(self.seconds),
            "paths": dict(self.paths),
        }


def run_demo(
    out: str | Path,
    *,
    address: str = "local",
    progress: Progress = SILENT,
    settings: DemoSettings | None = None,
) -> DemoResult:
    """Train base and sources, merge, tune, and measure all on the same target.

    What an earlier call left in `out` is used again where it is what this call would make.

    Raises:
        ResourceError: scikit-learn is missing, or no Ray answers at the address.
        SvdmergeError: whatever training, merging or tuning meets.
    """
    settings, folder, seconds = settings or DemoSettings(), Path(out).resolve(), _Seconds()
    with seconds.of("data"):
        write_examples(folder, settings=settings)
    with contextlib.ExitStack() as stack:
        with seconds.of("start of workers"):
            runtime = stack.enter_context(open_runtime(address))
        with seconds.of("base"):
            units = [base_unit(folder, settings=settings)]
            (base,) = runtime.map(train_model, units, stage="base", progress=progress)
        with seconds.of("sources"):
            units = source_units(folder, settings=settings)
            sources = runtime.map(train_model, units, stage="sources", progress=progress)
        recipe = write_recipe(folder, base=base, sources=sources, settings=settings)
        with seconds.of("merge and tune"):
            report = _run(recipe, address=address, progress=progress)
    with seconds.of("probes"):
        rows, by_source = _measure(folder, sources=sources, report=report)
    paths = {
        "recipe": str(recipe), "base": base, "sources": str(folder / "sources"),
        "merged": report.out, "tuned": str(folder / "tuned"), "store": report.store,
        "report": f"{report.out}/{PAGE}",
    }  # fmt: skip
    return DemoResult(
        rows=rows, sources=by_source, seconds=dict(seconds), paths=paths, report=report
    )


def write_examples(folder: Path, *, settings: DemoSettings) -> None:
    """`data/sources.parquet`, `data/target.parquet` and `data/test.parquet`, disjoint.

    Raises:
        ResourceError: scikit-learn is missing.
    """
    images, digits = digit_images()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(settings.seed))
    test, learn, rest = order.split([
        settings.num_test, settings.num_train, len(order) - settings.num_test - settings.num_train,
    ])  # fmt: skip
    few = torch.cat([rest[digits[rest] == d][: settings.shots] for d in range(NUM_CLASSES)])
    for name, chosen in (("sources", learn), ("target", few), ("test", test)):
        content = examples_bytes(images[chosen], digits=digits[chosen])
        file = Folder.at(folder / "data")
        # Untouched where equal: a new modification time would be a new version of the data.
        if file.stat(f"{name}.parquet") is None or file.read(f"{name}.parquet") != content:
            file.put(f"{name}.parquet", content)


def base_unit(folder: Path, *, settings: DemoSettings) -> Training:
    """The base's training."""
    return Training(
        name="base",
        folder=str(folder / "base"),
        examples=str(folder / "data" / "sources.parquet"),
        start=None,
        width=settings.width,
        depth=settings.depth,
        epochs=settings.base_epochs,
        learning_rate=settings.base_learning_rate,
        batch_size=settings.batch_size,
        seed=settings.seed,
    )


def source_units(folder: Path, *, settings: DemoSettings) -> list[Training]:
    """The sources' trainings, one a question."""
    base = base_unit(folder, settings=settings)
    return [
        replace(
            base,
            name=name,
            folder=str(folder / "sources" / name),
            start=base.folder,
            yes=yes,
            epochs=settings.source_epochs,
            learning_rate=settings.source_learning_rate,
            seed=settings.seed + number,
        )
        for number, (name, yes) in enumerate(QUESTIONS.items(), start=1)
    ]


def write_recipe(
    folder: Path, *, base: str, sources: Sequence[str], settings: DemoSettings
) -> Path:
    """`recipe.yml`, which `svdmerge run` takes as well."""
    recipe = {
        "merge_method": "axis",
        "base_model": base,
        "models": list(sources),
        "parameters": {"k": settings.k, "scale": settings.scale},
        "store": str(folder / "store"),
        "out": str(folder / "merged"),
        "tune": {
            "task": "tensor",
            "model": "svdmerge.demo:build",
            "input": "image",
            "train": str(folder / "data" / "target.parquet"),
            "test": str(folder / "data" / "test.parquet"),
            "per_class": settings.shots,
            "num_values": settings.k,
            "epochs": settings.tune_epochs,
            "learning_rate": settings.tune_learning_rate,
            "head_learning_rate": settings.head_learning_rate,
            # All epochs together take less than a second: nothing in between is worth a checkpoint.
            "checkpoint_every": settings.tune_epochs,
            "out": str(folder / "tuned"),
        },
    }
    Folder.at(folder).put("recipe.yml", yaml.safe_dump(recipe, sort_keys=False).encode())
    return folder / "recipe.yml"


def _run(recipe: Path, *, address: str, progress: Progress) -> RunReport:
    """What `svdmerge run` does, in the Ray that is already there."""
    return reported(run(load_recipe(recipe), address=address, progress=progress))


def _measure(
    folder: Path, *, sources: Sequence[str], report: RunReport
) -> tuple[tuple[DemoRow, ...], tuple[DemoRow, ...]]:
    """The tuning's rows with the harder bar among them, and a row for every source."""
    by_source = tuple(probe(s, name=Path(s).name, data=folder / "data") for s in sources)
    # Chosen on the test images themselves: what no rule for choosing beforehand can beat.
    best = max(by_source, key=lambda row: row.accuracy)
    bar = replace(best, name=f"best source in hindsight: {best.name}")
    base, chosen, *others = [
        DemoRow(
            name=row.name,
            accuracy=row.accuracy,
            trained=row.trained,
            trained_with_head=row.trained_with_head,
            seconds=row.seconds,
        )
        for row in report.tune.rows
    ]
    return (base, chosen, bar, *others), by_source


def probe(folder: str, *, name: str, data: Path) -> DemoRow:
    """Accuracy of a frozen model on the target by its head, as in tuning."""
    start = time.perf_counter()
    model = load_model(folder)
    images, digits = read_examples(data / "target.parquet")
    test_images, test_digits = read_examples(data / "test.parquet")
    with torch.no_grad():
        features, test_features = model(images), model(test_images)
    closed = discriminant(features, labels=digits, num_classes=NUM_CLASSES)
    head = fitted_head(features, labels=digits, closed=closed)
    return DemoRow(
        name=name,
        accuracy=head.accuracy(test_features, labels=test_digits),
        trained=0,
        trained_with_head=head.weight.numel() + head.bias.numel(),
        seconds=time.perf_counter() - start,
    )


class _Seconds(dict[str, float]):
    """Seconds by step."""

    @contextlib.contextmanager
    def of(self, step: str) -> Generator[None]:
        """Time the block."""
        start = time.perf_counter()
        yield
        self[step] = time.perf_counter() - start
