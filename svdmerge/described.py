"""What an output says of itself: its card, recipe, provenance and manifest."""

import contextlib
from collections.abc import Mapping, Sequence
from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq

from svdmerge import __version__
from svdmerge.core.methods.registry import METHODS
from svdmerge.engine.plan import Plan
from svdmerge.recipe import Recipe
from svdmerge.report.card import CardSource, licence_in, model_card
from svdmerge.report.run_report import RunReport
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.hf_model import PROVENANCE, RECIPE, WrittenFile, put_file
from svdmerge.storage.output import Manifest, written_files

# What models state, by their names.
Licences = Mapping[str, str | None]
# Of a model's card: front matter comes first.
MAX_CARD_BYTES = 1 << 20


def pq_bytes(table: pa.Table) -> bytes:
    """The table as a parquet file."""
    buffer = BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def side_files(
    plan: Plan, out: Folder, *, provenance: bytes, licences: Licences, report: RunReport
) -> list[WrittenFile]:
    """Card, resolved recipe and provenance."""
    recipe_yaml = plan.recipe.dump_yaml()
    card = model_card(
        title=out_name(plan),
        base=plan.base.reference,
        base_licence=licences[plan.base.reference],
        sources=[
            CardSource(
                name=s.reference,
                revision=s.revision,
                weight=s.weight,
                kept=report.kept.get(s.reference, 0),
                licence=licences[s.reference],
            )
            for s in sorted(plan.sources, key=lambda s: s.reference)
        ],
        recipe_yaml=recipe_yaml,
        summary=summary_of(plan.recipe, num_sources=len(plan.sources)) + _chosen(report),
    )
    return [
        put_file(out, PROVENANCE, provenance),
        put_file(out, RECIPE, recipe_yaml.encode()),
        put_file(out, "README.md", card.encode()),
    ]


def licences_of(plan: Plan) -> Licences:
    """What each model states, by its name."""
    folders = {s.reference: s.checkpoint.folder for s in plan.sources}
    folders[plan.base.reference] = plan.base.folder
    return {name: _licence(folder) for name, folder in folders.items()}


def _licence(folder: Folder) -> str | None:
    """What a model's own card states."""
    with contextlib.suppress(FileNotFoundError):
        text = folder.read("README.md", start=0, stop=MAX_CARD_BYTES)
        return licence_in(text.decode(errors="replace"))
    return None


def _chosen(report: RunReport) -> str:
    if report.adaptation is None:
        return ""
    return f" Sources and strength by the target's examples: {report.adaptation.verdict}"


def out_name(plan: Plan) -> str:
    """The output folder's name."""
    return Folder.at(plan.recipe.out).name


def summary_of(recipe: Recipe, *, num_sources: int) -> str:
    """What the merge is, in a sentence."""
    p = recipe.parameters
    share = f"{p.k:.4g} of each matrix's rank" if isinstance(p.k, float) else f"{p.k} per matrix"
    share += ", spent over all matrices" * (p.scope == "global")
    return METHODS[recipe.merge_method].summary.format(
        n=num_sources, k=share, salience=p.salience, density=f"{p.density or 1:.3g}"
    )


def manifest_of(
    plan: Plan, staged: Folder, written: Sequence[WrittenFile], licences: Licences
) -> Manifest:
    """What the output is, and of what, with every file's checksum."""
    return Manifest(
        plan_hash=plan.hash,
        svdmerge_version=__version__,
        base=plan.base.reference,
        base_revision=plan.base.revision,
        base_licence=licences[plan.base.reference],
        sources=tuple(
            {
                "model": s.reference, "revision": s.revision, "weight": s.weight,
                "licence": licences[s.reference],
            }
            for s in plan.sources
        ),
        actions={name: str(action) for name, action in plan.actions.items()},
        files=written_files(staged, known=written),
    )  # fmt: skip
