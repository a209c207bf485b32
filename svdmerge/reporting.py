"""The report of an output, gathered: its own files, the store's records and values, the run's."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import yaml

from svdmerge.core.params import Action
from svdmerge.described import summary_of
from svdmerge.engine.account import MatrixAccount, account
from svdmerge.engine.assemble import FACTORS
from svdmerge.engine.notices import notices
from svdmerge.engine.plan import Plan, make_plan
from svdmerge.engine.whatif import whatif
from svdmerge.errors import OutputError, SvdmergeError
from svdmerge.recipe import Recipe, parse_recipe
from svdmerge.report.card import illustrated
from svdmerge.report.contents import Contents, Inflation, MergedMatrix, MergedSource, Overlap
from svdmerge.report.figures import as_png, figures
from svdmerge.report.licence import combined
from svdmerge.report.page import captions, page
from svdmerge.storage import layout
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.hf_model import PROVENANCE, RECIPE, load_factors, put_file
from svdmerge.storage.layout import MANIFEST
from svdmerge.storage.output import Manifest, read_manifest

if TYPE_CHECKING:
    from svdmerge.report.run_report import RunReport

T = TypeVar("T")
PAGE = "report.html"
CARD = "README.md"
# Of the card: those that change only if the merge does, for its manifest holds no time.
PICTURES = "figures"
PICTURED = {
    "contributions": "Who contributed what",
    "spectra-0": "Spectra and where they were cut",
    "retained": "What is kept, and bounds on the rest",
    "overlap": "How alike the sources are",
    "inflation": "Where merging inflated singular values",
}
# Budgets of the what-if: shares of the rank, or powers of two up to the largest rank.
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
# Matrices of which vectors are read, spread over the model, and sources that are compared in pairs:
# a few seconds of reading and small SVDs however large the merge.
COMPARED_MATRICES, COMPARED_SOURCES = 6, 32
INFLATED_MATRICES = 64


def write_report(out: str) -> str:
    """The place of the page that was written into an output folder; its card gets pictures too.

    Raises:
        OutputError: it is no output of svdmerge.
    """
    folder = Folder.at(out)
    contents = gather(folder)
    if not contents.missing:
        _illustrate(folder, contents)
    folder.put(PAGE, page(contents).encode())
    return f"{folder.uri}/{PAGE}"


def _illustrate(out: Folder, contents: Contents) -> None:
    """Pictures beside the card, named in it and in the manifest, which goes last."""
    manifest, told = read_manifest(out), captions(contents)
    assert manifest is not None
    drawn = figures(contents)
    pictures = {
        f"{PICTURES}/{name}.png": (title, told[name.partition("-")[0]])
        for name, title in PICTURED.items()
        if name in drawn
    }
    card = illustrated(out.read(CARD).decode(), pictures=pictures).encode()
    written = [put_file(out, path, as_png(drawn[Path(path).stem])) for path in pictures]
    written.append(put_file(out, CARD, card))
    files = manifest.files | {f.file: {"size": f.size, "sha256": f.sha256} for f in written}
    out.put(MANIFEST, replace(manifest, files=dict(sorted(files.items()))).to_json())


def reported(report: "RunReport") -> "RunReport":
    """The report of a run, whose page is written; left as it is where nothing was done."""
    if report.stages or Folder.at(report.out).stat(PAGE) is None:
        try:
            write_report(report.out)
        except SvdmergeError as error:  # the merge is there, and whole
            report.warnings.append(f"{PAGE} was not written: {error.args[0]}")
    return report


def gather(out: Folder) -> Contents:
    """What the report of an output shows.

    What cannot be told any more, for a model or the store is gone, is missing by name.

    Raises:
        OutputError: it is no output of svdmerge.
    """
    manifest = read_manifest(out)
    if manifest is None:
        raise OutputError(
            f"{out.uri}: is no merged model of svdmerge", "It has no manifest.", "Check the path."
        )
    recipe = _recipe(out)
    run_folder = Folder.at(recipe.store).child(layout.run_path(manifest.plan_hash))
    run = _run_of(run_folder)
    names, counts, kept_in = _kept(out)
    licences = {str(s["model"]): s.get("licence") for s in manifest.sources}
    licence, why = combined({manifest.base: manifest.base_licence} | licences)
    kept = dict(zip(names, counts.sum(axis=1).tolist(), strict=True))
    sources = sorted(
        (
            MergedSource(
                name=str(s["model"]), revision=str(s["revision"]), weight=float(s["weight"]),
                licence=s.get("licence"), kept=kept.get(str(s["model"]), 0),
            )
            for s in manifest.sources
        ),
        key=lambda s: (-s.kept, s.name),
    )  # fmt: skip
    found: dict[str, Any] = {}
    missing: list[str] = []
    try:
        found = _from_store(_plan(recipe, manifest), [s.name for s in sources])
    except SvdmergeError as error:
        missing.append(f"spectra, bounds and other budgets ({error.args[0]})")
    row = {name: i for i, name in enumerate(names)}
    none = np.zeros(len(kept_in), np.int64)
    warnings = dict.fromkeys([*run.pop("warnings"), *found.pop("notices", [])])
    return Contents(
        title=out.name, base=manifest.base, base_revision=manifest.base_revision,
        base_licence=manifest.base_licence, licence=f"{licence}, {why}",
        version=manifest.svdmerge_version, plan_hash=manifest.plan_hash,
        summary=summary_of(recipe, num_sources=len(sources)), recipe_yaml=recipe.dump_yaml(),
        warnings=tuple(warnings), missing=tuple(missing),
        actions=_actions(manifest), sources=tuple(sources), kept_in=tuple(kept_in),
        kept_by=np.stack([counts[row[s.name]] if s.name in row else none for s in sources]),
        **run, **found,
    )  # fmt: skip


def _recipe(out: Folder) -> Recipe:
    try:
        raw = yaml.safe_load(out.read(RECIPE))
    except (FileNotFoundError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OutputError(
            f"{out.uri}/{RECIPE}: cannot be read ({type(error).__name__})",
            "It tells what was merged.",
            "Run the recipe again.",
        ) from None
    return parse_recipe(raw, origin=f"{out.uri}/{RECIPE}")


def _actions(manifest: Manifest) -> dict[str, int]:
    told = {
        Action.BASE: "kept as the base's", Action.EQUAL: "equal in all",
        Action.AVERAGE: "averaged", Action.DECOMPOSE: "decomposed",
    }  # fmt: skip
    found: dict[str, int] = {}
    for action in manifest.actions.values():
        name = told.get(Action(action), "merged whole")
        found[name] = found.get(name, 0) + 1
    return found


def _kept(out: Folder) -> tuple[list[str], np.ndarray, list[str]]:
    """Sources, counts of their kept components (sources, matrices), and the matrices in order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(pa.BufferReader(out.read(PROVENANCE)), columns=["parameter", "model"])
    model = table.column("model").combine_chunks().dictionary_encode()
    parameter = table.column("parameter").combine_chunks().dictionary_encode()
    names: list[str] = model.dictionary.to_pylist()
    matrices: list[str] = parameter.dictionary.to_pylist()
    counts = np.zeros((len(names), len(matrices)), np.int64)
    np.add.at(counts, (model.indices.to_numpy(), parameter.indices.to_numpy()), 1)
    # Averaged tensors are no components.
    components = [i for i, name in enumerate(matrices) if not name.endswith("#flat")]
    return names, counts[:, components], [matrices[i] for i in components]


