from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svdmerge.core.params import Policy
from svdmerge.errors import RecipeError
from svdmerge.recipe import (
    Recipe,
    TuneConfig,
    load_recipe,
    parse_bytes,
    parse_recipe,
    parse_rows,
)  # fmt: skip

LEAST: dict[str, Any] = {"base_model": "base", "models": ["one", "two"]}
TUNE = {"train": "train.parquet", "test": "test.parquet"}


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(raw)
    return str(caught.value)


def with_k(k: object) -> dict[str, Any]:
    return LEAST | {"parameters": {"k": k}}


# --- unknown keys ---


@pytest.mark.parametrize(
    ("raw", "place", "near"),
    [
        ({"basemodel": "b"}, "basemodel", "base_model"),
        ({"merge_metod": "axis"}, "merge_metod", "merge_method"),
        ({"parameters": {"salence": "sigma"}}, "parameters.salence", "salience"),
        ({"resources": {"treads": 1}}, "resources.treads", "threads"),
        ({"models": [{"model": "a", "wieght": 1}]}, "models.0.wieght", "weight"),
        (
            {"policies": [{"match": "*", "policy": "base", "polcy": 1}]},
            "policies.0.polcy",
            "policy",
        ),
        ({"tune": TUNE | {"epoch": 3}}, "tune.epoch", "epochs"),
    ],
)
def test_an_unknown_key_is_refused_with_its_place_and_the_nearest_known_one(
    raw: dict[str, Any], place: str, near: str
) -> None:
    text = refusal(LEAST | raw)
    assert f"{place}: unknown key" in text
    assert f"`{near}`" in text


def test_an_unknown_key_without_a_near_one_is_refused_with_the_known_ones() -> None:
    text = refusal(LEAST | {"parameters": {"zzzzzz": 1}})
    assert "parameters.zzzzzz: unknown key" in text
    assert all(key in text for key in ("k", "salience", "scope", "scale"))


def test_every_fault_is_told_at_once() -> None:
    text = refusal(LEAST | {"merge_method": "magic", "oout": "x", "parameters": {"scale": 0}})
    assert all(place in text for place in ("merge_method", "oout", "parameters.scale"))


# --- the budget ---


@pytest.mark.parametrize(
    ("given_k", "expected"),
    [
        ("10%", 0.1),
        ("100%", 1.0),
        (" 12.5 % ", 0.125),
        ("0.1", 0.1),
        (0.25, 0.25),
        (1.0, 1.0),
        (1, 1),
        (38, 38),
        ("38", 38),
    ],
)
def test_a_share_is_a_float_and_a_count_an_integer(given_k: object, expected: float) -> None:
    k = parse_recipe(with_k(given_k)).parameters.k
    assert k == pytest.approx(expected, rel=1e-15)
    assert type(k) is type(expected)


NO_BUDGETS: list[object] = [0, 0.0, "0", "0%", -1, -0.1, "-5%", 1.5, "101%", "150 %"]
NO_BUDGETS += ["abc", "", "%", "ten", "1_0", "nan", "inf%", True, False, None, [], {}]
NO_BUDGETS += [float("nan"), float("inf")]


@pytest.mark.parametrize("k", NO_BUDGETS)
def test_a_budget_that_is_no_share_and_no_count_is_refused_by_name(k: object) -> None:
    assert "parameters.k" in refusal(with_k(k))


@given(st.floats(min_value=0.01, max_value=100))
def test_percent_and_share_are_the_same_budget(percent: float) -> None:
    one = parse_recipe(with_k(f"{percent:.17f}%"))
    other = parse_recipe(with_k(percent / 100))
    assert one.parameters.k == pytest.approx(other.parameters.k, rel=1e-12)


# --- sizes ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2GiB", 2 << 30),
        ("500MB", 500_000_000),
        ("1.5KiB", 1536),
        ("4TiB", 4 << 40),
        ("1TB", 10**12),
        (" 7 KB ", 7000),
        ("12B", 12),
        ("12", 12),
        (12, 12),
    ],
)
def test_a_size_is_bytes(text: object, expected: int) -> None:
    assert parse_bytes(text) == expected
    recipe = parse_recipe(LEAST | {"resources": {"memory": text}})
    assert recipe.resources.memory == expected


@pytest.mark.parametrize("size", [0, -1, "0GiB", "-2GiB", "2Gi", "GiB", "2 gigs", "1..5GiB", ""])
def test_a_size_that_is_none_is_refused_by_name(size: object) -> None:
    assert "resources.memory" in refusal(LEAST | {"resources": {"memory": size}})
    assert "max_shard_size" in refusal(LEAST | {"max_shard_size": size})


