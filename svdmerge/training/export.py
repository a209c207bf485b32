"""The merged or adapted model as files: full model, adapter, PEFT adapter, head, manifest."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

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
    put_index,
    split,
    write_safetensors,
)
from svdmerge.storage.manifest import Covered, put_unit
from svdmerge.storage.output import (
    UNFINISHED,
    read_manifest,
    release,
    staging,
    take_place,
    written_files,
)
from svdmerge.storage.shards import Rows
from svdmerge.storage.side_files import copy_side_files
from svdmerge.training.adapter import (
    ADAPTER,
    HEAD,
    TUNE,
    Adapted,
    Adapter,
    Origin,
    adapter_bytes,
    open_adapted,
)
from svdmerge.training.peft_export import write_peft
from svdmerge.training.peft_report import PeftReport
from svdmerge.training.plain import open_merged

Form = Literal["model", "peft", "peft-on-merged"]


def check_out(out: Folder) -> None:
    """Raise OutputError if the folder holds anything but an earlier, or unfinished, tuning."""
    names = out.names()
    if names and not {TUNE, UNFINISHED} & set(names):
        raise OutputError(
            f"{out.uri}: holds something else ({', '.join(names[:3])})",
            f"Only an earlier tuned model, with its {TUNE}, is ever replaced.",
            "Give another `out` in `tune`, or empty that folder yourself.",
        )


def export(
    out: Folder,
    *,
    adapted: Adapted,
    adapter: Adapter,
    origin: Origin,
    head: LinearHead | None,
    key: str,
    result_json: str,
    results: Mapping[str, bytes],
    scratch: Folder,
) -> None:
    """Write what `save` asks for: beside its place and renamed if local, else `tune.json` last.

    `key` names this tuning; `results` are files for the hub, by path; `scratch` is where changes
    pass to the weights' writer.
    """
    check_out(out)
    staged = staging(out, plan_hash=key)
    try:
        _write(staged, adapted=adapted, adapter=adapter, head=head, scratch=scratch)
        for name, data in results.items():
            staged.put(name, data)
        metadata = {"tuning": key, "base": adapted.base.revision, "merged": adapted.merged.revision}
        manifest = json.loads(result_json) | {
            "metadata": metadata,
            "origin": origin.to_json(),
            "files": written_files(staged, known=[]),
        }
        staged.put(TUNE, (json.dumps(manifest, indent=1) + "\n").encode())
        check_out(out)  # once more: a user may have put files there meanwhile
        take_place(staged, out)
    finally:
        release(staged)


def _write(
    staged: Folder,
    *,
    adapted: Adapted,
    adapter: Adapter,
    head: LinearHead | None,
    scratch: Folder,
) -> None:
    """Everything but the manifest."""
    saved = adapted.config.saved
    if "adapter" in saved:
        staged.put(ADAPTER, adapter_bytes(adapter))
    if "model" in saved:
        write_model(staged, adapted, scratch=scratch)
    if "peft" in saved:
        write_peft(staged.child("peft"), adapted, on_merged=False)
    if head is not None:
        staged.put(HEAD, files.save(_head_tensors(head), metadata={"format": "pt"}))


def export_adapter(
    folder: str,
    to: str,
    *,
    form: Form,
    rank: int | None = None,
    model: str | None = None,
    places: Mapping[str, str | None],
) -> PeftReport | None:
    """Write a tuned adapter, or a merge, to a folder in another form, its head beside it; what an
    adapter leaves out.

    Raises:
        OutputError: `to` is not empty, the merged factors are not the adapter's, or the folder
            holds nothing that has this form.
    """
    out, given = Folder.at(to), Folder.at(folder)
    if (names := out.names()) and UNFINISHED not in names:
        raise OutputError(
            f"{out.uri}: is not empty ({', '.join(names[:3])})", "", "Give a new folder."
        )
    adapted = _opened(given, form=form, model=model, places=places)
    staged = staging(out, plan_hash="exported")
    report: PeftReport | None = None
    try:
        if form == "model":
            write_model(staged, adapted, scratch=staged.child(".change"))
        else:
            report = write_peft(staged, adapted, on_merged=form == "peft-on-merged", rank=rank)
        if given.stat(HEAD) is not None:
            staged.put(HEAD, given.read(HEAD))
    except BaseException:
        staged.remove()
        raise
    finally:
        release(staged)
    take_place(staged, out)
    return report


def _opened(
    folder: Folder, *, form: Form, model: str | None, places: Mapping[str, str | None]
) -> Adapted:
    """What a tuned folder, or a run's output, holds."""
    manifest = read_manifest(folder)
    if manifest is None:
        found = open_adapted(folder.uri, **places)
        named = found.config.model_copy(update={"model": model or found.config.model})
        return replace(found, config=named)
    if form != "peft":
        raise OutputError(
            f"{folder.uri}: is a merge without tuning",
            "It is the full model already." if form == "model" else "Nothing is on top of it.",
            "Export it as `peft`, or give the folder of a tuned model.",
        )
    return open_merged(
        folder, manifest, model=model, base=places.get("base"), factors=places.get("factors")
    )


def write_model(staged: Folder, adapted: Adapted, *, scratch: Folder) -> None:
    """Write the adapted model whole, with its configuration and tokenizer."""
    copy_side_files(adapted.base, staged)
    export_model(
        staged, base=adapted.base, merged=adapted.merged, changes=adapted.changes, scratch=scratch
    )


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
    parts = split(tensors, max_bytes=None)
    for file, part in parts.items():
        write_safetensors(staged, file, tensors=part, factors=scratch)
    put_index(staged, parts)
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
