"""Who wins in one matrix: stored values of all sources, ranked in a total order."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from svdmerge.core.methods.registry import Takes
from svdmerge.core.salience import SALIENCES
from svdmerge.core.topk import top_k
from svdmerge.storage.shards import Spectrum

# By how much a source's depth grows in a round at most: what is expected that far ahead is a guess.
MOST_GROWTH = 4
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


def share_above_noise(spectra: SpectraByMatrix) -> float:
    """Of a source's changed matrices, the share of which a component stands above the noise.

    Of pure noise about none does (`core.noise`); of fine-tuned models measured every one.
    """
    firsts = [x for by in spectra.values() for x in by if x.first == 0 and len(x.s) and x.m > 1]
    return sum(bool(x.s[0] > x.noise) for x in firsts) / len(firsts) if firsts else 1.0


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
            salience_of(x, s.astype(np.float64), salience=salience)
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
    """A matrix's singular values from the first on, from records that may overlap.

    Each block's are within tolerance of their own: where two overlap, the running minimum.
    """
    values = np.zeros(0, np.float32)
    for part in spectra:
        if part.first <= len(values):
            values = np.concatenate([values, part.s[len(values) - part.first :]])
    return np.minimum.accumulate(values)


def salience_of(
    listed: Listed, s: Float[np.ndarray, " c"], *, salience: str
) -> Float[np.ndarray, " c"]:
    """What singular values of this source count for."""
    first, w = listed.spectra[0], listed.weight
    return SALIENCES[salience](s * w, fro=first.fro, noise=first.noise * w)


def largest_unlisted(listed: Listed, *, salience: str) -> float:
    """The most salience that a value which is not listed can have."""
    bound = np.array([listed.spectra[-1].bound])
    return float(salience_of(listed, bound, salience=salience)[0])


def short_of(
    listed: Sequence[Listed], *, stored: Mapping[str, int], salience: str, k: int
) -> Iterator[tuple[str, int]]:
    """Sources that may have more among the k most salient of one matrix than what is `stored`
    (components by source), and how many each should have then.

    This is the threshold algorithm (Fagin, Lotem, Naor 2003): the k-th of all values seen is the
    cut, and a source is read on only while what it has not shown may lie above it.
    """
    rows = select_matrix(listed, salience=salience, k=k)
    cut = rows[-1].salience if rows and len(rows) == k else 0.0
    for x in listed:
        values = all_values(x.spectra)
        if len(values) < k and largest_unlisted(x, salience=salience) > cut:
            last = float(salience_of(x, values[-1:].astype(np.float64), salience=salience).sum())
            yield x.source, min(k, expected_depth(values, ratio=last / cut if cut else math.inf))
        elif (needed := max((r.index + 1 for r in rows if r.source == x.source), default=0)) > (
            stored[x.source]
        ):
            # The exact solver lists all values, and its vectors are stored only as deep as asked.
            yield x.source, needed


def expected_depth(values: Float[np.ndarray, " c"], *, ratio: float) -> int:
    """About how many values a source has above the cut, of which the last known is `ratio` times:
    by the power law through the last one and that in the middle, at least one more than known.

    What is stored does not depend on it, only the number of rounds.
    """
    count = len(values)
    if ratio <= 1.0 or count < 2:
        return count + 1
    slope = np.log(values[count // 2 - 1] / values[-1]) / np.log(count / (count // 2))
    most = MOST_GROWTH * count
    return (
        most if ratio >= MOST_GROWTH**slope else max(count + 1, int(count * ratio ** (1 / slope)))
    )
