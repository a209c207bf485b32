"""One matrix's components from a depth on, by the recipe's solver, as they are stored."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from svdmerge.core.block_shape import WIDTH
from svdmerge.core.blocks import COMPLETE, EXACT, Block, exact_block, next_block
from svdmerge.core.components import RankOneComponents, concatenate, flat, none
from svdmerge.core.low_rank import factored_block
from svdmerge.core.noise import noise_edge
from svdmerge.core.params import Action, Parameter
from svdmerge.storage.manifest import Committed
from svdmerge.storage.shards import Rows, Spectrum


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stored:
    """What the store holds of a matrix already."""

    blocks: RankOneComponents
    """The canonical blocks that the next one starts from; float32, as stored."""
    depth: int = 0
    """Components stored, those that the exact solver took over included."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Solved:
    """What is to be stored of a matrix."""

    rows: list[Rows]
    spectra: list[Spectrum]
    depth: int
    """Components stored then, or wherever any merge ends if there are no more."""


def known_of(committed: Committed, parameter: Parameter) -> tuple[int, int]:
    """Components of one matrix that its next block starts from, and those stored in all."""
    depth = committed.held(parameter.source_id)
    spectra = committed.spectra().get(parameter.source_id, [])
    # What the exact solver took over is found again from the blocks before it.
    return min([depth, *(x.first for x in spectra if x.solver in COMPLETE)]), depth


def stored_of(committed: Committed, parameter: Parameter) -> Stored:
    """What a source has in the store of one matrix. Raises: StoreError, if it is damaged."""
    last, depth = known_of(committed, parameter)
    return Stored(blocks=first_of(committed, parameter, num=last), depth=depth)


def first_of(committed: Committed, parameter: Parameter, *, num: int) -> RankOneComponents:
    """The first stored components of a matrix. Raises: StoreError, if one is damaged."""
    if num == 0:
        return none(parameter.m, parameter.n)
    return committed.read(parameter.source_id, range(num))


def solve(
    delta: torch.Tensor, *, parameter: Parameter, stored: Stored, wanted: int, depth: int,
    solver: str, digest: str, base_fro: float | None = None,
) -> Solved:  # fmt: skip
    """Components after those stored, `wanted` in all. No merge takes more than `depth`: so deep is
    stored what a solver finds that cannot stop early."""
    fro = float(torch.linalg.vector_norm(delta))
    found = list(_blocks(delta, p=parameter, stored=stored, wanted=wanted, solver=solver, fro=fro))
    first, block = found[0]
    noise = _noise(delta, block, p=parameter) if first == 0 else 0.0
    return to_store(
        found, parameter=parameter, start=stored.depth, depth=max(depth, wanted), digest=digest,
        fro=fro, base_fro=base_fro, noise=noise,
    )  # fmt: skip


def solve_low_rank(
    up: torch.Tensor, down: torch.Tensor, *, parameter: Parameter, stored: Stored, wanted: int,
    depth: int, digest: str,
) -> Solved:  # fmt: skip
    """Components after those stored of up @ down, as `solve` gives them."""
    block = factored_block(up, down)
    # Entries of low rank are no noise, whatever their size.
    fro = float(torch.linalg.vector_norm(block.components.s))
    return to_store(
        [(0, block)], parameter=parameter, start=stored.depth, depth=max(depth, wanted),
        digest=digest, fro=fro, base_fro=None, noise=0.0,
    )  # fmt: skip


def to_store(
    found: Sequence[tuple[int, Block]], *, parameter: Parameter, start: int, depth: int,
    digest: str, fro: float, base_fro: float | None, noise: float,
) -> Solved:  # fmt: skip
    """What is stored of blocks and the index of each one's first component, where `start` are there
    already and no merge takes more than `depth`. `noise` is of the matrix's first block."""
    spectra = [
        Spectrum(
            parameter=parameter.source_id, sha256=digest, m=parameter.m, n=parameter.n, fro=fro,
            base_fro=base_fro, bound=block.bound, first=first, noise=noise if first == 0 else 0.0,
            s=block.components.s.float().cpu().numpy(), solver=block.solver,
        )
        for first, block in found
    ]  # fmt: skip
    last, block = found[-1]
    return Solved(
        rows=[_rows(parameter, b, first, start=start, depth=depth) for first, b in found],
        spectra=spectra,
        depth=last + len(block.components) if block.bound > 0.0 else depth,
    )


def _blocks(
    delta: torch.Tensor, *, p: Parameter, stored: Stored, wanted: int, solver: str, fro: float
) -> Iterator[tuple[int, Block]]:
    """Blocks after those stored, and the index of the first component of each."""
    if p.action is not Action.DECOMPOSE:
        yield 0, Block(components=flat(delta.reshape(1, -1)), bound=0.0, solver="none")
        return
    known = stored.blocks.on(delta.device)
    if solver == EXACT:
        yield 0, exact_block(delta, stored=known)
        return
    while True:
        block = next_block(delta, stored=known, fro=fro, parameter=p.id)
        yield len(known), block
        if block.bound == 0.0:
            return
        known = concatenate([known, block.components.to(torch.float32)])
        if len(known) >= wanted:
            return


def _noise(delta: torch.Tensor, block: Block, *, p: Parameter) -> float:
    """The edge of the noise, as far as the first block can tell."""
    if p.action is not Action.DECOMPOSE:
        return 0.0
    return noise_edge(delta, leading=block.components.slice(0, WIDTH))


def _rows(p: Parameter, block: Block, first: int, *, start: int, depth: int) -> Rows:
    """What is stored of a block that begins at `first`, if `start` components are there already."""
    kind = "svd" if p.action is Action.DECOMPOSE else "flat"
    c, skipped = block.components.on("cpu"), max(0, start - first)
    kept = c.slice(skipped, max(skipped, depth - first)) if block.solver in COMPLETE else c
    return Rows(parameter=p.source_id, kind=kind, first=first + skipped, components=kept)
