"""Figures say what they show: seeds, whiskers, tolerances, names, shared axes, and no code names."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from frlkit import PROJECT
from frlkit.report import curves, figures, mechanism, names, tables

SHIPPED = PROJECT / "checkpoints" / "fashion_mnist"
SIGNS = PROJECT / "checkpoints" / "gtsrb17"


def read(recipe: str, seeds: int, name: str = "record") -> list[dict[str, Any]]:
    shipped = sorted((p for p in SHIPPED.iterdir() if p.name.split(",")[0] == recipe), key=lambda p: len(p.name))
    folder = next(p for p in shipped if (p / f"seed{seeds - 1}").exists())
    places = [folder / f"seed{seed}" / f"{name}.json" for seed in range(seeds)]
    return [json.loads(path.read_text(encoding="utf-8")) for path in places]


@pytest.fixture(autouse=True)
def no_window(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(plt, "show", lambda: None)
    plt.switch_backend("Agg")
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def records() -> dict[str, list[dict[str, Any]]]:
    return {"pgd_at": read("pgd_at", 5), "report_remargin": read("report_remargin", 3), "uniform": read("uniform", 5)}


def words(figure: Figure) -> list[str]:
    figure.canvas.draw()
    texts = figure.findobj(Text)
    return [text.get_text() for text in texts if text.get_text() and text.get_visible()]


def test_a_figure_with_three_seeds_does_not_say_five(records: dict[str, Any]) -> None:
    errors = tables.tidy(records)
    found = words(figures.class_bars(errors, list(dict.fromkeys(errors["class"])), "note"))
    assert any("whiskers ± sd over 3 to 5 seeds" in text for text in found)
    assert "Report's Remargin (3 seeds)" in found
    assert "PGD-AT (5 seeds)" in found


def test_many_classes_stay_legible_and_signs_have_their_radius() -> None:
    place = SHIPPED.parent / "gtsrb"
    read_one = {r: [json.loads((place / r / "seed0/record.json").read_text("utf-8"))] for r in ("natural", "pgd_at")}
    errors = tables.tidy(read_one)
    order = list(dict.fromkeys(errors["class"]))
    assert len(order) == 43
    figure = figures.class_bars(errors, order, "note")
    assert {"natural", "PGD-20 12/255", "PGD-20 16/255"} <= set(words(figure))
    for axis in figure.axes:
        boxes = [label.get_window_extent() for label in axis.get_xticklabels()]
        assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ([1, 1], "one seed, no whiskers"),
        ([5, 5], "whiskers ± sd over 5 seeds"),
        ([1, 3], "whiskers ± sd over 1 to 3 seeds"),
    ],
)
def test_what_whiskers_are(counts: list[int], said: str) -> None:
    assert figures.seeds(counts) == said


def test_panels_that_compare_share_an_axis(records: dict[str, Any]) -> None:
    figure = figures.value_bars(tables.scores(records)[["natural worst", "robust worst"]], "note")
    limits = {axis.get_xlim() for axis in figure.axes}
    assert len(limits) == 1
    histories = {"uniform": read("uniform", 2, "history"), "algorithm1_both": read("algorithm1_both", 2, "history")}
    figure = curves.fairness_curves(histories, "note")
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    assert figure.axes[2].get_ylim() == figure.axes[3].get_ylim() != figure.axes[0].get_ylim()


def test_tolerances_are_drawn_with_whose_they_are(records: dict[str, Any]) -> None:
    """The kit's 5 and 2 % and the paper's 7 %; equal weights have none, nor the report's softmax."""
    kinds = {name: read(name, 2, "history") for name in ("algorithm1_both", "uniform")}
    kinds["report_reweight"] = [replaced(each, weighting="softmax") for each in kinds["algorithm1_both"]]
    whole, classes = (
        curves.fairness_curves(kinds, ""),
        curves.class_curves(kinds["algorithm1_both"], list("abcdefghij"), ""),
    )
    drawn = [[{text for text in words_of(axis) if "τ" in text} for axis in each.axes[:2]] for each in (whole, classes)]
    assert drawn[0] == [
        {"τ = 5 % (paper, Reweight + Remargin)"},
        {"τ = 2 % (Reweight + Remargin)", "τ = 7 % (paper)"},
    ]
    assert drawn[1] == [{"τ = 5 %"}, {"τ = 2 %"}]
    many = {recipe: kinds["algorithm1_both"] for recipe in ("algorithm1_both", "algorithm1_reweight", "dafa")}
    assert any("3 methods" in text for text in words_of(curves.fairness_curves(many, "").axes[1]))


def replaced(history: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**history, "config": {**history["config"], **fields}}


