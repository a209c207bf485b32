"""Floating-point operations of each stage's work on one matrix, from its shape."""

from svdmerge.core.params import Action, Parameter

# Columns multiplied by a matrix and its transpose for a block: eight steps of sixteen, and three
# for the bound on what follows.
BLOCK_COLUMNS = 176


def block_flops(parameter: Parameter, *, num_blocks: int = 1) -> float:
    """Of so many blocks of components with certificates, or of a full SVD where that is less."""
    return min(svd_flops(parameter), 4.0 * parameter.numel * BLOCK_COLUMNS * num_blocks)


def svd_flops(parameter: Parameter) -> float:
    """Of a full SVD with vectors: 4 m n^2 + 22 n^3 for m >= n (Golub and Van Loan, table 8.6.1)."""
    long, short = max(parameter.m, parameter.n), min(parameter.m, parameter.n)
    return 4.0 * long * short**2 + 22.0 * short**3


def merge_flops(parameter: Parameter, *, k: int) -> float:
    """Of two QRs of k components and the core's SVD; of a merged whole difference's SVD."""
    if parameter.action is Action.DECOMPOSE:
        return 4.0 * (parameter.m + parameter.n) * k**2 + 22.0 * k**3
    return svd_flops(parameter) if parameter.is_factored else float(parameter.numel)


def write_flops(parameter: Parameter, *, k: int) -> float:
    """Of base + U diag(s) Vh."""
    return 2.0 * parameter.numel * k if parameter.is_factored else float(parameter.numel)
