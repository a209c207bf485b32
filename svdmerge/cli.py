"""The command line: parse, build, one call, one result. Heavy imports wait for their command."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from svdmerge.errors import RecipeError
from svdmerge.kind.cli import kind_app
from svdmerge.logs import Format, configure
from svdmerge.store_cli import store_app
from svdmerge.terminal import INTERRUPTED, Address, Json, Verbose, guard, progress, show

if TYPE_CHECKING:
    from svdmerge.report.run_report import RunReport
    from svdmerge.workflow import Run

app = typer.Typer(
    name="svdmerge",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(store_app, name="store")
adapter_app = typer.Typer(help="Use what tuning has trained.", no_args_is_help=True)
app.add_typer(adapter_app, name="adapter")
app.add_typer(kind_app, name="kind")

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe in YAML.")]
MaxShardSize = Annotated[
    str | None, typer.Option(help="Of the output's weights files, as 5GB; the recipe's if none.")
]


@app.callback()
def shared(
    log_format: Annotated[
        Format,
        typer.Option(
            envvar="SVDMERGE_LOG_FORMAT",
            help="Of standard error: text, or a JSON object a line in place of progress bars.",
        ),
    ] = "text",
) -> None:
    """Merge many fine-tuned models of one base by their singular components."""
    configure(log_format)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path(
        "svdmerge-demo"
    ),
    address: Address = "local",
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run the whole workflow on handwritten digits: train, merge, tune, compare."""

    def work() -> None:
        from svdmerge.demo import run_demo
        from svdmerge.tables import demo_tables

        result = run_demo(out, address=address, progress=progress())
        show(
            as_json,
            result.to_json,
            lambda: demo_tables(result.rows, seconds=result.seconds, paths=result.paths),
        )

    guard(work, verbose=verbose)


