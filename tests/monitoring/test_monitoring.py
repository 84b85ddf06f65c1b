# Copyright: the agentlab.proxmox contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Alert rules and dashboard: their syntax and behaviour by promtool, their names by the metrics of a real daemon,
their words by the documentation.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.agentlab.proxmox.plugins.module_utils._core import states
from prometheus_client.parser import text_string_to_metric_families

from support.daemon import daemon
from support.double import Server

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "roles/agentlabd/files/monitoring"
RULES = MONITORING / "agentlab-alerts.yml"
CASES = Path(__file__).with_name("alerts_test.yml")
DASHBOARD = json.loads((MONITORING / "agentlab-dashboard.json").read_text())
PAGE = (ROOT / "docs/monitoring.md").read_text()
GROUPS = yaml.safe_load(RULES.read_text())["groups"]
ALERTS = {rule["alert"]: rule for group in GROUPS for rule in group["rules"] if "alert" in rule}
RECORDS = {rule["record"]: rule for group in GROUPS for rule in group["rules"] if "record" in rule}
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def promtool(*arguments: object) -> subprocess.CompletedProcess[str]:
    assert shutil.which("promtool"), "promtool is missing: apt install prometheus"
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=300)


class Exposed:
    """What /metrics of a daemon has: series names, and for each the values of its labels."""

    def __init__(self, text: str) -> None:
        self.kinds: dict[str, str] = {}
        self.series: dict[str, dict[str, set[str]]] = {}
        for family in text_string_to_metric_families(text):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            self.kinds[name] = family.type
            for sample in family.samples:
                labels = self.series.setdefault(sample.name, {})
                for label, value in sample.labels.items():
                    labels.setdefault(label, set()).add(value)


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exposed]:
    folder = tmp_path_factory.mktemp("exposed")
    server = Server(str(folder))
    server.pve.add_template()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        with (
            daemon(folder / "daemon", server.environment(str(folder)), metrics_listen=f"127.0.0.1:{port}") as one,
        ):
            # Creations are counted by node, and a node has a line once a sandbox was created on it.
            one.good("POST", "/v1/sandboxes", {"template": "9000", "name": "counted", "wait_for_ip": False}, 201)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                yield Exposed(answer.read().decode())
    finally:
        server.stop()


# ---- behaviour ----


def test_the_rules_are_valid() -> None:
    found = promtool("check", "rules", "--lint=all", "--lint-fatal", RULES)
    assert found.returncode == 0, found.stdout + found.stderr


def test_every_alert_fires_when_it_should_and_only_then() -> None:
    found = promtool("test", "rules", CASES)
    assert found.returncode == 0, found.stdout + found.stderr


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    fires, quiet = set(), set()
    for case in yaml.safe_load(CASES.read_text())["tests"]:
        for one in case["alert_rule_test"]:
            (fires if one["exp_alerts"] else quiet).add(one["alertname"])
    assert fires == quiet == set(ALERTS)


def test_the_queries_of_the_dashboard_are_valid(tmp_path: Path) -> None:
    # As rules, so that promtool parses them. Grafana puts the variables in.
    filled = [query.replace("$job", "agentlab").replace("$instance", ".*") for query in QUERIES]
    assert not [query for query in filled if "$" in query]
    rules = [{"record": f"dashboard:query{number}", "expr": query} for number, query in enumerate(filled)]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    found = promtool("check", "rules", tmp_path / "rules.yml")
    assert found.returncode == 0, found.stdout + found.stderr
    assert f"{len(QUERIES)} rules found" in found.stdout


# ---- names ----


def selectors(expression: str) -> Iterator[tuple[str, str]]:
    """Each series that an expression names, with what stands in its braces."""
    for found in re.finditer(r"\b(agentlab[\w:]*)(?:\{([^}]*)\})?", re.sub(r'job="[^"]*"|"\$\w+"', "", expression)):
        yield found[1], found[2] or ""


