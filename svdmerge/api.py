"""What `import svdmerge` offers: the commands as functions, and the store to read."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from svdmerge import workflow
from svdmerge.core.components import RankOneComponents
from svdmerge.engine.estimate import Estimate, estimate
from svdmerge.engine.plan import make_plan
from svdmerge.engine.select import SELECTION
from svdmerge.engine.winners import all_values, unlisted_bound
from svdmerge.errors import StoreError
from svdmerge.progress import SILENT, Progress
from svdmerge.recipe import Recipe, load_recipe
from svdmerge.report.run_report import RunReport
from svdmerge.reporting import names_in, reported
from svdmerge.storage import layout, schema
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.maintenance import StoredSource, list_sources
from svdmerge.storage.manifest import Committed
from svdmerge.storage.shards import decode_table
from svdmerge.tables import plan_tables, run_tables

# One row per stored singular value.
SPECTRA = pa.schema(
    [
        pa.field("base", pa.string(), nullable=False),  # key of a base and a solver
        pa.field("source", pa.string(), nullable=False),  # revision
        pa.field("model", pa.string(), nullable=False),  # as a recipe calls it, else the revision
        pa.field("parameter", pa.string(), nullable=False),
        pa.field("index", pa.int32(), nullable=False),
        pa.field("s", pa.float32(), nullable=False),
        pa.field("fro", pa.float64(), nullable=False),  # Frobenius norm of the whole difference
        pa.field("bound", pa.float64(), nullable=False),  # on every value that is not listed
    ]
)


class _Shown(ABC):
    """Shows itself as the command line's tables, in terminals and notebooks."""

    __slots__ = ()

    @abstractmethod
    def _tables(self) -> Iterable[Any]: ...

    def _console(self) -> Any:
        from rich.console import Console

        console = Console(record=True, file=StringIO(), width=100, highlight=False, markup=False)
        for part in self._tables():
            console.print(part)
        return console

    def __str__(self) -> str:
        return self._console().export_text()

    def _repr_html_(self) -> str:
        return self._console().export_html(code_format="<pre>{code}</pre>", inline_styles=True)


@dataclass(frozen=True, slots=True)
class Planned(_Shown):
    """What happens to every tensor, and the costs."""

    estimate: Estimate

    def _tables(self) -> Iterable[Any]:
        return plan_tables(self.estimate)


@dataclass(frozen=True, slots=True)
class Ran(_Shown):
    """What was done."""

    report: RunReport

    @property
    def out(self) -> str:
        """The output's folder; its `report.html` shows the merge."""
        return self.report.out

    def _tables(self) -> Iterable[Any]:
        return [*run_tables(self.report), f"{self.report.status}: {self.out}"]


def plan(recipe: Recipe | str | Path) -> Planned:
    """What a recipe, or the recipe in a file, would do, from headers alone.

    Raises:
        SvdmergeError: whatever is wrong with the recipe or the models.
    """
    return Planned(estimate(make_plan(_recipe(recipe))))


def run(recipe: Recipe | str | Path, *, address: str = "local", progress: Progress = SILENT) -> Ran:
    """Decompose, select, assemble, and tune if the recipe asks; resumes by itself.

    `address` says where: `local` (an embedded Ray), `none` (in this process), `auto`, or a
    cluster's.

    Raises:
        SvdmergeError: whatever is wrong with the recipe, the models, the store or the output.
    """
    return Ran(reported(workflow.run(_recipe(recipe), address=address, progress=progress)))


def tune(
    recipe: Recipe | str | Path, *, address: str = "local", progress: Progress = SILENT
) -> Ran:
    """Train singular values of the merged model for the recipe's target, or many.

    Raises:
        SvdmergeError: as `run`, or the merge was not run.
    """
    return Ran(workflow.run_stage(_recipe(recipe), "tune", address=address, progress=progress))


def _recipe(recipe: Recipe | str | Path) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