# --- models ---


def test_a_model_may_be_a_name_or_a_mapping() -> None:
    recipe = parse_recipe(LEAST | {"models": ["one", {"model": "two", "weight": 0.5}]})
    assert [(m.model, m.weight) for m in recipe.models] == [("one", 1.0), ("two", 0.5)]


@pytest.mark.parametrize("weight", [0, -1, 0.0, float("nan"), float("inf"), "heavy"])
def test_a_weight_that_is_not_above_zero_and_finite_is_refused(weight: object) -> None:
    text = refusal(LEAST | {"models": [{"model": "one", "weight": weight}]})
    assert "models.0.weight" in text


@pytest.mark.parametrize("models", [[], "one", None, [""], [3], [{"weight": 1.0}], [["one"]]])
def test_models_that_name_none_are_refused(models: object) -> None:
    assert "models" in refusal(LEAST | {"models": models})


@pytest.mark.parametrize("missing", ["base_model", "models"])
def test_what_has_no_default_is_asked_for(missing: str) -> None:
    assert missing in refusal({key: value for key, value in LEAST.items() if key != missing})


# --- policies and the rest ---


def test_policies_keep_their_order() -> None:
    rules = [{"match": "a.*", "policy": "base"}, {"match": "*", "policy": "error"}]
    recipe = parse_recipe(LEAST | {"policies": rules})
    assert recipe.rules == (
        Policy(match="a.*", policy="base"),
        Policy(match="*", policy="error"),
    )


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ({}, "expected `policy`, `missing`, `mismatch` or `extra`"),
        ({"policy": None}, "expected `policy`"),
        ({"missing": "skip"}, "policies.0.missing"),
        ({"mismatch": "crop"}, "policies.0.mismatch"),
        ({"extra": "keep"}, "policies.0.extra"),
    ],
)
def test_a_policy_says_something_known(rule: dict[str, Any], told: str) -> None:
    assert told in refusal(LEAST | {"policies": [{"match": "*", **rule}]})


def test_the_first_policy_that_says_so_rules() -> None:
    rules = [
        {"match": "a.*", "policy": "base"},
        {"match": "a.b", "missing": "error"},
        {"match": "*", "missing": "base", "extra": "error"},
    ]
    recipe = parse_recipe(LEAST | {"policies": rules})
    assert [recipe.ruling("missing", n) for n in ("a.b", "a.c")] == ["error", "base"]
    assert recipe.ruling("mismatch", "a.b") is None
    assert recipe.rules == (Policy(match="a.*", policy="base"),)
    assert recipe.dump()["policies"] == rules


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"h.*.qkv": ["h.*.q", "h.0.k"]}, "h.0.k"),
        ({"a": []}, "expected tensors of the source"),
        ({"a": 3}, "models.0"),
        ({"a": {"b": 1}}, "models.0"),
    ],
)
def test_a_mapping_that_cannot_be_followed_is_refused(tensors: object, told: str) -> None:
    assert told in refusal(LEAST | {"models": [{"model": "m", "tensors": tensors}]})


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("a.w", ("a.w", 0, None)),
        ("a.w[2:5]", ("a.w", 2, 5)),
        ("a.w[2:]", ("a.w", 2, None)),
        ("a.w[:5]", ("a.w", 0, 5)),
        ("experts.w[0]", ("experts.w[0]", 0, None)),
    ],
)
def test_rows_of_a_tensor_are_read_from_its_name(
    text: str, rows: tuple[str, int, int | None]
) -> None:
    found = parse_rows(text)
    assert (found.tensor, found.first, found.stop) == rows


@pytest.mark.parametrize("policy", ["keep", "", "equal"])
def test_an_unknown_policy_is_refused(policy: object) -> None:
    text = refusal(LEAST | {"policies": [{"match": "*", "policy": policy}]})
    assert "policies.0.policy" in text


@pytest.mark.parametrize("scale", [0, -0.5, float("inf"), float("nan")])
def test_a_scale_that_is_not_above_zero_and_finite_is_refused(scale: float) -> None:
    assert "parameters.scale" in refusal(LEAST | {"parameters": {"scale": scale}})


def test_a_recipe_cannot_be_changed_after_it_was_checked() -> None:
    recipe = parse_recipe(LEAST)
    with pytest.raises(ValueError, match="frozen"):
        recipe.out = "elsewhere"  # pyright: ignore[reportAttributeAccessIssue]