def check(expression: str, exposed: Exposed) -> set[str]:
    """Every series, label and label value of an expression is one that the daemon has. Answers the series' names."""
    names = set()
    for name, braces in selectors(expression):
        names.add(name)
        if name in RECORDS:
            continue
        assert name in exposed.series, f"the daemon has no {name}: {expression}"
        for label, _operator, value in re.findall(r'(\w+)(=~|!=|!~|=)"([^"]*)"', braces):
            if label not in ("job", "instance"):
                assert value in exposed.series[name].get(label, ()), f"{name} has no {label}={value}: {expression}"
    for labels in re.findall(r"\b(?:by|without) \(([^)]*)\)", expression):
        known = {label for name in names for label in exposed.series.get(name, ())} | {"le", "instance", "job"}
        assert set(labels.replace(" ", "").split(",")) <= known, expression
    return names


def test_alerts_name_only_what_the_daemon_has(exposed: Exposed) -> None:
    for name, rule in {**ALERTS, **RECORDS}.items():
        used = check(rule["expr"], exposed)
        assert used or "up{" in rule["expr"], name


def test_the_dashboard_names_only_what_the_daemon_has_and_all_of_it(exposed: Exposed) -> None:
    used = set().union(*(check(query, exposed) for query in QUERIES))
    shown = {re.sub("_(bucket|sum|count)$", "", name) if exposed.kinds.get(name) is None else name for name in used}
    assert shown == set(exposed.kinds)


def test_a_wrong_name_would_be_found(exposed: Exposed) -> None:
    for wrong in (
        "agentlab_prunes_total",
        'agentlab_prune_runs_total{result="bad"}',
        'agentlab_sandboxes{status="RUNNING"}',
        "sum by (nonsense) (agentlab_sandboxes)",
    ):
        with pytest.raises(AssertionError):
            check(wrong, exposed)


def test_no_series_for_single_machines(exposed: Exposed) -> None:
    labels = {label for found in exposed.series.values() for label in found}
    assert labels == {
        "state",
        "result",
        "reason",
        "kind",
        "verdict",
        "operation",
        "method",
        "version",
        "le",
        "part",
        "duty",
        "what",
        "node",
    }


# ---- words ----


def test_every_alert_says_how_bad_what_and_where_to_read_on() -> None:
    for name, rule in ALERTS.items():
        assert name.startswith("Agentlab")
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
        assert (
            rule["annotations"]["runbook_url"]
            == f"https://github.com/agentlab/agentlab.proxmox/blob/main/docs/monitoring.md#{name.lower()}"
        )
    assert re.findall(r"^### (\w+)$", PAGE, re.M) == list(ALERTS), "each alert has its section, in the same order"


def test_every_metric_is_documented_with_its_labels(exposed: Exposed) -> None:
    table = PAGE.split("<!-- metrics -->")[1].split("<!-- /metrics -->")[0]
    rows = {
        name: (kind.strip(), labels.strip())
        for name, kind, labels in re.findall(r"^\| `(\w+)` \|([^|]*)\|([^|]*)\|", table, re.M)
    }
    assert set(rows) == set(exposed.kinds)
    for name, (kind, labels) in rows.items():
        assert kind == exposed.kinds[name], name
        series = exposed.series[f"{name}_count" if kind == "histogram" else name]
        told = {}
        for part in filter(None, labels.split("; ")):
            label, _colon, values = part.partition(": ")
            told[label.strip("`")] = set(states.STATES) if values == "all states" else set(values.split(", "))
            if values == "any":
                told[label.strip("`")] = series[label.strip("`")]
        if "version" in told:
            told["version"] = series["version"]
        assert told == series, name


def test_the_dashboard_can_be_imported() -> None:
    """What Grafana needs of a file: one id for each panel, no overlap, a data source that is chosen at import."""
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    places: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & places, panel["title"]
        places |= cells
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
    names: list[Any] = [one["name"] for one in DASHBOARD["templating"]["list"]]
    assert names == ["datasource", "job", "instance"]
