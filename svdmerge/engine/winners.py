"""Who wins in one matrix: stored values of all sources, ranked in a total order."""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from svdmerge.core.methods.registry import Takes
from svdmerge.core.params import Parameter, budget
from svdmerge.core.salience import SALIENCES
from svdmerge.core.topk import top_k
from svdmerge.storage.shards import Spectrum

# By how much a source's depth grows in a round at most: what is expected that far ahead is a guess.
MOST_GROWTH = 4
SpectraByMatrix = Mapping[str, list[Spectrum]]
SpectraBySource = Mapping[str, SpectraByMatrix]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A source as the selection knows it."""

    revision: str
    weight: float
    quota: float
    """Share of each matrix's slots that it may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One source's stored values of one matrix, by which it enters the selection."""

    sha256: str
    source: str
    weight: float
    spectra: list[Spectrum]
    most: int = sys.maxsize
    """Components that it may give to this matrix: its quota."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Winners:
    """Kept components, best first: of which source (its place among the listed), its index there,
    and why. Arrays, for there may be millions."""

    source: Int[np.ndarray, " k"]
    index: Int[np.ndarray, " k"]
    s: Float[np.ndarray, " k"]
    salience: Float[np.ndarray, " k"]

    def __len__(self) -> int:
        return len(self.index)

    def kept(self, num_sources: int) -> list[int]:
        """How many are of each source: the first so many of its list, for those come first."""
        return np.bincount(self.source, minlength=num_sources).tolist()


def listed_spectra(
    parameter: Parameter, *, slots: int, sources: Sequence[Contender], spectra: SpectraBySource
) -> list[Listed]:
    """A matrix's values by source, in order of the tensors' content.

    Content first, then weight, so that neither names nor places of sources decide a tie. Quotas
    are shares of `slots`, the matrix's budget.
    """
    listed = [
        Listed(
            sha256=found[0].sha256, source=source.revision, weight=source.weight, spectra=found,
            most=sys.maxsize if source.quota == 1 else budget(source.quota, rank=slots),
        )
        for source in sources
        if (found := spectra[source.revision].get(parameter.source_id))
    ]  # fmt: skip
    return sorted(listed, key=lambda x: (x.sha256, x.weight, x.source))


def share_above_noise(spectra: SpectraByMatrix) -> float:
    """Of a source's changed matrices, the share of which a component stands above the noise.

    Of pure noise about none does (`core.noise`); of fine-tuned models measured every one.
    """
    firsts = [x for by in spectra.values() for x in by if x.first == 0 and len(x.s) and x.m > 1]
    return sum(bool(x.s[0] > x.noise) for x in firsts) / len(firsts) if firsts else 1.0


def select_all(listed: Sequence[Listed]) -> Winners:
    """Every source's flat difference: what an average is made of."""
    num = len(listed)
    return Winners(
        source=np.arange(num), index=np.zeros(num, np.int64), s=np.ones(num, np.float32),
        salience=np.array([x.weight for x in listed], np.float64),
    )  # fmt: skip


def select_components(listed: Sequence[Listed], *, takes: Takes, salience: str, k: int) -> Winners:
    """The components of one matrix that a method takes, best first.

    `k` counts those of all sources where these are pooled, else those of each.
    """
    if takes is Takes.POOLED:
        return select_matrix(listed, salience=salience, k=k)
    return select_leading(listed, k=k)


def select_leading(listed: Sequence[Listed], *, k: int) -> Winners:
    """The k leading components of each source, none of them zero; largest first."""
    return _ranked(listed, salience="sigma", of_each=k, k=k * len(listed))


def select_matrix(listed: Sequence[Listed], *, salience: str, k: int) -> Winners:
    """The k most salient components of one matrix across sources, best first."""
    return _ranked(listed, salience=salience, of_each=k, k=k)


