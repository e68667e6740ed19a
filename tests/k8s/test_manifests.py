"""The manifests as they are committed: rendered, validated, closed, and in agreement with the code."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from agreement_rules import agreement, asked, pinned, recipe_of, stated
from manifests import (
    K8S,
    PINNED,
    SETS,
    containers,
    crd_folders,
    kubectl,
    named,
    objects,
    objects_of,
    pods,
    render,
    rendered,
    validate,
)
from security_rules import images, security

FOLDERS = sorted(str(path.parent.relative_to(K8S)) for path in K8S.rglob("kustomization.yaml"))
COMPONENTS = [
    folder
    for folder in FOLDERS
    if yaml.safe_load((K8S / folder / "kustomization.yaml").read_text())["kind"] == "Component"
]
KUSTOMIZATIONS = [folder for folder in FOLDERS if folder not in COMPONENTS]
OTHER = shutil.which("kubectl", path="/usr/local/bin:/usr/bin:/bin")


@pytest.mark.parametrize("folder", KUSTOMIZATIONS)
def test_renders_alike_with_two_kubectls(folder: str) -> None:
    first = rendered(folder)
    assert objects(first)
    if OTHER is None or not PINNED.exists():
        pytest.skip("only one kubectl on this machine")
    assert render(K8S / folder, OTHER) == first


@pytest.mark.parametrize("name", SETS)
def test_the_validator_finds_nothing(name: str, tmp_path: Path) -> None:
    status, said = validate([rendered(part) for part in SETS[name]], tmp_path)
    assert status == 0, said
    assert "0 errors, 0 warnings" in said, said


@pytest.mark.parametrize("name", SETS)
def test_security(name: str) -> None:
    assert security(objects_of(name)) == []


@pytest.mark.parametrize("name", SETS)
def test_agreement_with_command_line_recipes_and_versions(name: str) -> None:
    assert agreement(objects_of(name)) == []


@pytest.mark.parametrize(("name", "by_digest"), [("local", False), ("gpu", False), ("prod", True)])
def test_images_are_named_exactly(name: str, by_digest: bool) -> None:
    assert list(images(objects_of(name), by_digest=by_digest)) == []


def test_every_folder_is_part_of_a_set_or_of_an_overlay() -> None:
    """A folder that nothing renders would rot."""
    used = {part for parts in SETS.values() for part in parts}
    for folder in FOLDERS:
        tree = yaml.safe_load((K8S / folder / "kustomization.yaml").read_text())
        for target in (*tree.get("resources", ()), *tree.get("components", ())):
            path = (K8S / folder / target).resolve()
            if path.is_dir():
                used.add(str(path.relative_to(K8S)))
    assert set(FOLDERS) - used == {"components/rdma"}  # rendered below


def test_rdma_reaches_the_gpu_workers(tmp_path: Path) -> None:
    jobs = _jobs_with(tmp_path, "rdma")
    limits = jobs["pretrain"]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    assert limits["resources"]["limits"]["rdma/hca_shared_devices_a"] == "1"
    assert {"name": "NCCL_IB_HCA", "value": "mlx5"} in limits["env"]
    assert security(list(jobs.values()) + objects_of("local")) == []  # no capability that the namespace refuses


def test_local_fits_a_small_node_and_needs_no_bucket() -> None:
    found = objects_of("local")
    total = asked(found)
    assert total["cpu"] <= 2 and total["memory"] <= 6 * 2**30, total
    text = rendered("overlays/local")
    assert "s3://" not in text and "nvidia" not in text and "secretRef" not in text
    job = next(thing for thing in found if thing["kind"] == "RayJob")
    assert job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 1


def test_local_runs_the_demos_pretraining(tmp_path: Path) -> None:
    """Where this fails, the demo's recipe has changed: put its values into k8s/overlays/local/pretrain.yaml."""
    from crossgate.runs.demo_recipes import DemoRecipes

    found = objects_of("local")
    recipe = recipe_of(next(thing for thing in found if thing["kind"] == "RayJob"), found)
    demo = DemoRecipes(
        tmp_path,
        "/runs/demo/shards",
        modalities=("rgb", "flow", "audio", "depth"),
        pretrain_splits=("train", "unlabelled"),
        output=Path("/runs"),
        generated=True,
        workers=1,
        quick=False,
    ).pretrain()
    assert recipe is not None
    recipe.run.name = demo.run.name
    assert recipe.model_dump() == demo.model_dump()


def test_local_makes_the_clips_that_its_recipe_reads() -> None:
    from agreement_rules import parse

    found = objects_of("local")
    job = next(thing for thing in found if thing["kind"] == "RayJob")
    pod = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    synth, pack = (parse(*step["command"])[1] for step in pod["initContainers"])
    recipe = recipe_of(job, found)
    assert recipe is not None
    assert Path(pack["manifest"]) == Path(synth["out"]) / "manifest.csv"
    assert pack["out"] == recipe.data.index
    assert synth["unlabelled"] > 0  # the recipe's second split