def test_curves_say_the_radius_that_they_are_of() -> None:
    """Signs are steered at 12/255; the report's recipes steer on images drawn anew, and are watched at 8/255."""
    signs = json.loads((SHIPPED.parent / "gtsrb17/algorithm1_both/seed0/history.json").read_text("utf-8"))
    ours, report = read("algorithm1_both", 1, "history"), read("report_uniform", 1, "history")
    for histories, said in (
        ({"algorithm1_both": [signs]}, "PGD-20 at 12/255"),
        ({"algorithm1_both": ours, "report_uniform": report}, "PGD-20 at 8/255"),
        ({"algorithm1_both": [signs], "uniform": ours}, "PGD-20 at 8 and 12/255"),
    ):
        assert f"note · validation split, {said} · " in curves.fairness_curves(histories, "note").get_suptitle()


def words_of(axis: Any) -> list[str]:
    return [text.get_text() for text in axis.texts]


def test_multipliers_come_back_from_the_weights() -> None:
    """φ = (0.2, 0, 0.1) has the weights 1/3 + φ - 0.1; with its excess over the average and radii in 1/255."""
    entry = {
        "validation": {"natural": [0.3, 0.1, 0.2], "robust": [0.5, 0.4, 0.3]},
        "weights_nat": [1 / 3 + phi - 0.1 for phi in (0.2, 0.0, 0.1)],
        "weights_bdy": [1 / 3] * 3,
        "radius_factors": [1.0, 2.0, 1.5],
    }
    config = {"seed": 0, "eps_255": 8.0, "alpha_nat": 1.0, "alpha_margin": 1.0, "tau_nat": 0.05, "tau_bdy": 0.07}
    config |= {"measure_255": 8.0, "update_images": 0}
    history = {"config": config, "start": entry, "epochs": [entry]}
    figure = curves.class_curves([history], ["a", "b$c$", "d"], "")
    values = [[line.get_ydata()[-1] for line in axis.lines[:3]] for axis in figure.axes]
    assert values[0] == pytest.approx([10, -10, 0])
    assert values[1] == pytest.approx([100 * x for x in (0.2 - 0.2, 0.3 - 0.2, 0.1 - 0.2)])
    assert values[2] == pytest.approx([0.2, 0, 0.1])
    assert values[4] == pytest.approx([8, 16, 12])
    assert [line.get_xdata().tolist() for line in (figure.axes[0].lines[0], figure.axes[4].lines[0])] == [[0, 1], [1]]
    assert not figure.axes[4].collections[0].get_datalim(figure.axes[4].transData).height  # one seed has no band
    wider = {**history, "epochs": [{**entry, "radius_factors": [2.0, 2.0, 1.5]}]}
    axis = curves.class_curves([history, wider], ["a", "b$c$", "d"], "").axes[4]
    bands = [band.get_paths()[0].vertices[:, 1] for band in axis.collections]
    assert [(band.min(), band.max()) for band in bands] == [
        pytest.approx((12 - 8 / 2**0.5, 12 + 8 / 2**0.5)),  # the sd of 8 and 16 is 8 / sqrt(2)
        pytest.approx((16, 16)),
        pytest.approx((12, 12)),
    ]


def test_points_have_names_and_the_front_is_a_line(records: dict[str, Any]) -> None:
    figure = figures.pareto(tables.scores(records), [("robust average", "robust worst")], "note")
    assert {"1  PGD-AT (5 seeds)", "2  Report's Remargin (3 seeds)", "3  Control (5 seeds)"} <= set(words(figure))
    assert {text.get_text(): text.xy for text in figure.axes[0].texts}["3"] == pytest.approx(
        tuple(tables.scores(records).loc["uniform"][["robust average", "robust worst"]].mean())
    )
    front = mechanism.pareto(tables.scores(records), "robust average", "robust worst")
    assert len(figure.axes[0].lines[0].get_xdata()) == front["front"].sum()


def test_names_of_points_do_not_overprint() -> None:
    """Twelve points in a heap: no name on another, and none on a point."""
    figure, axis = plt.subplots()
    places = np.random.default_rng(0).normal(scale=0.02, size=(12, 2))
    axis.plot(*places.T, "o")
    axis.set(xlim=(-1, 1), ylim=(-1, 1))
    figures.name_points(axis, *places.T, [str(k) for k in range(12)])
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axis.texts]
    assert not any(box.overlaps(other) for k, box in enumerate(boxes) for other in boxes[:k])
    assert not any(box.contains(*point) for box in boxes for point in axis.transData.transform(places))
    plt.close(figure)


