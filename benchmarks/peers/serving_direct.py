"""The network of a model directory, called directly: what `serving.py` compares a served model with.

``python serving_direct.py MODEL`` answers each line of the input, a request as JSON, with a line of JSON. It needs no
more than the model's own requirements, and the packaged source on `PYTHONPATH`.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from crossgate.clips.extract import iter_clips
from crossgate.clips.tensors import clip_tensors
from crossgate.model.store import load_model


class Direct:
    """Decoding and the network, nothing else."""

    def __init__(self, folder: Path) -> None:
        self._model, self._card = load_model(folder)

    @torch.inference_mode()
    def score(self, video: bytes) -> dict[str, Any]:
        """Returns probabilities of the video's clips, and seconds of decoding and of the network."""
        clip, begun = self._card.clip, time.perf_counter()
        cut = iter_clips(video, seconds=clip.seconds, short_side=max(128, clip.size), modalities=clip.modalities)
        clips = [clip_tensors(raw, clip, None, 0) for raw in cut]
        decoded = time.perf_counter()
        present = torch.tensor([[name in one for name in clip.modalities] for one in clips])
        streams = {}
        for name in clip.modalities:
            dtype = torch.uint8 if name == "rgb" else torch.float32
            absent = torch.zeros(clip.shape(name), dtype=dtype)
            streams[name] = torch.stack([one.get(name, absent) for one in clips])
        scores = self._model(streams, present).logits.softmax(-1)
        return {
            "scores": scores.tolist(),
            "decode_s": decoded - begun,
            "forward_s": time.perf_counter() - decoded,
        }

    def burst(self, videos: list[bytes], threads: int) -> float:
        """Returns the seconds that so many threads take for all videos."""
        begun = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(self.score, videos))
        return time.perf_counter() - begun


def main() -> None:
    direct = Direct(Path(sys.argv[1]))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        videos = [Path(path).read_bytes() for path in request["videos"]]
        if "threads" in request:
            answer: dict[str, Any] = {"seconds": direct.burst(videos, request["threads"])}
        else:
            answer = direct.score(videos[0])
        answer["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
