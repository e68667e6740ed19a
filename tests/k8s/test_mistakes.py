"""Mistakes planted in the sources of k8s/, one at a time: each must be caught, with words that lead to it."""

from __future__ import annotations

import functools
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from agreement_rules import agreement, asked
from manifests import K8S, SETS, RenderError, objects, render, rendered, validate
from security_rules import images, security


class Mistake(NamedTuple):
    """``old`` becomes ``new`` in a file; rendering ``part`` of a set must then complain by ``caught``."""

    file: str
    old: str
    new: str
    part: str
    caught: str


JOB, LOCAL, GPU, PROD = "jobs/base/rayjob.yaml", "overlays/local", "overlays/gpu", "overlays/prod"
GPU_JOBS, PROD_JOBS = f"{GPU}/jobs", f"{PROD}/jobs"
PRETRAIN = "jobs/pretrain/kustomization.yaml"
MLFLOW, SERVING, CLUSTER = "base/mlflow/mlflow.yaml", "serving/serving.yaml", "raycluster/raycluster.yaml"
POLICIES = "base/network-policies.yaml"

MISTAKES = [
    # cluster-admin
    Mistake("cluster-admin/kueue.yaml", ", nvidia.com/gpu]", "]", "cluster-admin", "same number of resources"),
    Mistake(
        "cluster-admin/kueue.yaml", "ephemeral-storage", "ephemeral", "cluster-admin", "no quota of ephemeral-storage"
    ),
    Mistake("cluster-admin/kueue.yaml", "v1beta2", "v1beta1", "cluster-admin", "v1beta1"),
    Mistake(
        "cluster-admin/kueue.yaml",
        "name: crossgate\nspec:",
        "name: crossgates\nspec:",
        "cluster-admin",
        "ClusterQueue 'crossgate'",
    ),
    Mistake("cluster-admin/kueue.yaml", "LowerPriority", "Lower", "cluster-admin", "withinClusterQueue"),
    Mistake("cluster-admin/priorityclasses.yaml", "value: 100000", "value: high", "cluster-admin", "expected integer"),
    # base
    Mistake("base/namespace.yaml", "enforce: baseline", "enforce: restricted", LOCAL, "SidecarMode"),
    Mistake("base/namespace.yaml", "enforce: baseline", "enforce: privileged", GPU, "no Pod Security"),
    Mistake("base/serviceaccounts.yaml", "Token: false", "Token: true", GPU, "gives its token"),
    Mistake("base/serviceaccounts.yaml", "name: trainer", "name: trainers", LOCAL, "ServiceAccount 'trainer'"),
    Mistake("base/rbac.yaml", "resources: [configmaps]", "resources: [configmaps, secrets]", GPU, "allows secrets"),
    Mistake("base/rbac.yaml", "[get, list, watch, create, update, patch, delete]", '["*"]', GPU, "allows *"),
    Mistake("base/rbac.yaml", "roleRef", "roleref", GPU, "roleRef"),
    Mistake(POLICIES, "policyTypes: [Ingress, Egress]\n---", "policyTypes: [Ingress]\n---", GPU, "no default-deny"),
    Mistake(POLICIES, "name: allow-dns", "name: dns", LOCAL, "allow-dns is gone"),
    Mistake(POLICIES, "port: 8265", "port: 82650", GPU, "82650"),
    Mistake(
        POLICIES,
        "          podSelector:\n            matchLabels:\n              app.kubernetes.io/name: kuberay",
        "          # {}:\n            matchlabels:\n              name: kuberay",
        GPU,
        "error|Kustomize|lets every",
    ),
    Mistake("base/settings.env", "http://mlflow:5000", "http://mlflow:80", LOCAL, "no Service of the set"),
    Mistake("base/settings.env", "RAY_USAGE", "AWS_SECRET_ACCESS_KEY=hunter2\nRAY_USAGE", LOCAL, "holds a secret"),
    Mistake("base/runs.yaml", "ReadWriteMany", "ReadWriteAll", GPU, "not an access mode"),
    Mistake(
        "base/kustomization.yaml",
        "disableNameSuffixHash: true",
        "disableNameSuffixHash: false",
        LOCAL,
        "crossgate-settings",
    ),
    # base/mlflow
    Mistake(MLFLOW, "runAsNonRoot: true", "runAsNonRoot: false", GPU, "may run as root"),
    Mistake(MLFLOW, "allowPrivilegeEscalation: false", "privileged: true", LOCAL, "may gain privileges"),
    Mistake(MLFLOW, "--allowed-hosts=mlflow:5000,", "--allowed-hosts=", LOCAL, "answers 403"),
    Mistake(MLFLOW, "--workers=2", "--worker=2", GPU, "refuses it: No such option"),
    Mistake(MLFLOW, 'limits: {cpu: "2", memory: 2Gi', 'limits: {cpu: "2", memory: 1Gi', GPU, "more than limit"),
    Mistake(
        MLFLOW,
        "type: Recreate",
        "type: Recreate\n    rollingUpdate: {maxSurge: 1}",
        GPU,
        "may not be set with type Recreate",
    ),
    Mistake(MLFLOW, "claimName: mlflow", "claimName: ml", GPU, "PersistentVolumeClaim 'ml'"),
    Mistake(MLFLOW, "emptyDir: {sizeLimit: 2Gi}", "emptyDir: {}", GPU, "no sizeLimit"),
    Mistake(
        "base/mlflow/network-policy.yaml",
        "app.kubernetes.io/name: serving",
        "app.kubernetes.io/name: serving\n        - namespaceSelector: {}",
        GPU,
        "lets every namespace in",
    ),
    # jobs
    Mistake(JOB, "submissionMode: SidecarMode", "submissionMode: Sidecar", LOCAL, "'Sidecar' is not"),
    Mistake(
        JOB,
        "shutdownAfterJobFinishes: true",
        "shutdownAfterJobFinishes: false",
        GPU_JOBS,
        "shutdownAfterJobFinishes|testing path",
    ),
    Mistake(JOB, "authOptions: {mode: token}", "authOptions: {mode: disabled}", LOCAL, "asks for no token"),
    Mistake(JOB, 'rayVersion: "2.60.0"', 'rayVersion: "2.59.0"', GPU_JOBS, "tested is"),
    Mistake(JOB, 'num-cpus: "0"', "num-cpus: 0", GPU_JOBS, "num-cpus"),
    Mistake(JOB, "minReplicas: 1", "minReplicas: 2", GPU_JOBS, "greater than maxReplicas"),
    Mistake(JOB, "readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", GPU_JOBS, "can write its image"),
    Mistake(
        JOB,
        "capabilities: {drop: [ALL]}",
        "capabilities: {drop: [ALL], add: [IPC_LOCK]}",
        GPU_JOBS,
        "keeps capabilities",
    ),
    Mistake(
        JOB,
        "automountServiceAccountToken: false",
        "automountServiceAccountToken: true",
        GPU_JOBS,
        "mounts a service account token",
    ),
    Mistake(JOB, "mountPath: /runs", "mountPath: /run", LOCAL, "no shared volume holds"),
    Mistake(JOB, "claimName: runs", "claimName: run", GPU_JOBS, "PersistentVolumeClaim 'run'"),
    Mistake(JOB, "groupName: workers", "groupName: worker", GPU_JOBS, "groupName"),
    Mistake(JOB, "image: crossgate:0.1.0", "image: crossgate:latest", GPU_JOBS, "latest"),
    Mistake(
        JOB,
        "entrypoint: crossgate doctor",
        "entryPoint: crossgate doctor",
        GPU_JOBS,
        "entryPoint|missing path|nonexistent",
    ),
    Mistake(PRETRAIN, "jobs/pretrain.py --config", "jobs/pretrain.py --conf", LOCAL, "No such option"),
    Mistake(PRETRAIN, "jobs/pretrain.py", "jobs/pretraining.py", GPU_JOBS, "pretraining.py"),
    Mistake(
        PRETRAIN, "/etc/crossgate/pretrain.yaml", "/etc/crossgate/pretrain.yml", GPU_JOBS, "no such recipe is mounted"
    ),
    Mistake(PRETRAIN, "pretrain.yaml}", "pretrain.yaml data.index=$BUCKET}", GPU_JOBS, "submitter's shell"),
    Mistake(
        "jobs/finetune/kustomization.yaml",
        "configMap/name, value: recipe-finetune",
        "configMap/name, value: recipe-search",
        GPU_JOBS,
        "no such recipe is mounted",
    ),
    Mistake("jobs/finetune/kustomization.yaml", "value: finetune}", "value: Finetune}", GPU_JOBS, "Finetune"),
    Mistake("jobs/pretrain/pretrain.yaml", "global_batch: 1024", "global_batch: 1023", GPU_JOBS, "not divisible"),
    Mistake("jobs/pretrain/pretrain.yaml", "workers: 8", "workers: 16", GPU_JOBS, "16 GPUs"),
    Mistake("jobs/pretrain/pretrain.yaml", "global_batch", "globl_batch", GPU_JOBS, "unknown key 'data.globl_batch'"),
    Mistake("jobs/pretrain/pretrain.yaml", "output: /runs", "output: /tmp/runs", GPU_JOBS, "no shared volume holds"),
    Mistake("jobs/finetune/finetune.yaml", "checkpoint_url", "checkpoints", GPU_JOBS, "unknown key 'training.checkp"),
    Mistake("jobs/search/search.yaml", "kind: search", "kind: finetune", GPU_JOBS, "recipe"),
    Mistake("jobs/search/search.yaml", "gpus_per_trial: 1", "gpus_per_trial: 2", GPU_JOBS, "want 2 GPUs"),
    Mistake("jobs/evaluate/evaluate.yaml", "launcher: ray", "launcher: auto", GPU_JOBS, "run on the head"),
    Mistake("jobs/release/kustomization.yaml", "--alias", "--aliases", GPU_JOBS, "No such option"),
    Mistake("jobs/predict/kustomization.yaml", " --out ", " --output ", GPU_JOBS, "No such option"),
    Mistake(
        "jobs/predict/kustomization.yaml",
        "volumes/1/name, value: recipe",
        "volumes/0/name, value: recipe",
        GPU_JOBS,
        "test",
    ),
    # raycluster
    Mistake(CLUSTER, "version: v2", "version: v3", f"{GPU}/raycluster", "v3"),
    Mistake(
        CLUSTER,
        "automountServiceAccountToken: true",
        "automountServiceAccountToken: false",
        f"{GPU}/raycluster",
        "token",
    ),
    Mistake(
        CLUSTER,
        "  autoscalerOptions:",
        "  networkPolicy: {mode: DenyAll}\n  autoscalerOptions:",
        f"{GPU}/raycluster",
        "networkPolicy",
    ),
    Mistake(
        "raycluster/autoscaler.yaml",
        "            except: [169.254.169.254/32]",
        "            # all",
        f"{GPU}/raycluster",
        "metadata service",
    ),
    # serving
    Mistake(SERVING, "minAvailable: 1", "minAvailable: 1\n  maxUnavailable: 1", f"{GPU}/serving", "mutually exclusive"),
    Mistake(
        SERVING,
        "selector: {app.kubernetes.io/name: serving}",
        "selector: {app.kubernetes.io/name: served}",
        f"{GPU}/serving",
        "matches no pod",
    ),
    Mistake(SERVING, "--env-manager=local", "--env=local", f"{GPU}/serving", "refuses it"),
    Mistake(SERVING, "readinessProbe", "readynessProbe", f"{GPU}/serving", "readinessProbe"),
    Mistake(
        SERVING,
        "  ports:\n    - {name: http, port: 80",
        "  type: LoadBalancer\n  ports:\n    - {name: http, port: 80",
        f"{GPU}/serving",
        "reachable from outside",
    ),
    # components
    Mistake(
        "components/gpu/kustomization.yaml", 'requests: {cpu: "88"', 'requests: {cpu: "96"', GPU_JOBS, "more than limit"
    ),
    Mistake(
        "components/gpu/kustomization.yaml",
        'ephemeral-storage: 100Gi, nvidia.com/gpu: "8"}\n          limits',
        'ephemeral-storage: 100Gi, nvidia.com/gpu: "4"}\n          limits',
        GPU_JOBS,
        "must equal limit",
    ),
    Mistake(
        "components/kueue/kustomization.yaml",
        "queue-name, value: crossgate",
        "queue-name, value: gpus",
        GPU_JOBS,
        "LocalQueue 'gpus'",
    ),
    Mistake(
        "components/kueue-queue/localqueue.yaml",
        "clusterQueue: crossgate",
        "clusterqueue: crossgate",
        GPU,
        "did you mean 'clusterQueue'",
    ),
    Mistake("components/spot/kustomization.yaml", "value: 20}", "value: often}", PROD_JOBS, "expected integer"),
    Mistake(
        "components/postgres/kustomization.yaml",
        "valueFrom: {secretKeyRef: {name: mlflow-database, key: uri}}",
        "value: postgresql://mlflow:hunter2@db/mlflow",
        PROD,
        "holds a secret",
    ),
    Mistake(
        "components/gcs-redis/kustomization.yaml",
        "redisAddress: redis:6379",
        "redisAdress: redis:6379",
        f"{PROD}/raycluster",
        "redisAddress",
    ),
    Mistake(
        "components/s3-static/kustomization.yaml",
        "s3-credentials, optional: true",
        "s3-credentials",
        GPU_JOBS,
        "Secret 's3-credentials'",
    ),
    Mistake(
        "components/object-storage/network-policy.yaml",
        "      ports:\n        - {protocol: TCP, port: 443}",
        "",
        GPU,
        "every port",
    ),
    Mistake(
        "components/monitoring/network-policy.yaml", "protocol: TCP", "protocol: HTTP", PROD, "not TCP, UDP or SCTP"
    ),
    Mistake(
        "components/workload-identity/kustomization.yaml",
        "/metadata/annotations",
        "/metadata/annotation",
        PROD,
        "annotation",
    ),
    # overlays
    Mistake(
        "overlays/local/kustomization.yaml",
        "cpu: 200m, memory: 640Mi",
        "cpu: 500m, memory: 640Mi",
        LOCAL,
        "a small node",
    ),
    Mistake(
        "overlays/local/kustomization.yaml", "behavior: replace", "behavior: create", LOCAL, "already|conflict|exists"
    ),
    Mistake("overlays/local/pretrain.yaml", "launcher: ray", "launcher: local", LOCAL, "run on the head"),
    Mistake("overlays/gpu/kustomization.yaml", "  - ../../components/kueue-queue\n", "", GPU, "LocalQueue 'crossgate'"),
    Mistake(
        "overlays/gpu/serving/kustomization.yaml",
        "namespace: crossgate",
        "namespace: default",
        f"{GPU}/serving",
        "namespace default",
    ),
    Mistake(
        "overlays/prod/images/kustomization.yaml",
        "digest: sha256:0000000000",
        "newTag: 0.1.0 # ",
        f"{PROD}/serving",
        "not named by digest",
    ),
]


