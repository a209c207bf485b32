"""The report's figures, by matplotlib. Colours are told apart by colour-blind readers too."""

import re
import warnings
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import groupby
from typing import Any

import numpy as np

from svdmerge.report.contents import Contents, Inflation, MergedMatrix, Overlap

# A phone's width, so that text keeps its size there; wider screens show two beside each other.
WIDTH = 4.2
# Okabe and Ito's, and five steps of viridis for depth, on white. The page gives each a name of its
# own, for in the dark they are lighter.
INK, MUTED, RULE = "#1b1f24", "#57606a", "#d0d7de"
BLUE, RED = "#0072b2", "#d55e00"
DEPTHS = ("#440154", "#3b528b", "#21808c", "#2f8f4e", "#8a8500")
NAMES = {INK: "ink", MUTED: "muted", RULE: "rule", BLUE: "blue", RED: "red"} | {
    colour: f"depth-{i}" for i, colour in enumerate(DEPTHS)
}
# Rows and columns of a heat map, beyond which neighbours share a cell: a phone shows no more.
MOST_ROWS, MOST_COLUMNS = 60, 120
# Kinds of matrices whose spectra are drawn, those with the most energy first.
MOST_KINDS = 8
# Of the largest value, the least that is drawn: what lies below is mostly rounding.
LEAST = 1e-4
_RC: Any = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # names are no formulas
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.titlecolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def figures(contents: Contents) -> dict[str, Any]:
    """Figures by name, those that there are figures for: matplotlib's own, not yet drawn."""
    from matplotlib import rc_context

    found: dict[str, Any] = {}
    with rc_context(_RC):
        if contents.kept_by.size and contents.kept_by.any():
            found["contributions"] = _contributions(contents)
        for number, (kind, part) in enumerate(by_kind(contents.matrices)[:MOST_KINDS]):
            found[f"spectra-{number}"] = _spectra(kind, part)
        if contents.matrices:
            found["retained"] = _retained(contents.matrices)
        if contents.overlap is not None:
            found["overlap"] = _overlap(contents.overlap)
        if contents.inflation:
            found["inflation"] = _inflation(contents.inflation)
        for number, (name, result) in enumerate(contents.tuned[:MOST_KINDS]):
            if result["curve"]:
                found[f"curve-{number}"] = _curve(name, result)
    return found


def as_svg(figure: Any, *, salt: str) -> str:
    """An SVG element without ids that two figures could share; its colours are the page's."""
    more = {"svg.hashsalt": salt, "savefig.transparent": True}
    text = _saved(figure, more, format="svg", metadata={"Date": None}).decode()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg ") :], flags=re.DOTALL)
    text = re.sub(r' id="[A-Za-z.0-9]+_\d+"', "", text)  # of groups, that nothing refers to
    for colour, name in NAMES.items():
        text = text.replace(colour, f"var(--{name})")
    return text.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


def as_png(figure: Any) -> bytes:
    """A picture on white."""
    return _saved(figure, {}, format="png", dpi=150, metadata={"Software": None})


def _saved(figure: Any, more: Mapping[str, Any], **options: Any) -> bytes:
    from matplotlib import rc_context

    buffer = BytesIO()
    with rc_context(_RC | dict(more)), warnings.catch_warnings():
        # Names may be in any script; a page's text is drawn by the browser, which has more fonts.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(buffer, **options)
    return buffer.getvalue()


def kind_of(name: str) -> str:
    """`encoder.layer.3.output.weight` -> `encoder.layer.*.output.weight`."""
    return re.sub(r"\d+", "*", name)


def by_kind(matrices: Sequence[MergedMatrix]) -> list[tuple[str, list[MergedMatrix]]]:
    """Matrices that a source changed, of the same name but for numbers, in their order; those with
    most energy first."""
    changed = [x for x in matrices if x.spectrum]
    ranked = sorted(changed, key=lambda x: kind_of(x.name))  # stable: layers keep their order
    found = [(kind, list(part)) for kind, part in groupby(ranked, key=lambda x: kind_of(x.name))]
    return sorted(found, key=lambda item: -sum(x.total for x in item[1]))


def labels(names: Sequence[str]) -> list[str]:
    """Names by the last part of their path, where no two would look alike."""
    last = [name.rstrip("/").rsplit("/", 1)[-1] for name in names]
    return last if len(set(last)) == len(last) and all(last) else list(names)


def short(name: str, most: int) -> str:
    """A name of at most so many characters, its middle left out."""
    if len(name) <= most:
        return name
    head = (most - 1) // 2
    return f"{name[:head]}…{name[len(name) - (most - 1 - head) :]}"