@app.command()
def plan(
    recipe: RecipePath,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also read some weights: are sources of this base?")
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show what happens to every tensor, and the costs, from headers alone."""

    def work() -> None:
        from svdmerge.engine.estimate import estimate
        from svdmerge.engine.plan import make_plan
        from svdmerge.recipe import load_recipe

        made = make_plan(load_recipe(recipe))
        found = estimate(made)

        def tables() -> list[Any]:
            from svdmerge.tables import plan_tables

            return plan_tables(found)

        if not deep:
            return show(as_json, found.to_json, tables)
        from svdmerge.engine.kinship import deep_plan, judge
        from svdmerge.tables import deep_tables

        looked = deep_plan(made)
        show(
            as_json,
            lambda: found.to_json() | {"deep": looked.to_json()},
            lambda: [*tables(), *deep_tables(looked)],
        )
        judge(made, looked.kinships)
        return None

    guard(work, verbose=verbose)


@app.command()
def run(
    recipe: RecipePath,
    max_shard_size: MaxShardSize = None,
    address: Address = "local",
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Decompose, select, assemble, and tune if the recipe asks. Resumes by itself."""

    def all_of(run: "Run") -> "RunReport":
        from svdmerge.reporting import reported

        return reported(run.all())

    _staged(recipe, all_of, address, as_json, verbose, max_shard_size)


@app.command()
def decompose(
    recipe: RecipePath, address: Address = "local", as_json: Json = False, verbose: Verbose = False
) -> None:
    """Store every source's components, less those stored already."""
    _staged(recipe, lambda run: run.attempt(run.decompose), address, as_json, verbose)


@app.command()
def select(
    recipe: RecipePath, address: Address = "local", as_json: Json = False, verbose: Verbose = False
) -> None:
    """Choose the most salient components of every matrix across the sources."""
    _staged(recipe, lambda run: run.attempt(run.select), address, as_json, verbose)


@app.command()
def assemble(
    recipe: RecipePath,
    max_shard_size: MaxShardSize = None,
    address: Address = "local",
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Merge what is selected and write the model."""
    _staged(
        recipe, lambda run: run.attempt(run.assemble), address, as_json, verbose, max_shard_size
    )


@app.command()
def tune(
    recipe: RecipePath, address: Address = "local", as_json: Json = False, verbose: Verbose = False
) -> None:
    """Train singular values of the merged model for the recipe's target, or many targets."""
    _staged(recipe, lambda run: run.attempt(run.tune), address, as_json, verbose)


@app.command()
def tick(
    recipe: RecipePath,
    watch: Annotated[
        float | None, typer.Option(min=1.0, help="Look again every so many seconds.")
    ] = None,
    address: Address = "local",
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Merge and release anew if a source changed and the gate holds; for any scheduler."""

    def once() -> None:
        from svdmerge.recipe import load_recipe
        from svdmerge.tables import tick_tables
        from svdmerge.tick import tick as tick_of

        found = tick_of(load_recipe(recipe), address=address, progress=progress())
        show(as_json, found.to_json, lambda: tick_tables(found))
        if found.status == "refused":
            raise typer.Exit(1)

    if watch is None:
        guard(once, verbose=verbose)
    else:
        guard(lambda: _every(watch, once), verbose=verbose)


@app.command()
def rollback(
    recipe: RecipePath,
    number: Annotated[
        int | None, typer.Argument(metavar="N", help="A release; the one before by default.")
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Release an older content again, as a new release."""

    def work() -> None:
        from svdmerge.recipe import load_recipe
        from svdmerge.rollback import rollback as rolled_back
        from svdmerge.tables import tick_tables

        found = rolled_back(load_recipe(recipe), number)
        show(as_json, found.to_json, lambda: tick_tables(found))

    guard(work, verbose=verbose)


@app.command()
def releases(recipe: RecipePath, as_json: Json = False, verbose: Verbose = False) -> None:
    """List a recipe's releases; the last is the current one."""

    def work() -> None:
        from dataclasses import asdict

        from svdmerge.recipe import load_recipe
        from svdmerge.tables import releases_table
        from svdmerge.tick import releases_of

        held = releases_of(load_recipe(recipe))
        found = [held.read(n) for n in held.numbers()]
        show(as_json, lambda: [asdict(r) for r in found], lambda: [releases_table(found)])

    guard(work, verbose=verbose)


@app.command()
def rank(
    recipe: RecipePath,
    examples: Annotated[
        str | None, typer.Option(help="Examples of the target; `tune.train` by default.")
    ] = None,
    address: Address = "local",
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show which sources help a target, with intervals, and whether none does."""

    def work() -> None:
        from svdmerge.recipe import load_recipe
        from svdmerge.tables import ranking_tables
        from svdmerge.workflow import rank as ranking_of

        found = ranking_of(
            load_recipe(recipe), examples=examples, address=address, progress=progress()
        )
        show(as_json, lambda: json.loads(found.to_json()), lambda: ranking_tables(found))

    guard(work, verbose=verbose)


@app.command()
def whatif(
    recipe: RecipePath,
    k: Annotated[
        str | None, typer.Option("--k", help="Budgets, by commas: 16,38,10%; the recipe's if none.")
    ] = None,
    salience: Annotated[
        Literal["sigma", "relative", "denoised"] | None, typer.Option(help="Another salience.")
    ] = None,
    scope: Annotated[Literal["layer", "global"] | None, typer.Option(help="Another scope.")] = None,
    sources: Annotated[str | None, typer.Option(help="Only these sources, by commas.")] = None,
    without: Annotated[str | None, typer.Option(help="All but these, by commas.")] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show what another selection would keep, from whom, and lose, from stored spectra."""

    def work() -> None:
        from svdmerge.engine.plan import make_plan
        from svdmerge.engine.whatif import asked
        from svdmerge.engine.whatif import whatif as outcomes_of
        from svdmerge.recipe import load_recipe, parse_share
        from svdmerge.tables import whatif_table

        loaded = load_recipe(recipe)
        try:
            given = [] if k is None else [parse_share(part) for part in k.split(",")]
            budgets = given or [loaded.parameters.k]
        except ValueError as error:
            raise RecipeError(f"--k {k}: {error}") from None
        plan = asked(
            make_plan(loaded), salience=salience, scope=scope, only=_names(sources),
            without=_names(without),
        )  # fmt: skip
        outcomes = outcomes_of(plan, budgets=budgets)
        show(as_json, lambda: [o.to_json() for o in outcomes], lambda: [whatif_table(outcomes)])

    guard(work, verbose=verbose)


@app.command()
def verify(
    out: Annotated[str, typer.Argument(metavar="OUT", help="An output folder or URI.")],
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Reload an output, or an exported adapter, and prove what it claims."""

    def work() -> None:
        from svdmerge.tables import verify_table
        from svdmerge.verify import verify as checks_of

        checks = checks_of(out)
        show(as_json, lambda: [c.to_json() for c in checks], lambda: [verify_table(checks)])
        if any(c.held is False for c in checks):
            raise typer.Exit(1)

    guard(work, verbose=verbose)


@app.command()
def push(
    out: Annotated[str, typer.Argument(metavar="OUT", help="The output folder of a run.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="org/name on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="If the repository is made.")] = False,
    revision: Annotated[str, typer.Option(help="Branch to upload to.")] = "main",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check and list.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Upload an output to the hub, checked first, in one commit. Resumes by itself."""

    def work() -> None:
        from svdmerge.push import push as pushed_to

        done = pushed_to(out, repo, private=private, revision=revision, dry_run=dry_run)
        size = f"{len(done.files)} files, {done.nbytes / 2**20:.1f} MiB"
        show(as_json, done.to_json, lambda: [f"{done.url or 'would upload'}: {size}"])

    guard(work, verbose=verbose)


@app.command()
def report(
    out: Annotated[str, typer.Argument(metavar="OUT", help="The output folder of a run.")],
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write report.html into an output: what was merged, kept and lost, on one page."""

    def work() -> None:
        from svdmerge.reporting import write_report

        place = write_report(out)
        show(as_json, lambda: {"report": place}, lambda: [f"done: {place}"])

    guard(work, verbose=verbose)


@app.command()
def schema(as_json: Json = False, verbose: Verbose = False) -> None:
    """Print the recipe's JSON Schema, for editors."""

    def work() -> None:
        from svdmerge.recipe_schema import recipe_schema

        show(True, recipe_schema, list)

    guard(work, verbose=verbose)


@app.command("import-mergekit")
def import_mergekit(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A mergekit recipe.")],
    base: Annotated[str | None, typer.Option(help="The base, if the recipe names none.")] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Print a mergekit recipe as one of svdmerge, and what that does not say."""

    def work() -> None:
        from svdmerge.mergekit import import_mergekit as imported_from

        found = imported_from(file, base=base)
        if as_json:
            show(as_json, found.to_json, list)
        else:
            typer.echo(found.to_yaml(), nl=False)  # a table's line breaks would not be YAML

    guard(work, verbose=verbose)


@adapter_app.command("export")
def adapter_export(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="A folder that tuning wrote, or a merge.")
    ],
    to: Annotated[str, typer.Option(help="An empty folder or URI to write.")],
    form: Annotated[
        Literal["model", "peft", "peft-on-merged"],
        typer.Option(
            "--format", help="The full model, or a PEFT LoRA on the base or the merged model."
        ),
    ] = "model",
    rank: Annotated[
        int | None, typer.Option(min=1, help="Of LoRA layers, at most; by default the full one.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="As `tune.model`: the class that it is for.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base, if it moved.")] = None,
    merged: Annotated[str | None, typer.Option(help="The merged model, if it moved.")] = None,
    factors: Annotated[str | None, typer.Option(help="The merged factors, if moved.")] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write a tuned adapter as a full model, or that or a merge as an adapter for PEFT."""

    def work() -> None:
        from dataclasses import asdict

        from svdmerge.storage.filesystem import Folder
        from svdmerge.training.export import export_adapter

        places = {"base": base, "merged": merged, "factors": factors}
        found = export_adapter(folder, to, form=form, rank=rank, model=model, places=places)
        out = Folder.at(to).uri
        told = {"out": out, "format": form} | ({} if found is None else asdict(found))
        show(as_json, lambda: told, lambda: [*([found.told] if found else []), f"done: {out}"])

    guard(work, verbose=verbose)


def main() -> None:
    """The entry point."""
    app()


def _staged(
    recipe: Path,
    stage: "Callable[[Run], RunReport]",
    address: str,
    as_json: bool,
    verbose: bool,
    max_shard_size: str | None = None,
) -> None:
    """Run one stage, or all, of a recipe."""

    def work() -> None:
        from svdmerge.engine.runtime import open_runtime
        from svdmerge.recipe import load_recipe
        from svdmerge.tables import run_tables
        from svdmerge.workflow import Run, prepare

        given = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        loaded = load_recipe(recipe, **given)
        prepare(loaded, address=address)  # its faults are told before Ray starts
        with open_runtime(address) as runtime:
            report = stage(Run(loaded, runtime=runtime, progress=progress()))
        show(
            as_json,
            lambda: json.loads(report.to_json()),
            lambda: [*run_tables(report), f"{report.status}: {report.out}"],
        )
        if report.status.startswith("failed"):  # of many targets: the others are done
            raise typer.Exit(1)

    guard(work, verbose=verbose)


def _every(seconds: float, work: Callable[[], None]) -> None:
    """Do it again and again, until interrupted: a failure is told, and the next time may do."""
    while True:
        try:
            guard(work, verbose=False)
        except typer.Exit as end:
            if end.exit_code == INTERRUPTED:
                raise
        guard(lambda: time.sleep(seconds), verbose=False)


def _names(text: str | None) -> list[str]:
    return text.split(",") if text else []
