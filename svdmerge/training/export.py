"""The adapted model as files: the full model, the small adapter, the head, and what they are."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import torch as files
from torch import Tensor

from svdmerge.core.components import RankOneComponents
from svdmerge.core.params import Action, Parameter
from svdmerge.core.transfer import LinearHead
from svdmerge.errors import OutputError
from svdmerge.storage.checkpoint import Checkpoint
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.hf_model import (
    OutputTensor,
    copy_side_files,
    index_json,
    split,
    write_safetensors,
)
from svdmerge.storage.manifest import Covered, put_unit
from svdmerge.storage.output import staging, written_files
from svdmerge.storage.shards import Rows

TUNE, ADAPTER, HEAD = "tune.json", "adapter.safetensors", "head.safetensors"
MARKER = ".svdmerge-tune-partial"
# The Hugging Face default: larger files fail on some stores and tools.
MAX_SHARD_BYTES = 5 * 10**9


def check_out(out: Folder) -> None:
    """Raise OutputError if the folder holds anything but an earlier, or unfinished, tuning."""
    names = out.names()
    if names and not {TUNE, MARKER} & set(names):
        raise OutputError(
            f"{out.uri}: holds something else ({', '.join(names[:3])})",
            f"Only an earlier tuned model, with its {TUNE}, is ever replaced.",
            "Give another `out` in `tune`, or empty that folder yourself.",
        )


def export(
    out: Folder,
    *,
    base: Checkpoint,
    merged: Checkpoint,
    changes: Mapping[str, RankOneComponents],
    head: LinearHead | None,
    metadata: Mapping[str, str],
    result_json: str,
    scratch: Folder,
) -> None:
    """Write the adapted model: beside its place and renamed if local, else with `tune.json` last.

    `changes` holds directions with the changes of their singular values; `scratch` is where they
    pass to the weights' writer.
    """
    check_out(out)
    staged = staging(out, plan_hash=metadata["tuning"])
    staged.put(MARKER, b"")
    export_model(staged, base=base, merged=merged, changes=changes, scratch=scratch)
    sigma = {f"{name}.sigma_change": c.s.contiguous() for name, c in changes.items()}
    staged.put(ADAPTER, files.save(sigma, metadata={"format": "pt", **metadata}))
    if head is not None:
        staged.put(HEAD, files.save(_head_tensors(head), metadata={"format": "pt"}))
    copy_side_files(base, staged)
    staged.remove(MARKER)
    manifest = json.loads(result_json) | {
        "metadata": dict(metadata),
        "files": written_files(staged, known=[]),
    }
    staged.put(TUNE, (json.dumps(manifest, indent=1) + "\n").encode())
    _publish(staged, out)


def export_model(
    staged: Folder,
    *,
    base: Checkpoint,
    merged: Checkpoint,
    changes: Mapping[str, RankOneComponents],
    scratch: Folder,
) -> None:
    """Write the merged weights plus U diag(d) Vh, in the base's names and dtypes.

    The change of singular values is a list of components like any other, so the merge's own
    streaming writer adds it: memory is that of one tensor.
    """
    scratch.remove()
    _put_changes(scratch, changes)
    tensors = [
        OutputTensor(
            base=merged.tensors[name],
            dtype=ref.dtype,
            matrices=(_parameter(name, changes[name]),) if name in changes else (),
        )
        for name, ref in base.tensors.items()
    ]
    parts = split(tensors, max_bytes=MAX_SHARD_BYTES)
    for file, part in parts.items():
        write_safetensors(staged, file, tensors=part, factors=scratch)
    if len(parts) > 1:
        staged.put("model.safetensors.index.json", index_json(parts))
    scratch.remove()


def _put_changes(scratch: Folder, changes: Mapping[str, RankOneComponents]) -> None:
    put_unit(
        scratch,
        data_prefix="change",
        commit_path="change.json",
        rows=[Rows(parameter=p, kind="merged", first=0, components=c) for p, c in changes.items()],
        spectra=[],
        covered=[
            Covered(parameter=p, first=0, depth=len(c), source_sha256="", base_sha256="")
            for p, c in changes.items()
        ],
        solver="tuned",
        numerics="",
    )


def _parameter(name: str, change: RankOneComponents) -> Parameter:
    return Parameter(
        id=name,
        tensor=name,
        start=0,
        m=change.u.shape[0],
        n=change.vh.shape[1],
        action=Action.DECOMPOSE,
    )


def _head_tensors(head: LinearHead) -> dict[str, Tensor]:
    return {
        "weight": head.weight.to(torch.float32).contiguous(),
        "bias": head.bias.to(torch.float32).contiguous(),
        "classes": torch.arange(head.bias.shape[0]),
    }


def _publish(staged: Folder, out: Folder) -> None:
    if staged == out:
        return
    target, old = Path(out.path()), Path(staged.path() + ".old")
    if target.exists():
        target.rename(old)
    Path(staged.path()).rename(target)
    if old.exists():
        Folder.at(old).remove()


def changes_digest(changes: Mapping[str, RankOneComponents]) -> str:
    """sha256 of the directions: what an adapter's values belong to."""
    digest = hashlib.sha256()
    for name, c in sorted(changes.items()):
        digest.update(name.encode())
        for tensor in (c.u, c.vh):
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
