"""What rounding to bfloat16 adds to real differences, and what a source of noise would take."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svdmerge.core.block_shape import WIDTH
from svdmerge.core.noise import noise_edge
from svdmerge.core.svd import exact, seed_of
from svdmerge.engine.winners import Listed, select_matrix
from svdmerge.storage.checkpoint import Checkpoint
from svdmerge.storage.shards import Spectrum

SALIENCES = ("sigma", "relative", "denoised")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """Components of matrices of a source: counts over all of them."""

    above: int
    """Of the original difference, above the edge of its rounded copy."""
    kept: int
    """Of the rounded copy's difference, above its edge."""
    noise_kept: int
    """Of the rounding error by itself, above that edge."""
    in_all: int


def pairs(
    base: Checkpoint, source: Checkpoint, names: Sequence[str]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Matrices of base and source by name, in float64."""
    for name in names:
        yield name, base.tensors[name].read().double(), source.tensors[name].read().double()


def rounding(base: Checkpoint, source: Checkpoint, names: Sequence[str]) -> Rounding:
    """What `denoised` makes of a source that was rounded to bfloat16, its base as it is."""
    counts = [0, 0, 0, 0]
    for _, start, weight in pairs(base, source, names):
        rounded = weight.bfloat16().double()
        found = exact(rounded - start)
        edge = noise_edge(rounded - start, leading=found.slice(0, WIDTH))
        error = torch.linalg.svdvals(rounded - weight)
        values = (torch.linalg.svdvals(weight - start), found.s, error)
        counts = [c + int((s > edge).sum()) for c, s in zip(counts, values, strict=False)] + [
            counts[3] + len(error)
        ]
    return Rounding(above=counts[0], kept=counts[1], noise_kept=counts[2], in_all=counts[3])


def slots(
    base: Checkpoint,
    sources: Mapping[str, Checkpoint],
    names: Sequence[str],
    *,
    noisy: str,
    share: float,
) -> dict[str, float]:
    """By salience, the share of all slots that a source takes whose matrices were replaced by
    Gaussian noise of their own norms."""
    taken, in_all = dict.fromkeys(SALIENCES, 0), dict.fromkeys(SALIENCES, 0)
    for name in names:
        listed = [_listed(s, base, source, name, noisy=noisy) for s, source in sources.items()]
        k = int(share * min(base.tensors[name].shape))
        for salience in SALIENCES:
            rows = select_matrix(listed, salience=salience, k=k)
            taken[salience] += sum(listed[i].source == noisy for i in rows.source)
            in_all[salience] += len(rows)
    return {s: taken[s] / max(1, in_all[s]) for s in SALIENCES}


def _listed(key: str, base: Checkpoint, source: Checkpoint, name: str, *, noisy: str) -> Listed:
    ((_, start, weight),) = pairs(base, source, [name])
    d = weight - start
    if key == noisy:
        m, n = d.shape
        generator = torch.Generator().manual_seed(seed_of(name, m=m, n=n, block=0))
        noise = torch.randn(d.shape, generator=generator, dtype=torch.float64)
        d = noise * (torch.linalg.vector_norm(d) / torch.linalg.vector_norm(noise))
    found = exact(d)
    spectrum = Spectrum(
        parameter=name, sha256=key, m=d.shape[0], n=d.shape[1], bound=0.0, first=0,
        fro=float(torch.linalg.vector_norm(d)), base_fro=None, solver="exact",
        noise=noise_edge(d, leading=found.slice(0, WIDTH)), s=found.s.float().numpy(),
    )  # fmt: skip
    return Listed(sha256=key, source=key, weight=1.0, spectra=[spectrum])