def test_jobs_of_the_clouds_reach_their_storage_and_queue() -> None:
    """A component whose patch matches nothing says nothing: its effect is looked for."""
    for name in ("gpu", "prod"):
        found = objects_of(name)
        jobs = [thing for thing in found if thing["kind"] == "RayJob"]
        assert {thing["metadata"]["name"] for thing in jobs} == {
            "pretrain",
            "finetune",
            "search",
            "evaluate",
            "release",
            "predict",
        }
        for job in jobs:
            assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "crossgate"
            wants_gpu = job["metadata"]["labels"]["crossgate/device"] == "gpu"
            for path, _, pod in pods(job):
                limits = pod["containers"][0]["resources"]["limits"]
                assert ("nvidia.com/gpu" in limits) == (wants_gpu and "workerGroupSpecs" in path), named(job)
                refs = [ref.get("secretRef", {}).get("name") for ref in pod["containers"][0]["envFrom"]]
                assert ("s3-credentials" in refs) == (name == "gpu"), named(job)
    accounts = {t["metadata"]["name"]: t for t in objects_of("prod") if t["kind"] == "ServiceAccount"}
    for account in ("trainer", "mlflow", "ray-head"):
        assert "eks.amazonaws.com/role-arn" in accounts[account]["metadata"]["annotations"]


def test_spot_takes_workers_only() -> None:
    for job in (thing for thing in objects_of("prod") if thing["kind"] == "RayJob"):
        cluster = job["spec"]["rayClusterSpec"]
        assert cluster["headGroupSpec"]["template"]["spec"]["nodeSelector"] == {
            "karpenter.sh/capacity-type": "on-demand"
        }
        worker = cluster["workerGroupSpecs"][0]["template"]["spec"]
        assert worker["nodeSelector"] == {"karpenter.sh/capacity-type": "spot"}
        assert worker["terminationGracePeriodSeconds"] == 120
        recipe = recipe_of(job, objects_of("prod"))
        if recipe is not None and recipe.kind != "evaluate":
            assert recipe.training.save_minutes > 0  # what a lost node costs is bounded


@pytest.mark.parametrize("name", ["gpu", "prod"])
def test_checkpoints_of_the_clouds_are_uploaded(name: str) -> None:
    found = objects_of(name)
    recipes = [recipe_of(job, found) for job in found if job["kind"] == "RayJob"]
    trained = [recipe for recipe in recipes if recipe is not None and recipe.kind in ("pretrain", "finetune")]
    assert len(trained) == 2 and all(recipe.training.checkpoint_url.startswith("s3://") for recipe in trained)


def test_prod_keeps_its_records_in_postgres_and_tells_nobody_the_password() -> None:
    server = next(t for t in objects_of("prod") if named(t) == "Deployment/mlflow")
    env = {entry["name"]: entry for entry in server["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert env["MLFLOW_BACKEND_STORE_URI"]["valueFrom"]["secretKeyRef"] == {"name": "mlflow-database", "key": "uri"}
    assert "psycopg2-binary" in pinned()


def test_served_model_is_ready_only_once_loaded_and_reads_nothing_for_strangers() -> None:
    import json

    served = next(t for t in objects_of("gpu") if named(t) == "Deployment/serving")
    container = containers(served["spec"]["template"]["spec"])[0]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    config = json.loads(env["SERVING_MODEL_CONFIG"])
    assert config["paths"] is False and config["urls"] is False
    assert container["readinessProbe"]["httpGet"]["path"] == "/ping" and "startupProbe" in container
    from crossgate.registry.sources import Settings

    assert config.keys() <= set(Settings.model_fields)


def test_versions_agree() -> None:
    version = stated()
    assert version["RAY"] == pinned()["ray"] and version["MLFLOW"] == pinned()["mlflow"]
    assert {folder.name for folder in crd_folders()} == {f"kuberay-v{version['KUBERAY']}", f"kueue-v{version['KUEUE']}"}


def test_example_secrets_are_empty_and_in_no_kustomization() -> None:
    for secret in yaml.safe_load_all((K8S / "secret.example.yaml").read_text()):
        assert set(secret["stringData"].values()) == {""}
    for path in K8S.rglob("kustomization.yaml"):
        assert "secret.example.yaml" not in str(yaml.safe_load(path.read_text()))


def test_kubectl_is_the_pinned_one_where_the_test_extra_is_installed() -> None:
    assert kubectl() == str(PINNED) or not PINNED.exists()


def _jobs_with(tmp_path: Path, component: str) -> dict[str, dict]:
    shutil.copytree(K8S, tmp_path / "k8s")
    path = tmp_path / "k8s" / "overlays" / "gpu" / "jobs" / "kustomization.yaml"
    path.write_text(path.read_text() + f"  - ../../../components/{component}\n")
    found = objects(render(path.parent))
    return {thing["metadata"]["name"]: thing for thing in found if thing["kind"] == "RayJob"}
