"""The output's weights files: as the base's, or of a size; checked; a model only when whole."""

import contextlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
from fsspec.implementations.memory import MemoryFileSystem
from merging import Bench, micro_bench, tiny_bench
from safetensors.torch import load_file
from typer.testing import CliRunner

from svdmerge.cli import app
from svdmerge.errors import CheckpointError, StoreError
from svdmerge.storage.checkpoint import INDEX, open_checkpoint
from svdmerge.storage.filesystem import Folder


def test_the_output_has_the_bases_shards_by_default(tmp_path: Path) -> None:
    base = tiny.tiny_base(tmp_path / "base", shards=3)
    sources = tuple(tiny.tiny_source(tmp_path / f"s{i}", base, i) for i in (1, 2))
    bench = Bench(root=tmp_path, base=base, sources=sources)
    bench.run()
    for file in base.glob("*.safetensors"):
        assert load_file(bench.out / file.name).keys() == load_file(file).keys()
    index, given = (json.loads((folder / INDEX).read_text()) for folder in (bench.out, base))
    assert index["weight_map"] == given["weight_map"]
    assert index["metadata"]["total_size"] == given["metadata"]["total_size"]


def test_another_shard_size_is_written_from_what_is_merged(tmp_path: Path) -> None:
    bench = tiny_bench(tmp_path)
    bench.run()
    again = bench.run(max_shard_size="8KB")
    assert {s.num_units for s in again.stages if s.name in ("decompose", "merge")} == {0}
    assert len(list(bench.out.glob("*.safetensors"))) > 2
    assert bench.run(max_shard_size="8KB").status == "unchanged"
    assert bench.run(max_shard_size="4KB").status == "done"


def test_the_command_line_says_a_size_too(tmp_path: Path) -> None:
    bench = micro_bench(tmp_path)
    command = ["run", str(bench.write_recipe()), "--address", "none", "--max-shard-size"]
    assert CliRunner().invoke(app, [*command, "1KB"]).exit_code == 0
    assert len(list(bench.out.glob("model-0000*.safetensors"))) == 3
    told = CliRunner().invoke(app, [*command, "many"])
    assert told.exit_code == 2
    assert "max_shard_size: got 'many'; expected a size" in told.stderr


def test_a_shard_that_is_not_what_was_written_is_told_and_nothing_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk alters the second shard's last byte."""
    bench, read = micro_bench(tmp_path), Folder.read_exactly

    def altered(folder: Folder, relative: str, *, start: int, count: int) -> bytes:
        data = read(folder, relative, start=start, count=count)
        hit = relative.startswith("model-00002") and start == 0 and count > 8
        return data[:-1] + bytes([data[-1] ^ 1]) if hit else data

    monkeypatch.setattr(Folder, "read_exactly", altered)
    with pytest.raises(StoreError, match=r"model-00002-of-.*: is not what was written to it"):
        bench.run(max_shard_size="1KB")
    assert not bench.out.exists()
    assert not list(tmp_path.rglob(INDEX))


def test_one_file_of_several_is_no_model(tmp_path: Path) -> None:
    base = tiny.tiny_base(tmp_path, shards=2)
    (base / INDEX).unlink()
    (base / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"has no {INDEX}"):
        open_checkpoint(str(base))


def test_an_output_without_renames_is_a_model_only_when_it_is_whole(
    tmp_path: Path, memory_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run dies before each change to the folder, the removal of an earlier output's files among
    them; the same command again ends with the bytes of an undisturbed run."""
    bench, out = micro_bench(tmp_path, num_sources=1), Folder.at(f"{memory_uri}/out")
    places = {"out": out.uri, "store": f"{memory_uri}/store", "max_shard_size": "1KB"}
    run = partial(bench.run, **places)
    earlier = contents_of(run(parameters={"k": 1}) and out)
    expected, deaths = contents_of(run() and out), 0
    while dies_before_change(deaths + 1, out, run, earlier, monkeypatch):
        deaths += 1
        found = contents_of(out)
        if loads(out):
            shards = {n: d for n, d in found.items() if ".safetensors" in n}
            assert any(shards.items() <= whole.items() for whole in (earlier, expected))
            assert sum(INDEX in n for n in shards)
        run()
        assert contents_of(out) == expected
    assert deaths > 2 * len(expected)


def contents_of(folder: Folder) -> dict[str, bytes]:
    return {name: folder.read(name) for name in folder.find()}


def loads(folder: Folder) -> bool:
    """Whether the weights open as a model."""
    with contextlib.suppress(CheckpointError):
        return bool(open_checkpoint(folder.uri).tensors)
    return False


def dies_before_change(
    number: int, out: Folder, run: Any, earlier: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> bool:
    """Whether a run over an earlier output has so many changes to it, and died before that one."""
    out.remove()
    for name, data in earlier.items():
        out.put(name, data)
    seen = 0

    def mortal(change: Any) -> Any:
        def changed(*args: Any, **options: Any) -> Any:
            nonlocal seen
            seen += any(str(a).startswith(f"{out.path()}/") for a in args)
            if seen == number:
                raise KeyboardInterrupt
            return change(*args, **options)

        return changed

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        for name in ("pipe_file", "put_file", "rm_file"):
            patch.setattr(MemoryFileSystem, name, mortal(getattr(MemoryFileSystem, name)))
        run()
        return False
    return True
