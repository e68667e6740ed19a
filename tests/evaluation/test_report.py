"""The report, figures and results: nothing external, everything escaped, no figure fails on odd input."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest

from crossgate.errors import UserError
from crossgate.evaluation import (
    Evaluation,
    Section,
    figures,
    read_results,
    style,
    training_section,
    write_report,
    write_results,
)
from crossgate.evaluation.gates import diagnose
from crossgate.evaluation.intervals import Bootstrap, Difference, Interval, mean
from crossgate.evaluation.report import render
from crossgate.evaluation.results import metric_name
from crossgate.evaluation.tables import Table, bounds, p_value, percent, points, verdict

NASTY = "<script>alert('x')</script> & $\\frac{1}{0$ \"q\" | pipe"


class Reader(HTMLParser):
    """Collects tags and attributes, and whether every element was closed in order."""

    VOID = {"meta", "img", "link", "br"}

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.attributes, self.text = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(page):
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def sample_page():
    figure = figures.confusion(np.array([0, 1, 1]), np.array([0, 1, 0]), [NASTY, "b"])
    table = Table([NASTY, "n"], [[NASTY, "1"]], NASTY)
    return render(
        NASTY,
        [Section(NASTY, [NASTY], [table], [(figure, NASTY)], code=NASTY)],
        summary=f"{NASTY}\n\nsecond",
        recipe=NASTY,
        provenance={NASTY: NASTY},
    )


def test_everything_is_escaped():
    reader = read(sample_page())
    assert "script" not in reader.tags
    assert reader.text.count("alert('x')") >= 10
    assert reader.text.count(NASTY) >= 10, "the text survives unchanged"


def test_nothing_is_fetched_and_nothing_runs():
    reader = read(sample_page())
    assert not {"script", "link", "iframe", "object"} & set(reader.tags)
    for name, value in reader.attributes:
        assert not name.startswith("on")
        if name in ("src", "href"):
            assert value.startswith(("data:image/", "#"))
    assert "url(" not in sample_page()
    assert "@import" not in sample_page()


def test_links_lead_to_sections():
    reader = read(sample_page())
    links = {v[1:] for k, v in reader.attributes if k == "href"}
    assert links
    assert links <= {v for k, v in reader.attributes if k == "id"}


def test_report_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = write_report(tmp_path / "new" / "report.html", "Title", [Section("One", ["text"])])
    assert path.read_text().startswith("<!doctype html>")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(path, "Other", [])
    assert "Other" not in path.read_text()


def test_svg_is_well_formed_follows_the_colour_scheme_and_is_reproducible():
    first = style.svg(figures.confusion(np.array([0, 1]), np.array([0, 1]), [NASTY, "b"]))
    again = style.svg(figures.confusion(np.array([0, 1]), np.array([0, 1]), [NASTY, "b"]))
    assert first == again
    ElementTree.fromstring(first[first.index("<svg") :])
    assert "prefers-color-scheme: dark" in first
    assert f"fill: {style.INK}" in first, "the dark rules match what matplotlib writes"


def test_a_huge_figure_goes_in_as_png():
    labels = np.arange(150)
    figure = figures.confusion(labels, labels, [str(i) for i in labels])
    figure.axes[0].plot(np.random.default_rng(0).random(10_000), "o")
    assert "data:image/png" in render("t", [Section("s", figures=[(figure, "c")])])


def test_figures_leave_the_global_style_alone():
    before = dict(mpl.rcParams)
    figures.confusion(np.array([0, 1]), np.array([0, 1]), ["a", "b"])
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("classes", [2, 5, 17, 70])
def test_confusion_with_a_class_missing_in_test(classes):
    labels = np.arange(classes - 1)  # the last class has no clip, but is predicted
    figure = figures.confusion(labels, np.roll(labels, 1) + 1, [f"class {i}" for i in range(classes)])
    shown = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(np.nansum(shown[:-1], axis=1), 1)
    assert np.isnan(np.ma.filled(shown[-1], np.nan)).all()
    assert style.png(figure)[:4] == b"\x89PNG"


@pytest.mark.parametrize("positive", [[True, False, True, False], [True] * 4, [False] * 4])
def test_curves_with_one_class_missing(positive):
    scores, bootstrap = np.array([0.9, 0.2, 0.4, 0.4]), Bootstrap(np.arange(4), 50)
    for figure in (
        figures.precision_recall(scores, np.array(positive), bootstrap),
        figures.roc(scores, np.array(positive), bootstrap, 0.1),
    ):
        assert style.svg(figure)


def test_gate_figures_with_nothing_known(simulated):
    got = simulated(24, 1, classes=3)
    got.degraded[:] = np.nan
    got.present[:, 3] = False
    report = diagnose(
        [got.weights],
        got.present,
        got.labels["action"],
        4,
        got.degraded,
        got.modalities,
        Bootstrap(got.group, 50),
    )
    assert style.svg(figures.gate_by_class(report.by_class, ["a", "b", "c", "d"], got.modalities))
    assert style.svg(figures.gate_by_severity(report))


def test_forest_without_intervals_and_with_levels():
    bare = Interval(0.5, math.nan, math.nan, 1, 3)
    wide = Interval(0.6, 0.4, 0.8, 9, 30)
    figure = figures.forest([figures.Point("a", bare), figures.Point("b", wide)], "x", {"chance": 0.2}, wide)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b"]


def test_training_curves_choose_what_to_show_of_what_the_loop_logged():
    rows = [
        {"step": 2, "time": 1.5, "train/loss": 1.0, "train/loss/total": 1.0, "train/loss/fused": 0.5},
        {"step": 1, "train/loss": 2.0, "train/gate/weight_rgb": 0.5, "train/loss/pair_rgb_flow": 3.0, "train/lr": 0.1},
        {"step": 2, "val/retrieval/mean/r_at_1": 0.5, "val/retrieval/mean/median_rank": 40.0},
        {"step": 3, "train/loss": None},
    ]
    figure = figures.training_curves(rows)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["loss", "validation", "gate weights"]
    loss, validation, gate = figure.axes
    assert [line.get_label() for line in loss.lines] == ["loss", "fused"]
    assert len(validation.lines) == 1, "a rank is no share"
    np.testing.assert_array_equal(loss.lines[0].get_xdata(), [1, 2])
    assert gate.lines[0].get_color() == style.colour("rgb")
    assert style.svg(figures.training_curves([]))


def test_a_run_that_trained_gets_a_section_of_curves():
    done = Evaluation()
    training_section(done, [])
    assert not done.sections
    training_section(done, [{"step": 7, "train/loss": 1.0}])
    assert [section.title for section in done.sections] == ["Training"]
    assert "7 optimiser steps" in done.sections[0].text[0]
    assert list(done.figures) == ["training"]


def test_modalities_keep_their_colours():
    hues = [style.colour(name) for name in ("rgb", "flow", "audio", "depth")]
    assert len(set(hues)) == 4
    assert style.colour("thermal") == style.colour("thermal")


def test_table_text():
    table = Table(["name", "accuracy"], [["a|b", "9.5 %"], ["longer", "10.0 %"], ["none", "n/a"]])
    assert table.text().splitlines() == [
        "name    accuracy",
        "------  --------",
        "a|b        9.5 %",
        "longer    10.0 %",
        "none         n/a",
    ]


def test_wording():
    one, bare = Interval(0.612, 0.55, 0.671, 9, 90), Interval(0.5, math.nan, math.nan, 1, 3)
    assert (percent(one.value), bounds(one), bounds(bare)) == ("61.2 %", "55.0 to 67.1", "n/a")
    assert points(Difference(0.031, -0.004, 0.067, 9, 90)) == "+3.1 (-0.4 to +6.7)"
    assert (p_value(0.0004), p_value(0.02), p_value(math.nan)) == ("<0.001", "0.020", "n/a")
    assert "above" in verdict(one, 0.5)
    assert "below" in verdict(one, 0.7)
    assert "includes" in verdict(one, 0.6)
    assert "too few groups" in verdict(bare, 0.1)


def test_results_round_trip_and_are_plain_json(tmp_path):
    one = Bootstrap(np.arange(20), 50).interval(mean(np.arange(20) % 2))
    metrics = {**one.metrics("test/accuracy"), "test/roc_auc": math.nan}
    write_results(tmp_path / "results.json", metrics, {"run": "x"})
    json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)  # no NaN literals
    got, provenance = read_results(tmp_path / "results.json")
    assert got["test/accuracy_low"] == one.low
    assert math.isnan(got["test/roc_auc"])
    assert provenance == {"run": "x"}


@pytest.mark.parametrize("text", [None, "", "[]", '{"format": 1}', '{"format": 9, "metrics": {}, "provenance": {}}'])
def test_bad_results_are_one_clear_line(tmp_path, text):
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=re.escape(str(path))):
        read_results(path)


def test_infinite_metrics_are_refused(tmp_path):
    with pytest.raises(ValueError):
        write_results(tmp_path / "results.json", {"x": math.inf})
    assert list(tmp_path.iterdir()) == []


def test_metric_names_are_what_mlflow_takes():
    assert metric_name("test", "compare", "fixed weights <1:2>") == "test/compare/fixed_weights_1_2"
    assert re.fullmatch(r"[\w/.-]+", metric_name("a", "rgb à la $5", "/../"))
