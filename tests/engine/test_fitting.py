"""Sources whose tensors are unlike the base's: refused, or merged as the recipe says, and told."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import Bench, command
from safetensors.torch import load_file, save_file
from tiny import write_model
from torch import Tensor

from svdmerge.engine.estimate import estimate
from svdmerge.errors import CheckpointError, MismatchError, RecipeError

Weights = dict[str, Tensor]
D = 10
TOKENS = ["[PAD]", "the", "cat", "sat", "on", "mat"]
# Padded: the base has more rows than tokens.
VOCAB = len(TOKENS) + 2


def weights(seed: int, *, start: Weights | None = None) -> Weights:
    """A model with a fused projection, embeddings, a head and integers; or a fine-tune of one."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "embed.weight": (VOCAB, D), "h.0.qkv.weight": (3 * D, D), "h.0.qkv.bias": (3 * D,),
        "h.1.qkv.weight": (3 * D, D), "h.1.qkv.bias": (3 * D,), "out.weight": (D, D),
        "lm_head.weight": (VOCAB, D),
    }  # fmt: skip
    made = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    if start is not None:
        made = {n: start[n] + 0.1 * t for n, t in made.items()}
    return {n: t.float() for n, t in made.items()} | {"position_ids": torch.arange(4)}


@pytest.fixture
def base() -> Weights:
    return weights(0)


def bench_of(root: Path, base: Weights, *sources: Weights) -> Bench:
    config = {"vocab_size": VOCAB}
    return Bench(
        root=root,
        base=write_model(root / "base", base, config),
        sources=tuple(write_model(root / f"s{i}", s, config) for i, s in enumerate(sources)),
    )


def averaged(bench: Bench, **changes: Any) -> Weights:
    """The output of a plain average, which tells every source's difference apart from rounding."""
    bench.run(merge_method="average", **changes)
    return load_file(bench.out / "model.safetensors")


def assert_mean(got: Tensor, *sources: Tensor) -> None:
    wanted = torch.stack([s.double() for s in sources]).mean(0)
    assert torch.allclose(got.double(), wanted, atol=1e-6)


def renamed(tensors: Weights, *, without: str = "", **changes: Tensor) -> Weights:
    return {n: t for n, t in tensors.items() if n != without} | changes


def everywhere(bench: Bench, **changes: Any) -> dict[str, dict[str, Any]]:
    """What is told of tensors unlike the base's, the same by the plan and in the stored report."""
    planned = json.loads(json.dumps(estimate(bench.plan(**changes)).to_json()))["unlike"]
    bench.run(**changes)
    (told,) = (bench.store / "runs").rglob("run.json")
    assert json.loads(told.read_text())["unlike"] == planned
    return planned


# --- missing, mismatched, extra ---


def test_a_tensor_that_is_missing_counts_as_the_bases_where_a_policy_says_so(
    tmp_path: Path, base: Weights
) -> None:
    one, two = weights(1, start=base), weights(2, start=base)
    bench = bench_of(tmp_path, base, renamed(one, without="out.weight"), two)
    with pytest.raises(MismatchError, match=r"s0: lacks out.weight") as caught:
        bench.plan()
    assert "missing: base" in str(caught.value)
    rules = {"policies": [{"match": "out.*", "missing": "base"}]}
    assert_mean(averaged(bench, **rules)["out.weight"], base["out.weight"], two["out.weight"])
    told = {s.reference: dict(s.unlike) for s in bench.plan(**rules).sources}
    assert told[str(bench.sources[1])] == {}


def test_a_large_missing_matrix_is_not_read_by_rows(tmp_path: Path, base: Weights) -> None:
    bench = bench_of(tmp_path, base, renamed(weights(1, start=base), without="out.weight"))
    changes = {"policies": [{"match": "*", "missing": "base"}, {"match": "h.*", "policy": "base"}]}
    report = bench.run(**changes, resources={"max_matrix": "256B"}, parameters={"k": 1})
    assert report.status == "done"
    assert torch.equal(load_file(bench.out / "model.safetensors")["out.weight"], base["out.weight"])


