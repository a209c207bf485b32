"""mergekit's recipes: the same numbers where they can be had, and a word where not."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from svdmerge.errors import RecipeError
from svdmerge.mergekit import import_mergekit
from svdmerge.recipe import load_recipe

TIES = """
merge_method: ties
base_model: org/base
models:
  - model: org/base
  - {model: org/math, parameters: {weight: 0.5, density: 0.3}}
  - {model: org/code+org/lora, parameters: {weight: 0.5, density: 0.3}}
parameters: {normalize: true, int8_mask: true, density: 0.3, lambda: 1.5}
dtype: bfloat16
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mergekit.yml"
    path.write_text(text)
    return path


def linear(**fields: Any) -> str:
    models = [{"model": m, "parameters": {"weight": w}} for m, w in (("a", 3.0), ("b", 1.0))]
    return yaml.safe_dump({"merge_method": "linear", "models": models} | fields)


def test_ties_is_taken_over(tmp_path: Path) -> None:
    text = TIES.replace("  - model: org/base\n", "").replace("density: 0.3, lambda", "lambda")
    found = import_mergekit(written(tmp_path, text))
    assert found.recipe == {
        "merge_method": "ties",
        "base_model": "org/base",
        "models": ["org/math", "org/code+org/lora"],  # divided by the sum of equal weights
        "parameters": {"density": 0.3, "scale": 1.5},
        "out_dtype": "bfloat16",
    }
    assert any(line.startswith("dtype") for line in found.unexpressed)


def test_the_base_among_the_models_is_no_source(tmp_path: Path) -> None:
    found = import_mergekit(written(tmp_path, TIES))
    assert found.recipe["models"] == ["org/math", "org/code+org/lora"]


def test_a_linear_merge_has_the_weights_that_give_its_result(tmp_path: Path) -> None:
    found = import_mergekit(written(tmp_path, linear()), base="a-base")
    # (3 A + B) / 4 = base + mean of 1.5 (A - base) and 0.5 (B - base).
    assert found.recipe["models"] == [
        {"model": "a", "weight": 1.5},
        {"model": "b", "weight": 0.5},
    ]


def test_a_linear_merge_that_scales_the_base_is_refused(tmp_path: Path) -> None:
    # 3 A + B = 4 base + 3 (A - base) + (B - base).
    with pytest.raises(RecipeError, match="add up to 4"):
        import_mergekit(written(tmp_path, linear(parameters={"normalize": False})), base="x")


def test_weights_of_ties_count_as_shares_and_those_of_a_sum_as_they_are(tmp_path: Path) -> None:
    text = linear(merge_method="ties", base_model="x")
    assert [m["weight"] for m in import_mergekit(written(tmp_path, text)).recipe["models"]] == [
        1.5,
        0.5,
    ]
    text = linear(merge_method="ties", base_model="x", parameters={"normalize": False})
    assert import_mergekit(written(tmp_path, text)).recipe["models"][0]["weight"] == 3.0
    text = linear(merge_method="task_arithmetic", base_model="x")
    assert import_mergekit(written(tmp_path, text)).recipe["models"][0]["weight"] == 3.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parameters": {"weight": "abc"}}, "weight is 'abc'"),
        ({"parameters": {"weight": [1, 2]}}, "weight differs by layer"),
        ({"parameters": {"lambda": {"a": 1}}}, "lambda differs by layer"),
        ({"models": ["a", "a"]}, "lists a twice"),
        ({"merge_method": "linear", "parameters": {"weight": 0}}, "add up to 0"),
    ],
)
def test_a_wrong_value_is_told(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    text = {"merge_method": "ties", "base_model": "x", "models": ["a", "b"]} | fields
    with pytest.raises(RecipeError, match=message):
        import_mergekit(written(tmp_path, yaml.safe_dump(text)))


def test_what_is_not_taken_over_is_said(tmp_path: Path) -> None:
    models = [{"model": "a", "parameters": {"lambda": 2.0}}, "b"]
    given = {"merge_method": "dare_linear", "base_model": "x", "models": models}
    given |= {"parameters": {"density": 0.5, "rescale": False}, "dtype": "float64"}
    found = import_mergekit(written(tmp_path, yaml.safe_dump(given | {"x\nout: y": 1})))
    told = [line.split(":")[0] for line in found.unexpressed]
    assert {"a", "parameters", "out_dtype", "x\nout"} <= {*told}
    assert "out" not in yaml.safe_load(found.to_yaml())


def test_the_base_counts_in_a_linear_merge(tmp_path: Path) -> None:
    found = import_mergekit(written(tmp_path, linear(base_model="a")))
    # (3 base + B) / 4 = base + a quarter of (B - base).
    assert found.recipe["models"] == [{"model": "b", "weight": 0.25}]


def test_what_is_written_is_a_recipe(tmp_path: Path) -> None:
    text = import_mergekit(written(tmp_path, TIES)).to_yaml()
    assert text.startswith("# not expressed: ")
    path = tmp_path / "recipe.yml"
    path.write_text(text)
    assert load_recipe(path).parameters.scale == 1.5


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("merge_method: slerp\nmodels: [a, b]\n", "slerp cannot be expressed"),
        ("merge_method: dare_ties\nmodels: [a]\n", "dare_ties cannot be expressed"),
        ("merge_method: linear\nslices: []\n", "slices"),
        ("merge_method: linear\nmodels: [a]\n", "names no base_model"),
        ("models: [a]\n", "names no merge_method"),
        ("[1, 2", "cannot be read"),
        (TIES.replace("density: 0.3}}", "density: 0.4}}", 1), "densities of 0.3, 0.4"),
        (TIES.replace("weight: 0.5,", "weight: [0, 1],", 1), "weight differs by layer"),
        (TIES.replace("weight: 0.5,", "weight: -1,", 1), "weight"),
        ("merge_method: ties\nbase_model: a\nmodels: [a]\n", "no source"),
    ],
)
def test_what_cannot_be_had_is_refused(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        import_mergekit(written(tmp_path, text))


def test_what_is_not_said_is_told(tmp_path: Path) -> None:
    text = TIES.replace("normalize: true", "normalize: false") + "tokenizer_source: union\nx: 1\n"
    told = import_mergekit(written(tmp_path, text)).unexpressed
    for start in ("weights of ties", "tokenizer_source", "embeddings", "x"):
        assert any(line.startswith(start) for line in told), start
