"""Who wins in one matrix: stored values of all sources, ranked in a total order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from svdmerge.core.methods.registry import Takes
from svdmerge.core.salience import SALIENCES
from svdmerge.core.topk import top_k
from svdmerge.storage.shards import Spectrum

SpectraByMatrix = Mapping[str, list[Spectrum]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One source's stored values of one matrix, by which it enters the selection."""

    sha256: str
    source: str
    weight: float
    spectra: list[Spectrum]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """A kept component: its source's revision, its index there, and why it was kept."""

    source: str
    index: int
    s: float
    salience: float
    sha256: str


def listed_spectra(
    parameter: str, spectra: Mapping[str, tuple[float, SpectraByMatrix]]
) -> list[Listed]:
    """A matrix's values by source (revision -> weight, spectra), in order of the tensors' content.

    Content first, then weight, so that neither names nor places of sources decide a tie.
    """
    listed = [
        Listed(sha256=found[0].sha256, source=revision, weight=weight, spectra=found)
        for revision, (weight, by_matrix) in spectra.items()
        if (found := by_matrix.get(parameter))
    ]
    return sorted(listed, key=lambda x: (x.sha256, x.weight, x.source))


def select_all(listed: Sequence[Listed]) -> list[Selected]:
    """Every source's flat difference: what an average is made of."""
    return [
        Selected(source=x.source, index=0, s=1.0, salience=x.weight, sha256=x.sha256)
        for x in listed
    ]


def select_components(
    listed: Sequence[Listed], *, takes: Takes, salience: str, k: int
) -> list[Selected]:
    """The components of one matrix that a method takes, best first.

    `k` counts those of all sources where these are pooled, else those of each.
    """
    if takes is Takes.POOLED:
        return select_matrix(listed, salience=salience, k=k)
    return select_leading(listed, k=k)


def select_leading(listed: Sequence[Listed], *, k: int) -> list[Selected]:
    """The k leading components of each source, none of them zero; largest first."""
    rows = [
        Selected(
            source=x.source, index=i, s=float(s), salience=float(s) * x.weight, sha256=x.sha256
        )
        for x in listed
        for i, s in enumerate(all_values(x.spectra)[:k])
        if s > 0
    ]
    # Stable: what ties stays in the order of content.
    return sorted(rows, key=lambda row: -row.salience)


def select_matrix(listed: Sequence[Listed], *, salience: str, k: int) -> list[Selected]:
    """The k most salient components of one matrix across sources, best first."""
    if not listed:
        return []
    values = [all_values(x.spectra) for x in listed]
    scores = np.concatenate(
        [
            SALIENCES[salience](s.astype(np.float64) * x.weight, fro=x.spectra[0].fro)
            for x, s in zip(listed, values, strict=True)
        ]
    )
    tie = np.repeat(np.arange(len(values)), [len(s) for s in values])
    index = np.concatenate([np.arange(len(s)) for s in values])
    return [
        Selected(
            source=listed[int(tie[i])].source,
            index=int(index[i]),
            s=float(values[int(tie[i])][index[i]]),
            salience=float(scores[i]),
            sha256=listed[int(tie[i])].sha256,
        )
        for i in top_k(scores, tie=tie, index=index, k=k).tolist()
    ]


def all_values(spectra: Sequence[Spectrum]) -> np.ndarray:
    """A matrix's singular values from the first on, from records that may overlap."""
    values = np.zeros(0, np.float32)
    for part in spectra:
        if part.first <= len(values):
            values = np.concatenate([values, part.s[len(values) - part.first :]])
    return values