def test_a_tensor_of_another_shape_counts_as_the_bases_where_a_policy_says_so(
    tmp_path: Path, base: Weights
) -> None:
    one, two = weights(1, start=base), weights(2, start=base)
    bench = bench_of(tmp_path, base, one | {"out.weight": torch.ones(D, D + 1)}, two)
    with pytest.raises(MismatchError, match=r"out.weight is F32 \[10, 11\]") as caught:
        bench.plan()
    assert "mismatch: base" in str(caught.value)
    rules = {"policies": [{"match": "out.*", "mismatch": "base"}]}
    assert_mean(averaged(bench, **rules)["out.weight"], base["out.weight"], two["out.weight"])


def test_everything_unlike_is_told_by_plan_and_report_and_on_the_terminal(
    tmp_path: Path, base: Weights
) -> None:
    odd = renamed(
        weights(1, start=base), without="h.0.qkv.bias", **{"pooler.weight": base["out.weight"]}
    )
    odd |= {"out.weight": torch.ones(D, D + 1), "embed.weight": torch.ones(VOCAB + 3, D)}
    bench = bench_of(tmp_path, base, odd, weights(2, start=base))
    rules = {"policies": [{"match": "*", "missing": "base", "mismatch": "base"}]}
    assert everywhere(bench, **rules) == {
        str(bench.sources[0]): {
            "embed.weight": {
                "kind": "mismatch", "told": "F32 [11, 10] for F32 [8, 10]: the base's",
            },
            "h.0.qkv.bias": {"kind": "missing", "told": "the source lacks it: the base's"},
            "out.weight": {"kind": "mismatch", "told": "F32 [10, 11] for F32 [10, 10]: the base's"},
            "pooler.weight": {"kind": "extra", "told": "the base lacks it: left out"},
        }
    }  # fmt: skip
    done = command("plan", bench.write_recipe(**rules))
    shown = " ".join(done.stdout.split())
    for word in ("Unlike the base: ", "pooler.weight extra", "h.0.qkv.bias missing"):
        assert word in shown


def test_extra_tensors_are_left_out_or_refused(tmp_path: Path, base: Weights) -> None:
    bench = bench_of(tmp_path, base, weights(1, start=base) | {"score.weight": torch.ones(2, D)})
    assert [*bench.plan().sources[0].unlike] == ["score.weight"]
    refusing = [{"match": "*", "extra": "error"}]
    with pytest.raises(MismatchError, match=r"has score.weight\n.*extra: error"):
        bench.plan(policies=refusing)
    bench.plan(policies=[{"match": "score.*", "extra": "ignore"}, *refusing])


# --- ties and integers ---


def test_a_head_that_only_one_side_stores_is_the_bases(tmp_path: Path, base: Weights) -> None:
    """Tied: the files of one side lack it, those of the other hold it twice."""
    tied = renamed(base, without="lm_head.weight")
    for side, (start, source) in enumerate([(base, tied), (tied, base)]):
        own = weights(1, start=base)
        root = tmp_path / str(side)
        bench = bench_of(root, start, {n: own[n] for n in source})
        (unlike,) = everywhere(bench).values()
        assert {n: x["kind"] for n, x in unlike.items()} == {
            "lm_head.weight": ("missing", "extra")[side]
        }
        got = load_file(bench.out / "model.safetensors")
        assert got.keys() == start.keys()
        for name in start.keys() & {"lm_head.weight", "embed.weight"}:
            assert torch.equal(got[name], start[name])


def test_a_tied_head_is_merged_by_the_embeddings_it_is_declared_to_be(
    tmp_path: Path, base: Weights
) -> None:
    one, two = weights(1, start=base), weights(2, start=base)
    bench = bench_of(tmp_path, base, renamed(one, without="lm_head.weight"), two)
    rules = {"policies": [{"match": "lm_head.weight", "policy": "average"}]}
    with pytest.raises(MismatchError, match=r"lacks lm_head.weight"):
        bench.plan(**rules)
    first = {"model": str(bench.sources[0]), "tensors": {"lm_head.weight": "embed.weight"}}
    got = averaged(bench, **rules, models=[first, str(bench.sources[1])])
    assert_mean(got["lm_head.weight"], one["embed.weight"], two["lm_head.weight"])
    assert torch.equal(got["embed.weight"], base["embed.weight"])


