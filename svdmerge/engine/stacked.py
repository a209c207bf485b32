"""First blocks of many matrices, a stack of one shape at a time, on any device."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from svdmerge.core.block_shape import WIDTH
from svdmerge.core.blocks import first_blocks
from svdmerge.core.certified import Block
from svdmerge.core.noise import noise_edge
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
            fros = torch.linalg.vector_norm(deltas, dim=(-2, -1), dtype=torch.float64).tolist()
            names = [pair.name for pair in alike]
            blocks = first_blocks(deltas, fros=fros, parameters=names)
            for name, fro, block, d in zip(names, fros, blocks, deltas, strict=True):
                edge = noise_edge(d, leading=block.components.slice(0, WIDTH))
                yield FirstBlock(name=name, block=_on_host(block), fro=fro, noise=edge)


def _on_host(block: Block) -> Block:
    c = block.components.on("cpu")
    return Block(components=c, bound=block.bound, solver=block.solver)