def _run_of(run_folder: Folder) -> dict[str, Any]:
    """What the run's attempts report: of each stage the last that did it, and the last results."""
    found: dict[str, Any] = {"status": "unknown", "warnings": ()}
    stages: dict[str, Any] = {}
    tune: Any = None
    for path in sorted(p for p in run_folder.find("attempts") if p.endswith("run.json")):
        attempt = json.loads(run_folder.read(path))
        found |= {"status": attempt["status"], "warnings": attempt["warnings"]}
        stages |= {s["name"]: s for s in attempt["stages"]}
        found |= {n: attempt[n] for n in ("ranking", "adaptation") if attempt[n] is not None}
        tune = attempt["tune"] or tune
    targets = tune["targets"] if tune and "targets" in tune else [{"name": "", "result": tune}]
    tuned = tuple((t["name"], t["result"]) for t in targets if t["result"])
    failed = tuple((t["name"], t["error"]) for t in targets if tune and not t["result"])
    return found | {"stages": tuple(stages.values()), "tuned": tuned, "failed": failed}


def names_in(store: Folder) -> dict[str, str]:
    """Sources by revision, as the recipes call them that ran on a store."""
    found: dict[str, str] = {}
    for path in store.find("runs"):
        if path.endswith("/plan.json"):
            found |= {r: name for name, r in json.loads(store.read(path))["sources"].items()}
    return found