@functools.cache
def clean() -> dict[str, str]:
    """The renderings without a mistake."""
    return {part: rendered(part) for parts in SETS.values() for part in parts}


def _marked() -> Iterator[Any]:
    """Forty mistakes in every run, the first of each file among them; the others in the slow one."""
    seen: Counter[str] = Counter()
    order = []
    for number, mistake in enumerate(MISTAKES):
        order.append((seen[mistake.file], number))
        seen[mistake.file] += 1
    soon = {number for _, number in sorted(order)[:40]}
    for number, mistake in enumerate(MISTAKES):
        marks = () if number in soon else (pytest.mark.slow,)
        yield pytest.param(mistake, marks=marks, id=f"{mistake.file}: {mistake.new.strip()[:40]}")


@pytest.mark.parametrize("mistake", _marked())
def test_is_caught(mistake: Mistake, tmp_path: Path) -> None:
    source = tmp_path / "k8s"
    shutil.copytree(K8S, source)
    path = source / mistake.file
    text = path.read_text()
    assert mistake.old in text, "the mistake no longer has a place"
    path.write_text(text.replace(mistake.old, mistake.new))
    name = next(name for name, parts in SETS.items() if mistake.part in parts)
    complaints = _complaints(name, mistake.part, source, tmp_path)
    assert re.search(mistake.caught, complaints), complaints or "nobody noticed"


