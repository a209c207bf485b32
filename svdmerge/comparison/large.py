"""A pair of models with one matrix that no task may hold, and what its decomposition takes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from svdmerge.engine.row_tasks import PassReceipt, Survey
from svdmerge.engine.runtime import Runtime, Unit
from svdmerge.engine.tally import Tally
from svdmerge.engine.tasks import Receipt, peak_rss_bytes
from svdmerge.progress import SILENT, Progress

U = TypeVar("U", bound=Unit)
R = TypeVar("R")
NAME = "model.layers.0.mlp.down_proj.weight"
# Of the weights, and of the change: rounding them to bfloat16 leaves noise whose edge lies near the
# hundredth of the change's singular values.
WEIGHTS, LARGEST, EXPONENT, RANK = 0.02, 0.2, 0.7, 256
ROWS = 1024


def make_pair(root: Path, *, m: int, n: int) -> tuple[Path, Path]:
    """Folders of a base and a fine-tune in bfloat16: a change whose singular values fall by a power
    law, and the rounding of the weights."""
    generator, rank = torch.Generator().manual_seed(0), min(RANK, m, n)
    u, v = (torch.linalg.qr(torch.randn(d, rank, generator=generator)).Q for d in (m, n))
    s = LARGEST * torch.arange(1, rank + 1) ** -EXPONENT
    return (
        _write(root / "base", _weights(m, n)),
        _write(root / "source", _weights(m, n), u=u * s, vh=v.T),
    )


def _weights(m: int, n: int) -> Iterator[Tensor]:
    for first in range(0, m, ROWS):
        rows = torch.randn(
            min(ROWS, m - first), n, generator=torch.Generator().manual_seed(first + 1)
        )
        yield (WEIGHTS * rows).bfloat16()


def _write(
    folder: Path, weights: Iterator[Tensor], *, u: Tensor | None = None, vh: Tensor | None = None
) -> Path:
    folder.mkdir(parents=True)
    parts, first = list[Tensor](), 0
    for rows in weights:
        if u is not None and vh is not None:
            rows = (rows + u[first : first + len(rows)] @ vh).bfloat16()
        first += len(rows)
        parts.append(rows)
    save_file({NAME: torch.cat(parts)}, folder / "model.safetensors")
    return folder


@dataclass(slots=True)
class Stage:
    """What tasks of one kind took."""

    tasks: int = 0
    passes: int = 0
    bytes_read: int = 0
    peak_rss_bytes: int = 0


@dataclass(slots=True)
class Watched:
    """A runtime that adds up what the tasks of each stage say they took."""

    inner: Runtime
    stages: dict[str, Stage] = field(default_factory=dict[str, Stage])

    @property
    def address(self) -> str:
        """Where units run."""
        return self.inner.address

    @property
    def tally(self) -> Tally:
        """What the units come to."""
        return self.inner.tally

    def map(
        self,
        task: Callable[[U], R],
        units: Sequence[U],
        *,
        stage: str,
        progress: Progress,
        failed: Any = None,
        num_gpus: float = 0,
    ) -> list[R]:
        """The task's results, in the order of the units."""
        found = self.inner.map(
            task, units, stage=stage, progress=progress, failed=failed, num_gpus=num_gpus
        )
        seen = self.stages.setdefault(stage, Stage())
        seen.tasks += len(units)
        seen.passes += 1
        for receipt in found:
            if isinstance(receipt, PassReceipt | Survey | Receipt):
                seen.bytes_read += receipt.bytes_read
                seen.peak_rss_bytes = max(seen.peak_rss_bytes, receipt.peak_rss_bytes)
        return found


def own_rss_bytes(runtime: Runtime, *, num: int) -> int:
    """Resident size of a worker that has imported everything and done nothing."""
    units = [
        SimpleNamespace(name="idle", memory_bytes=1 << 20, threads=1, index=i) for i in range(num)
    ]
    found = runtime.map(_idle, cast("list[Any]", units), stage="idle", progress=SILENT)
    return max(found)


def _idle(unit: Any) -> int:
    del unit
    return peak_rss_bytes()