# --- files ---


def file_refusal(path: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return str(caught.value)


def test_a_recipe_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text("base_model: b\nmodels:\n  - one\nparameters: {k: 10%}\n")
    assert load_recipe(path) == parse_recipe(
        {"base_model": "b", "models": ["one"], "parameters": {"k": 0.1}}
    )


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "none.yml") in file_refusal(tmp_path / "none.yml")


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    assert str(tmp_path) in file_refusal(tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        b"base_model: [unclosed",
        b"a: b: c",
        b"\t- tab",
        b"\xff\xfe\x00bad",
        b"!!python/object/apply:os.system ['true']",
        b"when: 2024-99-99",
        b"[" * 5000,
    ],
    ids=["unclosed", "nested", "tab", "not utf-8", "object", "impossible date", "too deep"],
)
def test_what_is_no_yaml_is_refused_with_the_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "recipe.yml"
    path.write_bytes(data)
    assert str(path) in file_refusal(path)


@pytest.mark.parametrize("text", ["", "- one\n- two", "just words", "42", "null"])
def test_yaml_that_is_no_mapping_is_refused_with_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(text)
    assert str(path) in file_refusal(path)


def test_a_key_that_is_no_string_is_refused() -> None:
    assert "1" in refusal(LEAST | {1: 2})  # pyright: ignore[reportOperatorIssue]


# --- the whole recipe back and forth ---


def recipes() -> st.SearchStrategy[dict[str, Any]]:
    name = st.text("abc/-@+:. é", min_size=1, max_size=12)
    weight = st.floats(1e-6, 1e6)
    model = st.one_of(name, st.fixed_dictionaries({"model": name, "weight": weight}))
    policy = st.fixed_dictionaries(
        {"match": name, "policy": st.sampled_from(["base", "average", "decompose", "error"])}
    )
    parameters = st.fixed_dictionaries(
        {},
        optional={
            "k": st.one_of(st.integers(1, 10**6), st.floats(1e-6, 1.0)),
            "salience": st.sampled_from(["sigma", "relative"]),
            "scale": weight,
            "svd": st.sampled_from(["adaptive", "exact"]),
        },
    )
    return st.fixed_dictionaries(
        {"base_model": name, "models": st.lists(model, min_size=1, max_size=4)},
        optional={
            "parameters": parameters,
            "policies": st.lists(policy, max_size=3),
            "store": name,
            "out": name,
            "max_shard_size": st.one_of(st.just("base"), st.integers(1, 10**13)),
            "resources": st.fixed_dictionaries({"memory": st.integers(1, 10**13)}),
            "tune": st.just(TUNE),
        },
    )


@given(recipes())
def test_a_dumped_recipe_is_the_same_recipe(raw: dict[str, Any]) -> None:
    import yaml

    recipe = parse_recipe(raw)
    again = parse_recipe(yaml.safe_load(recipe.dump_yaml()))
    assert again == recipe
    assert again.numeric_digest() == recipe.numeric_digest()


# --- many targets ---

SHARED = {"train": "data/{name}-train.parquet", "test": "data/{name}-test.parquet", "epochs": 3}


def targets(*listed: Any, **shared: Any) -> list[TuneConfig]:
    config = parse_recipe(LEAST | {"tune": SHARED | shared | {"targets": list(listed)}}).tune
    assert config is not None
    return [config.of(target) for target in config.targets]


def test_targets_share_the_section_and_differ_in_what_they_say() -> None:
    mr, cr = targets("mr", {"name": "cr", "epochs": 5, "test": "elsewhere.parquet"})
    assert (mr.train, mr.test, mr.epochs) == ("data/mr-train.parquet", "data/mr-test.parquet", 3)
    assert (cr.train, cr.test, cr.epochs) == ("data/cr-train.parquet", "elsewhere.parquet", 5)


def test_a_target_saves_its_adapter_alone_unless_told_and_one_target_the_model_too() -> None:
    assert [t.saved for t in targets("mr", {"name": "cr", "save": ["peft"]})] == [
        ("adapter",),
        ("peft",),
    ]
    assert targets("mr", save=["model"])[0].saved == ("model",)
    one = parse_recipe(LEAST | {"tune": TUNE}).tune
    assert one is not None
    assert one.saved == ("adapter", "model")


