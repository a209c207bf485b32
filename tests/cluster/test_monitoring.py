"""Dashboard and alerts: of no metric, label or value but those that a run exports."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from svdmerge.engine.retry import Failure
from svdmerge.engine.tally import METRICS

MONITORING = Path(__file__).parents[2] / "cluster" / "monitoring"
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
RULES = yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"]["groups"]
EXPORTED = {metric.exported: metric for metric in METRICS}
VALUES = {
    "state": {"done", "failed", "waiting", "running", "computed", "reused"},
    "cause": {str(failure) for failure in Failure},
}


def expressions() -> Iterator[str]:
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    for group in RULES:
        yield from (rule["expr"] for rule in group["rules"])


def test_every_expression_is_of_exported_metrics_by_their_labels() -> None:
    for expression in expressions():
        names = re.findall(r"\bray_\w+", expression)
        assert names, expression
        for name in names:
            assert name in EXPORTED, f"{name} in {expression}"
        labels = {label for name in names for label in EXPORTED[name].labels}
        grouped = {
            label.strip()
            for part in re.findall(r"\bby \(([^)]*)\)", expression)
            for label in part.split(",")
        }
        matched = re.findall(r'(\w+)="([^"]*)"', expression)
        assert grouped | {label for label, _ in matched} <= labels, expression
        assert all(value in VALUES[label] for label, value in matched), expression
        for pair in ("()", "{}", "[]"):
            assert expression.count(pair[0]) == expression.count(pair[1]), expression


def test_counters_are_read_by_their_growth() -> None:
    for expression in expressions():
        for name in re.findall(r"\bray_\w+_total", expression):
            assert re.search(rf"(rate|increase)\({name}", expression), expression


def test_every_metric_has_a_panel() -> None:
    shown = " ".join(t["expr"] for panel in DASHBOARD["panels"] for t in panel["targets"])
    assert set(re.findall(r"\bray_\w+", shown)) == set(EXPORTED)


def test_panels_do_not_overlap_and_take_their_source_from_the_variable() -> None:
    ids: list[Any] = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken = set[tuple[int, int]]()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24
        assert not cells & taken
        taken |= cells
        assert panel["datasource"]["uid"] == "${datasource}"
    assert [v["name"] for v in DASHBOARD["templating"]["list"]] == ["datasource"]


def test_legends_and_summaries_name_labels_that_are_left() -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            grouped = re.findall(r"\bby \(([^)]*)\)", target["expr"])
            left = {label.strip() for part in grouped for label in part.split(",")}
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) == left
    for rule in (rule for group in RULES for rule in group["rules"]):
        used = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
        assert used <= set(re.findall(r"\bby \((\w+)\)", rule["expr"]))


def test_the_readme_lists_the_metrics_with_their_labels() -> None:
    text = (MONITORING.parent / "README.md").read_text()
    rows = re.findall(r"^\| (`ray_\w+`[^|]*) \| ([^|]*)\|$", text, flags=re.MULTILINE)
    told = {name: "".join(re.findall(r"^`(\w+)`", labels)) for names, labels in rows
            for name in re.findall(r"ray_\w+", names)}  # fmt: skip
    assert told == {name: "".join(metric.labels[1:]) for name, metric in EXPORTED.items()}
