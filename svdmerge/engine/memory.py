"""What tasks over a matrix that none may hold need of memory, from its shape. Imports no torch."""

from svdmerge.core.block_shape import block_width, steps_within
from svdmerge.core.params import Parameter
from svdmerge.storage.checkpoint import TILE

# Bytes an entry of a tile takes: both tensors as read and decoded, in float64, their difference,
# and what a worker keeps of them.
TILE_BYTES = 64


def by_rows_bytes(parameter: Parameter, *, depth: int, block_rows: int) -> int:
    """Peak memory of a matrix in blocks of rows: of Lanczos, or of a task with most columns."""
    part = pass_bytes(m=block_rows, n=parameter.n, columns=depth, itemsize=8)
    return max(iteration_bytes(parameter, depth=depth), part, survey_bytes(parameter.n))


def iteration_bytes(parameter: Parameter, *, depth: int) -> int:
    """Peak memory of Lanczos itself, where products are made elsewhere.

    The basis, and m rows more of it for what the allocator keeps of vectors freed, which measured
    more than that; of the components known both vectors in float64, again the right ones in the
    basis, and A^T U; some blocks of vectors on their way. Or, once per block at most, the
    step that makes known vectors orthonormal in float64: these, and four times the right ones.
    """
    m, n, rank = parameter.m, parameter.n, parameter.rank
    width = block_width(rank)
    basis = max(
        itemsize * steps_within(rank, itemsize=itemsize) for itemsize in (4, 8)
    ) * width * (m + n)  # fmt: skip
    iterating = basis + depth * (8 * (m + n) + 16 * n) + 32 * width * (m + n)
    return max(iterating, depth * (4 * (m + n) + 32 * n))


def pass_bytes(*, m: int, n: int, columns: int, itemsize: int) -> int:
    """Peak memory of a part of m rows in a pass: a tile, and what it is multiplied with and gives,
    which are copied as they are written."""
    return TILE_BYTES * max(TILE, n) + itemsize * columns * (4 * n + 4 * m)


def survey_bytes(n: int) -> int:
    """Peak memory of a survey: a tile, and norms."""
    return (TILE_BYTES + 8) * max(TILE, n)
