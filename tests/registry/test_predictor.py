"""The predictor on real videos: every way to name one, every modality missing, every kind of bad input."""

from __future__ import annotations

import base64
import contextlib
import json
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from crossgate.errors import UserError
from crossgate.registry.predictor import COLUMNS, Predictor, as_json
from crossgate.registry.sources import Settings


@pytest.fixture(scope="module")
def predictor(model_dir: Path) -> Predictor:
    return Predictor(model_dir)


def same_scores(one: pd.DataFrame, other: pd.DataFrame) -> None:
    for a, b in zip(one["scores"], other["scores"], strict=True):
        assert a == pytest.approx(b, abs=1e-6)


def test_a_row_says_all(predictor: Predictor, videos: Path) -> None:
    table = predictor.predict(str(videos / "whole.mp4"))
    assert tuple(table.columns) == COLUMNS
    (row,) = table.to_dict(orient="records")
    assert row["source"] == str(videos / "whole.mp4")
    assert row["error"] is None
    assert set(row["scores"]) == {"fight", "nofight"}
    assert sum(row["scores"].values()) == pytest.approx(1)
    assert row["score"] == max(row["scores"].values()) == row["scores"][row["label"]]
    assert row["modalities"] == ["rgb", "audio"]
    assert row["weights"]["depth"] == 0
    assert sum(row["weights"].values()) == pytest.approx(1)


def test_the_label_follows_the_threshold_and_a_caller_may_set_another(model_dir: Path, videos: Path) -> None:
    """The model's own one, that of a caller, and both for one row a video."""
    items = [str(videos / "long.mp4"), str(videos / "whole.mp4")]
    fights = [row["fight"] for row in Predictor(model_dir).predict(items)["scores"]]
    for threshold in (min(fights), max(fights), 1.1):
        table = Predictor(model_dir, Settings(threshold=threshold)).predict(items)
        assert table["label"].tolist() == ["fight" if score >= threshold else "nofight" for score in fights]
        assert table["score"].tolist() == [row[label] for row, label in zip(table["scores"], table["label"])]
        for row in Predictor(model_dir, Settings(threshold=threshold)).predict(items, aggregate=True).itertuples():
            assert row.label == ("fight" if row.scores["fight"] >= threshold else "nofight")


def test_path_bytes_base64_and_table_are_the_same_video(predictor: Predictor, videos: Path) -> None:
    file = videos / "whole.mp4"
    data = file.read_bytes()
    text = base64.b64encode(data).decode()
    wanted = predictor.predict([file])
    for items in (
        data,
        [bytearray(data)],
        [text],
        ["data:video/mp4;base64," + text],
        [{"source": data, "name": "camera 1"}],
        pd.DataFrame({"source": [text]}),
        pd.DataFrame({"depth": [None], "source": [str(file)]}),
        pd.DataFrame({"source": [data], "depth": [np.nan]}),
        np.array([str(file)], dtype=object),
    ):
        same_scores(predictor.predict(items), wanted)
    assert predictor.predict([{"source": data, "name": "camera 1"}])["source"][0] == "camera 1"
    assert len(predictor.predict([text])["source"][0]) < 60, "a row does not repeat a whole video"


def test_a_url_is_fetched(predictor: Predictor, model_dir: Path, videos: Path) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(videos)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        table = predictor.predict([f"{url}/whole.mp4", f"{url}/none.mp4"])
        same_scores(table.head(1), predictor.predict([videos / "whole.mp4"]))
        assert "cannot be fetched" in table["error"][1]
        refusing = Predictor(model_dir, Settings(urls=False))
        assert "switched off" in refusing.predict([f"{url}/whole.mp4"])["error"][0]
    finally:
        server.shutdown()
        server.server_close()


class Trickle(BaseHTTPRequestHandler):
    """Gives a body in two halves, the second a while after the first, and refuses another path."""

    body = b""

    def do_GET(self) -> None:
        if "there" not in self.path:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        middle = len(self.body) // 2
        self.wfile.write(self.body[:middle])
        time.sleep(0.3)
        with contextlib.suppress(OSError):  # who has had enough hangs up
            self.wfile.write(self.body[middle:])

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def trickle(videos: Path) -> Iterator[str]:
    """Host and port of a slow server that has the whole video at /there."""
    Trickle.body = (videos / "whole.mp4").read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Trickle)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_url_that_comes_in_pieces_is_fetched_whole(predictor: Predictor, videos: Path, trickle: str) -> None:
    table = predictor.predict([f"http://{trickle}/there.mp4"])
    assert table["error"][0] is None
    same_scores(table, predictor.predict([videos / "whole.mp4"]))


