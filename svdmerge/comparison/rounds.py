"""Threshold rounds over matrices in memory: what the engine does, without store and tasks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from svdmerge.core.block_shape import WIDTH
from svdmerge.core.blocks import EXACT
from svdmerge.core.components import RankOneComponents, concatenate, none
from svdmerge.core.params import Action, Parameter
from svdmerge.engine.solve import Solved, Stored, solve
from svdmerge.engine.winners import Listed, select_matrix, short_of


class Outcome(NamedTuple):
    """What threshold rounds find, by sources' numbers."""

    kept: list[tuple[int, int]]
    """(source, index) of the k largest components over all sources, best first."""
    stored: list[RankOneComponents]
    """What was computed of each source, as stored."""
    reads: int
    """Sources decomposed, summed over rounds."""


def threshold_rounds(deltas: Sequence[Float[Tensor, "m n"]], *, k: int) -> Outcome:
    """The k largest components over all sources, as the engine's rounds find them."""
    m, n = deltas[0].shape
    parameter = Parameter(id="x", tensor="x", start=0, m=m, n=n, action=Action.DECOMPOSE)
    # Names sort as numbers do.
    names = [f"{i:06}" for i in range(len(deltas))]
    wanted = dict.fromkeys(names, min(WIDTH, k))
    held = {name: Stored(blocks=none(m, n)) for name in names}
    parts = {name: [none(m, n)] for name in names}
    listed = {name: Listed(sha256=name, source=name, weight=1.0, spectra=[]) for name in names}
    reads = 0
    while wanted:
        reads += len(wanted)
        for name, depth in wanted.items():
            found = solve(
                deltas[int(name)], parameter=parameter, stored=held[name], wanted=depth,
                depth=k, solver="adaptive", digest=name,
            )  # fmt: skip
            listed[name].spectra.extend(found.spectra)
            parts[name] += [rows.components.to(torch.float32) for rows in found.rows]
            held[name] = Stored(blocks=_blocks(held[name], found), depth=min(found.depth, k))
        stored = {name: s.depth for name, s in held.items()}
        wanted = dict(short_of([*listed.values()], stored=stored, salience="sigma", k=k))
    rows = select_matrix([*listed.values()], salience="sigma", k=k)
    return Outcome(
        kept=list(zip(rows.source.tolist(), rows.index.tolist(), strict=True)),
        stored=[concatenate(parts[name]) for name in names],
        reads=reads,
    )


def _blocks(stored: Stored, found: Solved) -> RankOneComponents:
    """What the next block starts from, as a store would give it back."""
    parts = zip(found.rows, found.spectra, strict=True)
    new = [rows.components.to(torch.float32) for rows, s in parts if s.solver != EXACT]
    return concatenate([stored.blocks, *new])
