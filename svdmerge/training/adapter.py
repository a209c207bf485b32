"""The adapter: a target's changes of singular values, and the merged factors they belong to."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from safetensors import torch as files
from torch import Tensor

from svdmerge.core.components import RankOneComponents, none
from svdmerge.core.factored import trained_directions
from svdmerge.core.svd import seed_of
from svdmerge.errors import OutputError
from svdmerge.recipe import TuneConfig
from svdmerge.storage.checkpoint import Checkpoint, open_checkpoint
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.hf_model import load_factors
from svdmerge.storage.manifest import Committed

TUNE, ADAPTER, HEAD = "tune.json", "adapter.safetensors", "head.safetensors"
_SUFFIX, _METADATA = ".sigma_change", "svdmerge"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapter:
    """What was trained for a target, without its head: a few kilobytes."""

    sigma_change: Mapping[str, Tensor]
    """By matrix, the changes of its leading singular values."""
    factors_sha256: str
    """Digest of the merged factors whose singular values they change."""
    null_space: bool
    seed: int
    """Of the null-space directions, where there are any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What an adapter was trained on, and where that lay."""

    base: str
    merged: str
    factors: str
    config: TuneConfig

    def to_json(self) -> dict[str, Any]:
        """As `tune.json` holds it."""
        places = {"base": self.base, "merged": self.merged, "factors": self.factors}
        return places | {"config": self.config.model_dump(mode="json")}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapted:
    """An adapter beside the models and merged factors that it belongs to."""

    base: Checkpoint
    merged: Checkpoint
    factors: Committed
    config: TuneConfig
    changes: Mapping[str, RankOneComponents]
    """By matrix, the directions, with `s` the change of each value."""


def absolute(reference: str) -> str:
    """A model's reference as it is found from any folder."""
    place = Folder.at(reference)
    return place.uri if place.exists() else reference


def factors_digest(factors: Committed) -> str:
    """sha256 of the merged factors' content, read from their commits alone."""
    blocks = sorted(
        (b.parameter, b.first, b.count, b.sha256) for c in factors.commits for b in c.blocks
    )
    return hashlib.sha256(json.dumps(sorted(set(blocks))).encode()).hexdigest()


def adapter_bytes(adapter: Adapter) -> bytes:
    """The adapter as a safetensors file: equal adapters give equal bytes."""
    tensors = {f"{n}{_SUFFIX}": d.contiguous() for n, d in sorted(adapter.sigma_change.items())}
    fields = {
        "factors_sha256": adapter.factors_sha256,
        "null_space": adapter.null_space,
        "seed": adapter.seed,
    }
    # One key: safetensors writes several in an order that differs from one process to the next.
    return files.save(tensors, metadata={_METADATA: json.dumps(fields)})


def load_adapter(folder: Folder) -> Adapter:
    """The adapter in a tuned folder.

    Raises:
        OutputError: there is none, or it is malformed.
    """
    try:
        data = folder.read(ADAPTER)
        tensors = files.load(data)
        length = int.from_bytes(data[:8], "little")
        held = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_METADATA])
        return Adapter(
            sigma_change={name.removesuffix(_SUFFIX): d for name, d in tensors.items()},
            factors_sha256=str(held["factors_sha256"]),
            null_space=bool(held["null_space"]),
            seed=int(held["seed"]),
        )
    except FileNotFoundError:
        raise OutputError(
            f"{folder.uri}: holds no {ADAPTER}",
            "Expected a folder that `svdmerge tune` wrote with `save: [adapter, ...]`.",
            "Give its `out`, or tune again.",
        ) from None
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise OutputError(
            f"{folder.uri}/{ADAPTER}: malformed", str(error), "Tune again, or copy it again."
        ) from None


def load_origin(folder: Folder) -> Origin:
    """What the adapter in a folder was trained on. Raises: OutputError."""
    try:
        held = json.loads(folder.read(TUNE))["origin"]
        places = {key: str(held[key]) for key in ("base", "merged", "factors")}
        return Origin(**places, config=TuneConfig.model_validate(held["config"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{folder.uri}: holds no {TUNE} of a tuning",
            str(error).splitlines()[0] if str(error) else "",
            "Give the folder that `svdmerge tune` wrote.",
        ) from None


def changes_of(
    adapter: Adapter, *, factors: Committed, base: Checkpoint
) -> dict[str, RankOneComponents]:
    """The directions that were trained of each matrix, with `s` the change of each value.

    Raises:
        OutputError: the adapter belongs to other merged factors.
    """
    found = factors_digest(factors)
    if found != adapter.factors_sha256:
        raise OutputError(
            f"{factors.store.uri}: merged factors {found}",
            f"The adapter belongs to merged factors {adapter.factors_sha256}.",
            "Give the merge it was tuned on, or tune again on this one.",
        )
    return {
        name: _directions(name, change, adapter=adapter, factors=factors, base=base)
        for name, change in adapter.sigma_change.items()
    }


def _directions(
    name: str, change: Tensor, *, adapter: Adapter, factors: Committed, base: Checkpoint
) -> RankOneComponents:
    (m, n), num, depth = base.tensors[name].shape, change.shape[0], factors.depth(name)
    # Null-space directions avoid all stored ones; else the leading ones are enough.
    wanted = depth if adapter.null_space else min(depth, num)
    directions = trained_directions(
        factors.read(name, range(wanted)) if wanted else none(m, n),
        num_values=num,
        null_space=adapter.null_space,
        seed=seed_of(name, m=m, n=n, block=0) ^ adapter.seed,
    )
    return RankOneComponents(u=directions.u, s=change, vh=directions.vh)


def open_adapted(
    tuned: str, *, base: str | None = None, merged: str | None = None, factors: str | None = None
) -> Adapted:
    """An adapter with all it belongs to: where `tune.json` says, or at the places given.

    Raises:
        SvdmergeError: something is missing, or the merged factors are not the adapter's.
    """
    folder = Folder.at(tuned)
    origin, adapter = load_origin(folder), load_adapter(folder)
    place = Folder.at(factors or origin.factors)
    if not place.names():
        raise OutputError(
            f"{place.uri}: holds no merged factors",
            "The adapter's changes belong to them.",
            "Run the merge again, or say where they are with `--factors`.",
        )
    found, start = load_factors(place), open_checkpoint(base or origin.base)
    return Adapted(
        base=start,
        merged=open_checkpoint(merged or origin.merged),
        factors=found,
        config=origin.config,
        changes=changes_of(adapter, factors=found, base=start),
    )
