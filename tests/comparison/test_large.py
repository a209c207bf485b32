"""The pair that the benchmark of large matrices runs on, and what it counts."""

from pathlib import Path

import torch
from merging import Bench
from safetensors.torch import load_file

from svdmerge.comparison.large import LARGEST, NAME, Watched, make_pair, own_rss_bytes
from svdmerge.engine.runtime import InProcess
from svdmerge.workflow import Run


def test_the_change_falls_by_a_power_law_from_its_largest_value(tmp_path: Path) -> None:
    base, source = (
        load_file(f / "model.safetensors")[NAME] for f in make_pair(tmp_path, m=300, n=400)
    )
    assert base.dtype == source.dtype == torch.bfloat16
    s = torch.linalg.svdvals(source.double() - base.double())
    assert abs(float(s[0]) - LARGEST) < 0.02 * LARGEST
    assert abs(float(s[7] / s[0]) - 8**-0.7) < 0.02


def test_every_pass_is_counted_and_reads_the_tensors_once(tmp_path: Path) -> None:
    base, source = make_pair(tmp_path, m=300, n=400)
    bench = Bench(root=tmp_path, base=base, sources=(source,))
    runtime = Watched(InProcess())
    recipe = bench.recipe(parameters={"k": 16}, resources={"max_matrix": "256KiB"})
    assert own_rss_bytes(runtime, num=2) > 0
    report = Run(recipe, runtime=runtime).all()
    passes = {name: s for name, s in runtime.stages.items() if s.bytes_read}
    assert set(passes) == {"survey", "pass: step", "pass: image"}
    for stage in passes.values():
        assert stage.bytes_read == stage.passes * 2 * 2 * 300 * 400
    assert report.stages[0].bytes_read == sum(s.bytes_read for s in passes.values())
