"""docs/metrics.md, the alerts and the dashboard against the names that there are; promtool says whether they are valid.

The alerts are tried, too: each of them with series that make it fire, and with the page of a server that is well.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from docs_kit import ROOT, between, table
from metrics_kit import Measured
from prometheus_client.parser import text_string_to_metric_families

from tt.metrics import METRICS

DOCUMENT = (ROOT / "docs/metrics.md").read_text("utf-8")
ALERTS = ROOT / "docs/alerts.yml"
DASHBOARD = json.loads((ROOT / "docs/dashboard.json").read_text("utf-8"))
WIDTH = 24  # of a dashboard
PARTS = ("_bucket", "_sum", "_count")  # of a histogram
SAMPLES = {"up"} | {
    metric.name + part for metric in METRICS for part in (PARTS if metric.kind == "histogram" else ("",))
}  # what an expression may name
LABELS = {"reason", "state", "map", "family", "le", "version", "job", "instance"}

# What makes each alert fire: a series, its values minute by minute in promtool's notation, and when it has to.
FIRES = {
    "TapeTrackDown": ('up{job="tapetrack"}', "0+0x20", "3m"),
    "TapeTrackRestarts": ('process_start_time_seconds{job="tapetrack"}', "0+60x20", "5m"),
    "TapeTrackInternalErrors": ('tt_connections_closed_total{reason="internal"}', "0 0 0 1+0x20", "6m"),
    "TapeTrackAcceptFails": ("tt_accept_failures_total", "0+1x20", "5m"),
    "TapeTrackDescriptorsScarce": ('process_open_fds{job="tapetrack"}', "19000+0x20", "6m"),
    "TapeTrackOverBudget": ('tt_connections_closed_total{reason="too_many"}', "0+700x30", "20m"),
    "TapeTrackManyTimeOuts": ('tt_timeouts_begun_total{reason="not_protocol"}', "0+1300x30", "20m"),
    "TapeTrackTimeOutTableFull": ("tt_timeouts_evicted_total", "0+1x20", "5m"),
    "TapeTrackLoginsGuessed": ('tt_timeouts_begun_total{reason="login_failed"}', "0+1x30", "20m"),
    "TapeTrackOldKeys": ('tt_timeouts_begun_total{reason="bad_hello"}', "0+1x30", "20m"),
    "TapeTrackTampered": ('tt_timeouts_begun_total{reason="tampered"}', "0 0 0 1+0x20", "6m"),
    "TapeTrackOnlyObserves": ("tt_observe", "1+0x1500", "1441m"),
    "TapeTrackKernelMapIncomplete": ('tt_kernel_map_missing{map="/pin",family="IPv4"}', "3+0x20", "6m"),
    "TapeTrackKernelMapErrors": ('tt_kernel_map_errors_total{map="/pin",family="IPv4"}', "0+1x20", "5m"),
    "TapeTrackFilterNotAttached": ("tt_listener_filter_attached", "0+0x20", "6m"),
    "TapeTrackCommitsFail": ("tt_catalog_commit_failures_total", "0 0 0 1+0x20", "6m"),
    "TapeTrackCommitsSlow": ('tt_catalog_commit_seconds_bucket{le="0.5"}', "0+100x30", "20m"),
    "TapeTrackCommitVerySlow": ("tt_catalog_commit_max_seconds", "6+0x20", "1m"),
    "TapeTrackLogLost": ("tt_log_dropped_lines_total", "0 0 0 1+0x20", "6m"),
}
# What the expressions look at besides.
BESIDES = {
    "TapeTrackDescriptorsScarce": {'process_max_fds{job="tapetrack"}': "20000+0x20"},
    "TapeTrackCommitsSlow": {
        'tt_catalog_commit_seconds_bucket{le="0.25"}': "0+1x30",
        'tt_catalog_commit_seconds_bucket{le="+Inf"}': "0+100x30",
    },
}


@pytest.fixture
def promtool(tmp_path: Path) -> Any:
    """Runs it on a file with this content; Debian's package would start a service, so tools/need.sh takes it out."""
    program = shutil.which("promtool", path=f"{os.environ['PATH']}{os.pathsep}{ROOT / 'build/tools'}")
    if program is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("it needs promtool")

    def check(*words: str, content: str | None = None, stdin: bytes | None = None) -> str:
        file = tmp_path / "checked.yml"
        if content is not None:
            file.write_text(content, "utf-8")
        done = subprocess.run(
            [program, *words, *([str(file)] if content is not None else [])],
            input=stdin, capture_output=True, cwd=tmp_path, check=False,
        )  # fmt: skip
        said = (done.stdout + done.stderr).decode()
        assert done.returncode == 0, said
        return said

    return check


