"""Tensors put together from rows of others: any range of them is what concatenating gives."""

import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from svdmerge.storage.checkpoint import Checkpoint, open_checkpoint
from svdmerge.storage.composed import Composed, Piece, compose
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.vocabulary import common_rows

ROWS, WIDTH = 12, 5
WHOLE = {
    "a": torch.arange(ROWS * WIDTH, dtype=torch.float32).reshape(ROWS, WIDTH),
    "b": -torch.arange(ROWS * WIDTH, dtype=torch.float32).reshape(ROWS, WIDTH).bfloat16(),
    "c": torch.ones(ROWS, WIDTH).to(torch.float8_e4m3fn),
    "c_scale": torch.tensor(3.0),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("composed")
    save_file(WHOLE, folder / "model.safetensors")
    return open_checkpoint(str(folder))


def composed(checkpoint: Checkpoint, *given: tuple[str, int, int]) -> Composed:
    refs = checkpoint.tensors
    pieces = [Piece(ref=refs[name], first=first, stop=stop) for name, first, stop in given]
    return compose("x", pieces, model="m")


rows = st.tuples(st.sampled_from("abc"), st.integers(0, ROWS - 1), st.integers(1, ROWS)).map(
    lambda x: (x[0], x[1], min(ROWS, x[1] + x[2]))
)


@settings(max_examples=60)
@given(given_rows=st.lists(rows, min_size=1, max_size=6), data=st.data())
def test_any_rows_of_it_are_those_of_the_concatenation(
    checkpoint: Checkpoint, given_rows: list[tuple[str, int, int]], data: st.DataObject
) -> None:
    x = composed(checkpoint, *given_rows)
    own = {"a": WHOLE["a"], "b": WHOLE["b"].float(), "c": 3 * WHOLE["c"].float()}
    wanted = torch.cat([own[name][first:stop].float() for name, first, stop in given_rows])
    assert torch.equal(x.read().float(), wanted)
    first = data.draw(st.integers(0, len(wanted) - 1))
    stop = data.draw(st.integers(first, len(wanted)))
    start, count = first * WIDTH, (stop - first) * WIDTH
    part = x.decode(x.read_bytes(start=start, count=count), start=start)
    assert torch.equal(part.reshape(-1, WIDTH).float(), wanted[first:stop])


def test_it_has_a_dtype_that_holds_all_its_pieces(checkpoint: Checkpoint) -> None:
    assert composed(checkpoint, ("b", 0, 2), ("b", 3, 4)).dtype == "BF16"
    assert composed(checkpoint, ("a", 0, 2), ("b", 3, 4)).dtype == "F32"
    assert composed(checkpoint, ("c", 0, 2)).dtype == "F32"


def test_scattered_rows_are_read_at_once_and_far_ones_apart(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = list[int]()
    real = Folder.read_exactly

    def counting(self: Folder, path: str, *, start: int, count: int) -> bytes:
        counts.append(count)
        return real(self, path, start=start, count=count)

    monkeypatch.setattr(Folder, "read_exactly", counting)
    composed(checkpoint, ("a", 4, 5), ("a", 2, 3), ("a", 0, 1)).read()
    assert counts == [5 * WIDTH * 4]
    counts.clear()
    composed(checkpoint, ("a", 11, 12), ("a", 0, 1)).read()
    assert counts == [WIDTH * 4] * 2


def test_it_travels_to_workers(checkpoint: Checkpoint) -> None:
    x = composed(checkpoint, ("a", 4, 6), ("b", 2, 3))
    assert torch.equal(pickle.loads(pickle.dumps(x)).read(), x.read())


def test_rows_of_tokens_come_in_runs() -> None:
    base = {"a": 0, "b": 1, "c": 2, "d": 4}
    assert common_rows(base, base, num_base=5, num_source=5) == [
        (True, 0, 3), (False, 3, 4), (True, 4, 5),
    ]  # fmt: skip
    other = {"b": 0, "c": 1, "a": 2, "d": 9}
    assert common_rows(base, other, num_base=5, num_source=9) == [
        (True, 2, 3), (True, 0, 2), (False, 3, 5),
    ]  # fmt: skip


def test_a_file_that_changed_is_told(tmp_path: Path) -> None:
    save_file(WHOLE, tmp_path / "model.safetensors")
    x = composed(open_checkpoint(str(tmp_path)), ("a", 4, 6), ("b", 2, 3))
    save_file(WHOLE | {"d": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(Exception, match="changed or vanished"):
        x.read()
