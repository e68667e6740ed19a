"""The settings of `crossgate deploy`, and what among them cannot work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field, ValidationError

from crossgate.config.base import Config, CredentialsError, FolderUrl, Positive
from crossgate.errors import UserError, nearest
from crossgate.yaml_file import read_yaml

SHIPPED = ("local", "gpu", "prod")
"""Overlays of the repository, which are not overwritten."""
_EXAMPLE_BUCKET = "example-bucket"
_PLACEHOLDER = "sha256:" + 64 * "0"
_WORD = re.compile(r"s3://[A-Za-z0-9._/=-]+")
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")


class DeployConfig(Config):
    """One cluster."""

    name: str
    """Name of the overlay, and of its folder in k8s/overlays."""
    shards: FolderUrl
    """URL of the shards, such as s3://my-bucket/shards."""
    image: str
    """Image of Ray's pods and the tracking server, with tag or, better, digest."""
    serving_image: str = ""
    """Image of the served models (empty: nothing is served)."""
    artifacts: FolderUrl = ""
    """URL that MLflow keeps artifacts and models at (empty: its volume)."""
    checkpoints: FolderUrl = ""
    """URL that checkpoints are uploaded to while training goes on (empty: they are on the volume of runs only)."""
    videos: FolderUrl = ""
    """URL below which the job `predict` scores every video (empty: no such job)."""
    scores: FolderUrl = ""
    """URL that it writes its tables to."""
    endpoint: FolderUrl = ""
    """Address of an S3 service other than AWS; pods may reach its port besides 443."""
    role_arn: str = ""
    """Cloud role that the pods act as (empty: keys, from the Secret `s3-credentials`)."""
    nodes: Positive = 1
    """GPU nodes that pretraining takes."""
    gpus_per_node: Annotated[int, Field(ge=1, le=16)] = 8
    """GPUs of one of them."""
    gpu_memory_gib: Annotated[float, Field(gt=0)] = 80.0
    """Memory of one GPU; recipes that want more by `crossgate estimate` are refused."""
    cpus_per_node: Positive = 88
    """CPUs of one of them that pods may ask for: some less than it has."""
    memory_gib_per_node: Positive = 800
    """Memory likewise."""
    runs_storage_class: str = ""
    """Storage class with ReadWriteMany for run directories (empty: the cluster's default)."""
    runs_gib: Positive = 500
    """Size of that volume."""
    spot: bool = False
    """Workers on nodes that may be taken away."""
    recipe: str = ""
    """Recipe of pretraining, beside this file (empty: k8s/jobs/pretrain/pretrain.yaml)."""

    @property
    def ranks(self) -> int:
        """One a GPU."""
        return self.nodes * self.gpus_per_node

    @property
    def endpoint_at(self) -> tuple[str, int]:
        """Host and port of the endpoint.

        Raises:
            ValueError: it names none.
        """
        parts = urlsplit(self.endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(self.endpoint)
        return parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def load_settings(path: str | Path) -> DeployConfig:
    """Returns the settings of a YAML file.

    Raises:
        UserError: for a file that is not there, an unknown or missing key, and for what cannot work.
    """
    path = Path(path)
    example = "k8s/deploy.example.yaml"
    tree = read_yaml(path, "settings", f"a YAML mapping as {example}", f"see {example}")
    try:
        settings = DeployConfig.model_validate(tree)
    except ValidationError as error:
        raise _explained(error, path) from None
    _refuse_impossible(settings, path)
    return settings


def _explained(error: ValidationError, path: Path) -> UserError:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return UserError(f"unknown key '{key}'", where=path, cure=nearest(key, list(DeployConfig.model_fields)))
    if first["type"] == "missing":
        return UserError(f"key '{key}' is missing", where=path, cure="see k8s/deploy.example.yaml")
    secret = isinstance(first.get("ctx", {}).get("error"), CredentialsError)
    found = "" if secret else f", found {first.get('input')!r}"
    return UserError(f"key '{key}': {first['msg'].removeprefix('Value error, ')}{found}", where=path)


def _refuse_impossible(settings: DeployConfig, path: Path) -> None:
    if not _NAME.fullmatch(settings.name) or settings.name in SHIPPED:
        raise UserError(
            f"key 'name': '{settings.name}' will not do",
            where=path,
            expected=f"small letters, digits and hyphens, 40 at most, other than {', '.join(SHIPPED)}",
        )
    _refuse_endpoint(settings, path)
    for key in ("shards", "artifacts", "checkpoints", "videos", "scores"):
        _refuse_bucket(key, getattr(settings, key), path)
    if bool(settings.videos) != bool(settings.scores):
        raise UserError("one of the keys 'videos' and 'scores' is empty", where=path, expected="both, or neither")
    for key in ("image", "serving_image"):
        _refuse_image(key, getattr(settings, key), path)


def _refuse_endpoint(settings: DeployConfig, path: Path) -> None:
    try:
        if settings.endpoint:
            _ = settings.endpoint_at
    except ValueError:
        raise UserError(
            f"key 'endpoint': '{settings.endpoint}' will not do",
            where=path,
            expected="http(s)://HOST or http(s)://HOST:PORT",
        ) from None


def _refuse_bucket(key: str, url: str, path: Path) -> None:
    if key != "shards" and not url:
        return
    scheme, _, rest = url.partition("://")
    bucket = rest.partition("/")[0]
    if scheme != "s3" or not bucket:
        raise UserError(
            f"key '{key}': '{url}' names no bucket", where=path, expected="an address such as s3://my-bucket/shards"
        )
    if key in ("videos", "scores") and not _WORD.fullmatch(url):  # the submitter's shell reads them
        raise UserError(
            f"key '{key}': '{url}' will not do", where=path, expected="letters, digits and ._-/= after s3://"
        )
    if bucket == _EXAMPLE_BUCKET:
        raise UserError(f"key '{key}': '{bucket}' is the example's bucket", where=path, cure="name your own")


def _refuse_image(key: str, image: str, path: Path) -> None:
    if not image and key == "serving_image":
        return
    name, _, digest = image.partition("@")
    tag = name.rpartition("/")[2].partition(":")[2]
    if digest == _PLACEHOLDER:
        raise UserError(f"key '{key}': this digest is the example's", where=path, cure="name your image's own")
    if digest and not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise UserError(f"key '{key}': '{digest}' is no digest", where=path, expected="sha256: and 64 hex digits")
    if not digest and tag in ("", "latest"):
        raise UserError(
            f"key '{key}': '{image}' may be another image tomorrow",
            where=path,
            expected="a tag other than latest, or a digest",
        )
