"""What decomposing for a selection costs: threshold rounds beside full and sketched SVDs."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from svdmerge.core.blocks import EXACT, WIDTH
from svdmerge.core.components import RankOneComponents, concatenate, none
from svdmerge.core.params import Action, Parameter
from svdmerge.engine.solve import Solved, Stored, solve
from svdmerge.engine.winners import Listed, select_matrix, short_of

# Exponents of the sources' spectra: those measured on fine-tuned models lie between.
STEEPNESS = (0.6, 0.9)
# Passes over a matrix, both ways counted as one, in which sixteen components of such spectra
# converge; and the columns of a certificate: what the count of flops needed assumes.
PASSES, CERTIFICATE, OVERSAMPLE = 6, 56, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Seconds for all sources of one matrix."""

    num_sources: int
    rank: int
    ours: float
    """Threshold rounds, certificates included."""
    full: float
    """`torch.linalg.svd` of every source, float32; measured on some, for all cost the same."""
    sketched: float
    """`torch.svd_lowrank` of every source to rank k: neither certain nor as exact."""
    floor: float
    """Flops needed at the speed of a large matrix product in the same run."""
    kept: int
    computed: int
    """Components kept and computed."""
    depths: dict[int, int]
    """Sources by how many components were computed of them."""


def spectra(rank: int, *, num_sources: int) -> list[Float[Tensor, " r"]]:
    """Power laws of exponents spread over STEEPNESS."""
    exponents = np.linspace(*STEEPNESS, num_sources)
    return [torch.arange(1, rank + 1, dtype=torch.float32) ** -float(a) for a in exponents]


def matrices(rank: int, *, num_sources: int) -> list[Float[Tensor, "r r"]]:
    """Square matrices of those spectra. Vectors of all are those of two random orthogonal matrices
    in another order each, for drawing more of them would take longer than what is measured."""
    generator = torch.Generator().manual_seed(rank)
    u, v = (
        torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q for _ in range(2)
    )  # fmt: skip
    found: list[Tensor] = []
    for s in spectra(rank, num_sources=num_sources):
        rows, columns = (torch.randperm(rank, generator=generator) for _ in range(2))
        found.append((u[:, rows] * s) @ v[:, columns].T)
    return found


def threshold_rounds(
    deltas: Sequence[Float[Tensor, "m n"]], *, k: int
) -> tuple[list[tuple[str, int]], dict[str, int]]:
    """(source, index) of the k largest components over all sources, best first, and how many were
    computed of each source."""
    m, n = deltas[0].shape
    parameter = Parameter(id="x", tensor="x", start=0, m=m, n=n, action=Action.DECOMPOSE)
    wanted = {str(i): min(WIDTH, k) for i in range(len(deltas))}
    held = {name: Stored(blocks=none(m, n)) for name in wanted}
    listed = {name: Listed(sha256=name, source=name, weight=1.0, spectra=[]) for name in wanted}
    while wanted:
        for name, depth in wanted.items():
            found = solve(
                deltas[int(name)], parameter=parameter, stored=held[name], wanted=depth,
                depth=k, solver="adaptive", digest=name,
            )  # fmt: skip
            listed[name].spectra.extend(found.spectra)
            held[name] = Stored(blocks=_blocks(held[name], found), depth=min(found.depth, k))
        order = [listed[name] for name in sorted(listed)]
        stored = {name: s.depth for name, s in held.items()}
        wanted = dict(short_of(order, stored=stored, salience="sigma", k=k))
    order = [listed[name] for name in sorted(listed)]
    rows = select_matrix(order, salience="sigma", k=k)
    sources = [order[i].source for i in rows.source]
    kept = list(zip(sources, rows.index.tolist(), strict=True))
    return kept, {name: s.depth for name, s in held.items()}


def _blocks(stored: Stored, found: Solved) -> RankOneComponents:
    """What the next block starts from, as a store would give it back."""
    parts = zip(found.rows, found.spectra, strict=True)
    new = [rows.components.to(torch.float32) for rows, s in parts if s.solver != EXACT]
    return concatenate([stored.blocks, *new])


def measure(rank: int, *, num_sources: int, share: float, repeats: int, full_of: int) -> Cost:
    """The costs, medians over interleaved repeats; full SVDs of `full_of` sources stand for all."""
    deltas = matrices(rank, num_sources=num_sources)
    k = max(1, int(share * rank))
    times: dict[str, list[float]] = {"ours": [], "full": [], "sketched": [], "flop": []}
    kept, depths = threshold_rounds(deltas, k=k)
    probe = torch.randn(1024, 1024)
    for _ in range(repeats):
        times["ours"].append(_seconds(lambda: threshold_rounds(deltas, k=k)))
        scale = num_sources / full_of
        times["full"].append(
            scale
            * _seconds(lambda: [torch.linalg.svd(d, full_matrices=False) for d in deltas[:full_of]])
        )
        times["sketched"].append(
            scale * _seconds(lambda: [torch.svd_lowrank(d, q=k) for d in deltas[:full_of]])
        )
        times["flop"].append(_seconds(lambda: probe @ probe) / (2 * 1024**3))
    middle = {name: statistics.median(values) for name, values in times.items()}
    counts = [sum(1 for source, _ in kept if source == str(i)) for i in range(num_sources)]
    return Cost(
        num_sources=num_sources,
        rank=rank,
        ours=middle["ours"],
        full=middle["full"],
        sketched=middle["sketched"],
        floor=sum(needed_flops(rank, needed=count) for count in counts) * middle["flop"],
        kept=len(kept),
        computed=sum(depths.values()),
        depths={d: list(depths.values()).count(d) for d in sorted(set(depths.values()))},
    )


def needed_flops(rank: int, *, needed: int) -> float:
    """Of one source: 4 m n (l q + 56) with l = needed + 8 columns, q passes, the certificate."""
    return 4.0 * rank**2 * ((needed + OVERSAMPLE) * PASSES + CERTIFICATE)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
