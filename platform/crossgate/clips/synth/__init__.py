"""Synthetic clips: articulated people, filmed with sound and true depth, some streams spoiled on purpose.

`generate` writes a folder of clips with its manifest; `actions` tabulates which modality tells which classes apart,
`degrade` what may be wrong with a stream. Nothing here imports torch.
"""

from crossgate.clips.synth.actions import ACTIONS
from crossgate.clips.synth.generate import generate

__all__ = ["ACTIONS", "generate"]