def _complaints(name: str, part: str, source: Path, tmp_path: Path) -> str:
    """Everything that is said about a set with one part rendered anew."""
    try:
        fresh = render(source / part)
    except RenderError as error:
        return f"error: {error}"
    texts = [fresh if other == part else clean()[other] for other in SETS[name]]
    said = _errors(validate(texts, tmp_path)[1])
    found = [thing for text in texts for thing in objects(text)]
    try:
        said += security(found) + agreement(found) + list(images(found, by_digest=name == "prod"))
    except (KeyError, TypeError, AttributeError):  # the validator has said why
        assert said
        return "\n".join(said)
    total = asked(found)
    if name == "local" and (total["cpu"] > 2 or total["memory"] > 6 * 2**30):
        said.append(f"asks for more than a small node has: {total}")
    return "\n".join(said)


def _errors(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith(("ERROR", "WARNING"))]


def test_there_are_mistakes_in_every_folder() -> None:
    assert len(MISTAKES) >= 40
    folders = {str(p.parent.relative_to(K8S)).split("/")[0] for p in K8S.rglob("kustomization.yaml")}
    assert {mistake.file.split("/")[0] for mistake in MISTAKES} == folders
    components = {path.name for path in (K8S / "components").iterdir()} - {"rdma"}
    assert {m.file.split("/")[1] for m in MISTAKES if m.file.startswith("components/")} == components
