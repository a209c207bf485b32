"""Proof of an exported adapter: PEFT opens it, and base and adapter give what they should."""

import torch

from svdmerge.claims import Check, checked
from svdmerge.core.delta import all_finite
from svdmerge.errors import OutputError
from svdmerge.reload import run_peft, run_transformers
from svdmerge.storage.checkpoint import read_header
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.hf_model import file_sha256
from svdmerge.training.peft_export import CONFIG, WEIGHTS
from svdmerge.training.peft_report import PeftReport, read_report

# Of outputs, relative to the largest: float32 sums in another order, through every layer.
TOLERANCE = 1e-4


def verify_adapter(folder: Folder) -> list[Check]:
    """Every claim of an adapter that `adapter export` or tuning wrote, checked.

    Raises:
        OutputError: its report is malformed.
    """
    report = read_report(folder)
    files = {CONFIG: "", WEIGHTS: "", **report.files}
    return [
        checked(f"{len(files)} files have their sha256", lambda: _same_files(folder, files)),
        checked("weights are finite", lambda: _finite(folder)),
        checked("PEFT loads it, with finite outputs", lambda: _runs(folder, report)),
    ]


def _same_files(folder: Folder, files: dict[str, str]) -> str:
    for name, expected in files.items():
        if folder.stat(name) is None:
            raise OutputError(f"{name}: missing")
        if file_sha256(folder, name) != expected:
            raise OutputError(f"{name}: its content changed")
    return ""


def _finite(folder: Folder) -> str:
    tensors, _, _ = read_header(folder, WEIGHTS)
    for name, ref in tensors.items():
        if not all_finite(ref.read()):
            raise OutputError(f"{name} holds NaN or Inf")
    return f"{len(tensors)} tensors"


def _runs(folder: Folder, report: PeftReport) -> str:
    """How far base + adapter is from the merged model, where that is what it stands for."""
    name, found = run_peft(folder.uri, on=report.base, model=report.model)
    told = f"{name}, {len(found)} outputs"
    if report.tuned:
        return told
    _, expected = run_transformers(report.merged, model=report.model)
    off = max(
        float((a - b).abs().max()) / max(float(b.abs().max()), torch.finfo(b.dtype).tiny)
        for a, b in zip(found, expected, strict=True)
    )
    told += f"; off the merged model's by {off:.1e} of the largest"
    # Not >, which a NaN would pass. A lower rank is off by what it leaves out.
    if report.rank is None and not off <= TOLERANCE:
        raise OutputError(told)
    return told
