"""The report of a merge: one page of HTML that needs no network and runs one script of its own."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from svdmerge.report.contents import Contents, Overlap
from svdmerge.report.figures import MOST_KINDS, as_svg, by_kind, figures, labels, short

# Pairs of sources that are named as most alike.
MOST_PAIRS = 8
# Letters of a name, where it is not told whole.
MOST_NAME = 48
# What the slider shows of each budget, beside what it keeps of whom.
FIELDS = {
    "energy": "energy kept",
    "frobenius": "left out (Frobenius), at most",
    "spectral": "left out (spectral), at most",
    "factor_bytes": "merged factors",
    "store_bytes": "components to store",
    "num_open": "matrices to deepen first",
}


def page(contents: Contents) -> str:
    """The report as HTML. What sources wrote is escaped, and nothing of it could run: the page's
    policy allows the one script alone, by its digest."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("svdmerge.report", package_path=""),
        autoescape=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    script, css = _file("page.js"), _file("page.css")
    drawn = {name: as_svg(figure, salt=name) for name, figure in figures(contents).items()}
    # In the order of what they gave.
    given = [s.name for s in contents.sources]
    grid = [_point(outcome, names=given) for outcome in contents.whatif]
    ks = [outcome["k"] for outcome in contents.whatif]
    return environment.get_template("page.html.j2").render(
        c=contents,
        figures={name: Markup(text) for name, text in drawn.items()},
        css=Markup(css),
        script=Markup(script),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        grid=grid,
        chosen=ks.index(contents.k) if contents.k in ks else 0,
        kept_names=_called(given),
        fields=FIELDS,
        kinds=_kinds(contents),
        pairs=_pairs(contents.overlap) if contents.overlap else [],
        told=captions(contents),
        percent=_percent,
    )


def _file(name: str) -> str:
    return (files("svdmerge.report") / name).read_text(encoding="utf-8")


def _point(outcome: Mapping[str, Any], *, names: Sequence[str]) -> dict[str, Any]:
    """An outcome as the page shows it: each figure as it is, and as text."""
    from jinja2.filters import do_filesizeformat

    texts = {
        "energy": _percent(outcome["energy"]),
        "frobenius": f"{outcome['frobenius']:.3g}",
        "spectral": f"{outcome['spectral']:.3g}",
        "factor_bytes": do_filesizeformat(outcome["factor_bytes"], binary=True),
        "store_bytes": do_filesizeformat(outcome["store_bytes"], binary=True),
        "num_open": "none" if outcome["certain"] else str(outcome["num_open"]),
    }
    k = outcome["k"]
    return {
        "k": {"value": k, "text": _percent(k) if isinstance(k, float) else str(k)},
        "kept": [outcome["kept"].get(name, 0) for name in names],
        **{name: {"value": outcome[name], "text": text} for name, text in texts.items()},
    }


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _called(names: Sequence[str]) -> list[str]:
    """Names as running text and narrow tables have them; the first table has them whole."""
    return [short(name, MOST_NAME) for name in labels(names)]


def _kinds(contents: Contents) -> list[tuple[str, int, str]]:
    """Of each kind drawn: its name, how many matrices, and the range of their cuts."""
    found: list[tuple[str, int, str]] = []
    for kind, part in by_kind(contents.matrices)[:MOST_KINDS]:
        cuts = [x.cut[1] for x in part if x.cut]
        told = f"{min(cuts):.3g} to {max(cuts):.3g}" if cuts else "each source's own budget"
        found.append((kind, len(part), told))
    return found


def _pairs(overlap: Overlap) -> list[tuple[str, str, float]]:
    """The most alike sources, the pair with the largest overlap first."""
    rows, columns = np.triu_indices(len(overlap.names), k=1)
    values = overlap.mean[rows, columns]
    order = np.argsort(-values, kind="stable")[:MOST_PAIRS]
    names = _called(overlap.names)
    return [(names[rows[i]], names[columns[i]], float(values[i])) for i in order]


def captions(c: Contents) -> dict[str, str]:
    """What each figure says, in words."""
    told: dict[str, str] = {}
    if c.sources:
        names, gave = _called([s.name for s in c.sources]), [s.kept for s in c.sources]
        told["contributions"] = (
            f"Each row is a source, those that gave most first, each column a matrix, and the "
            f"colour the source's share of what was kept there. {names[gave.index(max(gave))]} "
            f"gave most: {_percent(max(gave) / max(1, sum(gave)))} of all components."
        )
    if c.matrices:
        kinds = len(by_kind(c.matrices))
        told["spectra"] = (
            "One line a matrix: the components of all sources, the most salient first. What lies "
            "up to the dot was kept, what is faint was left out."
        )
        if kinds > MOST_KINDS:
            told["spectra"] += f" Of {kinds} kinds of matrices the {MOST_KINDS} of most energy."
        # Of what no source changed nothing can be kept.
        least = min(c.matrices, key=lambda x: (x.total == 0, x.energy))
        told["retained"] = (
            f"Energy is the share of the sources' squared Frobenius norms that was kept: "
            f"{_percent(c.energy or 0.0)} over all matrices, least in {least.name} with "
            f"{_percent(least.energy)}. What was left out of a matrix has certainly no larger "
            f"singular value than the bound, which adds up all sources, as if what they left out "
            f"pointed the same way."
        )
    if c.overlap is not None:
        told["overlap"] = (
            f"Mean squared cosine of the principal angles between what sources changed most, in "
            f"{len(c.overlap.matrices)} of the matrices: 1 for the same directions, near 0 for "
            f"unrelated ones."
        )
        if (num := len(c.sources)) > len(c.overlap.names):
            told["overlap"] += f" Of {num} sources the {len(c.overlap.names)} that gave most."
    if c.inflation:
        worst = max(c.inflation, key=lambda x: x.ratio)
        told["inflation"] = (
            f"The largest singular value of the merged difference over the largest of any source "
            f"in it. Above 1, sources share a direction and their sum counts it more than once. "
            f"Of {len(c.inflation)} matrices the most is {worst.ratio:.3g}, in {worst.name}."
        )
    return told
