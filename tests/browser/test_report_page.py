"""The report in a browser: nothing is fetched, nothing fails, and everyone can read it."""

import json
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from merging import Bench, tiny_bench
from report_cases import SCRIPT, synthetic
from typer.testing import CliRunner

from svdmerge.cli import app
from svdmerge.report.page import page
from svdmerge.reporting import write_report

pytestmark = pytest.mark.browser
MOST_BYTES = 10 * 2**20
MOST_SECONDS = 2.0
WIDTHS = {"phone": 390, "desktop": 1280}


@pytest.fixture(scope="module")
def chromium() -> Generator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as found:
        # Root, as containers are, has no sandbox to give.
        browser = found.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    made = tiny_bench(tmp_path_factory.mktemp("run"))
    made.run()
    write_report(str(made.out))
    return made


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "report.html"
    path.write_text(page(synthetic()), encoding="utf-8")
    return path


@dataclass
class Shown:
    """A page that was opened, and whatever it complained of or asked for."""

    tab: Any
    faults: list[str] = field(default_factory=list[str])
    asked: list[str] = field(default_factory=list[str])


def show(chromium: Any, path: Path, *, width: int = 1280, scheme: str = "light") -> Shown:
    tab = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    shown = Shown(tab)
    tab.on("console", lambda told: shown.faults.append(told.text))
    tab.on("pageerror", lambda error: shown.faults.append(str(error)))
    tab.on("dialog", lambda dialog: shown.faults.append(dialog.message))
    tab.on("request", lambda request: shown.asked.append(request.url))
    tab.goto(path.as_uri())
    return shown


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("case", ["tiny", "large"])
def test_a_page_loads_alone_and_fits_the_screen(
    chromium: Any, bench: Bench, large: Path, case: str, scheme: str, width: str, tmp_path: Path
) -> None:
    path = bench.out / "report.html" if case == "tiny" else large
    shown = show(chromium, path, width=WIDTHS[width], scheme=scheme)
    shown.tab.screenshot(path=tmp_path / f"{case}-{width}-{scheme}.png", full_page=True)
    assert shown.asked == [path.as_uri()]
    assert shown.tab.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width]
    assert shown.faults == []
    shown.tab.close()


# axe takes eight seconds of the large page.
@pytest.mark.parametrize(
    ("case", "scheme", "width"),
    [("tiny", "light", 390), ("tiny", "dark", 1280), ("large", "dark", 390)],
)
def test_a_page_bars_nobody(
    chromium: Any, bench: Bench, large: Path, case: str, scheme: str, width: int
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    path = bench.out / "report.html" if case == "tiny" else large
    shown = show(chromium, path, width=width, scheme=scheme)
    for details in shown.tab.query_selector_all("summary"):
        details.click()
    violations = Axe().run(shown.tab).response["violations"]
    assert {v["id"]: v["nodes"][0]["html"] for v in violations} == {}
    shown.tab.close()


def test_names_that_mean_harm_are_text(chromium: Any, large: Path) -> None:
    shown = show(chromium, large)
    assert shown.tab.inner_text("h1") == SCRIPT
    assert SCRIPT in shown.tab.inner_text("table")
    assert shown.tab.locator("img").count() == 0
    assert shown.faults == []
    shown.tab.close()


def test_a_large_merge_is_small_and_drawn_soon(chromium: Any, large: Path) -> None:
    assert large.stat().st_size <= MOST_BYTES
    tab = chromium.new_page(viewport={"width": 1280, "height": 900})
    metrics = tab.context.new_cdp_session(tab)
    # Time of the page's own thread, whatever else the machine does.
    metrics.send("Performance.enable", {"timeDomain": "threadTicks"})
    tab.goto(large.as_uri())
    tab.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    found = {m["name"]: m["value"] for m in metrics.send("Performance.getMetrics")["metrics"]}
    assert 0 < found["TaskDuration"] <= MOST_SECONDS
    tab.close()


def test_the_slider_says_what_whatif_says(chromium: Any, bench: Bench) -> None:
    shown = show(chromium, bench.out / "report.html")
    tab = shown.tab
    grid = json.loads(tab.inner_text("#whatif-grid"))
    ks = ",".join(str(point["k"]["value"]) for point in grid)
    done = CliRunner().invoke(app, ["whatif", str(bench.write_recipe()), "--k", ks, "--json"])
    outcomes = json.loads(done.stdout)
    assert len(outcomes) == len(grid) > 5
    names = [Path(name).name for name in outcomes[0]["kept"]]
    tab.focus("#k")
    tab.keyboard.press("Home")
    for outcome in outcomes:
        for name in ("energy", "frobenius", "spectral", "factor_bytes", "store_bytes", "num_open"):
            assert float(tab.locator(f"#whatif-{name}").get_attribute("value")) == outcome[name]
        rows = tab.locator("tr:has(data.kept)").all()
        shown_kept = {
            row.locator("th").inner_text(): int(row.locator("data").get_attribute("value"))
            for row in rows
        }
        assert shown_kept == dict(zip(names, outcome["kept"].values(), strict=True))
        tab.keyboard.press("ArrowRight")
    assert shown.faults == []
    tab.close()


def test_without_scripts_the_figures_of_the_run_stand_there(chromium: Any, bench: Bench) -> None:
    context = chromium.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto((bench.out / "report.html").as_uri())
    assert tab.inner_text("#k-now") == "20 %"
    assert "this merge" in tab.text_content("table:has(var)")
    context.close()
