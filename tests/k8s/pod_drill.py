"""The containers' drill: the local overlay without a cluster, its head killed half-way.

    podman build --format docker -f k8s/image/Containerfile -t crossgate:0.1.0 .
    python tests/k8s/pod_drill.py

The rendered tracking server runs by `podman kube play`. Head and worker run by the commands that KubeRay makes of the
rendered RayJob, with token authentication, as user 1000 on a read-only root, within the pods' limits. The job comes
through `ray job submit`; its checkpoints go to a real S3 server. When the first one is there the head is killed;
another cluster is given the job again and has to go on from there, to the end. Then the run's folder is lost too, and
what S3 has must be enough.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "stream")]

import s3_server  # noqa: E402
import yaml  # noqa: E402
from kuberay import RayCluster, ended, wait_for  # noqa: E402
from manifests import Object, named, objects_of  # noqa: E402
from pods import Node, missing, podman  # noqa: E402

BUCKET = "crossgate"
RECIPE = "ConfigMap/recipe-pretrain"
JOB_S = 900.0
"""Seconds that one start of the job may take."""

ASK = """
import json, mlflow
client = mlflow.MlflowClient()
runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
print(json.dumps({run.info.run_name: {
    "status": run.info.status,
    "rates": sorted(point.step for point in client.get_metric_history(run.info.run_id, "train/lr")),
} for run in runs}))
"""
TAKE = """
import mlflow
with mlflow.start_run(run_name="by-hand"):
    mlflow.log_metric("train/lr", 1.0)
    mlflow.log_text("kept", "note.txt")
