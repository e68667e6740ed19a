"""`crossgate doctor`: is everything that a run needs on this machine, and does it work?"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from crossgate import environment
from crossgate.errors import first_line

GIB = 1 << 30
PACKAGES = (
    "torch",
    "timm",
    "deepspeed",
    "ray",
    "webdataset",
    "fsspec",
    "s3fs",
    "mlflow",
    "av",
    "opencv-python-headless",
)


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis: `ok`, what was looked at, what was found, and the cure if it is not ok."""

    ok: bool
    what: str
    found: str
    cure: str = ""

    def __str__(self) -> str:
        mark = "ok  " if self.ok else "FAIL"
        return f"{mark}  {self.what:<28} {self.found}" + (f"  -> {self.cure}" if self.cure and not self.ok else "")


def diagnose(say: Callable[[str], None] = print) -> bool:
    """Says one line a check; returns whether all are well."""
    well = True
    for check in (_python, _packages, _torch, _encoder, _video, _flow, _deepspeed, _ray, _mlflow, _memory, _disk):
        try:
            findings = check()
        except Exception as error:  # a doctor names what is broken, whatever it is, and goes on
            reason = first_line(error)
            findings = [Finding(False, check.__name__.lstrip("_"), reason, "reinstall with `make install`")]
        for finding in findings:
            say(str(finding))
            well &= finding.ok
    say("all well" if well else "something is wrong: see the lines marked FAIL")
    return well


def _python() -> list[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    return [Finding(sys.version_info >= (3, 11), "python", version, "use Python 3.11 or newer")]


def _packages() -> list[Finding]:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            return [Finding(False, "packages", f"{name} is missing", "`make install` in a clone")]
    return [Finding(True, "packages", ", ".join(found))]


def _torch() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        return [Finding(True, "device", f"CPU, {torch.get_num_threads()} threads (no GPU seen by torch)")]
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
    return [Finding(True, "device", f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, {bf16}")]


def _encoder() -> list[Finding]:
    import timm
    import torch

    with torch.no_grad():
        feature = timm.create_model("test_vit", in_chans=2, num_classes=0, img_size=64)(torch.zeros(1, 2, 64, 64))
    return [Finding(bool(torch.isfinite(feature).all()), "timm encoder", f"feature of width {feature.shape[-1]}")]


def _video() -> list[Finding]:
    import av
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.mp4"
        with av.open(str(path), "w") as out:
            stream = out.add_stream("libx264", rate=12)
            stream.width = stream.height = 64
            stream.pix_fmt = "yuv420p"
            for _ in range(6):
                frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
        with av.open(str(path)) as container:
            frames = sum(1 for _ in container.decode(video=0))
    return [Finding(frames == 6, "video (PyAV, H.264)", f"{frames} of 6 frames came back")]


def _flow() -> list[Finding]:
    import cv2
    import numpy as np

    noise = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8), (0, 0), 2)
    empty = np.zeros((64, 64, 2), np.float32)
    estimator = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flow = np.asarray(estimator.calc(noise, np.roll(noise, 2, axis=1), empty))
    moved = float(np.median(flow[16:-16, 16:-16, 0]))
    return [Finding(abs(moved - 2) < 0.5, "optical flow (OpenCV DIS)", f"a shift of 2 px measures {moved:.2f}")]


def _deepspeed() -> list[Finding]:
    import torch

    environment.prepare_deepspeed(local_rank=0, cpu=not torch.cuda.is_available())
    import deepspeed

    return [Finding(True, "deepspeed", f"{deepspeed.__version__} on {deepspeed.get_accelerator()._name}")]


def _ray() -> list[Finding]:
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        answer = ray.get(ray.remote(_worker_probe).remote(), timeout=60)
    finally:
        ray.shutdown()
    return [Finding(answer == "ok", "ray", "a worker started and imported crossgate and timm")]


def _worker_probe() -> str:
    importlib.import_module("crossgate")  # before timm, for its torchvision cure
    importlib.import_module("timm")
    return "ok"


def _mlflow() -> list[Finding]:
    from crossgate.tracking.server import make_client

    with tempfile.TemporaryDirectory() as folder:
        client = make_client(f"sqlite:///{folder}/probe.db")
        experiment = client.create_experiment("probe", artifact_location=folder)
        run = client.create_run(experiment)
        client.log_metric(run.info.run_id, "x", 1.0)
        value = client.get_run(run.info.run_id).data.metrics["x"]
    return [Finding(value == 1.0, "mlflow (sqlite)", "a metric came back")]


def _memory() -> list[Finding]:
    import psutil

    free = psutil.virtual_memory().available / GIB
    findings = [Finding(free >= 4, "memory", f"{free:.1f} GiB free", "the demo wants 8 GiB")]
    if Path("/dev/shm").exists():
        shared = shutil.disk_usage("/dev/shm").free / GIB
        findings.append(
            Finding(shared >= 0.5, "/dev/shm", f"{shared:.1f} GiB free", "mount a larger one: loader workers use it")
        )
    return findings


def _disk() -> list[Finding]:
    free = shutil.disk_usage(os.getcwd()).free / GIB
    return [Finding(free >= 2, "disk here", f"{free:.1f} GiB free", "free some space")]
