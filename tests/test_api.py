"""The Python interface: its names, and what a store gives to read."""

import inspect
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from merging import Bench, micro_bench, numbers
from test_readme import README

import svdmerge

STORE = {
    "components": "(self, source, parameter, *, indices=None)",
    "folder": "",
    "runs": "(self)",
    "selection": "(self, run)",
    "sources": "(self)",
    "spectra": "(self, source=None)",
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    made = micro_bench(tmp_path_factory.mktemp("api"))
    svdmerge.run(made.recipe(), address="none")
    return made


@pytest.fixture(scope="module")
def store(bench: Bench) -> svdmerge.Store:
    return svdmerge.Store(bench.store)


def test_names_and_signatures_are_held() -> None:
    assert sorted(svdmerge.__all__) == [
        "Planned", "Ran", "Recipe", "Store", "SvdmergeError", "load_recipe", "plan", "run", "tune",
    ]  # fmt: skip
    found = {
        name: "" if inspect.ismemberdescriptor(made) else bare(made)
        for name, made in vars(svdmerge.Store).items()
        if not name.startswith("_")
    }
    assert found == STORE
    for name in ("run", "tune"):
        told = bare(getattr(svdmerge, name))
        assert told.startswith("(recipe, *, address='local', progress=")
    assert bare(svdmerge.plan) == "(recipe)"
    with pytest.raises(AttributeError, match="no attribute 'merge'"):
        svdmerge.merge  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def bare(function: object) -> str:
    """A signature without annotations."""
    signature = inspect.signature(function)  # type: ignore[arg-type]
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


def test_importing_it_is_light() -> None:
    program = (
        "import sys, svdmerge; svdmerge.load_recipe; dir(svdmerge)\n"
        "assert not {'torch', 'ray', 'pyarrow', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_results_show_themselves(bench: Bench, store: svdmerge.Store) -> None:
    planned = svdmerge.plan(bench.write_recipe())
    assert "a.weight" in str(planned)
    assert planned._repr_html_().startswith("<pre>")
    again = svdmerge.run(bench.recipe(), address="none")
    assert again.report.status == "unchanged"
    assert str(bench.out) in str(again)
    assert "source-1" in str(store)
    assert repr(store).endswith("3 sources")


def test_markup_in_a_name_is_text_in_a_notebook(bench: Bench) -> None:
    report = svdmerge.run(bench.recipe(), address="none").report
    report.kept = {"<script>alert(1)</script>": 1, "n" * 300: 2}
    told = svdmerge.Ran(report)._repr_html_()
    assert "<script>" not in told
    assert "&lt;script&gt;" in told


def test_spectra_are_the_singular_values_of_the_differences(
    bench: Bench, store: svdmerge.Store
) -> None:
    table = store.spectra("source-1").to_pylist()
    got = [row["s"] for row in table if row["parameter"] == "a.weight"]
    assert [row["index"] for row in table if row["parameter"] == "a.weight"] == list(
        range(len(got))
    )
    delta = numbers(bench.sources[0])["a.weight"] - numbers(bench.base)["a.weight"]
    expected = np.linalg.svd(delta, compute_uv=False)[: len(got)]
    assert np.allclose(got, expected, rtol=1e-5)
    assert {row["model"] for row in store.spectra().to_pylist()} == {str(s) for s in bench.sources}


def test_components_are_tensors_that_add_up(bench: Bench, store: svdmerge.Store) -> None:
    found = store.components("source-2", "a.weight", indices=[0, 2])
    assert found.u.shape == (24, 2)
    assert found.vh.shape == (2, 18)
    whole = store.components("source-2", "a.weight")
    delta = torch.from_numpy(
        numbers(bench.sources[1])["a.weight"] - numbers(bench.base)["a.weight"]
    )
    left = float(torch.linalg.matrix_norm(delta - whole.dense(), ord=2))
    # Values may be listed that have no vectors yet: the next of them is what is left.
    rows = [r for r in store.spectra("source-2").to_pylist() if r["parameter"] == "a.weight"]
    assert left == pytest.approx(rows[len(whole)]["s"], rel=1e-4)


def test_a_runs_selection_is_a_table(bench: Bench, store: svdmerge.Store) -> None:
    (name,) = store.runs()
    assert name == bench.plan().hash
    table = store.selection(name)
    sources = set(store.sources().column("source").to_pylist())
    assert set(table.column("source").to_pylist()) <= sources


def test_what_is_not_there_is_said(bench: Bench, store: svdmerge.Store) -> None:
    for ask in (
        lambda: store.spectra("source-9"),
        lambda: store.components("source-1", "c.weight"),
        lambda: store.components("source-1", "a.weight", indices=[99]),
        lambda: store.selection("0"),
        lambda: svdmerge.Store(bench.root / "nowhere"),
    ):
        with pytest.raises(svdmerge.SvdmergeError):
            ask()


def test_the_readmes_example_runs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    monkeypatch.chdir(bench.root)
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(code.splitlines()) <= 5
    exec(code.replace("svdmerge-store", "store"), {})
    assert (bench.root / "spectra.png").stat().st_size > 0