def _ranked(listed: Sequence[Listed], *, salience: str, of_each: int, k: int) -> Winners:
    # A source's values descend, and so do its saliences: what it gives is among its first.
    values = [all_values(x.spectra, most=min(of_each, x.most)) for x in listed]
    scores = [salience_of(x, s, salience=salience) for x, s in zip(listed, values, strict=True)]
    s = np.concatenate([np.zeros(0, np.float32), *values])
    ranked = np.concatenate([np.zeros(0), *scores])
    lengths = np.array([len(v) for v in values], np.int64)
    source = np.repeat(np.arange(len(values)), lengths)
    index = np.arange(len(s)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    best = top_k(ranked, tie=source, index=index, k=k)
    return Winners(source=source[best], index=index[best], s=s[best], salience=ranked[best])


def all_values(spectra: Sequence[Spectrum], *, most: int | None = None) -> np.ndarray:
    """A matrix's singular values (`most` of them) from the first on, from records that may overlap.

    Each block's are within tolerance of their own: where two overlap, the running minimum.
    """
    values = np.zeros(0, np.float32)
    for part in spectra:
        if part.first <= len(values):
            new = part.s[len(values) - part.first :]
            values = np.concatenate([values, new]) if len(values) else new
    return np.minimum.accumulate(values[:most])


def unlisted_bound(spectra: Sequence[Spectrum]) -> float:
    """What no value exceeds that `all_values` does not give: by the record that reaches furthest
    from the first value on without a gap, for one beyond a gap says nothing of what was lost."""
    reach, bound = 0, spectra[0].fro
    for part in spectra:
        end = part.first + len(part.s)
        if part.first <= reach <= end:
            bound = part.bound if end > reach else min(bound, part.bound)
            reach = end
    return bound


def salience_of(
    listed: Listed, s: Float[np.ndarray, " c"], *, salience: str
) -> Float[np.ndarray, " c"]:
    """What singular values of this source count for, in float64."""
    first, w = listed.spectra[0], listed.weight
    scaled = s.astype(np.float64) * w
    return SALIENCES[salience](scaled, fro=first.fro, noise=first.noise * w)


def largest_unlisted(listed: Listed, *, salience: str) -> float:
    """The most salience that a value which is not listed can have."""
    bound = np.array([unlisted_bound(listed.spectra)])
    return float(salience_of(listed, bound, salience=salience)[0])


def cut_of(rows: Winners, *, cap: int, floor: float) -> float:
    """What a value must exceed to be kept besides these: the least of as many as there may be."""
    return max(floor, float(rows.salience[-1])) if 0 < cap == len(rows) else floor


def is_open(listed: Listed, *, cap: int, cut: float, salience: str) -> bool:
    """Whether a value that is not listed may exceed the cut, and would have a slot then."""
    has_slots = len(all_values(listed.spectra)) < min(cap, listed.most)
    return has_slots and largest_unlisted(listed, salience=salience) > cut


def short_of(
    listed: Sequence[Listed],
    *,
    stored: Mapping[str, int],
    salience: str,
    k: int,
    cap: int | None = None,
    floor: float = 0.0,
) -> Iterator[tuple[str, int]]:
    """Sources that may have more among the k most salient of one matrix than what is `stored`
    (components by source), and how many each should have then.

    This is the threshold algorithm (Fagin, Lotem, Naor 2003): the k-th of all values seen is the
    cut, and a source is read on only while what it has not shown may lie above it. Where matrices
    compete, the cut of all is the `floor`, and only `cap` of one's own end it sooner.
    """
    cap = k if cap is None else cap
    rows = select_matrix(listed, salience=salience, k=k)
    cut = cut_of(rows, cap=cap, floor=floor)
    for x, needed in zip(listed, rows.kept(len(listed)), strict=True):
        if is_open(x, cap=cap, cut=cut, salience=salience):
            values, most = all_values(x.spectra), min(cap, x.most)
            last = float(salience_of(x, values[-1:], salience=salience).sum())
            yield x.source, min(most, expected_depth(values, ratio=last / cut if cut else math.inf))
        elif needed > stored[x.source]:
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