def test_integers_that_a_source_does_not_store_are_the_bases(tmp_path: Path, base: Weights) -> None:
    bench = bench_of(tmp_path, base, renamed(weights(1, start=base), without="position_ids"))
    (unlike,) = everywhere(bench).values()
    assert unlike["position_ids"]["kind"] == "missing"
    assert torch.equal(
        load_file(bench.out / "model.safetensors")["position_ids"], base["position_ids"]
    )


# --- fused and split ---

FUSE = {
    f"h.*.qkv.{part}": [f"layers.*.{x}.{part}" for x in "qkv"] for part in ("weight", "bias")
}  # fmt: skip


def split(tensors: Weights) -> Weights:
    """The same model with q, k and v of their own, and layers named otherwise."""
    found = {n: t for n, t in tensors.items() if "qkv" not in n}
    for layer in range(2):
        for part in ("weight", "bias"):
            for i, x in enumerate("qkv"):
                rows = tensors[f"h.{layer}.qkv.{part}"][i * D : (i + 1) * D]
                found[f"layers.{layer}.{x}.{part}"] = rows.clone()
    return found


@pytest.mark.parametrize("method", ["axis", "average"])
def test_a_split_source_of_a_fused_base_merges_as_a_fused_one(
    tmp_path: Path, base: Weights, method: str
) -> None:
    one, two = weights(1, start=base), weights(2, start=base)
    bench = bench_of(tmp_path, base, one, two, split(one))
    plain = [str(s) for s in bench.sources[:2]]
    bench.run(merge_method=method, models=plain, parameters={})
    whole = load_file(bench.out / "model.safetensors")
    mapped = {"model": str(bench.sources[2]), "tensors": FUSE}
    report = bench.run(merge_method=method, models=[mapped, plain[1]], parameters={})
    got = load_file(bench.out / "model.safetensors")
    assert all(torch.equal(got[n], t) for n, t in whole.items())
    (unlike,) = report.unlike.values()
    assert unlike["h.1.qkv.bias"].told == (
        "put together of layers.1.q.bias, layers.1.k.bias, layers.1.v.bias"
    )
    assert len(unlike) == 4


def test_a_fused_source_of_a_split_base_merges_as_a_split_one(
    tmp_path: Path, base: Weights
) -> None:
    one, two = weights(1, start=base), weights(2, start=base)
    bench = bench_of(tmp_path, split(base), split(one), split(two), one)
    plain = [str(s) for s in bench.sources[:2]]
    bench.run(models=plain)
    whole = load_file(bench.out / "model.safetensors")
    rows = {"q": f"[:{D}]", "k": f"[{D}:{2 * D}]", "v": f"[{2 * D}:]"}
    tensors = {
        f"layers.*.{x}.{part}": f"h.*.qkv.{part}{r}"
        for x, r in rows.items()
        for part in ("weight", "bias")
    }
    mapped = {"model": str(bench.sources[2]), "tensors": tensors}
    report = bench.run(models=[mapped, plain[1]])
    got = load_file(bench.out / "model.safetensors")
    assert all(torch.equal(got[n], t) for n, t in whole.items())
    assert all(x.kind == "mapped" for x in report.unlike[str(bench.sources[2])].values())


def test_pieces_of_several_dtypes_are_read_in_one_that_holds_all(
    tmp_path: Path, base: Weights
) -> None:
    own = split(weights(1, start=base))
    own["layers.0.q.weight"] = own["layers.0.q.weight"].bfloat16()
    bench = bench_of(tmp_path, base, own)
    mapped = {"model": str(bench.sources[0]), "tensors": FUSE}
    got = averaged(bench, models=[mapped])["h.0.qkv.weight"]
    wanted = [own[f"layers.0.{x}.weight"].float() for x in "qkv"]
    assert torch.allclose(got, torch.cat(wanted), atol=1e-6)


