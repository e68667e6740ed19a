"""The dashboard and the scrape settings: loadable, and about metrics that exist."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml
from manifests import named, objects, rendered

from crossgate.cluster.meters import STARTED, metric_name

# Written by the training loop (training/window, training/meters, stream/loader); the loop's own tests hold them.
METERS = (
    "throughput/clips_per_s",
    "throughput/mfu_pct",
    "time/data_wait_pct",
    "time/step_s_p95",
    "memory/gpu_peak_gib",
    "train/loss",
    "data/bad_clips",
)
RAYS_OWN = {"ray_node_mem_used", "ray_node_mem_total", "ray_node_disk_free"}
"""Seen in a scrape of Ray: tests/cluster/test_meters.py looks again."""


def config_map(name: str) -> dict[str, str]:
    found = objects(rendered("overlays/prod"))
    return next(thing["data"] for thing in found if named(thing) == f"ConfigMap/{name}")


def dashboard() -> dict[str, Any]:
    return json.loads(config_map("crossgate-dashboard")["crossgate.json"])


def expressions() -> list[str]:
    return [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]


def test_the_dashboard_has_what_grafana_asks_of_one() -> None:
    board = dashboard()
    assert board["uid"] and board["title"] and board["schemaVersion"] >= 30
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    corners = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24
        corners.add((place["x"], place["y"]))
        assert panel["type"] in ("timeseries", "stat") and panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert all(target["refId"] for target in panel["targets"])
    assert len(corners) == len(board["panels"]), "two panels in one place"
    variables = {variable["name"] for variable in board["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(board))) <= variables


def test_it_shows_what_is_promised_and_only_metrics_that_exist() -> None:
    used = set(re.findall(r"ray_\w+", " ".join(expressions()))) - {"ray_node_type"}
    exported = {f"ray_{metric_name(name)}" for name in METERS} | {f"ray_{STARTED}"}
    assert used == exported | RAYS_OWN


def test_its_queries_are_whole() -> None:
    for expression in expressions():
        for one, other in ("()", "{}", "[]"):
            assert expression.count(one) == expression.count(other), expression
        assert re.fullmatch(r"(max|min|sum|changes)\b.*", expression), expression


def test_the_loop_writes_these_meters() -> None:
    """By their names in the code that writes them, so that a renamed meter is missed here and not on the wall."""
    from pathlib import Path

    import crossgate

    package = Path(crossgate.__file__).parent
    files = ("training/meters.py", "training/window.py", "training/loop.py", "stream/loader.py")
    source = "".join((package / file).read_text() for file in files)
    for name in METERS:
        assert f'"{name}"' in source or f'"{name.partition("/")[2]}"' in source, name


def test_prometheus_scrapes_the_port_that_the_pods_name() -> None:
    settings = yaml.safe_load(config_map("crossgate-prometheus")["scrape.yaml"])
    (job,) = settings["scrape_configs"]
    assert job["kubernetes_sd_configs"] == [{"role": "pod", "namespaces": {"names": ["crossgate"]}}]
    kept = {rule["source_labels"][0]: rule["regex"] for rule in job["relabel_configs"] if rule.get("action") == "keep"}
    assert kept["__meta_kubernetes_pod_label_ray_io_is_ray_node"] == "yes"
    name = kept["__meta_kubernetes_pod_container_port_name"]
    for part in ("overlays/prod/jobs", "overlays/prod/raycluster"):
        text = rendered(part)
        ports = re.findall(rf"containerPort: (\d+)\n\s+name: {name}\n", text)
        assert ports and set(ports) == {"8080"}
    policy = next(t for t in objects(rendered("overlays/prod")) if named(t) == "NetworkPolicy/ray-metrics")
    assert policy["spec"]["ingress"][0]["ports"] == [{"protocol": "TCP", "port": 8080}]
