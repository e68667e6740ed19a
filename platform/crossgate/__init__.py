"""crossgate: distributed self-supervised pretraining of multimodal video encoders."""

from crossgate import _torchvision
from crossgate._version import __version__

__all__ = ["__version__"]

_torchvision.install()