@pytest.mark.parametrize(
    ("tensors", "kind", "told"),
    [
        ({"h.9.qkv.weight": "out.weight"}, RecipeError, "matches no tensor of the base"),
        ({"out.weight": "nowhere"}, MismatchError, "lacks nowhere"),
        ({"out.weight": "h.0.qkv.weight[25:31]"}, MismatchError, "has no rows 25:31"),
        ({"out.weight": "h.0.qkv.weight[3:3]"}, MismatchError, "has no rows 3:3"),
        ({"out.weight": ["out.weight", "h.0.qkv.bias"]}, MismatchError, "does not lie below"),
        ({"out.weight": ["position_ids"]}, MismatchError, r"out.weight is I64 [4]"),
        ({"out.weight": "h.0.qkv.weight[0:7]"}, MismatchError, "out.weight is F32 [7, 10]"),
    ],
)
def test_a_mapping_that_does_not_fit_is_told(
    tmp_path: Path, base: Weights, tensors: dict[str, Any], kind: type[Exception], told: str
) -> None:
    bench = bench_of(tmp_path, base, weights(1, start=base))
    with pytest.raises(kind) as caught:
        bench.plan(models=[{"model": str(bench.sources[0]), "tensors": tensors}])
    assert told in str(caught.value)
    assert str(bench.sources[0]) in str(caught.value)


def test_another_mapping_is_another_source_of_the_store(tmp_path: Path, base: Weights) -> None:
    bench = bench_of(tmp_path, base, split(weights(1, start=base)))
    swapped = {n: [given[i] for i in (1, 0, 2)] for n, given in FUSE.items()}
    plans = [
        bench.plan(models=[{"model": str(bench.sources[0]), "tensors": t}])
        for t in (FUSE, swapped, FUSE)
    ]
    revisions = [p.sources[0].revision for p in plans]
    assert revisions[0] == revisions[2] != revisions[1]


# --- vocabularies ---

MERGED = {"match": "embed.weight", "policy": "average", "mismatch": "tokens"}
# Of the source: other numbers, one token more, one fewer.
THEIRS = ["[PAD]", "cat", "the", "sat", "dog", "mat"]


def put_tokenizer(folder: Path, tokens: list[str], *, form: str = "tokenizer.json") -> None:
    numbers = {token: i for i, token in enumerate(tokens)}
    if form == "vocab.txt":
        text = "\n".join(tokens) + "\n"
    elif form == "vocab.json":
        text = json.dumps(numbers)
    elif form == "unigram":
        form, text = "tokenizer.json", json.dumps({"model": {"vocab": [[t, -1.0] for t in tokens]}})
    else:
        added = [{"id": numbers.pop(t), "content": t} for t in tokens[-1:]]
        text = json.dumps({"model": {"vocab": numbers}, "added_tokens": added})
    (folder / form).write_text(text)


def with_tokens(tmp_path: Path, base: Weights, *, rows: int, form: str = "tokenizer.json") -> Bench:
    own = weights(1, start=base)
    generator = torch.Generator().manual_seed(7)
    own["embed.weight"] = torch.randn(rows, D, generator=generator)
    bench = bench_of(tmp_path, base, own)
    put_tokenizer(bench.base, TOKENS)
    put_tokenizer(bench.sources[0], THEIRS, form=form)
    return bench


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json", "vocab.txt", "unigram"])
@pytest.mark.parametrize("rows", [len(THEIRS), VOCAB, VOCAB + 5])
def test_rows_of_common_tokens_are_merged_by_their_string(
    tmp_path: Path, base: Weights, rows: int, form: str
) -> None:
    bench = with_tokens(tmp_path, base, rows=rows, form=form)
    got = averaged(bench, policies=[MERGED])["embed.weight"]
    own = load_file(bench.sources[0] / "model.safetensors")["embed.weight"]
    for i, token in enumerate(TOKENS):
        there = token in THEIRS
        wanted = own[THEIRS.index(token)] if there else base["embed.weight"][i]
        assert torch.allclose(got[i], wanted, atol=1e-6), token
    # Padding is the base's, and so is the shape.
    assert torch.equal(got[len(TOKENS) :], base["embed.weight"][len(TOKENS) :])
    told = bench.plan(policies=[MERGED]).sources[0].unlike["embed.weight"].told
    assert told == f"5 of 8 rows by token, the others the base's; {rows - 5} of its {rows} left out"


