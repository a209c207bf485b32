"""Benchmarks of planning and writing large models, at the smallest size there is."""

from pathlib import Path

from safetensors.torch import load_file

from svdmerge.comparison.planning import decoder, time_plan, write_sparse
from svdmerge.comparison.writing import measure, prepare, weights_of
from svdmerge.engine.runtime import InProcess
from svdmerge.storage.checkpoint import open_checkpoint


def test_forty_gigabytes_of_holes_are_planned_from_their_headers(tmp_path: Path) -> None:
    for name in ("base", "source-0"):
        write_sparse(tmp_path / name, decoder(), num_shards=20)
    on_disk = sum(f.stat().st_blocks * 512 for f in tmp_path.rglob("*.safetensors"))
    found = time_plan(tmp_path, num_sources=1)
    assert (found.num_sources, found.num_tensors) == (1, 435)
    assert found.num_bytes > 40e9
    assert on_disk < 1e6
    assert found.cpu_seconds < 5  # of the processor: tests may share it


def test_what_is_timed_is_the_whole_model_in_its_shards(tmp_path: Path) -> None:
    shapes = decoder(layers=2, width=32, hidden=48, vocabulary=64)
    plan = prepare(tmp_path, shapes, num_shards=3)
    found = measure(plan, tmp_path, runtime=InProcess())
    assert found.num_files == 3
    assert found.ratio > 0
    assert open_checkpoint(str(tmp_path / "merged")).tensors.keys() == shapes.keys()
    name = "model.layers.0.mlp.up_proj.weight"
    base, out = (
        next(t[name] for f in weights_of(tmp_path / m) if name in (t := load_file(f)))
        for m in ("base", "merged")
    )
    assert (out - base).abs().max() > 0