def test_who_dominates_whom() -> None:
    """The control in both columns beyond chance, TRADES in neither; a single better mean or three seeds do not do."""
    seeds = np.array([0.0, 0.1, -0.1, 0.2, -0.2])
    points = {"pgd_at": (1.0, 5.0), "uniform": (1.0, 4.0), "trades": (2.0, 3.0), "dafa": (0.9, 4.9)}
    rows = {(r, k): np.add(p, seeds[k]) for r, p in points.items() for k in range(5)}
    noise = np.array([0.4, -0.4, 0.3, -0.3, 0.1])
    rows |= {("dafa", k): np.array(points["dafa"]) + noise[k] * np.array([1, -1]) for k in range(5)}
    rows |= {("natural", k): np.zeros(2) for k in range(3)}
    scored = pd.DataFrame(rows, index=["average", "worst"]).T.rename_axis(["recipe", "seed"])
    columns = ("average", "worst")
    assert mechanism.dominated(scored, "pgd_at", columns) == "dominated by Control"
    assert mechanism.dominated(scored, "trades", columns) == "dominated by none"
    lower = scored[scored.index.get_level_values("seed") < 3]
    said = "not compared: no other has 5 seeds in common with it"
    assert mechanism.dominated(lower, "pgd_at", columns) == said


def test_report_figure_three(records: dict[str, Any]) -> None:
    errors = tables.tidy(records)
    order = list(dict.fromkeys(errors["class"]))
    figure = figures.before_after(errors, "pgd_at", "report_remargin", order, "note")
    found = words(figure)
    assert {"(a) PGD-AT (5 seeds)", "(b) Report's Remargin (3 seeds)", "PGD-20 16/255", "natural"} <= set(found)
    heights = [bar.get_height() for bar in figure.axes[1].patches][:10]
    expected = tables.classwise(errors, "report_remargin", "natural").mean()
    assert heights == pytest.approx(expected.tolist())


@pytest.mark.parametrize("recipe", [*names.TITLES, "uniform,alpha_margin=3,eps_255=16", "some_new_recipe,tau_nat=0.1"])
def test_no_title_is_a_code_name(recipe: str) -> None:
    assert not re.search(r"[a-z]_[a-z]|=|algorithm1", names.title(recipe))


def test_titles_are_different() -> None:
    assert len(set(names.TITLES.values())) == len(names.TITLES) >= len(names.METHODS)
    assert set(names.CONTROLS) | set(names.CONTROLS.values()) <= set(names.METHODS)


def test_odd_class_names_are_no_formulas(records: dict[str, Any], tmp_path: Path) -> None:
    made = copy.deepcopy(records["pgd_at"][:2])
    for record in made:
        record["class_names"][:3] = ["$\\frac$", "two\nlines", "a|b $ c"]
    errors = tables.tidy({"pgd_at": made})
    order = list(dict.fromkeys(errors["class"]))
    drawn = {
        "bars": figures.class_bars(errors, order, "data of folder:$x"),
        "map": figures.confusion_map(mechanism.confusion(made, 8), "$"),
        "points": figures.one_class(
            pd.DataFrame({"own radius": 1.0, **{f"change, {m}": 1.0 for m in tables.MEASURES}}, index=order), ""
        ),
    }
    for name, figure in drawn.items():
        figures.save(figure, tmp_path / f"{name}.png")  # draws every word
        text = (tmp_path / f"{name}.svg").read_text(encoding="utf-8")
        assert "two lines" in text


def test_many_classes_have_lines_of_their_own_and_a_long_heading_its_lines() -> None:
    history = json.loads((SIGNS / "algorithm1_remargin" / "seed0" / "history.json").read_text(encoding="utf-8"))
    record = json.loads((SIGNS / "uniform" / "seed0" / "record.json").read_text(encoding="utf-8"))
    lines = curves.class_curves([history], record["class_names"], "note").axes[4].get_legend_handles_labels()[0]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(lines) == 17
    note = "a long $heading of a narrow figure · " * 6
    figure = figures.confusion_map(mechanism.confusion([record], 12), note)
    figure.canvas.draw()
    assert figure.get_suptitle().replace("\n", " ").replace("\\$", "$") == note.rstrip()
    boxes = [text.get_window_extent() for text in (figure._suptitle, *figure.axes[0].get_xticklabels())]
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)
    ends = [box.x1 for box in boxes[1:]]  # names lean to the left of their columns: none under another's end
    assert np.diff(ends).min() > 0.9 * np.diff(ends).max()


def test_a_notebook_shows_what_it_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    figure, axis = plt.subplots(layout="constrained")
    axis.set_ylabel("a label")
    figures.show(figure, tmp_path / "new" / "01_figure.png")
    (image,) = shown
    assert image.data == (tmp_path / "new" / "01_figure.png").read_bytes()
    assert "a label" in (tmp_path / "new" / "01_figure.svg").read_text(encoding="utf-8")
    assert plt.get_fignums() == []


def test_training_curves_and_grid(tmp_path: Path) -> None:
    figure = curves.training_curves({"natural": read("natural", 2, "history")}, "note")
    assert any("bands ± sd over 2 seeds" in text for text in words(figure))
    index = pd.MultiIndex.from_product([[1, 2], [1, 5]], names=["natural", "boundary"])
    grid = pd.DataFrame({"a": range(4), "b": range(4)}, index=index)
    assert len(figures.grid_maps(grid, ["a", "b"], "").axes) == 2