def test_the_same_tokens_are_read_as_they_are(tmp_path: Path, base: Weights) -> None:
    bench = bench_of(tmp_path, base, weights(1, start=base))
    plain = bench.plan(policies=[MERGED | {"mismatch": "error"}]).sources[0]
    for folder in (bench.base, bench.sources[0]):
        put_tokenizer(folder, [*TOKENS, "a", "b"])
    same = bench.plan(policies=[MERGED]).sources[0]
    assert (same.revision, dict(same.unlike)) == (plain.revision, {})


def test_embeddings_of_another_vocabulary_stay_the_bases_and_sizes_are_told(
    tmp_path: Path, base: Weights
) -> None:
    bench = with_tokens(tmp_path, base, rows=30)
    unlike = bench.plan().sources[0].unlike["embed.weight"]
    assert unlike.told == "F32 [30, 10] for F32 [8, 10]: the base's"
    bench.run()
    got = load_file(bench.out / "model.safetensors")
    assert torch.equal(got["embed.weight"], base["embed.weight"])


def test_an_adapter_that_saved_embeddings_with_tokens_added_is_merged(
    tmp_path: Path, base: Weights
) -> None:
    bench = bench_of(tmp_path, base)
    own = torch.cat([base["embed.weight"][: len(TOKENS)] + 1.0, torch.ones(5, D)])
    pair = {"out.lora_A.weight": torch.ones(1, D), "out.lora_B.weight": torch.ones(D, 1)}
    (tmp_path / "lora").mkdir()
    save_file(pair | {"embed.weight": own}, tmp_path / "lora" / "adapter_model.safetensors")
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"r": 1, "lora_alpha": 1}))
    models = [str(tmp_path / "lora")]
    (unlike,) = everywhere(bench, models=models).values()
    assert unlike["embed.weight"]["told"] == "F32 [11, 10] for F32 [8, 10]: the base's"
    with pytest.raises(MismatchError, match=r"embed.weight is F32 \[11, 10\]"):
        bench.plan(models=models, policies=[{"match": "embed.weight", "policy": "average"}])
    put_tokenizer(bench.base, TOKENS)
    put_tokenizer(tmp_path / "lora", [*TOKENS, "<new>"])
    got = averaged(bench, models=models, policies=[MERGED])["embed.weight"]
    assert torch.allclose(got[: len(TOKENS)], own[: len(TOKENS)], atol=1e-6)
    assert torch.equal(got[len(TOKENS) :], base["embed.weight"][len(TOKENS) :])


def test_without_a_tokenizer_tokens_cannot_be_matched(tmp_path: Path, base: Weights) -> None:
    bench = with_tokens(tmp_path, base, rows=30)
    (bench.sources[0] / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        bench.plan(policies=[MERGED])


@pytest.mark.parametrize(
    "text", ["{", "[]", "3", '{"model": {}}', '{"model": {"vocab": {"a": "b"}}}', "{}"]
)
def test_a_tokenizer_that_is_none_is_told(tmp_path: Path, base: Weights, text: str) -> None:
    bench = with_tokens(tmp_path, base, rows=30)
    (bench.sources[0] / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match="no vocabulary") as caught:
        bench.plan(policies=[MERGED])
    assert "s0/tokenizer.json" in str(caught.value)


def test_tokens_do_not_bridge_another_width(tmp_path: Path, base: Weights) -> None:
    bench = bench_of(
        tmp_path, base, weights(1, start=base) | {"embed.weight": torch.ones(VOCAB, D + 1)}
    )
    for folder in (bench.base, bench.sources[0]):
        put_tokenizer(folder, TOKENS)
    with pytest.raises(MismatchError, match=r"embed.weight is F32 \[8, 11\]"):
        bench.plan(policies=[MERGED])
