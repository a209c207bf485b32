"""AXIS: the sum of the globally most salient components, re-orthogonalised (arXiv 2508.19353)."""

from collections.abc import Sequence

from svdmerge.core.components import RankOneComponents, concatenate
from svdmerge.core.merge import recompress


def axis(
    parts: Sequence[RankOneComponents], *, weights: Sequence[float], scale: float
) -> RankOneComponents:
    """Merged factors of one matrix from the kept components of each source.

    A source's weight scales its singular values; `scale` is the strength of all (1 in the paper).
    """
    weighted = [
        RankOneComponents(u=p.u, s=p.s.double() * (w * scale), vh=p.vh)
        for p, w in zip(parts, weights, strict=True)
    ]
    return recompress(concatenate([p.to(p.s.dtype) for p in weighted]))