def names_in(expression: str) -> set[str]:
    """The metrics of an expression: its words but for labels, functions, and what stands in brackets."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(?:by|without)\s*\([^)]*\)", "", expression)
    return {word for word, call in re.findall(r"\b([a-zA-Z_]\w*)(\s*\()?", bare) if not call}


def alerts() -> dict[str, str]:
    """The expression of each alert."""
    text = ALERTS.read_text("utf-8")
    return dict(re.findall(r"^ +- alert: (\w+)\n +expr: (.*)$", text, re.MULTILINE))


def panels() -> Iterator[dict[str, Any]]:
    """Those that show something."""
    return (panel for panel in DASHBOARD["panels"] if panel["type"] != "row")


def expressions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


# ---- docs/metrics.md ------------------------------------------------------------------------------------------------


def test_the_document_has_every_name_as_it_is() -> None:
    rows = [f"| `{metric.name}` | {metric.kind} | {metric.meaning} |" for metric in METRICS]
    expected = "\n".join(["", "| name | type | meaning |", "| --- | --- | --- |", *rows, "", ""])
    assert between(DOCUMENT, "metrics") == expected, f"the table must be:\n{expected}"


def test_the_document_has_every_alert_as_it_is() -> None:
    rows = table(DOCUMENT, "alert", "severity", "when")
    found = re.findall(
        r"- alert: (\w+)\n +expr: (.*)\n(?: +for: (\w+)\n)? +labels:\n +severity: (\w+)", ALERTS.read_text("utf-8")
    )
    assert rows == [[f"`{a}`", severity, f"`{e}`" + (f" for {f}" if f else "")] for a, e, f, severity in found]


def test_the_documented_scrape_configuration_is_one(promtool: Any) -> None:
    scrape, rules = re.findall(r"```yaml\n(.*?)```", DOCUMENT, re.DOTALL)
    promtool("check", "config", "--syntax-only", content=scrape + rules)


def test_the_page_passes_promtools_rules_for_names(promtool: Any, tmp_path: Path) -> None:
    with Measured(tmp_path / "data") as server:
        assert promtool("check", "metrics", stdin=server.get()[1].encode()) == ""


# ---- docs/alerts.yml ------------------------------------------------------------------------------------------------


def test_alerts_use_names_and_labels_that_there_are() -> None:
    assert len(alerts()) == ALERTS.read_text("utf-8").count("- alert:")
    for alert, expression in alerts().items():
        assert names_in(expression) <= SAMPLES, alert
        assert set(re.findall(r"(\w+)=~?\"", expression)) <= LABELS, alert
        assert names_in(expression), alert


def test_the_rules_are_valid(promtool: Any) -> None:
    assert f"SUCCESS: {len(alerts())} rules found" in promtool("check", "rules", str(ALERTS))


def firing(alert: str, after: str, count: int) -> dict[str, Any]:
    """An expectation of promtool: how many series have that alert firing."""
    expr = f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) or vector(0)'
    return {"expr": expr, "eval_time": after, "exp_samples": [{"labels": "{}", "value": count}]}


def test_every_alert_fires_when_it_should(promtool: Any) -> None:
    assert set(FIRES) == set(alerts())
    tests = [
        {
            "interval": "1m",
            "input_series": [
                {"series": name, "values": text} for name, text in {series: values, **BESIDES.get(alert, {})}.items()
            ],
            "promql_expr_test": [firing(alert, after, 1)],
        }
        for alert, (series, values, after) in FIRES.items()
    ]
    promtool("test", "rules", content=json.dumps({"rule_files": [str(ALERTS)], "tests": tests}))


def test_no_alert_fires_for_a_server_that_is_well(promtool: Any, tmp_path: Path) -> None:
    with Measured(tmp_path / "data") as server:
        page = server.get()[1]
    series = {'up{job="tapetrack"}': 1.0}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels = {"job": "tapetrack", **sample.labels}
            text = ",".join(f'{name}="{value}"' for name, value in labels.items())
            series[f"{sample.name}{{{text}}}"] = sample.value
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": f"{value:.6f}+0x120"} for name, value in series.items()],
        "promql_expr_test": [firing(alert, "2h", 0) for alert in alerts()],
    }
    promtool("test", "rules", content=json.dumps({"rule_files": [str(ALERTS)], "tests": [test]}))


# ---- docs/dashboard.json --------------------------------------------------------------------------------------------


def test_the_dashboard_uses_names_and_labels_that_there_are() -> None:
    for expression in expressions():
        assert names_in(expression) <= SAMPLES, expression
        assert set(re.findall(r"(\w+)=~?\"", expression)) <= LABELS, expression
    used = set().union(*map(names_in, expressions()))
    assert {"tt_timeouts_begun_total", "tt_kernel_map_missing", "tt_catalog_commit_seconds_bucket", "up"} <= used


def test_the_expressions_of_the_dashboard_are_promql(promtool: Any) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": expression.replace("$__rate_interval", "5m")}
        for number, expression in enumerate(expressions())
    ]
    promtool("check", "rules", content=json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))


def test_the_dashboard_is_what_grafana_imports() -> None:
    assert DASHBOARD["title"]
    assert re.fullmatch(r"[a-z0-9-]{1,40}", DASHBOARD["uid"])
    assert DASHBOARD["schemaVersion"] >= 36  # from there on a data source is named by type and uid
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD)))
    assert used - {"__rate_interval", "__all"} == variables
    for panel in panels():
        assert panel["type"] in ("stat", "timeseries")
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"] in ("none", "s", "ops", "bytes", "percentunit")
        references = [target["refId"] for target in panel["targets"]]
        assert references == [chr(ord("A") + number) for number in range(len(references))]
        for source in (panel, *panel["targets"]):
            assert source["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_no_two_panels_of_the_dashboard_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= WIDTH
        taken |= cells
