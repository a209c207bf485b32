"""The adapter is small, names its merged factors, and gives the adapted model back."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tune_case import Case, make_case, put_factors
from typer.testing import CliRunner, Result

from svdmerge.cli import app
from svdmerge.core.components import RankOneComponents
from svdmerge.errors import OutputError, SvdmergeError
from svdmerge.storage.filesystem import Folder
from svdmerge.training.adapter import (
    Adapter,
    adapter_bytes,
    changes_of,
    factors_digest,
    load_adapter,
    open_adapted,
)
from svdmerge.training.export import export_adapter


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return make_case(tmp_path)


def exported(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["adapter", "export", *map(str, arguments)])


def other_factors(case: Case) -> Folder:
    """The same merge, a little different in one value."""
    folder = Folder.at(case.root / "other")
    factors = {p: case.factors.read(p, range(case.factors.depth(p))) for p in case.parameters}
    name, c = next(iter(factors.items()))
    put_factors(folder, factors | {name: RankOneComponents(u=c.u, s=c.s * 1.0001, vh=c.vh)})
    return folder


def test_of_a_small_sentence_model_it_takes_less_than_20_kb() -> None:
    parts = (
        "attention.self.query", "attention.self.key", "attention.self.value",
        "attention.output.dense", "intermediate.dense", "output.dense",
    )  # fmt: skip
    names = [f"bert.encoder.layer.{i}.{part}.weight" for i in range(6) for part in parts]
    adapter = Adapter(
        sigma_change={name: torch.randn(38) for name in names},
        factors_sha256="0" * 64,
        null_space=False,
        seed=0,
    )
    assert len(names) == 36
    assert len(adapter_bytes(adapter)) <= 20_000


def test_it_is_read_as_it_was_written_and_names_its_merged_factors(case: Case) -> None:
    case.tune()
    folder = Folder.at(case.root / "tuned")
    adapter = load_adapter(folder)
    assert adapter_bytes(adapter) == folder.read("adapter.safetensors")
    assert adapter.factors_sha256 == factors_digest(case.factors)
    assert {len(d) for d in adapter.sigma_change.values()} == {3}


@pytest.mark.parametrize("null_space", [False, True])
def test_merge_and_adapter_give_the_adapted_model_byte_for_byte(
    case: Case, null_space: bool
) -> None:
    case.tune(case.config(num_values=7, null_space=null_space))
    done = exported(case.root / "tuned", "--to", case.root / "again", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["format"] == "model"
    for name in ("model.safetensors", "head.safetensors", "config.json"):
        assert (case.root / "again" / name).read_bytes() == (
            case.root / "tuned" / name
        ).read_bytes()


def test_what_save_does_not_name_is_not_written(case: Case) -> None:
    case.tune(case.config(save=["adapter"]))
    names = {p.name for p in (case.root / "tuned").iterdir()}
    assert names == {"adapter.safetensors", "head.safetensors", "tune.json"}
    case.tune(case.config(save=["peft"]))
    names = {p.name for p in (case.root / "tuned").iterdir()}
    assert names == {"peft", "head.safetensors", "tune.json"}
    done = exported(case.root / "tuned", "--to", case.root / "model")
    assert done.exit_code == 1
    assert "holds no adapter.safetensors" in done.stderr


def test_as_peft_it_is_the_same_from_the_folder_as_from_the_tuning(case: Case) -> None:
    case.tune(case.config(save=["adapter", "peft"]))
    done = exported(case.root / "tuned", "--to", case.root / "peft", "--format", "peft")
    assert done.exit_code == 0, done.stderr
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        told = [(case.root / f / name).read_text("latin1") for f in ("peft", "tuned/peft")]
        assert told[0] == told[1]
    held = load_file(case.root / "peft" / "head.safetensors")
    assert held.keys() == {"weight", "bias", "classes"}


def test_an_adapter_of_other_merged_factors_is_refused_with_both_digests(case: Case) -> None:
    case.tune()
    other = other_factors(case)
    with pytest.raises(OutputError) as caught:
        open_adapted(str(case.root / "tuned"), factors=other.uri)
    adapter = load_adapter(Folder.at(case.root / "tuned"))
    assert adapter.factors_sha256 in str(caught.value)
    with pytest.raises(OutputError, match="The adapter belongs to merged factors"):
        changes_of(
            Adapter(
                sigma_change=adapter.sigma_change, factors_sha256="0" * 64, null_space=False, seed=0
            ),
            factors=case.factors,
            base=case.base,
        )


def test_models_that_moved_are_found_where_they_are_said_to_be(case: Case) -> None:
    case.tune()
    shutil.move(case.root / "factors", case.root / "moved")
    shutil.move(case.root / "merged", case.root / "moved-merged")
    done = exported(case.root / "tuned", "--to", case.root / "again")
    assert done.exit_code == 1
    assert "holds no merged factors" in done.stderr
    places = ("--factors", case.root / "moved", "--merged", case.root / "moved-merged")
    done = exported(case.root / "tuned", "--to", case.root / "again", *places)
    assert done.exit_code == 0, done.stderr


def test_a_folder_that_holds_something_is_not_written_to(case: Case) -> None:
    case.tune()
    with pytest.raises(OutputError, match="is not empty"):
        export_adapter(str(case.root / "tuned"), str(case.root / "base"), form="model", places={})


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("adapter.safetensors", b"nonsense", "malformed"),
        ("adapter.safetensors", None, "holds no adapter"),
        ("tune.json", b"{}", "holds no tune.json"),
        ("tune.json", None, "holds no tune.json"),
    ],
)
def test_a_damaged_or_foreign_folder_is_told(
    case: Case, name: str, content: bytes | None, told: str
) -> None:
    case.tune()
    path = case.root / "tuned" / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(SvdmergeError, match=told):
        open_adapted(str(case.root / "tuned"))
