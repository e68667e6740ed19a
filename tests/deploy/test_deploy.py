"""`crossgate deploy`: one small file in, Kustomize input out, and no for what cannot work."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from crossgate.cli import app
from crossgate.deploy import build, load_settings
from crossgate.errors import UserError
from crossgate.runs.estimate import refuse_too_large

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "k8s"))

from agreement_rules import agreement, recipe_of  # noqa: E402
from manifests import named, objects, render, rendered, validate  # noqa: E402
from security_rules import images, security  # noqa: E402

DIGEST = "sha256:" + 64 * "a"
GOOD: dict[str, Any] = {
    "name": "mine",
    "shards": "s3://bucket/shards",
    "image": f"registry.example.com/team/crossgate@{DIGEST}",
    "serving_image": f"registry.example.com:5000/crossgate-serving:0.1.0@{DIGEST}",
    "artifacts": "s3://bucket/mlflow",
    "checkpoints": "s3://bucket/checkpoints",
    "videos": "s3://bucket/videos",
    "scores": "s3://bucket/scores",
    "nodes": 2,
}


@pytest.fixture
def manifests(tmp_path: Path) -> Path:
    """A copy of k8s/ to write into."""
    return Path(shutil.copytree(ROOT / "k8s", tmp_path / "k8s"))


def settings_file(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **changes}))
    return path


def applied(manifests: Path, name: str = "mine") -> list[str]:
    folder = manifests / "overlays" / name
    return [rendered("cluster-admin"), *(render(path.parent) for path in sorted(folder.rglob("kustomization.yaml")))]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"role_arn": "arn:aws:iam::123456789012:role/train", "spot": True, "nodes": 4},
        {
            "endpoint": "http://minio.storage:9000",
            "runs_storage_class": "fast",
            "serving_image": "",
            "artifacts": "",
            "checkpoints": "",
            "videos": "",
            "scores": "",
        },
    ],
    ids=["keys", "role and spot", "own storage"],
)
def test_what_it_writes_is_as_sound_as_the_shipped_overlays(
    tmp_path: Path, manifests: Path, changes: dict[str, Any]
) -> None:
    build(load_settings(settings_file(tmp_path, **changes)), manifests).write()
    texts = applied(manifests)
    status, said = validate(texts, tmp_path)
    assert status == 0, said
    found = [thing for text in texts for thing in objects(text)]
    assert security(found) == [] and agreement(found) == []
    assert list(images(found, by_digest=True)) == []
    assert "example-bucket" not in "".join(texts)
    assert "000000000000:role" not in "".join(texts)


def test_sizes_bucket_and_images_arrive(tmp_path: Path, manifests: Path) -> None:
    build(load_settings(settings_file(tmp_path)), manifests).write()
    found = [thing for text in applied(manifests) for thing in objects(text)]
    job = next(thing for thing in found if named(thing) == "RayJob/pretrain")
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (2, 2, 2)
    container = group["template"]["spec"]["containers"][0]
    assert container["image"] == GOOD["image"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    recipe = recipe_of(job, found)
    assert recipe is not None
    assert recipe.cluster.workers == 16 and recipe.data.index == GOOD["shards"]
    assert recipe.run.name == "pretrain-v1"
    assert recipe.training.checkpoint_url == GOOD["checkpoints"]
    predict = next(thing for thing in found if named(thing) == "RayJob/predict")
    assert predict["spec"]["entrypoint"].endswith("@champion s3://bucket/videos --out s3://bucket/scores")
    server = next(thing for thing in found if named(thing) == "Deployment/mlflow")
    env = {entry["name"]: entry.get("value") for entry in server["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert env["MLFLOW_ARTIFACTS_DESTINATION"] == GOOD["artifacts"]


@pytest.mark.parametrize(
    ("endpoint", "ports", "namespaces"),
    [
        ("https://s3.example.com", [443], []),
        ("https://s3.example.com:8443", [443, 8443], []),
        ("http://10.0.0.7", [443, 80], []),
        ("http://minio.storage:9000", [443, 9000], ["storage"]),
        ("https://minio.storage.svc.cluster.local", [443], ["storage"]),
    ],
)
def test_pods_may_reach_the_endpoint(
    tmp_path: Path, manifests: Path, endpoint: str, ports: list[int], namespaces: list[str]
) -> None:
    build(load_settings(settings_file(tmp_path, endpoint=endpoint)), manifests).write()
    found = objects(render(manifests / "overlays" / "mine"))
    policy = next(thing for thing in found if named(thing) == "NetworkPolicy/object-storage")
    rule = policy["spec"]["egress"][0]
    assert [entry["port"] for entry in rule["ports"]] == ports
    others = [entry["namespaceSelector"]["matchLabels"] for entry in rule["to"] if "namespaceSelector" in entry]
    assert others == [{"kubernetes.io/metadata.name": name} for name in namespaces]


def test_your_own_recipe_is_the_one_that_runs(tmp_path: Path, manifests: Path) -> None:
    own = tmp_path / "tiny.yaml"
    own.write_text("kind: pretrain\nrun: {name: tiny}\ndata: {global_batch: 32}\n")
    overlay = build(load_settings(settings_file(tmp_path, recipe="tiny.yaml")), manifests, beside=tmp_path)
    written = yaml.safe_load(overlay.files["jobs/pretrain.yaml"])
    assert written["run"] == {"name": "tiny", "output": "/runs"}
    assert written["cluster"] == {"launcher": "ray", "workers": 16, "gpus_per_worker": 1}


def test_without_somewhere_to_upload_and_score_there_is_neither(tmp_path: Path, manifests: Path) -> None:
    files = build(load_settings(settings_file(tmp_path, checkpoints="", videos="", scores="")), manifests).files
    assert yaml.safe_load(files["jobs/pretrain.yaml"])["training"]["checkpoint_url"] == ""
    assert "predict" not in files["jobs/kustomization.yaml"]


@pytest.fixture
def small(manifests: Path) -> Path:
    """The manifests with models that are estimated at once."""
    for job in ("pretrain", "finetune", "search"):
        path = manifests / "jobs" / job / f"{job}.yaml"
        tree = yaml.safe_load(path.read_text())
        tiny = {"backbone": "test_efficientnet", "norm": "group"}
        tree["model"] = {"encoders": {"rgb": tiny, "audio": tiny}}
        tree["data"]["clip"] = {"modalities": ["rgb", "audio"], "frames": 1, "size": 32, "mels": 32}
        path.write_text(yaml.safe_dump(tree))
    return manifests


@pytest.mark.parametrize("job", ["pretrain", "finetune", "search"])
def test_a_recipe_too_large_for_its_gpu_is_refused(tmp_path: Path, small: Path, job: str) -> None:
    settings = load_settings(settings_file(tmp_path, gpu_memory_gib=1))
    path = small / "jobs" / job / f"{job}.yaml"
    path.write_text(path.read_text().replace("frames: 1", "frames: 32").replace("size: 32", "size: 96"))
    recipes = dict(build(settings, small).trainings())
    assert set(recipes) == {"pretrain", "finetune", "search"}
    with pytest.raises(UserError, match=r"it: a rank wants .* its GPU has 1; lower data.global_batch"):
        refuse_too_large(recipes[job], settings.gpu_memory_gib, where="it")


def test_the_diff_is_shown_and_nothing_is_written_unless_asked(tmp_path: Path, small: Path) -> None:
    def deploy(*words: str) -> str:
        done = CliRunner().invoke(app, ["deploy", str(path), "--manifests", str(small), *words])
        assert done.exit_code == 0, done.output
        return done.output

    path = settings_file(tmp_path)
    shown = deploy()
    assert "+- name: crossgate" in shown and "nothing was written" in shown
    assert not (small / "overlays" / "mine").exists()
    deploy("--write")
    settings_file(tmp_path, nodes=4)
    changed = deploy()
    assert "-  workers: 16" in changed and "+  workers: 32" in changed
    assert "newName" not in changed  # only what differs
    settings_file(tmp_path)
    assert "is as it should be" in deploy()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"shards": ""}, "names no bucket"),
        ({"shards": "/data/shards"}, "names no bucket"),
        ({"shards": "s3://example-bucket/shards"}, "the example's bucket"),
        ({"artifacts": "s3://"}, "names no bucket"),
        ({"artifacts": "s3://KEY:s3cret@bucket/mlflow"}, "key 'artifacts': .*credentials into the environment$"),
        ({"checkpoints": "/checkpoints"}, "names no bucket"),
        ({"scores": ""}, "'videos' and 'scores'"),
        ({"videos": "s3://bucket/a;b"}, "letters, digits"),
        ({"gpu_memory_gib": 0}, "greater than 0"),
        ({"endpoint": "minio.storage:9000"}, r"expected http\(s\)://HOST"),
        ({"endpoint": "http://minio.storage:99999"}, r"expected http\(s\)://HOST"),
        ({"image": "crossgate"}, "another image tomorrow"),
        ({"image": "registry.example.com:5000/crossgate"}, "another image tomorrow"),
        ({"image": "crossgate:latest"}, "another image tomorrow"),
        ({"image": "crossgate@sha256:" + 64 * "0"}, "the example's"),
        ({"image": "crossgate@sha256:abc"}, "no digest"),
        ({"name": "prod"}, "will not do"),
        ({"name": "../else"}, "will not do"),
        ({"nodes": 3}, "make it 1008 or 1032"),
        ({"nodes": 0}, "greater than or equal to 1"),
        ({"nodes": 8}, "quota is 32"),
        ({"cpus_per_node": 64}, "cluster.cpus_per_worker to 8 or less"),
        ({"gpu_per_node": 4}, "gpus_per_node"),
        ({"spot": True, "recipe": "epochs.yaml"}, "training.save_minutes"),
        ({"recipe": "finetune.yaml"}, "kind 'pretrain'"),
        ({"recipe": "none.yaml"}, "no such recipe"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    tmp_path: Path, manifests: Path, changes: dict[str, Any], complaint: str
) -> None:
    (tmp_path / "epochs.yaml").write_text("kind: pretrain\ndata: {global_batch: 32}\n")
    (tmp_path / "finetune.yaml").write_text("kind: finetune\ndata: {global_batch: 32}\n")
    with pytest.raises(UserError, match=complaint) as caught:
        build(load_settings(settings_file(tmp_path, **changes)), manifests, beside=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("job", ["finetune", "search"])
def test_every_trained_job_on_spot_nodes_must_save_within_an_epoch(tmp_path: Path, manifests: Path, job: str) -> None:
    recipe = manifests / "jobs" / job / f"{job}.yaml"
    recipe.write_text(recipe.read_text().replace(", save_minutes: 10", ""))
    build(load_settings(settings_file(tmp_path)), manifests)
    with pytest.raises(UserError, match=rf"{job}.yaml: spot nodes .* set training.save_minutes"):
        build(load_settings(settings_file(tmp_path, spot=True)), manifests)


def test_a_key_left_out_and_a_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "half.yaml"
    path.write_text("name: mine\n")
    with pytest.raises(UserError, match="key 'shards' is missing"):
        load_settings(path)
    path.write_text("- 1\n")
    with pytest.raises(UserError, match="YAML mapping"):
        load_settings(path)
    with pytest.raises(UserError, match="no such settings"):
        load_settings(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="no manifests"):
        build(load_settings(settings_file(tmp_path)), tmp_path)


def test_the_example_names_every_setting_and_is_refused_until_filled_in() -> None:
    from crossgate.deploy import DeployConfig

    example = ROOT / "k8s" / "deploy.example.yaml"
    assert yaml.safe_load(example.read_text()).keys() == DeployConfig.model_fields.keys()
    with pytest.raises(UserError, match="the example's"):
        load_settings(example)