class Store(_Shown):
    """A component store, to read: Arrow tables of what it holds, tensors of components.

    A source is given by its name in a recipe, by the last part of that, or by its revision.
    """

    __slots__ = ("_found", "_names", "folder")

    def __init__(self, uri: str | Path) -> None:
        """The store in a folder or at an fsspec URI.

        Raises:
            StoreError: it does not exist.
        """
        self.folder = Folder.at(uri)
        if not self.folder.exists():
            raise StoreError(f"{uri}: does not exist", "", "Check the path of the store.")
        self._found: tuple[StoredSource, ...] = tuple(list_sources(self.folder))
        self._names = names_in(self.folder)

    def _tables(self) -> Iterable[Any]:
        from svdmerge.tables import size, table

        rows = [
            (self._name(s), s.base[:12], s.source[:12], s.num_components, size(s.size_bytes))
            for s in self._found
        ]
        columns = ("model", "base", "source", "components", "size")
        return [table(self.folder.uri, columns=columns, rows=rows)]

    def __repr__(self) -> str:
        return f"Store({self.folder.uri!r}): {len(self._found)} sources"

    def sources(self) -> pa.Table:
        """One row per base and source: keys, name, counts, bytes."""
        return pa.Table.from_pylist([asdict(s) | {"model": self._name(s)} for s in self._found])

    def spectra(self, source: str | None = None) -> pa.Table:
        """Every stored singular value of all sources, or of one: the schema `SPECTRA`. There may be
        more of them than components.

        Raises:
            StoreError: the source is not known, or a file is damaged.
        """
        parts = [part for s in self._chosen(source) for part in self._spectra(s)]
        return pa.Table.from_batches(parts, schema=SPECTRA)

    def components(
        self, source: str, parameter: str, *, indices: Sequence[int] | None = None
    ) -> RankOneComponents:
        """u (m, r), s (r,) and vh (r, n) of a source's matrix: all that are stored, or those asked.

        Raises:
            StoreError: there is no such source, matrix or component, or it is damaged; or the
                source is stored under several bases.
        """
        chosen = self._chosen(source)
        if len(chosen) > 1:
            raise StoreError(
                f"{source}: is stored under {len(chosen)} bases or solvers",
                "", "Read the shards of one; the README tells their format.",
            )  # fmt: skip
        committed = self._committed(chosen[0])
        wanted = range(committed.held(parameter)) if indices is None else indices
        if parameter not in committed:
            raise StoreError(
                f"{self.folder.uri}: {source} has no {parameter}", "", "`spectra` lists matrices."
            )
        return committed.read(parameter, wanted)

    def runs(self) -> list[str]:
        """Plan hashes of the runs that have a selection."""
        found = self.folder.find("runs")
        return sorted({p.split("/")[1] for p in found if p.count("/") == 2 and SELECTION in p})

    def selection(self, run: str) -> pa.Table:
        """The ids of the components that a run (its plan hash) kept, best first by matrix.

        Raises:
            StoreError: the run has no selection.
        """
        path = f"{layout.run_path(run)}/{SELECTION}"
        if self.folder.stat(path) is None:
            raise StoreError(f"{self.folder.uri}: {run} selected nothing", "", "See `runs`.")
        return decode_table(self.folder.read(path)).cast(schema.SELECTION)

    def _name(self, s: StoredSource) -> str:
        return self._names.get(s.source, s.source)

    def _chosen(self, source: str | None) -> list[StoredSource]:
        found = [
            s
            for s in self._found
            if source is None
            or source in (s.source, self._name(s), self._name(s).rstrip("/").rsplit("/", 1)[-1])
        ]
        if source is not None and not found:
            known = ", ".join(sorted({self._name(s) for s in self._found})[:5])
            raise StoreError(f"{self.folder.uri}: holds no {source}", f"It holds {known}.")
        return found

    def _committed(self, s: StoredSource) -> Committed:
        return Committed.load(
            self.folder,
            commits=layout.commits_path(s.base, s.source),
            data=layout.components_path(s.base, s.source),
        )

    def _spectra(self, s: StoredSource) -> Iterator[pa.RecordBatch]:
        for parameter, parts in self._committed(s).spectra().items():
            values = all_values(parts)
            same = [s.base, s.source, self._name(s), parameter]
            columns = [pa.repeat(pa.scalar(x), len(values)) for x in same]
            columns += [pa.array(np.arange(len(values), dtype=np.int32)), pa.array(values)]
            bounds = (float(parts[0].fro), float(unlisted_bound(parts)))
            columns += [pa.repeat(pa.scalar(x), len(values)) for x in bounds]
            yield pa.record_batch(columns, schema=SPECTRA)
