"""References: paths win, hub ids and adapters are told apart from them without asking anyone."""

from pathlib import Path

import pytest

from svdmerge.storage.model_ref import ModelRef, parse_reference, pinned


@pytest.mark.parametrize(
    ("text", "model", "adapter"),
    [
        ("s3://bucket/ft-math", "s3://bucket/ft-math", None),
        ("/models/base", "/models/base", None),
        ("./base", "./base", None),
        ("base.safetensors", "base.safetensors", None),
        ("org/base", "hf://org/base", None),
        ("org/base@v1.0", "hf://org/base@v1.0", None),
        ("org/base@refs/pr/3", "hf://org/base@refs%2Fpr%2F3", None),
        ("org/base+org/lora-code", "hf://org/base", "hf://org/lora-code"),
        ("org/base@main+s3://bucket/lora", "hf://org/base@main", "s3://bucket/lora"),
        ("./base+./adapter", "./base", "./adapter"),
        ("s3://bucket/base+org/lora@1f2e", "s3://bucket/base", "hf://org/lora@1f2e"),
        ("org/base/file", "org/base/file", None),
        ("org/base+", "org/base+", None),
        ("~nouser-of-this-name/x", "~nouser-of-this-name/x", None),
    ],
)
def test_a_reference_names_a_model_and_perhaps_an_adapter(
    text: str, model: str, adapter: str | None
) -> None:
    assert parse_reference(text) == ModelRef(model=model, adapter=adapter)


@pytest.mark.parametrize("name", ["org/base", "org/base@main", "a+b", "org/x+org/y"])
def test_a_path_that_exists_is_that_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir(parents=True)
    assert parse_reference(name) == ModelRef(model=name)


def test_only_places_of_the_hub_need_a_revision() -> None:
    assert pinned("s3://bucket/model") == "s3://bucket/model"
    assert pinned("/models/base") == "/models/base"