"""


class Failed(Exception):
    """Something in the drill did not come true."""


def must(true: Any, what: str) -> None:
    """Raises `Failed` where it is not so."""
    if not true:
        raise Failed(what)


class Drill:
    """The drill in progress.

    Args:
        folder: for volumes and the S3 server.
        say: told what has come true.
        clips: that the job generates, instead of the overlay's number (0).
    """

    def __init__(self, folder: Path, say: Callable[[str], None], clips: int = 0) -> None:
        self.folder, self.say, self.clips = folder, say, clips
        (folder / "node").mkdir()
        (folder / "s3").mkdir()

    def run(self) -> dict[str, Any]:
        """Holds the drill; returns its figures.

        Raises:
            Failed: something did not come true.
        """
        things = {named(thing): copy.deepcopy(thing) for thing in objects_of("local")}
        recipe = yaml.safe_load(things[RECIPE]["data"]["pretrain.yaml"])
        recipe["training"]["checkpoint_url"] = f"s3://{BUCKET}/checkpoints"
        things[RECIPE]["data"]["pretrain.yaml"] = yaml.safe_dump(recipe)
        self.name, self.job = recipe["run"]["name"], things["RayJob/pretrain"]
        if self.clips:
            (synth, _) = self.job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["initContainers"]
            synth["command"] = [re.sub(r"^--clips=.*", f"--clips={self.clips}", word) for word in synth["command"]]
        with Node.up(self.folder / "node", list(things.values())) as self.node:
            self.track()
            with s3_server.seaweed(self.folder / "s3", self.node.gateway) as self.url:
                s3_server.client(self.url).create_bucket(Bucket=BUCKET)
                self.env = {
                    "AWS_ENDPOINT_URL": self.url,
                    "AWS_ACCESS_KEY_ID": s3_server.KEY,
                    "AWS_SECRET_ACCESS_KEY": s3_server.SECRET,
                }
                return self.train()

    # ---- the tracking server -----------------------------------------------------------------------------------

    def track(self) -> None:
        """The tracking server answers, as its Service's name, and takes a run."""
        pod = self.node.play("mlflow")
        self.say(f"tracking server by kube play: {pod}")
        probe = ("exec", f"{pod}-mlflow", "wget", "-qO-", "http://localhost:5000/health")
        wait_for(lambda: podman(*probe, check=False).endswith("OK"), "the tracking server does not answer")
        self.ask(TAKE)
        runs = self.runs()
        must(runs["by-hand"]["status"] == "FINISHED" and runs["by-hand"]["rates"] == [0], "MLflow took no run")
        self.say("tracking server took a run with a metric and an artifact")

    def ask(self, program: str) -> str:
        """What a program says that runs as the job's worker would, without Ray."""
        (group,) = self.job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        pod: Object = group["template"]["spec"]
        return self.node.run("ask", pod, pod["containers"][0], ["python", "-c", program])

    def runs(self) -> dict[str, Any]:
        """What MLflow knows."""
        return json.loads(self.ask(ASK).splitlines()[-1])

    # ---- the job -----------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """The job, its head killed, the job again, and once more without its folder."""
        began = time.monotonic()
        cluster = self.cluster()
        self.refuses_strangers(cluster)
        submitter = cluster.submit("first")
        wait_for(lambda: self.stored(), "no checkpoint in S3", JOB_S)
        said = podman("logs", submitter)
        must("starting at step 0" in said, f"the first start was none:\n{said[-2000:]}")
        cluster.lose()
        self.node.kill(submitter)
        at = self.stored()[-1]
        self.say(f"first submission: {at} is in S3 after {time.monotonic() - began:.0f} s; head killed")

        cluster = self.cluster()
        resumed, total = self.ends(cluster, "second")
        must(0 < resumed < total, f"resumed at {resumed} of {total}")
        self.say(f"second submission: went on from step {resumed} to {total}, succeeded")
        must(int(self.stored()[-1].removeprefix("step-")) == total, "the last checkpoint is not in S3")
        peaks = cluster.peaks()

        run_dir = self.node.folder / "claims" / "runs" / self.name
        run_dir.rename(run_dir.with_name("lost"))
        brought, _ = self.ends(cluster, "third")
        must(brought == total, f"without its folder the run went on from step {brought}")
        self.say(f"third submission, without the run's folder: step {brought} came from S3")
        run = self.runs()[self.name]
        must(run["status"] == "FINISHED", f"MLflow says {run['status']}")
        must(
            len(set(run["rates"])) == len(run["rates"]) and run["rates"][-1] == total,
            f"steps in MLflow: {run['rates']}",
        )
        self.say(f"MLflow: {self.name} {run['status']}, rates at steps {run['rates']}")
        cluster.lose()
        return {"killed_at": at, "resumed_from": resumed, "steps": total, "peak_gib": peaks}

    def cluster(self) -> RayCluster:
        """A new cluster for the job, as each try of the operator makes one."""
        cluster = RayCluster(self.node, self.job, self.env)
        cluster.start()
        self.say(f"{cluster.name}: head and worker are up, Ray counts 1 CPU")
        return cluster

    def refuses_strangers(self, cluster: RayCluster) -> None:
        """The dashboard wants the token."""
        for headers, status in (
            ((), "401"),
            ((f"Authorization: Bearer {64 * '0'}",), "40[13]"),
            ((f"Authorization: Bearer {cluster.token}",), "200"),
        ):
            answer = cluster.asked(*headers)
            must(re.search(rf"HTTP/1.1 {status}", answer), f"the dashboard answered {answer[:300]}")
        self.say("dashboard: 401 without the token, refused with another one, 200 with it")

    def ends(self, cluster: RayCluster, job_id: str) -> tuple[int, int]:
        """Submits the job and waits for it; returns the step that it went on from and its last."""
        submitter = cluster.submit(job_id)
        status, said = ended(submitter, JOB_S)
        (self.folder / f"{job_id}.log").write_text(said)
        self.node.kill(submitter)
        must(status == 0 and "succeeded" in said, f"submission {job_id} ended with {status}:\n{said[-4000:]}")
        found = re.search(r"resumed from \S+/step-0*(\d+), .*(complete|going on to step (\d+))", said)
        must(found, f"submission {job_id} did not resume:\n{said[-4000:]}")
        assert found
        return int(found[1]), int(found[3] or found[1])

    def stored(self) -> list[str]:
        """Names of the whole checkpoints in S3, oldest first."""
        prefix = f"checkpoints/{self.name}/"
        listed = s3_server.client(self.url).list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", ())
        keys = (entry["Key"].removeprefix(prefix) for entry in listed)
        return sorted(key.partition(".")[0] for key in keys if key.endswith(".manifest.json"))


def main() -> None:
    """Holds the drill; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="an empty folder that volumes and logs stay in")
    parser.add_argument("--clips", type=int, default=0, help="generate so many instead of the overlay's number")
    chosen = parser.parse_args()
    image = next(t for t in objects_of("local") if named(t) == "Deployment/mlflow")
    reason = missing(image["spec"]["template"]["spec"]["containers"][0]["image"])
    if reason:
        sys.exit(f"{reason}: podman build --format docker -f k8s/image/Containerfile -t crossgate:0.1.0 .")
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = chosen.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="crossgate-drill-")))
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)
        figures = Drill(
            folder, lambda text: print(f"{time.monotonic() - began:5.0f} s  {text}", flush=True), chosen.clips
        ).run()
    print(json.dumps({"drill": "passed", **figures, "seconds": round(time.monotonic() - began)}))


if __name__ == "__main__":
    main()