def _figure(height: float = 2.6) -> tuple[Any, Any]:
    """A plot with room for a title and for labels, which is not looked for: that takes longer than
    drawing."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(WIDTH, height))
    room = {"left": 0.18, "right": 0.97, "bottom": 0.45 / height, "top": 1 - 0.3 / height}
    axes = figure.subplots(gridspec_kw=room)
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _spectra(kind: str, matrices: Sequence[MergedMatrix]) -> Any:
    from matplotlib.ticker import LogLocator

    figure, axes = _figure()
    for i, matrix in enumerate(matrices):
        colour = DEPTHS[min(i * len(DEPTHS) // len(matrices), len(DEPTHS) - 1)]
        places, values = np.array(matrix.spectrum).T
        kept = places <= matrix.kept if matrix.cut else places > 0
        axes.plot(places, values, color=colour, linewidth=0.9, alpha=0.35)
        axes.plot(places[kept], values[kept], color=colour, linewidth=1.4)
        if matrix.cut:
            axes.plot(*matrix.cut, "o", color=colour, markersize=4)
    axes.set(xscale="log", xlabel="place among all sources' components")
    axes.set(ylabel="salience", title=short(kind, 52))
    ends = [s for x in matrices for _, s in x.spectrum if s > 0]
    if ends:  # where no source changed a matrix of this kind, no axis can be logarithmic
        axes.set_yscale("log")
        least = max(min(ends), LEAST * max(ends))
        axes.set_ylim(least / 1.5, max(ends) * 1.5)
        if max(ends) < 100 * least:  # powers of ten alone would be one or two
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    if len(matrices) >= len(DEPTHS):
        for colour, told in ((DEPTHS[0], "first layers"), (DEPTHS[-1], "last layers")):
            axes.plot([], [], color=colour, label=told)
        axes.legend(loc="lower left")
    return figure


def _contributions(contents: Contents) -> Any:
    order = np.argsort([-s.kept for s in contents.sources], kind="stable")
    share = contents.kept_by / np.maximum(1, contents.kept_by.sum(axis=0))
    names = labels([contents.sources[i].name for i in order])
    told = {"label": "share of the matrix's components", "xlabel": "matrix, in order"}
    return _heat_map(share[order], names, most=None, **told)


def _overlap(overlap: Overlap) -> Any:
    shown = overlap.mean.copy()
    np.fill_diagonal(shown, np.nan)
    told = {"label": "mean squared cosine", "xlabel": "the same sources, in the same order"}
    return _heat_map(shown, labels(overlap.names), most=1.0, **told)


def _heat_map(
    values: np.ndarray, names: Sequence[str], *, most: float | None, label: str, xlabel: str
) -> Any:
    from matplotlib.figure import Figure

    cells = pooled(values, MOST_ROWS, MOST_COLUMNS)
    figure: Any = Figure(figsize=(WIDTH, min(5.0, 1.3 + 0.17 * len(cells))), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        cells, aspect="auto", cmap="cividis", interpolation="none", vmin=0, vmax=most
    )
    bar = figure.colorbar(image, ax=axes, location="top", shrink=0.7, aspect=30, label=label)
    bar.outline.set_visible(False)
    # As many names as there is room for, each beside the cell that it fell into.
    step = max(1, -(-len(names) // 28))
    rows = range(0, len(names), step)
    axes.set_yticks([row * len(cells) // len(names) for row in rows])
    axes.set_yticklabels([short(names[row], 20) for row in rows], fontsize=7)
    axes.set_xticks([])
    axes.set_xlabel(xlabel)
    axes.spines[:].set_visible(False)
    return figure


def pooled(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """At most so many rows and columns, each the mean of neighbours."""
    for axis, most in enumerate((rows, columns)):
        length = values.shape[axis]
        if length > most:
            starts = np.arange(most) * length // most
            sums = np.add.reduceat(values, starts, axis=axis)
            widths = np.diff(np.append(starts, length))
            values = sums / (widths[:, None] if axis == 0 else widths)
    return values


def _retained(matrices: Sequence[MergedMatrix]) -> Any:
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(WIDTH, 3.6))
    upper, lower = figure.subplots(
        2, 1, sharex=True, gridspec_kw={"left": 0.18, "right": 0.97, "bottom": 0.12, "top": 0.93}
    )
    at = np.arange(1, len(matrices) + 1)
    energy = [x.energy if x.total else np.nan for x in matrices]
    upper.plot(at, energy, "o", color=BLUE, markersize=3)
    upper.set(ylim=(0, 1.05), title="energy kept, share")
    bound = [x.spectral / x.largest if x.largest else np.nan for x in matrices]
    lower.plot(at, bound, "x", color=RED, markersize=3.5)
    lower.set(xlabel="matrix, in order", title="bound on the rest, over the largest value")
    lower.set_ylim(0, 1.1 * np.nanmax([1.0, *bound]))
    for axes in (upper, lower):
        axes.grid(color=RULE, linewidth=0.6)
    return figure


def _inflation(found: Sequence[Inflation]) -> Any:
    figure, axes = _figure()
    axes.axhline(1.0, color=MUTED, linewidth=1)
    axes.plot(range(1, len(found) + 1), [x.ratio for x in found], "o", color=BLUE, markersize=4)
    axes.set(xlabel="matrix, in order", title="largest value: merged, over sources'")
    axes.set_ylim(0, max(1.2, 1.1 * max(x.ratio for x in found)))
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _curve(name: str, result: Mapping[str, Any]) -> Any:
    figure, axes = _figure()
    curve = result["curve"]
    at = np.arange(1, len(curve) + 1)
    axes.plot(at, [p["loss"] for p in curve], "o-", color=BLUE, markersize=3, label="training")
    held_out = [p["held_out_loss"] for p in curve]
    if all(loss is not None for loss in held_out):
        axes.plot(at, held_out, "s--", color=RED, markersize=3, label="held out")
    axes.set(xlabel="epoch", ylabel="loss, nats", title=short(name, 52))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    return figure
