"""What selecting runs on workers: sidecars in, counts and ids out. No vector is read."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from svdmerge.core.contest import Rivals
from svdmerge.core.histogram import Histogram, bins_of
from svdmerge.core.methods.registry import Takes
from svdmerge.core.params import Action, Parameter
from svdmerge.engine.inventory import Sidecar
from svdmerge.engine.winners import (
    Contender,
    Listed,
    SpectraBySource,
    Winners,
    listed_spectra,
    select_all,
    select_components,
    select_matrix,
    short_of,
)
from svdmerge.storage import schema
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.manifest import read_sidecar
from svdmerge.storage.shards import Spectrum


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How many components of a matrix may be kept."""

    parameter: Parameter
    k: int
    """Of all sources where these are pooled, else of each."""
    most: int
    """What `k` is at most, however the cut falls."""
    slots: int
    """What quotas are shares of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectUnit:
    """Matrices whose components are ranked across all sources."""

    name: str
    memory_bytes: int
    threads: int
    store: Folder
    sidecars: tuple[Sidecar, ...]
    sources: tuple[Contender, ...]
    budgets: tuple[Budget, ...]
    stored: Mapping[str, tuple[int, ...]]
    """Components stored of each source (revision), by budget."""
    takes: Takes
    salience: str


def select(unit: SelectUnit) -> pa.Table:
    """The selected ids, best first within each matrix."""
    parts = [_batch(b.parameter, listed, _winners(unit, b, listed)) for b, listed in matrices(unit)]
    return pa.Table.from_batches(parts, schema=schema.SELECTION).combine_chunks()


def shortfalls(unit: SelectUnit, *, floor: float) -> list[tuple[str, str, int]]:
    """Source, matrix and depth to go to, wherever what is not stored might be selected."""
    return [
        (revision, b.parameter.source_id, depth)
        for number, (b, listed) in enumerate(matrices(unit))
        if b.parameter.action is Action.DECOMPOSE
        for revision, depth in short_of(
            listed,
            stored={revision: depths[number] for revision, depths in unit.stored.items()},
            salience=unit.salience, k=b.k, cap=b.most, floor=floor,
        )
    ]  # fmt: skip


def weigh(unit: SelectUnit) -> Histogram:
    """How the saliences that could be kept are spread."""
    return spread(matrices(unit), salience=unit.salience)


def contest(unit: SelectUnit, *, cut: int, k: int) -> tuple[dict[str, int], Rivals]:
    """Per matrix how many lie in bins above the `cut`, and the first `k` of those inside it."""
    return rivals_of(matrices(unit), salience=unit.salience, cut=cut, k=k)


def spread(found: Iterable[tuple[Budget, list[Listed]]], *, salience: str) -> Histogram:
    """The histogram of matrices, the saliences of one in memory at a time."""
    return Histogram.of(rows.salience for _, _, rows in _ranked(found, salience=salience))


def rivals_of(
    found: Iterable[tuple[Budget, list[Listed]]], *, salience: str, cut: int, k: int
) -> tuple[dict[str, int], Rivals]:
    """Counts and rivals of matrices, as `contest` tells them."""
    above: dict[str, int] = {}
    rivals: list[tuple[np.ndarray, str]] = []
    for b, listed, rows in _ranked(found, salience=salience):
        bins = bins_of(rows.salience)
        above[b.parameter.source_id] = int((bins > cut).sum())
        at = np.flatnonzero(bins == cut)
        for i in np.unique(rows.source[at]):
            mine = rows.salience[at[rows.source[at] == i]]
            rivals.append((mine, f"{listed[i].sha256} {b.parameter.source_id}"))
    return above, Rivals.of(rivals).first(k)


def matrices(unit: SelectUnit) -> Iterator[tuple[Budget, list[Listed]]]:
    """Each matrix with the stored values of all sources.

    Raises: StoreError, if a sidecar is damaged.
    """
    return listed_in(unit, read_spectra(unit))


def read_spectra(unit: SelectUnit) -> SpectraBySource:
    """The stored values of a unit's matrices, by source; its budgets have no part in them."""
    wanted = {b.parameter.source_id for b in unit.budgets}
    spectra: dict[str, dict[str, list[Spectrum]]] = {
        source.revision: defaultdict(list) for source in unit.sources
    }
    for sidecar in unit.sidecars:
        for spectrum in read_sidecar(unit.store, sidecar.entry):
            if spectrum.parameter in wanted:
                spectra[sidecar.revision][spectrum.parameter].append(spectrum)
    for by_matrix in spectra.values():
        for parts in by_matrix.values():
            parts.sort(key=lambda x: x.first)
    return spectra


def listed_in(unit: SelectUnit, spectra: SpectraBySource) -> Iterator[tuple[Budget, list[Listed]]]:
    """Each matrix with its values among those that were read."""
    for b in unit.budgets:
        listed = listed_spectra(b.parameter, slots=b.slots, sources=unit.sources, spectra=spectra)
        yield b, listed


def _ranked(
    found: Iterable[tuple[Budget, list[Listed]]], *, salience: str
) -> Iterator[tuple[Budget, list[Listed], Winners]]:
    """As many of each decomposed matrix as there may be of it."""
    for b, listed in found:
        if b.parameter.action is Action.DECOMPOSE:
            yield b, listed, select_matrix(listed, salience=salience, k=b.most)


def _winners(unit: SelectUnit, b: Budget, listed: list[Listed]) -> Winners:
    if b.parameter.action is not Action.DECOMPOSE:
        return select_all(listed)
    return select_components(listed, takes=unit.takes, salience=unit.salience, k=b.k)


def _batch(parameter: Parameter, listed: list[Listed], rows: Winners) -> pa.RecordBatch:
    def text(values: list[str]) -> pa.Array:
        return pa.array(values, pa.string()).take(pa.array(rows.source))

    columns = {
        "parameter": pa.repeat(parameter.source_id, len(rows)),
        "rank": pa.array(np.arange(len(rows), dtype=np.int32)),
        "source": text([x.source for x in listed]),
        "index": pa.array(rows.index.astype(np.int32)),
        "s": pa.array(rows.s),
        "salience": pa.array(rows.salience),
        "sha256": text([x.sha256 for x in listed]),
    }
    return pa.record_batch([columns[f.name] for f in schema.SELECTION], schema=schema.SELECTION)
