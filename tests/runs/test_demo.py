"""What the demo makes of a corpus that is not its own."""

from __future__ import annotations

from pathlib import Path

from tiny_videos import write_video

from crossgate.runs.demo import Demo
from crossgate.runs.pack import PackSettings, pack


def test_a_modality_that_no_labelled_clip_has_is_left_out(tmp_path: Path) -> None:
    lines = ["path,label,split,group"]
    for number, (split, label, sound) in enumerate(
        [("train", "wave", False), ("train", "clap", False), ("val", "wave", False), ("test", "clap", False)]
        + [("unlabelled", "", True)]
    ):
        write_video(tmp_path / f"v{number}.mp4", number, frames=12, sound=sound)
        lines.append(f"v{number}.mp4,{label},{split},g{number}")
    (tmp_path / "manifest.csv").write_text("\n".join(lines) + "\n")
    index = pack(tmp_path / "manifest.csv", str(tmp_path / "shards"), PackSettings(workers=1, seconds=1.0))
    assert index.modalities["audio"] == 1
    demo = Demo(tmp_path / "demo", launch=lambda recipe: None, search=lambda recipe: None)  # type: ignore[arg-type, return-value]
    assert demo._recipes(index).pretrain().data.clip.modalities == ("rgb", "flow")
