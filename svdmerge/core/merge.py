"""Re-orthogonalisation: an SVD of a sum of components that never forms the dense matrix."""

import torch

from svdmerge.core.components import RankOneComponents


def recompress(parts: RankOneComponents) -> RankOneComponents:
    """The SVD of the components' sum, in float64: QR of both sides, then a k x k core.

    With U = Qu Ru and Vh = (Qv Rv)^T the sum is Qu (Ru diag(s) Rv^T) Qv^T, and the core's SVD is
    the sum's. Equal to the dense SVD to rounding; O((m + n) k^2 + k^3) instead of O(m n r).

    Reference: the second SVD of AXIS, arXiv 2508.19353; the QR core as in Core Space, 2509.17786.
    """
    c = parts.to(torch.float64)
    qu, ru = torch.linalg.qr(c.u)
    qv, rv = torch.linalg.qr(c.vh.T)
    u, s, vh = torch.linalg.svd((ru * c.s) @ rv.T, full_matrices=False)
    # Directions that rounding alone produced are dropped: rounding of the largest part, not of the
    # sum, for parts may cancel. Not >=: an all-zero sum has rank 0.
    parts_norm = c.s.abs() * c.u.norm(dim=0) * c.vh.norm(dim=1)
    largest = float(parts_norm.max()) if len(parts_norm) else 0.0
    floor = largest * torch.finfo(s.dtype).eps * max(c.u.shape[0], c.vh.shape[1])
    rank = int((s > floor).sum())
    return RankOneComponents(u=qu @ u[:, :rank], s=s[:rank], vh=vh[:rank] @ qv.T)
