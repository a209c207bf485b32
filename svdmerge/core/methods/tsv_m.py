"""TSV-M: leading singular vectors of each source, orthogonalised together (arXiv 2412.00081)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from svdmerge.core.components import RankOneComponents, concatenate
from svdmerge.core.merge import recompress

# Singular values of stacked unit vectors below this share of the largest are rounding of the
# float32 in which vectors are stored, so no direction of theirs.
ROUNDING = 1e-6


def tsv_m(
    parts: Sequence[RankOneComponents], *, weights: Sequence[float], scale: float
) -> RankOneComponents:
    """Merged factors of one matrix from the leading r / N components of each of N sources.

    The stacked U, and likewise V, is replaced by the orthonormal matrix nearest to it; the sources'
    singular values stay. The outcome is decomposed again, for equal directions may have met.

    Reference: arXiv 2412.00081, algorithm 1 (TSV-Merge).
    """
    c = concatenate([p.scaled(w * scale) for p, w in zip(parts, weights, strict=True)])
    return recompress(RankOneComponents(u=polar(c.u), s=c.s, vh=polar(c.vh.T).T))


def polar(vectors: Float[Tensor, "d c"]) -> Float[Tensor, "d c"]:
    """The orthogonal polar factor P Q^T of vectors = P S Q^T.

    Deviation: of dependent columns, such as those of two equal sources, it is the partial isometry,
    without the null space, where P and Q are not determined and a solver's choice would decide.
    """
    p, s, qh = torch.linalg.svd(vectors, full_matrices=False)
    rank = int((s > ROUNDING * s[:1]).sum())
    return p[:, :rank] @ qh[:rank]
