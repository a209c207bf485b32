"""First blocks of many matrices, a stack of one shape at a time, on any device."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from svdmerge.core.block_shape import WIDTH
from svdmerge.core.blocks import first_blocks
from svdmerge.core.certified import Block
from svdmerge.core.noise import SquaredNorms, edge_of, squared_norms
from svdmerge.core.products import doubled_tiles
from svdmerge.engine.device import Pair, deltas_on, full_float32, stacks


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FirstBlock:
    """What is known of a matrix after its first block."""

    name: str
    block: Block
    fro: float
    noise: float


def first_blocks_on(device: torch.device, pairs: Sequence[Pair]) -> Iterator[FirstBlock]:
    """The first block of every difference, by stacks; components come back to the host."""
    stacked = list(stacks(pairs))
    with full_float32():
        for alike, deltas in zip(stacked, deltas_on(device, stacked), strict=True):
            norms = squared_norms(doubled_tiles(deltas), n=deltas.shape[-1])
            rows, columns = norms.rows.cpu(), norms.columns.cpu()
            fros = rows.sum(dim=-1).sqrt().tolist()
            names = [pair.name for pair in alike]
            blocks = first_blocks(deltas, fros=fros, parameters=names)
            for name, fro, block, *norms in zip(names, fros, blocks, rows, columns, strict=True):
                edge = edge_of(
                    SquaredNorms(rows=norms[0], columns=norms[1]),
                    leading=block.components.slice(0, WIDTH),
                )
                yield FirstBlock(name=name, block=block, fro=fro, noise=edge)
