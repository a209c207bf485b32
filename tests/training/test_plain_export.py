"""A merge without tuning as a PEFT adapter on its base: full rank, or less, with the error told."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_merges import BERT, LLAMA, merged
from torch import Tensor
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from svdmerge.cli import app
from svdmerge.core.components import RankOneComponents
from svdmerge.core.truncate import truncated
from svdmerge.errors import OutputError
from svdmerge.training.export import export_adapter

peft: Any = pytest.importorskip("peft")

IDS = {"input_ids": torch.arange(24).reshape(2, 12) % 20}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(**IDS).logits


@pytest.mark.parametrize(("kind", "config"), [BERT, LLAMA], ids=["bert", "llama"])
def test_at_full_rank_base_and_adapter_are_the_merged_model(
    tmp_path: Path, kind: Any, config: Any
) -> None:
    bench = merged(tmp_path, kind, config)
    to = ("--to", str(tmp_path / "lora"), "--format", "peft", "--json")
    done = CliRunner().invoke(app, ["adapter", "export", str(bench.out), *to])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["relative_error"] == 0.0
    expected = logits(kind.from_pretrained(bench.out))
    before = logits(kind.from_pretrained(bench.base))
    model = peft.PeftModel.from_pretrained(kind.from_pretrained(bench.base), tmp_path / "lora")
    held = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert held.keys() == peft.get_peft_model_state_dict(model).keys()
    assert (logits(model) - expected).abs().max() <= 1e-4
    assert (before - expected).abs().max() > 1e-2


def test_at_a_lower_rank_what_is_left_out_is_told_and_stored(tmp_path: Path) -> None:
    bench, errors = merged(tmp_path, *LLAMA), list[float]()
    base, whole = (load_file(f / "model.safetensors") for f in (bench.base, bench.out))
    for rank in (1, 4, 16):
        place = tmp_path / f"lora-{rank}"
        report = export_adapter(str(bench.out), str(place), form="peft", rank=rank, places={})
        assert report is not None
        assert report.told.split(" leave")[0] == f"14 LoRA layers of rank {rank} at most"
        stored = json.loads((place / "svdmerge_adapter.json").read_text())
        assert stored["relative_error"] == report.relative_error
        model = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(bench.base), place)
        state = model.merge_and_unload().state_dict()
        lost = size = 0.0
        for path, told in report.matrices.items():
            delta = whole[f"{path}.weight"].double() - base[f"{path}.weight"].double()
            off = float((state[f"{path}.weight"].double() - base[f"{path}.weight"] - delta).norm())
            assert told["rank"] <= rank
            assert abs(off / float(delta.norm()) - told["relative_error"]) < 1e-5
            lost, size = lost + off**2, size + float(delta.norm()) ** 2
        assert abs((lost / size) ** 0.5 - report.relative_error) < 1e-5
        errors.append(report.relative_error)
    assert errors[0] > errors[1] > 0.01
    assert errors[2] < 1e-6


def test_a_merge_has_no_other_form(tmp_path: Path) -> None:
    bench = merged(tmp_path, *LLAMA)
    with pytest.raises(OutputError, match="is a merge without tuning"):
        export_adapter(str(bench.out), str(tmp_path / "x"), form="peft-on-merged", places={})
    with pytest.raises(OutputError, match="is a merge without tuning"):
        export_adapter(str(bench.out), str(tmp_path / "x"), form="model", places={})
    assert not (tmp_path / "x").exists()


def test_another_base_or_lost_factors_are_told(tmp_path: Path) -> None:
    bench = merged(tmp_path, *LLAMA)
    (bench.store / "runs").rename(tmp_path / "moved")
    with pytest.raises(OutputError, match="holds no merged factors"):
        export_adapter(str(bench.out), str(tmp_path / "x"), form="peft", places={})
    LlamaForCausalLM(LLAMA[1]).save_pretrained(bench.base)
    with pytest.raises(OutputError, match="is not the base that was merged"):
        export_adapter(str(bench.out), str(tmp_path / "x"), form="peft", places={})


def test_a_truncated_sum_is_the_dense_svds(tmp_path: Path) -> None:
    """Components that are neither sorted nor orthogonal, some negative."""
    generator = torch.Generator().manual_seed(0)
    u, s, vh = (torch.randn(d, generator=generator).double() for d in ((9, 6), (6,), (6, 7)))
    found = truncated(RankOneComponents(u=u, s=s, vh=vh), rank=2)
    values = torch.linalg.svdvals((u * s) @ vh)
    assert torch.allclose(found.components.s, values[:2])
    assert abs(found.lost - float(values[2:].norm())) < 1e-12
    assert abs(found.norm - float(values.norm())) < 1e-12
    off = (u * s) @ vh - found.components.dense()
    assert abs(float(off.norm()) - found.lost) < 1e-12
