"""What threshold rounds select from real models' differences is what float64 SVDs select.

Run with `SVDMERGE_ZOO=... pytest -m zoo tests/zoo/test_zoo_selection.py`.
"""

import os
from pathlib import Path

import pytest
from selections import assert_selected_as_by_full_svds

from svdmerge.comparison.decomposition import decomposed_names
from svdmerge.core.delta import delta
from svdmerge.storage.checkpoint import Checkpoint, open_checkpoint

pytestmark = [pytest.mark.zoo, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def models() -> tuple[Checkpoint, list[Checkpoint]]:
    zoo = Path(os.environ["SVDMERGE_ZOO"])
    sources = sorted(p for p in zoo.iterdir() if (p / "config.json").exists() and p.name != "base")
    return open_checkpoint(str(zoo / "base")), [open_checkpoint(str(p)) for p in sources[:8]]


@pytest.mark.parametrize("is_rounded", [False, True])
def test_the_selection_of_every_matrix_is_that_of_full_svds(
    models: tuple[Checkpoint, list[Checkpoint]], is_rounded: bool
) -> None:
    """The sources as they are, and rounded to bfloat16."""
    base, sources = models
    for name in decomposed_names(base):
        weights = [source.tensors[name].read() for source in sources]
        changed = [w.bfloat16() if is_rounded else w for w in weights]
        start = base.tensors[name].read()
        deltas = [delta(weight, base=start) for weight in changed]
        assert_selected_as_by_full_svds(deltas, k=int(0.1 * min(start.shape)))
