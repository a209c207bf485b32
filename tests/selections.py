"""What full float64 SVDs select, and how near to it threshold rounds must be."""

from collections.abc import Sequence

import torch
from torch import Tensor

from svdmerge.comparison.rounds import threshold_rounds


def assert_selected_as_by_full_svds(deltas: Sequence[Tensor], *, k: int) -> None:
    """The same set, but for values within 1e-5 of the cut; what is kept to the promised residuals
    and values."""
    values = [torch.linalg.svdvals(d.double()) for d in deltas]
    rounding = [1e-12 * float(v[0]) if len(v) else 0.0 for v in values]
    ranked = sorted((float(s) for v in values for s in v), reverse=True)
    cut = max(ranked[k - 1], *rounding)
    outcome = threshold_rounds(deltas, k=k)
    kept = set(outcome.kept)
    for source, v in enumerate(values):
        for index, s in enumerate(v.tolist()):
            if abs(s - cut) > 1e-5 * cut:
                assert ((source, index) in kept) == (s > cut), (source, index, s, cut)
    for source, (d, v) in enumerate(zip(deltas, values, strict=True)):
        c = outcome.stored[source].to(torch.float64)
        indices = sorted(index for s, index in kept if s == source)
        u, vh = c.u[:, indices], c.vh[indices]
        found = torch.cummin(c.s, dim=0).values[indices] if indices else c.s[:0]
        largest = float(v[0])
        assert torch.all((found - v[indices]).abs() <= 1e-5 * largest)
        for residual in (
            d.double() @ vh.T - u * c.s[indices],
            d.double().T @ u - vh.T * c.s[indices],
        ):
            lengths = torch.linalg.vector_norm(residual, dim=0)
            assert torch.all(lengths <= 1e-4 * largest)