def _plan(recipe: Recipe, manifest: Manifest) -> Plan:
    plan = make_plan(recipe)
    if plan.hash != manifest.plan_hash:
        raise OutputError("a model, a version or the machine's kind changed since the merge")
    return plan


def _from_store(plan: Plan, by_kept: list[str]) -> dict[str, Any]:
    """What the store's values and vectors tell of a plan whose sources are decomposed."""
    found: dict[str, Any] = {"notices": notices(plan)}
    if "k" not in plan.method.parameters or not any(
        a is Action.DECOMPOSE for a in plan.actions.values()
    ):
        return found
    merged = _as_merged(plan)
    accounts = list(account(merged))
    outcomes = whatif(plan, budgets=grid(plan))
    return found | {
        "matrices": tuple(_matrix(a) for a in accounts),
        "whatif": tuple(o.to_json() for o in outcomes),
        "k": plan.recipe.parameters.k,
        "overlap": _overlap(merged, by_kept),
        "inflation": tuple(_inflation(merged, accounts)),
    }


def _as_merged(plan: Plan) -> Plan:
    """With the weights and the strength that a target's examples chose, where they did."""
    if not plan.recipe.is_targeted:
        return plan
    from svdmerge import targeting

    found = targeting.load(plan.run_folder)
    return plan if found is None else targeting.adapted(plan, found)


def grid(plan: Plan) -> list[int | float]:
    """Budgets of the what-if, the recipe's among them."""
    k = plan.recipe.parameters.k
    if isinstance(k, float):
        return sorted({*SHARES, k})
    most = max(p.rank for p in plan.parameters if p.action is Action.DECOMPOSE)
    return sorted({*(1 << i for i in range(most.bit_length())), k})


def _matrix(found: MatrixAccount) -> MergedMatrix:
    p, of = found.parameter, found.found
    return MergedMatrix(
        name=p.id, m=p.m, n=p.n, kept=sum(of.kept.values()),
        energy=of.energy / of.total if of.total else 0.0, total=of.total, spectral=of.spectral,
        largest=found.largest, spectrum=found.spectrum, cut=found.cut,
    )  # fmt: skip


def _overlap(plan: Plan, by_kept: list[str]) -> Overlap | None:
    """Of the sources that gave most, in some matrices; None of a single one."""
    from svdmerge.training.overlap import OverlapUnit, overlaps

    given = {s.reference: s for s in plan.sources}
    chosen = [given[name] for name in by_kept if name in given][:COMPARED_SOURCES]
    if len(chosen) < 2:
        return None
    matrices = [p for p in plan.parameters if p.action is Action.DECOMPOSE]
    parameters = tuple(spread(matrices, COMPARED_MATRICES))
    unit = OverlapUnit(
        name="overlap", memory_bytes=0, threads=1, store=plan.store, base_key=plan.base_key,
        revisions=tuple(s.revision for s in chosen), parameters=parameters,
    )  # fmt: skip
    sums, counts = (np.array(part) for part in overlaps(unit))
    return Overlap(
        names=tuple(s.reference for s in chosen),
        mean=sums / np.maximum(counts, 1.0),
        matrices=tuple(p.id for p in parameters),
    )


def _inflation(plan: Plan, accounts: list[MatrixAccount]) -> Iterator[Inflation]:
    """Of some matrices; those that nothing was kept of are left out."""
    factors = load_factors(plan.run_folder.child(FACTORS))
    for found in spread(accounts, INFLATED_MATRICES):
        name = found.parameter.id
        if found.largest > 0 and name in factors and factors.held(name):
            largest = float(factors.read(name, [0]).s[0])
            yield Inflation(name=name, ratio=largest / (plan.scale * found.largest))


def spread(items: list[T], most: int) -> list[T]:
    """At most so many of the items, evenly spread, in their order."""
    return [items[i * len(items) // most] for i in range(most)] if len(items) > most else items
