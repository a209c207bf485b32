"""Damaged sources and inputs: the same target again, to see what an entrant loses by it.

Damaged sources are written as checkpoints, so that everything after that is as for any source.
"""

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from svdmerge.errors import TrainingError
from svdmerge.peers.corrupt import noise_by_entry, noise_by_norm, pruned, without_tokens
from svdmerge.storage.checkpoint import FLOATING, SINGLE, Checkpoint, open_checkpoint
from svdmerge.training.data import Examples

# Of ||D||_F, as AXIS's paper; it does not say whether by entry or by norm, so both are here.
NOISE = 0.5
# Of each tensor's entries, the largest.
PRUNED_TO = 0.1
# Of a text's inner tokens.
DROPPED = 0.3
# Unrelated sources beside the given ones.
UNRELATED = 4
# Of the rank that a matrix of an unrelated source has: AXIS's K, so that it could fill every slot.
UNRELATED_RANK = 0.1

Differences = Mapping[str, Tensor]
Damage = Callable[[Differences], dict[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Alteration:
    """What is done to the sources of a target."""

    damage: Damage
    num_sources: int | None
    """How many are damaged, chosen by hash; None: all."""
    added: bool = False
    """Whether the damaged ones come beside the given ones, not in their place."""


def random_low_rank(differences: Differences, *, share: float, seed: int) -> dict[str, Tensor]:
    """Gaussian low-rank matrices and Gaussian vectors, each of the norm of the difference there."""
    found: dict[str, Tensor] = {}
    for name, d in differences.items():
        generator = torch.Generator().manual_seed(_number(f"{seed} {name}"))
        if d.ndim < 2:
            random = torch.randn(d.shape, generator=generator)
        else:
            m, n = d.flatten(1).shape
            rank = max(1, int(share * min(m, n)))
            left = torch.randn(m, rank, generator=generator)
            random = (left @ torch.randn(rank, n, generator=generator)).reshape(d.shape)
        norm = torch.linalg.vector_norm(random)
        found[name] = random * (torch.linalg.vector_norm(d) / norm) if norm > 0 else random
    return found


ALTERATIONS: dict[str, Alteration] = {
    "noise-entry": Alteration(
        damage=lambda d: noise_by_entry(d, factor=NOISE, seed=0), num_sources=1
    ),
    "noise-norm": Alteration(
        damage=lambda d: noise_by_norm(d, factor=NOISE, seed=0), num_sources=1
    ),
    "pruned": Alteration(damage=lambda d: pruned(d, share=PRUNED_TO), num_sources=None),
    "unrelated": Alteration(
        damage=lambda d: random_low_rank(d, share=UNRELATED_RANK, seed=0),
        num_sources=UNRELATED,
        added=True,
    ),
    "corrupted": Alteration(
        damage=lambda d: noise_by_entry(d, factor=NOISE, seed=0),
        num_sources=UNRELATED,
        added=True,
    ),
}
DROPPED_TOKENS = "dropped"
KINDS = (*ALTERATIONS, DROPPED_TOKENS)


def altered_sources(
    kind: str, *, base: Path, sources: Sequence[Path], target: str, out: Path
) -> list[Path]:
    """The sources with some of them damaged, or damaged ones added; written below `out` once.

    Which ones follows from target and name: neither the best nor the worst is sought out.
    """
    how = ALTERATIONS[kind]
    ranked = sorted(sources, key=lambda path: _number(f"{target} {path.name}"))
    hit = ranked if how.num_sources is None else ranked[: how.num_sources]
    if how.num_sources is not None and len(hit) < how.num_sources:
        raise TrainingError(
            f"{kind}: {len(sources)} sources",
            f"It damages {how.num_sources}.",
            "Give more sources.",
        )
    written = {p: _written(p, base=base, out=out / kind, damage=how.damage) for p in hit}
    if how.added:
        return [*sources, *written.values()]
    return [written.get(path, path) for path in sources]


def drop_tokens(examples: Examples) -> Examples:
    """The texts without some of their inner tokens; which ones follows from the row alone."""
    if isinstance(examples.inputs, Tensor):
        raise TrainingError(
            "dropped tokens: the inputs are no texts", "They are tensors.", "Take a text target."
        )
    inputs: list[dict[str, Tensor]] = []
    for row, text in enumerate(examples.inputs):
        places = list(range(len(text["input_ids"])))
        kept = without_tokens(places, share=DROPPED, row=row, seed=0)
        inputs.append({column: values[kept] for column, values in text.items()})
    return replace(examples, inputs=inputs)


def fewer(sources: Sequence[Path], *, num: int, target: str) -> list[Path]:
    """So many of the sources, by hash: nested, so that a larger number only adds."""
    ranked = sorted(sources, key=lambda path: _number(f"number {target} {path.name}"))
    return sorted(ranked[:num])


def _written(source: Path, *, base: Path, out: Path, damage: Damage) -> Path:
    folder = out / f"{source.name}-damaged"
    if folder.exists():
        return folder
    given, start = open_checkpoint(str(source)), open_checkpoint(str(base))
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = _damaged(given, start, damage=damage)
    save_file(tensors, partial / SINGLE, metadata={"format": "pt"})
    shutil.copy(source / "config.json", partial)
    partial.rename(folder)
    return folder


def _damaged(given: Checkpoint, start: Checkpoint, *, damage: Damage) -> dict[str, Tensor]:
    """All tensors of the source, in float32; those that do not differ from the base stay."""
    tensors = {name: ref.read() for name, ref in given.tensors.items()}
    base = {n: start.tensors[n].read().float() for n in tensors if n in start.tensors}
    differences = {
        name: d
        for name, t in tensors.items()
        if name in base
        and start.tensors[name].dtype in FLOATING
        and bool((d := t.float() - base[name]).any())
    }
    changed = damage(differences)
    return tensors | {name: (base[name] + d).contiguous() for name, d in changed.items()}


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