def test_each_target_has_its_own_folder() -> None:
    assert [t.out for t in targets("mr", out="all")] == ["all/mr"]
    assert [t.out for t in targets("mr", out="all/x-{name}")] == ["all/x-mr"]
    assert [t.out for t in targets("mr")] == [None]


def test_targets_survive_being_dumped() -> None:
    import yaml

    recipe = parse_recipe(
        LEAST | {"tune": SHARED | {"targets": ["mr", {"name": "cr", "epochs": 5}]}}
    )
    again = parse_recipe(yaml.safe_load(recipe.dump_yaml()))
    assert again == recipe
    assert recipe.tune is not None
    assert again.tune is not None
    both = (recipe.tune, again.tune)
    assert len({str([config.of(t) for t in config.targets]) for config in both}) == 1


@pytest.mark.parametrize(
    ("tune", "told"),
    [
        (SHARED | {"targets": ["mr", "mr"]}, "mr: two targets have this name"),
        (SHARED | {"targets": ["../mr"]}, "targets.0.name"),
        (SHARED | {"targets": [{"epochs": 3}]}, "targets.0.name: Field required"),
        (SHARED | {"targets": [{"name": "mr", "epoch": 3}]}, "mr: tune.epoch: unknown key; the"),
        (SHARED | {"targets": [{"name": "mr", "epochs": 0}]}, "mr: tune.epochs: "),
        (SHARED | {"targets": ["mr"], "num_workers": 2}, "mr: each is tuned in one process"),
        ({"test": "t", "targets": ["mr"]}, "mr: tune: train: Field required"),
        ({"test": "t"}, "tune: train: Field required"),
        (TUNE | {"save": []}, "tune.save"),
        (TUNE | {"save": ["modle"]}, "tune.save.0"),
    ],
)
def test_faulty_targets_are_told(tune: dict[str, Any], told: str) -> None:
    assert told in refusal(LEAST | {"tune": tune})


@pytest.mark.parametrize("num_workers", [1, (1, 1)])
def test_one_process_has_nobody_to_share_weights_with(num_workers: Any) -> None:
    tune = TUNE | {"shard": True}
    assert "tune: shard: one process" in refusal(
        LEAST | {"tune": tune | {"num_workers": num_workers}}
    )
    assert parse_recipe(LEAST | {"tune": tune | {"num_workers": (1, 2)}}).tune is not None


def test_a_merge_for_one_target_is_not_tuned_for_many() -> None:
    raw = LEAST | {"parameters": {"scale": "auto"}, "tune": SHARED | {"targets": ["mr"]}}
    assert "merge for one target" in refusal(raw)


# --- the digest ---


@pytest.mark.parametrize(
    "change",
    [
        {"models": ["two", "one"]},
        {"models": ["three"]},
        {"base_model": "another"},
        {"out": "elsewhere"},
        {"store": "s3://bucket/store"},
        {"resources": {"memory": "9GiB"}},
        {"tune": TUNE},
        {"merge_method": "axis"},
        {"parameters": {"k": "10%", "scale": 1}},
    ],
)
def test_places_order_and_defaults_do_not_change_the_digest(change: dict[str, Any]) -> None:
    assert parse_recipe(LEAST | change).numeric_digest() == parse_recipe(LEAST).numeric_digest()


def test_everything_that_numbers_depend_on_changes_the_digest() -> None:
    rule = {"match": "*.gate.*", "policy": "base"}
    other = {"match": "*.up.*", "policy": "base"}
    changes: list[dict[str, Any]] = [
        {},
        {"parameters": {"k": 0.2}},
        {"parameters": {"k": 1}},
        {"parameters": {"k": 1.0}},
        {"parameters": {"salience": "relative"}},
        {"parameters": {"scale": 0.5}},
        {"parameters": {"svd": "exact"}},
        {"policies": [rule]},
        {"policies": [rule, other]},
        {"policies": [other, rule]},
        {"merge_method": "average"},
        {"out_dtype": "bfloat16"},
        {"resources": {"threads": 2}},
    ]
    digests = [parse_recipe(LEAST | change).numeric_digest() for change in changes]
    assert len(set(digests)) == len(changes)


def test_the_digest_is_stable_from_one_process_to_the_next() -> None:
    # Stored runs are found again by it: changing it on purpose is a change of this line.
    digest = Recipe(base_model="b", models=("m",)).numeric_digest()  # pyright: ignore[reportArgumentType]
    assert len(digest) == 64
    assert digest == parse_recipe({"base_model": "x", "models": ["y"]}).numeric_digest()