def test_no_message_shows_the_secrets_of_a_url(model_dir: Path, trickle: str) -> None:
    tight = Predictor(model_dir, Settings(megabytes=1))
    Trickle.body = b"\0" * (3 << 20)
    refused = [
        f"http://ann:s3cret@{trickle}/there?token=s3cret",
        f"http://ann:s3cret@{trickle}/none?token=s3cret",
        "http://ann:s3cret@127.0.0.1:9/none?token=s3cret#s3cret",
        "http://ann:s3/cret@127.0.0.1:9/none?token=s3cret",
        "ftp://ann:s3cret@host/clip.mp4?token=s3cret",
        "s3://ann:s3cret@host/clip.mp4?token=s3cret",
        "https://ann:s3cret@[::1/?s3cret",
    ]
    errors = tight.predict([{"source": url, "name": "x"} for url in refused])["error"].tolist()
    errors += Predictor(model_dir, Settings(urls=False)).predict([{"source": refused[0]}])["error"].tolist()
    for error, words in zip(
        errors, ["too large", "NotFound", "fetched", "fetched", "scheme", "fetched", "fetched", "off"]
    ):
        assert words in error and "cret" not in error and "ann:" not in error and "ann@" not in error, error
    assert f"http://{trickle}/there" in errors[0]


def test_a_missing_modality_is_missing_and_depth_counts_when_given(predictor: Predictor, videos: Path) -> None:
    whole, depth = str(videos / "whole.mp4"), str(videos / "depth.mkv")
    table = predictor.predict([videos / "mute.mp4", {"source": whole, "depth": depth}, whole])
    assert table["modalities"].tolist() == [["rgb"], ["rgb", "audio", "depth"], ["rgb", "audio"]]
    assert table["weights"][0] == {"rgb": 1.0, "audio": 0.0, "depth": 0.0}
    assert table["weights"][1]["depth"] > 0
    same_scores(table.tail(1), predictor.predict(whole))  # neighbours in a batch change nothing


def test_a_long_video_is_several_clips_and_may_be_one_row(predictor: Predictor, videos: Path) -> None:
    clips = predictor.predict([videos / "long.mp4", videos / "whole.mp4"])
    assert clips["start_s"].tolist() == [0.0, 1.0, 2.0, 0.0]
    merged = predictor.predict([videos / "long.mp4", videos / "text.mp4", videos / "whole.mp4"], aggregate=True)
    assert len(merged) == 3
    assert merged["error"].notna().tolist() == [False, True, False]
    mean = np.mean([scores["fight"] for scores in clips["scores"][:3]])
    assert merged["scores"][0]["fight"] == pytest.approx(mean)
    assert merged["label"][0] == max(merged["scores"][0], key=merged["scores"][0].get)


def test_batches_do_not_change_scores(predictor: Predictor, model_dir: Path, videos: Path) -> None:
    items = [videos / "long.mp4", videos / "mute.mp4", videos / "whole.mp4"]
    same_scores(Predictor(model_dir, Settings(batch=2)).predict(items), predictor.predict(items))


