"""From one small file to an overlay of k8s/: Kustomize input for the user's bucket, images and nodes."""

from crossgate.deploy.overlay import Overlay, build
from crossgate.deploy.settings import DeployConfig, load_settings

__all__ = ["DeployConfig", "Overlay", "build", "load_settings"]
