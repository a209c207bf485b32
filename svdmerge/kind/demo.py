"""The demo of decomposable models: handwritten digits, seven to train on and three new ones."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from svdmerge.demo_models import build, digit_images, examples_bytes
from svdmerge.errors import OutputError
from svdmerge.kind import workflow
from svdmerge.kind.recipe import KindRecipe, parse_kind_recipe
from svdmerge.kind.recombine import RecombineResult
from svdmerge.kind.split import SplitResult
from svdmerge.kind.train import TrainResult
from svdmerge.progress import SILENT, Progress
from svdmerge.storage.checkpoint import SINGLE
from svdmerge.storage.filesystem import Folder

CONFIG = {"model_type": "digits", "hidden_size": 48, "num_hidden_layers": 3}
# Superclasses by how digits are drawn; the three new ones are told apart among themselves.
OLD = {"loops": [0, 6], "strokes": [1, 4], "bows": [2, 3, 5]}
NEW = {"new": [0, 1, 2]}
CONFIG_FILE = "kind.yml"
STEPS = {"old": 400, "new": 150}
FIRST_NEW, KEPT = 7, ("1", "4")


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """What every stage came to."""

    trained: TrainResult
    split: SplitResult
    recombined: RecombineResult
    transferred: TrainResult
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def run_demo(out: Path, *, address: str = "local", progress: Progress = SILENT) -> DemoResult:
    """Train on digits 0 to 6, split, recombine for 1 and 4, transfer to 7, 8 and 9.

    Raises:
        OutputError: a model's folder holds something else.
    """
    start = time.perf_counter()
    recipe = _written(out.resolve())
    return DemoResult(
        trained=workflow.train(recipe, address=address, progress=progress),
        split=workflow.split(recipe, address=address, progress=progress),
        recombined=workflow.recombine(recipe),
        transferred=workflow.transfer(recipe, address=address, progress=progress),
        seconds=time.perf_counter() - start,
    )


def _written(out: Path) -> KindRecipe:
    """The configuration, its architecture and examples written below `out`."""
    raw: dict[str, Any] = {
        "model": f"{out}/model",
        "store": f"{out}/store",
        "train": _section(out, "old", groups=OLD, steps=STEPS["old"]),
        "recombine": {"classes": list(KEPT), "out": f"{out}/recombined"},
        "transfer": _section(out, "new", groups=NEW, steps=STEPS["new"])
        | {"out": f"{out}/transferred"},
    }
    config = json.dumps(raw, indent=1) + "\n"  # JSON is YAML
    _check_own(out, config)
    out.mkdir(parents=True, exist_ok=True)
    (out / CONFIG_FILE).write_text(config)
    _write_base(out / "base")
    images, digits = digit_images()
    old = digits < FIRST_NEW
    _write_examples(out, "old", images[old], digits[old])
    _write_examples(out, "new", images[~old], digits[~old] - FIRST_NEW)
    return parse_kind_recipe(raw)


def _check_own(out: Path, config: str) -> None:
    """Raise OutputError if the folder holds anything but an earlier demo."""
    names = Folder.at(out).names()
    own = out / CONFIG_FILE
    if names and not (own.is_file() and own.read_text() == config):
        raise OutputError(
            f"{out}: holds something else ({', '.join(names[:3])})",
            f"Only the folder of an earlier demo, with its {CONFIG_FILE}, is written to.",
            "Give another folder, or empty that one yourself.",
        )


def _section(out: Path, name: str, *, groups: dict[str, list[int]], steps: int) -> dict[str, Any]:
    return {
        "task": "tensor",
        "base_model": f"{out}/base",
        "backbone": "svdmerge.demo_models:build",
        "train": f"{out}/{name}-train.parquet",
        "test": f"{out}/{name}-test.parquet",
        "input": "image",
        "groups": groups,
        "steps": steps,
        "batch_size": 64,
        "learning_rate": 3e-3,
        "warmup_steps": 20,
        "measure_every": 100,
    }


def _write_base(folder: Path) -> None:
    """An untrained transformer: the architecture that training starts from at random."""
    if (folder / "config.json").exists():
        return  # written again it would be another revision, and trained from anew
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = build(CONFIG).state_dict()
    save_file(state, folder / SINGLE, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")


def _write_examples(out: Path, name: str, images: Tensor, digits: Tensor) -> None:
    """Every fourth image is for the test."""
    test = torch.arange(len(digits)) % 4 == 0
    for part, rows in (("train", ~test), ("test", test)):
        data = examples_bytes(images[rows], digits=digits[rows])
        (out / f"{name}-{part}.parquet").write_bytes(data)
