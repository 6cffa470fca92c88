"""The reference page and the dashboard name exactly the metrics that are exposed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.admin.scrape import every_metric, exposed

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "metrics.md"
DASHBOARD = json.loads((ROOT / "examples" / "grafana" / "dashboards" / "userspace-proxy.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TIME_SERIES = {"_bucket", "_sum", "_count"}


def test_the_page_has_every_metric_with_its_type_in_the_order_of_a_scrape() -> None:
    told = re.findall(r"^\| `(\w+)` \| (\w+) \| \S", PAGE.read_text(), re.MULTILINE)

    assert told == [(metric.name, metric.type) for metric in exposed(every_metric())]


def test_the_page_names_the_labels_of_each_metric() -> None:
    known = {metric.name: set(metric.labels) for metric in exposed(every_metric())}

    for section in PAGE.read_text().split("\n## ")[1:-1]:
        said = re.search(r"^Labels: (.*)$", section, re.MULTILINE)
        assert said, section[:30]
        names = set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE))
        rows = "".join(row.rpartition("|")[0] for row in re.findall(r"(?<=\| ).*$", section, re.MULTILINE))
        in_section = set(re.findall(r"`(\w+)`", said[1])) | {
            label for label in ("code", "traffic_policy", "table") if f"`{label}`" in rows
        }
        assert set().union(*(known[name] for name in names)) == in_section, section[:30]


def metrics_in(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:userspace_proxy|kubeproxy)_\w+", expression))


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_asks_for_what_is_exposed(panel: dict[str, Any]) -> None:
    known = {metric.name: set(metric.labels) for metric in exposed(every_metric())}
    known |= {name + end: labels | {"le"} for name, labels in known.items() for end in TIME_SERIES}

    for target in panel["targets"]:
        names = metrics_in(target["expr"])
        assert names
        assert names <= known.keys()
        labels = set(re.findall(r"(\w+)!?=~?\"", target["expr"])) | set(
            re.findall(r"{{(\w+)}}", target["legendFormat"])
        )
        for grouped in re.findall(r"by \(([^)]*)\)", target["expr"]):
            labels |= set(grouped.split(", "))
        assert labels <= set().union(*(known[name] for name in names)) | {"instance"}


def test_the_dashboard_has_a_row_for_each_question() -> None:
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    asked = {name for variable in DASHBOARD["templating"]["list"] for name in metrics_in(str(variable.get("query")))}

    assert rows == ["Traffic", "Failures", "Syncs and programming latency", "Source and health"]
    assert asked <= {metric.name for metric in exposed(every_metric())}
    places = [tuple(panel["gridPos"].values()) for panel in DASHBOARD["panels"]]
    assert len(places) == len(set(places))
