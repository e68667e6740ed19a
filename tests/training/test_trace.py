"""Phases of steps, rank by rank: what is noted, and the picture of it."""

from __future__ import annotations

from contextlib import suppress

import pytest
from tiny_run import run_fit, tiny_recipe

from crossgate.errors import UserError
from crossgate.runs.trace import trace_picture
from crossgate.training.trace import Span, StepTrace, read_traces


def test_a_run_notes_the_phases_of_the_steps_asked_for(tmp_path):
    run_fit(tiny_recipe(tmp_path, "run", training={"trace": [3, 4]}), validated=False)
    (spans,) = read_traces(tmp_path / "run").values()
    assert [(span.step, span.phase) for span in spans[:4]] == [
        (3, "load"),
        (3, "forward"),
        (3, "backward"),
        (3, "step"),
    ]
    assert {span.step for span in spans} == {3, 4}
    for span, after in zip(spans, spans[1:], strict=False):
        assert span.start + span.seconds == pytest.approx(after.start, abs=1e-6), "a phase ends where the next begins"


def test_what_an_error_ends_is_kept(tmp_path):
    with suppress(RuntimeError), StepTrace((1, 9), tmp_path, 5) as trace:
        trace.enter("load", 1)
        trace.enter("forward", 1)
        raise RuntimeError
    assert {rank: [span.phase for span in spans] for rank, spans in read_traces(tmp_path).items()} == {
        5: ["load", "forward"]
    }


def test_the_picture_has_a_row_a_rank_up_to_64(tmp_path):
    from crossgate.evaluation.steps import step_timeline

    spans = [Span("load", 1, 100.0, 0.5), Span("forward", 1, 100.5, 1.0)]
    (axes,) = step_timeline({rank: spans for rank in range(70)}).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"rank {rank}" for rank in range(64)]
    with StepTrace((1, 1), tmp_path, 0) as trace:
        trace.enter("load", 1)
    assert trace_picture(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_a_run_without_a_trace_is_told_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match=r"no trace of any step; train with training\.trace="):
        trace_picture(tmp_path)
    with pytest.raises(UserError, match=rf"^{tmp_path}/nowhere: no such run; expected the directory of a run"):
        trace_picture(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["profile", "trace"])
def test_steps_that_the_run_does_not_have_are_refused(tmp_path, name):
    with pytest.raises(UserError, match=rf"^training\.{name}: begins at step 13, and the run has 12; expected \[first"):
        run_fit(tiny_recipe(tmp_path, "run", training={name: [13, 14]}), validated=False)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
