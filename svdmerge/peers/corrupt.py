"""Damaged sources and texts, for tests of robustness; seeds and names decide, never an order."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from svdmerge.errors import TrainingError
from svdmerge.peers.space import Weights


def noise_by_entry(differences: Weights, *, factor: float, seed: int) -> dict[str, Tensor]:
    """D + noise whose *standard deviation in every entry* is factor * ||D||_F.

    Its norm is sqrt(m n) times that: at 0.5 it drowns any matrix, and takes every slot of a top-k
    of raw singular values. Say which noise a result is for; this is the harsh one.
    """
    return {
        name: d + factor * torch.linalg.vector_norm(d) * _normal(d, name=name, seed=seed)
        for name, d in differences.items()
    }


def noise_by_norm(differences: Weights, *, factor: float, seed: int) -> dict[str, Tensor]:
    """D + Gaussian noise *of norm* factor * ||D||_F, exactly: the mild one."""
    noisy: dict[str, Tensor] = {}
    for name, d in differences.items():
        noise = _normal(d, name=name, seed=seed)
        size = torch.linalg.vector_norm(d) / torch.linalg.vector_norm(noise)
        noisy[name] = d + factor * size * noise
    return noisy


def pruned(differences: Weights, *, share: float) -> dict[str, Tensor]:
    """The entries of largest magnitude, floor(share * count + 1e-9) of each tensor, else zeros.

    The earlier entry on a tie, so that the same ones stay everywhere.

    Raises:
        TrainingError: the share is not within 0 and 1.
    """
    return {name: _pruned(d, share=_checked(share)) for name, d in differences.items()}


def without_tokens(tokens: Sequence[int], *, share: float, row: int, seed: int) -> list[int]:
    """A text's tokens less floor(share * count + 1e-9) of its inner ones; the first and the last
    stay, for they are markers.

    Which ones follows from seed and row, so the text is damaged alike in any batch.
    """
    inner = list(tokens[1:-1])
    order = torch.randperm(len(inner), generator=_generator(seed, row)).tolist()
    dropped = set(order[: int(_checked(share) * len(inner) + 1e-9)])
    kept = [token for place, token in enumerate(inner) if place not in dropped]
    return [*tokens[:1], *kept, *tokens[1:][-1:]]


def _pruned(d: Tensor, *, share: float) -> Tensor:
    flat = d.flatten()
    kept = flat.abs().argsort(descending=True, stable=True)[: int(share * d.numel() + 1e-9)]
    result = torch.zeros_like(flat)
    result[kept] = flat[kept]
    return result.reshape(d.shape)


def _normal(like: Tensor, *, name: str, seed: int) -> Tensor:
    # Drawn on the CPU in float64: the same noise for any device and dtype.
    generator = _generator(seed, name)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def _generator(seed: int, what: str | int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}\0{what}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _checked(share: float) -> float:
    if not 0.0 <= share <= 1.0:
        raise TrainingError(f"a share of {share}", "Expected 0 to 1.", "Give it as a fraction.")
    return share
