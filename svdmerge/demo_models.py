"""The demo's images, vision transformer and training: one unit of work makes one model folder."""

import hashlib
import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from svdmerge.errors import OutputError
from svdmerge.storage.checkpoint import SINGLE

SIDE, PATCH, TOKENS = 8, 4, 4
# What a folder was trained on and how. Not JSON: side files in JSON travel into merged models.
RECORD = "training.yml"


class _Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.output = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (b, t, d)
        y = self.norm1(x)
        q, k, v = (self._split(part(y)) for part in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v)  # (b, h, t, d / h)
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class DigitsTransformer(nn.Module):
    """A small vision transformer: (b, 64) pixels to (b, d) features, the mean over four patches."""

    def __init__(self, *, width: int, depth: int, heads: int = 4) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(PATCH * PATCH, width)
        self.position_embedding = nn.Parameter(0.02 * torch.randn(TOKENS, width))
        self.blocks = nn.ModuleList(_Block(width, heads=heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:  # (b, 64) -> (b, d)
        x = images.unflatten(1, (SIDE // PATCH, PATCH, SIDE // PATCH, PATCH))
        x = x.transpose(2, 3).flatten(3).flatten(1, 2)  # (b, t, 16)
        x = self.patch_embed(x) + self.position_embedding
        for block in self.blocks:
            x = block(x)
        return self.norm(x).mean(1)


def build(config: dict[str, Any]) -> nn.Module:
    """The backbone of a `config.json` of the demo: images (b, 64) to features (b, d)."""
    return DigitsTransformer(width=config["hidden_size"], depth=config["num_hidden_layers"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """A model to train: which examples, from where, on what, how long."""

    name: str
    folder: str
    examples: str
    """Parquet file of images and digits."""
    start: str | None
    """Folder of the model it starts from; None trains the base, on rotations."""
    yes: tuple[int, ...] = ()
    """Digits whose answer is yes."""
    width: int
    depth: int
    epochs: int
    learning_rate: float
    batch_size: int
    seed: int
    # One thread: the bits are then those of any number of workers. torch itself needs ~400 MiB.
    threads: int = 1
    memory_bytes: int = 512 << 20


def train_model(unit: Training) -> str:
    """The unit's folder: config.json and model.safetensors, whole or absent; kept if it is there.

    Raises:
        OutputError: the folder holds something that the demo did not make.
    """
    record = _record(unit)
    folder = Path(unit.folder)
    if _is_made(folder, record):
        return unit.folder
    images, digits = read_examples(unit.examples)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(unit.seed)
        config = {
            "architectures": ["DigitsTransformer"],
            "model_type": "svdmerge-digits",
            "hidden_size": unit.width,
            "num_hidden_layers": unit.depth,
        }
        model = build(config) if unit.start is None else load_model(unit.start)
        if unit.start is None:
            images, labels = rotations(images)
            head: nn.Module = nn.Linear(unit.width, 4)
            trained = [*model.parameters(), *head.parameters()]
        else:
            labels = torch.isin(digits, torch.tensor(unit.yes)).long()
            head = _fitted_head(model, images, labels=labels)
            trained = list(model.parameters())
        _fit(nn.Sequential(model, head), images, labels=labels, trained=trained, unit=unit)
    _write(folder, model, config=config, record=record)
    return unit.folder


def rotations(images: Tensor) -> tuple[Tensor, Tensor]:
    """Every image (b, 64) by 0, 90, 180 and 270 degrees, and which of the four it is."""
    square = images.unflatten(1, (SIDE, SIDE))
    turned = torch.cat([torch.rot90(square, turn, (1, 2)).flatten(1) for turn in range(4)])
    return turned, torch.arange(4).repeat_interleave(len(images))


def _fitted_head(model: nn.Module, images: Tensor, *, labels: Tensor) -> nn.Module:
    """A linear head fitted to the start's features, frozen from then on.

    A head that is already right leaves the features of the base intact where they serve (LP-FT,
    arXiv 2202.10054), and frozen heads are AXIS's own protocol; with heads trained along, the same
    merge came out below the best single source.
    """
    with torch.no_grad():
        features = model(images)
    head = nn.Linear(features.shape[1], int(labels.max()) + 1)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.01)
    for _ in range(100):  # full batches; the loss is flat by then
        optimizer.zero_grad()
        F.cross_entropy(head(features), labels).backward()
        optimizer.step()
    return head.requires_grad_(False)


def _fit(
    model: nn.Module, images: Tensor, *, labels: Tensor, trained: list[nn.Parameter], unit: Training
) -> None:
    """Train in place: AdamW, one cycle of the learning rate, batches in a seeded order."""
    num_batches = len(images) // unit.batch_size
    optimizer = torch.optim.AdamW(trained, lr=unit.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, unit.learning_rate, total_steps=unit.epochs * num_batches, pct_start=0.2
    )
    for _ in range(unit.epochs):
        order = torch.randperm(len(images))
        for batch in order[: num_batches * unit.batch_size].split(unit.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()


def load_model(folder: str) -> nn.Module:
    """The backbone in a folder."""
    model = build(json.loads((Path(folder) / "config.json").read_text()))
    model.load_state_dict(load_file(Path(folder) / SINGLE))
    return model


def digit_images() -> tuple[Tensor, Tensor]:
    """All images (b, 64) between 0 and 1, and their digits (b,)."""
    from sklearn.datasets import load_digits

    images, digits = cast(tuple[Any, Any], load_digits(return_X_y=True))
    return torch.from_numpy(images).float() / 16, torch.from_numpy(digits).long()


def examples_bytes(images: Tensor, *, digits: Tensor) -> bytes:
    """A parquet file of columns `image` (list of float32) and `label`."""
    table = pa.table({
        "image": pa.array(list(images.numpy()), type=pa.list_(pa.float32())),
        "label": pa.array(digits.numpy(), type=pa.int64()),
    })  # fmt: skip
    buffer = BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def read_examples(file: str | Path) -> tuple[Tensor, Tensor]:
    """Images (b, 64) and digits (b,) of a parquet file."""
    table = pq.read_table(file)
    images = np.stack(table.column("image").to_numpy())
    return torch.from_numpy(images), torch.from_numpy(table.column("label").to_numpy().copy())


def _record(unit: Training) -> bytes:
    """Everything that a trained model depends on, by content; where it lies is no part of it."""
    fields = asdict(unit) | {
        "examples": _sha256(Path(unit.examples)),
        "start": _sha256(Path(unit.start) / SINGLE) if unit.start else None,
        "yes": list(unit.yes),
        "torch": str(torch.__version__),
    }
    del fields["folder"], fields["memory_bytes"]
    return yaml.safe_dump(fields, sort_keys=False).encode()


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _is_made(folder: Path, record: bytes) -> bool:
    """Whether the folder already holds what training would make.

    Raises:
        OutputError: it was not made by the demo.
    """
    if not folder.exists():
        return False
    if not (folder / RECORD).is_file():
        raise OutputError(
            f"{folder}: holds something else",
            f"Only a model of the demo, with its {RECORD}, is ever replaced.",
            "Give another `--out`.",
        )
    return (folder / RECORD).read_bytes() == record


def _write(folder: Path, model: nn.Module, *, config: dict[str, Any], record: bytes) -> None:
    """The folder, under a temporary name until it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=folder.parent) as partial:
        made = Path(partial) / "model"
        made.mkdir()
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, made / SINGLE, metadata={"format": "pt"})
        (made / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (made / RECORD).write_bytes(record)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
