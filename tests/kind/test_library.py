"""A library of fine-tuned sources as one decomposable model: planted shared and private changes."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import ViTConfig, ViTModel

from svdmerge.core.kind.gate import gated
from svdmerge.core.kind.replace import projections
from svdmerge.errors import RecipeError, StoreError
from svdmerge.kind import folder, workflow
from svdmerge.kind.recipe import load_kind_recipe, parse_kind_recipe
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.maintenance import verify

WIDTH, NAMES = 16, ("a", "b", "c")


def vit() -> ViTModel:
    torch.manual_seed(0)
    return ViTModel(
        ViTConfig(
            hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
            image_size=8, patch_size=4,
        )
    )  # fmt: skip


def outer(m: int, n: int, *, seed: int, strength: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.randn(d, generator=generator) for d in (m, n))
    return strength * torch.outer(u / u.norm(), v / v.norm())


@torch.no_grad()
def source(number: int) -> ViTModel:
    """Every projection moved along one direction that all share and one of its own; every vector
    by a number of its own."""
    model = vit()
    for i, path in enumerate(projections(model)):
        weight = model.get_parameter(f"{path}.weight")
        weight += outer(*weight.shape, seed=i, strength=1.0)
        weight += outer(*weight.shape, seed=100 * (number + 1) + i, strength=0.6)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter += 0.01 * (number + 1)
        del name
    return model.eval()


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("library")
    vit().save_pretrained(path / "base")
    for i, name in enumerate(NAMES):
        source(i).save_pretrained(path / name)
    recipe = {
        "base_model": str(path / "base"),
        # Weights are of merging: what a source is as a class does not depend on one.
        "models": [
            {"model": str(path / name), "weight": 0.5 if name == "c" else 1.0} for name in NAMES
        ],
        "parameters": {"k": 3},
        "policies": [{"match": "pooler.*", "policy": "base"}],
        "store": str(path / "store"),
        "out": str(path / "merged"),
    }
    (path / "merge.yml").write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def split(library):
    return workflow.split(load_kind_recipe(library / "merge.yml"), address="none")


def recombined(library, **wanted):
    recipe = {"library": str(library / "merge.yml"), "recombine": wanted}
    return workflow.recombine(parse_kind_recipe(recipe))


def features(path, *, name=None):
    model = folder.read(Folder.at(path))
    module = folder.load(model)
    with torch.no_grad(), gated(module, name or model.blueprint.gate.classes[0]):
        return folder.called(module, model.example)


@torch.no_grad()
def expected(path, model):
    inputs = folder.read(Folder.at(path)).example["argument0"]
    return model(inputs).last_hidden_state.mean(dim=1)


def test_what_all_share_becomes_one_learngene_a_matrix_and_the_store_verifies(library, split):
    assert split.num_layers == split.num_learngenes == 6
    assert verify(Folder.at(library / "store")) == []
    assert sum("its weight does not count" in note for note in split.notes) == 1


def test_recombined_for_one_source_the_library_is_that_source(library, split):
    for i, name in enumerate(NAMES):
        result = recombined(library, classes=[name], out=str(library / f"one-{name}"))
        assert not result.gated
        assert result.max_difference <= 1e-5
        found = features(library / f"one-{name}")
        torch.testing.assert_close(found, expected(library / f"one-{name}", source(i)))


def test_recombined_for_two_sources_it_is_gated_by_source_and_smaller(library, split):
    result = recombined(library, classes=["a", "c"], out=str(library / "two"))
    assert result.gated
    assert result.max_difference <= 1e-5
    assert result.recombined.flops < result.full.flops
    # Vectors are not gated: they are both sources' mean.
    means = source(0)
    for name, parameter in means.named_parameters():
        if parameter.dim() == 1:
            with torch.no_grad():
                parameter += 0.01
        del name
    torch.testing.assert_close(
        features(library / "two", name="a"), expected(library / "two", means)
    )


def test_sources_together_are_the_average_of_their_differences(library, split):
    out = library / "together"
    recombined(library, classes=["a", "b"], together=True, out=str(out))
    mean = source(0)
    other = dict(source(1).named_parameters())
    with torch.no_grad():
        for name, parameter in mean.named_parameters():
            parameter.copy_((parameter + other[name]) / 2)
    torch.testing.assert_close(features(out), expected(out, mean))


def test_an_unknown_source_and_a_library_that_was_not_split_are_told(library, split, tmp_path):
    with pytest.raises(RecipeError, match="'z': unknown to the gate"):
        recombined(library, classes=["z"], out=str(tmp_path / "out"))
    recipe = yaml.safe_load((library / "merge.yml").read_text()) | {"store": str(tmp_path / "s")}
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(StoreError, match="kind split"):
        recombined(tmp_path, classes=["a"], out=str(tmp_path / "out"))
