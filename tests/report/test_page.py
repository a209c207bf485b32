"""The report's page and figures: what is escaped, what is left out, what is told."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from report_cases import HOSTILE, SCRIPT, synthetic

from svdmerge.report.figures import as_png, by_kind, figures, labels, pooled, short
from svdmerge.report.page import page


@pytest.fixture(scope="module")
def html() -> str:
    return page(synthetic(num_sources=6, num_matrices=12))


class Elements(HTMLParser):
    """Every element with its attributes, and the page's text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_names_that_mean_harm_become_text_and_the_policy_allows_one_script(html: str) -> None:
    elements = Elements(html)
    scripts = [attributes for tag, attributes in elements.found if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "whatif-grid"}, {}]
    assert not [tag for tag, _ in elements.found if tag in ("img", "iframe", "object")]
    assert not [a for _, attributes in elements.found for a in attributes if a.startswith("on")]
    (policy,) = [
        a["content"] or ""
        for tag, a in elements.found
        if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert "default-src 'none'" in policy
    assert re.search(r"script-src 'sha256-[\w+/]{43}='$", policy)
    for name in HOSTILE:
        assert name in elements.text


def test_nothing_is_fetched(html: str) -> None:
    addresses = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert addresses
    assert all(a.startswith(("data:", "#")) for a in addresses)
    assert "url(http" not in html


def test_no_two_elements_have_one_id(html: str) -> None:
    ids = [a["id"] for _, a in Elements(html).found if "id" in a]
    assert len(ids) == len(set(ids))


def test_the_same_figures_give_the_same_page(html: str) -> None:
    assert page(synthetic(num_sources=6, num_matrices=12)) == html


def test_what_is_not_known_has_no_section() -> None:
    html = page(
        synthetic(
            num_sources=1, num_matrices=1, matrices=(), whatif=(), k=None, overlap=None,
            inflation=(), stages=(), ranking=None, tuned=(), failed=(), warnings=(),
            missing=("spectra (the base is gone)",), kept_by=np.zeros((1, 0), np.int64), kept_in=(),
        )
    )  # fmt: skip
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", html)
    assert headings == ["Warnings", "What was merged", "Recipe"]
    assert "Not in this report: spectra (the base is gone)" in html
    assert "<script" not in html


def test_every_figure_is_a_picture_too() -> None:
    found = figures(synthetic(num_sources=3, num_matrices=6))
    expected = {"contributions", "spectra-0", "retained", "overlap", "inflation", "curve-0"}
    assert expected <= set(found)
    assert as_png(found["contributions"]).startswith(b"\x89PNG")


def test_a_heat_map_of_any_size_is_pooled_to_means() -> None:
    values = np.arange(35.0).reshape(5, 7)
    assert np.array_equal(pooled(values, 5, 7), values)
    small = pooled(values, 2, 3)
    assert small.shape == (2, 3)
    assert small[0, 0] == values[:2, :2].mean()


def test_names_are_short_where_that_is_not_ambiguous() -> None:
    assert labels(["/a/x", "org/y"]) == ["x", "y"]
    assert labels(["/a/x", "/b/x"]) == ["/a/x", "/b/x"]
    assert short("abcdefghij", 5) == "ab…ij"
    assert short(SCRIPT, 99) == SCRIPT


def test_matrices_of_one_kind_keep_the_order_of_layers() -> None:
    kinds = by_kind(synthetic(num_sources=2, num_matrices=90).matrices)
    names = [x.name for x in dict(kinds)["layer.*.attention.query"]]
    assert names == [f"layer.{i}.attention.query" for i in range(15)]