def test_bad_input_is_a_row_and_never_a_failure(predictor: Predictor, videos: Path) -> None:
    bad = {
        "no such file": str(videos / "none.mp4"),
        "not decodable": str(videos / "broken.mp4"),
        "not decodable ": videos / "text.mp4",
        "no pictures": videos / "sound.wav",
        "a folder, not a video": str(videos),
        "no such file  ": "../../etc/pass\0wd",
        "not decodable  ": b"\x00" * 5000,
        "no bytes": b"",
        "a path, URL, bytes": None,
        "a path, URL, bytes ": 3.5,
        "a path, URL, bytes  ": {},
        "unknown key 'sorce'": {"sorce": "x"},
        "not base64": "data:video/mp4;base64,###",
        "not decodable   ": base64.b64encode(b"no video" * 100).decode(),
        "scheme ftp": "ftp://host/clip.mp4",
        "scheme file": "file:///etc/passwd",
        "no such file   ": "concat:a.mp4|b.mp4",
        "no such file    ": "é" * 5000,
        "expected 16-bit grey": {"source": str(videos / "whole.mp4"), "depth": str(videos / "whole.mp4")},
    }
    table = predictor.predict([*bad.values(), videos / "whole.mp4"])
    assert len(table) == len(bad) + 1
    for expected, error, label in zip(bad, table["error"], table["label"], strict=False):
        assert expected.strip() in error
        assert "\n" not in error
        assert label is None
    assert table["error"].iloc[-1] is None
    assert table["label"].iloc[-1] in ("fight", "nofight")


def test_bounds_hold(model_dir: Path, videos: Path) -> None:
    long, whole = videos / "long.mp4", videos / "whole.mp4"
    assert "lasts" in Predictor(model_dir, Settings(seconds=2)).predict(long)["error"].iloc[0]
    tight = Predictor(model_dir, Settings(megabytes=1))
    big = b"\0" * (2 << 20)
    assert "too large" in tight.predict([big])["error"][0]
    assert "too large" in tight.predict([base64.b64encode(big).decode()])["error"][0]
    closed = Predictor(model_dir, Settings(paths=False))
    table = closed.predict([str(whole), whole.read_bytes()])
    assert "paths are switched off" in table["error"][0]
    assert table["error"][1] is None


def test_a_request_names_so_many_videos(model_dir: Path) -> None:
    few = Predictor(model_dir, Settings(items=2))
    assert len(few.predict([b"", b""])) == 2
    with pytest.raises(UserError, match="3 videos at once; expected at most 2; ask for them in parts"):
        few.predict([b""] * 3)


def test_base64_may_have_line_breaks_and_is_measured_before_it_is_decoded(model_dir: Path, videos: Path) -> None:
    data = (videos / "whole.mp4").read_bytes()
    tight = Predictor(model_dir, Settings(megabytes=1))
    folded = "\r\n".join(["data:video/mp4;base64,", *base64.encodebytes(data).decode().splitlines()])
    assert tight.predict([folded, base64.encodebytes(data).decode()])["error"].tolist() == [None, None]
    tracemalloc.start()
    text = "A" * (8 << 20)
    held = tracemalloc.get_traced_memory()[0]
    errors = tight.predict([text, "data:video/mp4;base64," + text])["error"]
    grown = tracemalloc.get_traced_memory()[1] - held
    tracemalloc.stop()
    assert all("too large; expected at most 1 MB" in error for error in errors)
    assert grown < 20 << 20, "the second text itself, and no copy"


def test_a_pretrained_model_is_refused(tmp_path: Path, model_dir: Path) -> None:
    from crossgate.model.store import build_model, read_card, save_model

    card = read_card(model_dir).model_copy(update={"kind": "contrastive", "classes": ()})
    save_model(tmp_path / "model", build_model(card), card)
    with pytest.raises(UserError, match="no classes"):
        Predictor(tmp_path / "model")


def test_no_items_give_an_empty_table(predictor: Predictor) -> None:
    assert predictor.predict([]).empty


def test_rows_become_json_without_what_it_lacks() -> None:
    row = {"score": np.float32("nan"), "scores": {"a": float("inf"), "b": np.float64(0.5)}, "n": (np.int64(3), "x")}
    told = as_json({**row, "weights": None, "good": np.bool_(True)})
    wanted = {"score": None, "scores": {"a": None, "b": 0.5}, "n": [3, "x"], "weights": None, "good": True}
    assert json.dumps(told, allow_nan=False) == json.dumps(wanted)


def test_importing_the_registry_pulls_no_training_stack() -> None:
    code = """
import sys
training = ["ray", "deepspeed", "mlflow.server", "flask", "uvicorn", "crossgate.training", "crossgate.cluster"]
def found(names):
    return [name for name in names if name in sys.modules]
import crossgate.registry.predictor
assert not found([*training, "mlflow", "crossgate.tracking"]), found(sys.modules)
import crossgate.registry.package, crossgate.registry.release
assert not found(training), found(training)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
