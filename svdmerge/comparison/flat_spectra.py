"""What decomposing costs where nothing cheaper than a full SVD can be certain."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from svdmerge.core.components import none
from svdmerge.core.params import Action, Parameter
from svdmerge.engine.solve import Stored, solve

# What a tenth of the rank is kept of: these many values then stand above the rest.
FEW = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatCost:
    """CPU seconds over those of a full SVD."""

    kind: str
    shape: tuple[int, int]
    float32: float
    """Over `torch.linalg.svd` in float32, which the selection is not exact to."""
    float64: float
    """Over it in float64, which it is."""
    solvers: list[str]


def flat_matrices(m: int, n: int) -> Iterator[tuple[str, Float[Tensor, "m n"]]]:
    """Matrices whose spectra do not fall, or not far."""
    r, generator = min(m, n), torch.Generator().manual_seed(m + n)
    noise = torch.randn(m, n, generator=generator)
    u, v = (
        torch.linalg.qr(torch.randn(side, r, generator=generator)).Q for side in (m, n)
    )  # fmt: skip
    few = (u[:, :FEW] * torch.linspace(1.0, 0.6, FEW)) @ v[:, :FEW].T
    yield "Gaussian noise", noise
    yield "orthogonal", u @ v.T
    yield "i^-0.2", (u * torch.arange(1, r + 1) ** -0.2) @ v.T
    yield f"{FEW} above noise", few + 0.05 * noise / (m**0.5 + n**0.5)


def flat_costs(m: int, n: int, *, share: float, repeats: int) -> Iterator[FlatCost]:
    """Medians over interleaved repeats; k is a share of the rank, of this source alone."""
    k = max(1, int(share * min(m, n)))
    parameter = Parameter(id="x", tensor="x", start=0, m=m, n=n, action=Action.DECOMPOSE)

    for kind, a in flat_matrices(m, n):

        def ours(a: Tensor = a) -> list[str]:
            found = solve(
                a, parameter=parameter, stored=Stored(blocks=none(m, n)), wanted=k, depth=k,
                solver="adaptive", digest="",
            )  # fmt: skip
            return [s.solver for s in found.spectra]

        times = [
            [
                _seconds(run)
                for run in (
                    ours,
                    lambda a=a: torch.linalg.svd(a, full_matrices=False),
                    lambda a=a: torch.linalg.svd(a.double(), full_matrices=False),
                )
            ]
            for _ in range(repeats)
        ]
        spent, single, double = (statistics.median(column) for column in zip(*times, strict=True))
        yield FlatCost(
            kind=kind, shape=(m, n), float32=spent / single, float64=spent / double, solvers=ours()
        )


def _seconds(work: Callable[[], object]) -> float:
    """Of this process's CPU: in one thread what a machine that does nothing else would take."""
    start = time.process_time()
    work()
    return time.process_time() - start
