"""Tables of average and worst class against numbers worked out by hand."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from frlkit import PROJECT, KitError
from frlkit.__main__ import main
from frlkit.evaluation import Attack
from frlkit.report import mechanism, rules, statistics, tables


def record(seed: int, natural: list[float], robust: list[float]) -> dict[str, Any]:
    from dataclasses import asdict

    entries = [{"attack": asdict(Attack(eps)), "robust": robust} for eps in tables.RADII]
    return {"config": {"seed": seed}, "natural": natural, "attacks": entries}


SHIPPED = PROJECT / "checkpoints" / "fashion_mnist"
RECORDS = {
    "control": [record(0, [0.1, 0.3], [0.4, 0.5]), record(1, [0.2, 0.2], [0.4, 0.6])],
    "method": [record(1, [0.1, 0.2], [0.3, 0.5]), record(0, [0.1, 0.1], [0.4, 0.4])],  # another order of seeds
}


def test_scores_by_hand() -> None:
    scored = tables.scores(RECORDS)
    row = scored.loc[("control", 0)]
    expected = {"natural": (20, 30), "boundary": (25, 30), "robust": (45, 50)}
    for kind, (average, worst) in expected.items():
        assert row[f"{kind} average"] == pytest.approx(average)
        assert row[f"{kind} worst"] == pytest.approx(worst)


def test_scores_over_images_by_hand() -> None:
    """A class of 30 images and one of 10."""
    unbalanced = {"control": [{**record(0, [0.1, 0.3], [0.4, 0.5]), "class_counts": [30, 10]}]}
    row = tables.scores(unbalanced).loc[("control", 0)]
    assert row["natural average"] == pytest.approx(20)
    assert row["natural average over images"] == pytest.approx(15)
    assert row["boundary average over images"] == pytest.approx(27.5)
    assert row["robust average over images"] == pytest.approx(42.5)


class TestSigns:
    """Classes that differ in size, and a third radius."""

    SIGN = {
        **record(3, [0.1, 0.3], [0.4, 0.5]),
        "dataset": "gtsrb",
        "class_names": ["Stop", "Yield"],
        "class_counts": [30, 10],
        "images": 40,
    }

    def test_the_papers_radius_where_every_record_has_it(self) -> None:
        attack = {"attack": vars(Attack(12.0)), "robust": [0.6, 0.7]}
        more = {**self.SIGN, "attacks": [*self.SIGN["attacks"], attack]}
        table = tables.statistics(tables.tidy({"pgd_at": [more]}))
        assert table.loc[("pgd_at", "PGD-20 12/255"), ["average", "average over images", "best"]].tolist() == (
            pytest.approx([65, 62.5, 60])
        )
        records = {"gtsrb": {"pgd_at": [more]}}
        assert "PGD-20 12/255, average" in tables.by_method(records)
        assert all("PGD-20 12/255" in tables.rendered(records, kind).replace("\\/", "/") for kind in tables.FORMATS)
        assert tables.radius({"pgd_at": [more]}) == 12
        assert tables.radius({"pgd_at": [{**more, "dataset": "fashion_mnist"}]}) == 8
        quoted = {eps: tables.scores({"pgd_at": [more]}, eps).loc[("pgd_at", 3), "robust worst"] for eps in (None, 8)}
        assert quoted == pytest.approx({None: 70, 8: 50})  # as they are trained, and as others are
        for read in (tables.tidy, tables.scores):  # never in silence at another radius
            with pytest.raises(KitError, match="12/255"):
                read({"pgd_at": [more], "natural": [self.SIGN]})

    def test_the_papers_second_radius_on_cifar10_where_all_have_it(self) -> None:
        more = [*self.SIGN["attacks"], {"attack": vars(Attack(4.0)), "robust": [0.2, 0.4]}]
        both = {**self.SIGN, "dataset": "cifar10", "attacks": more}
        found = tables.tidy({"pgd_at": [both]})
        assert tables.classwise(found, "pgd_at", "PGD-20 4/255").loc[3].tolist() == pytest.approx([20, 40])
        lacking = {**both, "attacks": self.SIGN["attacks"]}
        for others in ({"trades": [lacking]}, {"trades": [{**both, "dataset": "fashion_mnist"}]}):
            assert "PGD-20 4/255" not in set(tables.tidy({"pgd_at": [both], **others})["measure"])

    def test_caption_names_fewer_attack_steps(self) -> None:
        for steps, words in ((2, ", 2 attack steps in training"), (10, ""), (20, "")):
            trained = {**self.SIGN, "config": {"steps": steps}}
            assert tables.note("signs", "a CNN", trained) == f"signs, a CNN{words}; 40 test images"

    def test_sizes_and_caption_name_the_training_images_where_they_are_known(self) -> None:
        known = {**self.SIGN, "training_counts": [1300, 200]}
        assert tables.sizes({"natural": [known]}, "natural").loc[3].to_dict() == {"Stop": 1300, "Yield": 200}
        assert tables.sizes({"natural": [self.SIGN]}, "natural").loc[3].to_dict() == {"Stop": 30, "Yield": 10}
        assert tables.note("signs", "a CNN", known) == "signs, a CNN; 1,500 of 26,640 training and 40 test images"
        whole = {**known, "training_counts": [1600, 200]}  # more in a class than torchvision's download has
        assert tables.trained_on(whole) == "1,800 of 39,209"
        assert tables.trained_on({**whole, "dataset": "cifar10"}) == "1,800"
        assert tables.note("signs", "a CNN", self.SIGN) == "signs, a CNN; 40 test images"


def test_differences_pair_the_seeds() -> None:
    """And leave out a pair without runs."""
    scored = tables.scores(RECORDS)
    change = rules.minus(scored, "method", "control", "robust worst")
    assert change.to_dict() == pytest.approx({0: -10, 1: -10})
    assert rules.minus(scored, "method", "control", "natural worst").to_dict() == pytest.approx({0: -20, 1: 0})
    table = rules.differences(scored, [("method", "control"), ("method", "nothing")])
    assert list(table.index) == ["method − control"]
    assert table.loc["method − control", "natural worst"] == "-10.0 ± 14.1"


def test_scores_of_nothing() -> None:
    scored = tables.scores({"control": []})
    assert scored.empty
    assert list(scored.columns) == list(tables.scores(RECORDS).columns)
    assert scored.index.names == ["recipe", "seed"]


def test_last_epochs_validation_by_hand() -> None:
    def history(natural: list[float], robust: list[float]) -> dict[str, Any]:
        earlier = {"validation": {"natural": [1.0, 1.0], "robust": [1.0, 1.0]}}
        return {"epochs": [earlier, {"validation": {"natural": natural, "robust": robust}}]}

    table = tables.last_epoch({"uniform": [history([0.1, 0.3], [0.5, 0.4]), history([0.3, 0.1], [0.6, 0.9])]})
    assert table.loc["uniform"].to_dict() == {
        "natural average": 20.0,
        "natural worst": 30.0,
        "robust average": 60.0,
        "robust worst": 70.0,
    }


def test_means_over_seeds() -> None:
    assert tables.means(tables.scores(RECORDS)).loc["control", "robust worst"] == "55.0 ± 7.1"


def test_unbalanced_classes_have_two_averages() -> None:
    record = {"class_names": ["a", "b"], "class_counts": [30, 10], "natural": [0.1, 0.5]}
    table = tables.error_table(record, [0.2, 0.9])
    assert table.loc["average over classes"].tolist() == [30.0, 25.0, 55.0]
    assert table.loc["average over images"].tolist() == [20.0, 17.5, 37.5]
    assert "average" in tables.error_table({**record, "class_counts": [20, 20]}, [0.2, 0.9]).index
    rows = [
        ("r", seed, name, "natural", error, n) for seed in (0, 1) for name, error, n in (("a", 10, 30), ("b", 50, 10))
    ]
    errors = pd.DataFrame(rows, columns=["recipe", "seed", "class", "measure", "error", "images"])
    assert tables.summary(errors).loc[("r", "natural"), ["average", "average over images"]].tolist() == [
        "30.0 ± 0.0",
        "20.0 ± 0.0",
    ]


class TestStatistics:
    def test_spread_by_hand(self) -> None:
        """Two seeds, the worst class another in each: 1, 2, 6 has mean 3, sd sqrt(14/3), Gini (1+5+4)*2/9/6 = 10/27."""
        found = statistics.spread([[1.0, 2.0, 6.0], [4.0, 2.0, 3.0]], fixed=2)
        assert found["average"] == pytest.approx([3, 3])
        assert found["worst"] == pytest.approx([6, 4])
        assert found["fixed class"] == pytest.approx([6, 3])
        assert found["mean of the two worst"] == pytest.approx([4, 3.5])
        assert found["sd over classes"] == pytest.approx([(14 / 3) ** 0.5, (2 / 3) ** 0.5])
        assert found["range"] == pytest.approx([5, 2])
        assert found["Gini"] == pytest.approx([10 / 27, 4 / 27])

    @given(st.lists(st.floats(0, 100), min_size=2, max_size=8), st.floats(0.1, 10))
    def test_gini_is_a_share_whatever_the_unit(self, values: list[float], unit: float) -> None:
        found = float(statistics.gini(values))
        assert 0 <= found <= 1 - 1 / len(values) + 1e-9
        assert statistics.gini([unit * value for value in values]) == pytest.approx(found, abs=1e-9)

    def test_gini_at_its_ends(self) -> None:
        assert statistics.gini([0, 0, 0]) == statistics.gini([3, 3, 3]) == 0
        assert statistics.gini([0, 0, 0, 5]) == pytest.approx(0.75)

    def test_a_tie_names_no_class(self) -> None:
        assert statistics.worst_class(np.array([[10.0, 40, 20], [10, 30, 20]]), ["a", "b", "c"]) == "b"
        assert statistics.worst_class(np.array([[100.0, 40, 100]]), ["a", "b", "c"]) == "2 classes"

    def test_worst_interval_against_whole_bootstrap(self) -> None:
        """Against one that draws every class of every resampled seed anew, image by image."""
        shares, images = np.array([[0.1, 0.5, 0.48], [0.2, 0.45, 0.5]]), np.array([200, 200, 100])
        low, high = statistics.worst_interval(shares, images)
        generator, means = np.random.default_rng(9), []
        for _ in range(1500):
            seeds = generator.integers(2, size=2)
            drawn = [[(generator.random(n) < p).mean() for p, n in zip(shares[s], images, strict=True)] for s in seeds]
            means.append(np.max(drawn, axis=1).mean())
        assert (low, high) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.012)

    def test_worst_interval_reproduces_itself(self) -> None:
        shares, images = np.array([[0.1, 0.5]]), np.array([50, 50])
        assert statistics.worst_interval(shares, images) == statistics.worst_interval(shares, images)
        assert statistics.worst_interval(np.array([[0.0, 1.0]]), images) == (1, 1)

    def test_front_by_hand(self) -> None:
        points = [[1, 5], [2, 3], [3, 3], [4, 1], [2, 3], [5, 5]]
        assert statistics.front(points).tolist() == [True, True, False, True, True, False]


class TestPaired:
    CLASSES = np.repeat([0, 1], 400)

    def outcomes(self, rate: float, seeds: int = 3) -> np.ndarray:
        return np.random.default_rng(int(100 * rate)).random((seeds, 800)) < rate

    def test_the_difference_itself(self) -> None:
        ours, theirs = self.outcomes(0.8), self.outcomes(0.6)
        worst = [[(~right[s][c == self.CLASSES]).mean() for c in (0, 1)] for right in (ours, theirs) for s in range(3)]
        expected = np.max(worst[:3], axis=1).mean() - np.max(worst[3:], axis=1).mean()
        found, low, high = statistics.paired_worst(ours, theirs, self.CLASSES)
        assert found == pytest.approx(expected)
        assert low < found < high < 0

    def test_class_errors_count_what_is_wrong(self) -> None:
        right = [[True, False, True, True], [False, False, True, False]]
        found = statistics.class_errors(right, [0, 0, 1, 0])
        np.testing.assert_allclose(found, [[1 / 3, 0], [1, 0]])

    def test_what_both_share_cancels(self) -> None:
        """Equal models differ by nothing; those that differ on few images, by far less than independent ones."""
        ours = self.outcomes(0.6)
        assert statistics.paired_worst(ours, ours, self.CLASSES) == (0, 0, 0)
        nearly = ours.copy()
        nearly[:, ::50] = ~nearly[:, ::50]
        apart = [np.subtract(*statistics.paired_worst(ours, other, self.CLASSES)[:0:-1]) for other in (nearly, ~ours)]
        assert apart[0] < apart[1] / 3

    def test_draws_are_those_of_a_plain_loop(self) -> None:
        """Draws are shared between pairs and classes may lie anywhere: the same as drawing by hand, in that order."""
        ours, theirs = self.outcomes(0.8, 2), self.outcomes(0.7, 2)
        mixed = np.random.default_rng(1).permutation(800)
        for _ in range(2):  # the second from what the first has drawn
            change, draws = statistics.paired_worst_draws(ours[:, mixed], theirs[:, mixed], self.CLASSES[mixed], 20)
            generator = np.random.default_rng(0)
            seeds = generator.integers(2, size=(20, 2))
            wrong = [~right[:, mixed] for right in (ours, theirs)]
            by_class = []
            for label in (0, 1):
                times = generator.multinomial(400, np.full(400, 1 / 400), size=20)
                members = self.CLASSES[mixed] == label
                by_class.append([[(each[:, members] * row).sum(1) / 400 for row in times] for each in wrong])
            worst = np.max(by_class, axis=0)  # (2, draws, S)
            expected = [(worst[0][k] - worst[1][k])[seeds[k]].mean() for k in range(20)]
            np.testing.assert_allclose(draws, expected)

    def test_shapes(self) -> None:
        with pytest.raises(KitError, match=r"shape \(1, 3\) and 2 labels do not belong together"):
            statistics.paired_worst([[True, False, True]], [[True, True, True]], [0, 1])


def attacked(counts: list[list[int]], seed: int = 0) -> dict[str, Any]:
    from dataclasses import asdict

    entry = {"attack": asdict(Attack(8)), "confusion": counts}
    return {"config": {"seed": seed}, "class_names": ["a\nb", "c", "d"], "attacks": [entry]}


class TestMechanism:
    BEFORE = [attacked([[6, 4, 0], [1, 8, 1], [0, 0, 10]])]
    AFTER = [attacked([[9, 1, 0], [5, 4, 1], [0, 2, 8]])]

    def test_who_pays_by_hand(self) -> None:
        found = mechanism.who_pays(self.BEFORE, self.AFTER, 8)
        assert found["own error"].to_dict() == {"a b": -30, "c": 40, "d": 20}
        assert found["taken for it"].to_dict() == {"a b": 40, "c": -10, "d": 0}
        assert found["now goes to"].tolist() == ["–", "a b +40.0", "c +20.0"]
        assert found["no longer to"].tolist() == ["c -30.0", "–", "–"]
        assert found["own error"].sum() == found["taken for it"].sum()

    def test_confusion_is_a_mean_over_seeds(self) -> None:
        both = mechanism.confusion([*self.BEFORE, *self.AFTER], 8)
        assert both.loc["a b"].tolist() == [75, 25, 0]
        with pytest.raises(KitError, match="the record has no PGD-20 at 16/255"):
            mechanism.confusion(self.BEFORE, 16)

    def test_group(self) -> None:
        rows = [("r", 0, name, "natural", error, 10) for name, error in (("a", 10.0), ("b", 30.0), ("c", 2.0))]
        errors = pd.DataFrame(rows, columns=["recipe", "seed", "class", "measure", "error", "images"])
        found = mechanism.group_error(errors, "r", "natural", ("a", "b")).loc[0]
        assert found.tolist() == [20, 30, 2]
        with pytest.raises(KitError, match="class 'z' is not there: use a, b, c"):
            mechanism.group_error(errors, "r", "natural", ("z",))

    def test_violations_by_hand(self) -> None:
        start = {"natural": [0.1, 0.3], "robust": [0.2, 0.6]}  # natural +10, boundary 0.1 and 0.3: +10 points
        later = {"natural": [0.2, 0.2], "robust": [0.3, 0.5]}  # natural 0, boundary +10
        history = {"config": {"seed": 4}, "start": {"validation": start}, "epochs": [{"validation": later}]}
        found = mechanism.violations(history)
        assert found.index.tolist() == [0, 1]
        assert found.loc[0].tolist() == pytest.approx([5, 3, 5])
        assert found.loc[1].tolist() == pytest.approx([-5, 3, 3])
        assert mechanism.smallest_violation({"uniform": [history]}, "uniform").to_dict() == pytest.approx({4: 3})
        assert mechanism.smallest_violation({}, "uniform").empty
        table = mechanism.smallest_violations({"uniform": [history]})
        assert table.loc["uniform"].tolist() == ["5.0", "3.0", "boundary 1", "20.0", "40.0", "1", "3.0", "0 of 1"]
        assert mechanism.smallest_violations({"u": [history]}, tau_nat=0.2, tau_bdy=0.2)["satisfied"].item() == "1 of 1"

    def test_a_violation_counts_after_any_epoch_and_not_at_the_start(self) -> None:
        """A start that violates nothing does not count, and neither the last epoch, +15, but the one before, +5."""
        epochs = [{"natural": [x, 0.5 - x], "robust": [x, 0.5 - x]} for x in (0.25, 0.15, 0.05)]
        history = {"config": {"seed": 2}, "start": {"validation": epochs[0]}}
        history["epochs"] = [{"validation": found} for found in epochs[1:]]
        assert mechanism.smallest_violation({"uniform": [history]}, "uniform").to_dict() == pytest.approx({2: 5})
        row = mechanism.smallest_violations({"uniform": [history]}).loc["uniform"]
        assert row.tolist() == ["-5.0", "5.0", "natural 1", "25.0", "25.0", "1", "15.0", "0 of 1"]

    def test_sums_of_multipliers(self) -> None:
        """φ = (0.3, 0, 0.1) and (0, 0.5, 0) under Eq. 17, and (0.3, 0.2, 0.1) as printed, from the class weights."""
        natural, boundary, printed = np.array([0.3, 0, 0.1]), np.array([0, 0.5, 0]), np.array([0.3, 0.2, 0.1])
        entry = {"weights_nat": 1 / 3 + natural - natural.mean(), "weights_bdy": 1 / 3 + boundary - boundary.mean()}
        found = mechanism.multiplier_sums([{"config": {"seed": 7}, "epochs": [entry, entry]}])
        assert found.index.tolist() == [1, 2]
        assert found.loc[2].to_dict() == pytest.approx({("natural", 7): 0.4, ("boundary", 7): 0.5})
        entry = {"weights_nat": 1 / 3 + printed, "weights_bdy": 1 / 3 + boundary}
        found = mechanism.multiplier_sums([{"config": {"seed": 7, "weighting": "printed"}, "epochs": [entry]}])
        assert found.loc[1].tolist() == pytest.approx([0.6, 0.5])

    def test_the_worst_class_by_seed(self) -> None:
        """The class with the largest mean is the worst in no seed."""
        by_seed = {"a": (50.0, 10.0), "b": (10.0, 50.0), "c": (45.0, 45.0)}
        rows = [("r", k, name, "natural", e, 10) for name, found in by_seed.items() for k, e in enumerate(found)]
        errors = pd.DataFrame(rows, columns=["recipe", "seed", "class", "measure", "error", "images"])
        assert mechanism.worst_by_seed(errors, "r", "natural") == "a 1, b 1"

    def test_who_pays_in_words(self) -> None:
        words = mechanism.payers(mechanism.who_pays(self.BEFORE, self.AFTER, 8))
        assert words.startswith("own robust error: from -30.0 points (a b) to +40.0 (c); ")
        assert words.endswith(": +40.0 % of a class; sum over all classes +30.0 points")

    def test_how_far_the_weights_move(self) -> None:
        """Both losses' weights of two classes, moving by 0.2 + 0.2 in each of the first steps and by nothing later."""
        path = [0.5, 0.6, 0.7, 0.7, 0.7]
        epochs = [{"weights_nat": [w, 1 - w], "weights_bdy": [w, 1 - w]} for w in path]
        still = [{"weights_nat": [0.5, 0.5], "weights_bdy": [0.5, 0.5]}] * 5
        table = mechanism.weight_movement(
            {"both": [{"epochs": epochs}, {"epochs": still}], "one": [{"epochs": epochs}]}, 2
        )
        assert table.columns.tolist() == ["first 2 epochs", "last 2 epochs"]
        assert table.loc["one"].tolist() == ["0.400", "0.000"]
        assert table.loc["both"].tolist() == ["0.200 ± 0.283", "0.000 ± 0.000"]  # sd of 0.4 and 0


class TestRendered:
    def made(self, **names: str) -> dict[str, Any]:
        made = json.loads((SHIPPED / "natural" / "seed0" / "record.json").read_text(encoding="utf-8"))
        made["class_names"][6] = "one\ntwo|three $x$"
        return {"fashion_mnist": {"natural": [made]}}

    def test_odd_names_stay_on_one_line(self) -> None:
        records = self.made()
        text, markdown = (tables.rendered(records, kind) for kind in ("text", "markdown"))
        assert "one two|three $x$" in text
        assert r"one two\|three \$x\$" in markdown
        assert len(markdown.splitlines()) == 3
        assert {line.replace("\\|", "").count("|") for line in markdown.splitlines()} == {1 + 3 + 3 * 5}

    def test_markdown_says_names_as_they_are(self) -> None:
        """As a renderer of Markdown understands them; a recipe's underscores are no emphasis anyway."""
        import mistune

        records = self.made()["fashion_mnist"]["natural"]
        name = r"$x_1$ & \frac `tick` *a* __b__ [l](u) <b>|x|</b> ~~s~~"
        records[0]["class_names"][6] = name
        written = tables.rendered({f"folder:{name}": {"natural,lr=0.1": records}}, "markdown")
        render = mistune.create_markdown(plugins=["table", "strikethrough", "math"])
        cells = re.findall(r"<td>(.*?)</td>", render(written))
        assert [html.unescape(cell) for cell in cells].count(name) == 2  # at 16/255 several classes are worst
        assert html.unescape(cells[0]) == f"folder:{name}"
        assert cells[1] == "natural,lr=0.1"

    def test_csv_and_json_are_the_same_numbers(self) -> None:
        from io import StringIO

        records = self.made()
        csv = pd.read_csv(StringIO(tables.rendered(records, "csv")))
        made = pd.DataFrame(json.loads(tables.rendered(records, "json")))
        assert csv["natural, worst"].item() == pytest.approx(
            100 * max(records["fashion_mnist"]["natural"][0]["natural"])
        )
        assert made["natural, worst"].item() == pytest.approx(csv["natural, worst"].item())
        assert made["PGD-20 8/255, worst sd"].item() is None or np.isnan(made["PGD-20 8/255, worst sd"].item())

    def test_unknown_formats_are_refused(self) -> None:
        with pytest.raises(KitError, match="format = 'xlsx' is not allowed: use one of text, markdown, csv, json"):
            tables.rendered(self.made(), "xlsx")


def test_spread_of_shipped_runs() -> None:
    errors = tables.tidy(tables.collect([SHIPPED / "pgd_at"])["fashion_mnist"])
    found = tables.spread(errors, "natural", "Shirt").loc["pgd_at"]
    by_seed = tables.classwise(errors, "pgd_at", "natural")
    assert found["Shirt in every seed"] == tables.plus_minus(by_seed["Shirt"])
    assert found["worst"] == tables.plus_minus(by_seed.max(axis=1))
    assert found["range"] == tables.plus_minus(by_seed.max(axis=1) - by_seed.min(axis=1))
    assert found["Gini"].count(".") == 2


def table(*words: str | Path) -> Result:
    return CliRunner().invoke(main, ["table", *map(str, words)])


class TestCollected:
    """``frlkit table``, on shipped runs."""

    def test_one_row_a_method_in_numbers_by_hand(self, tmp_path: Path) -> None:
        result = table(SHIPPED / "pgd_at", SHIPPED / "trades" / "seed0", "--output", tmp_path / "out.csv")
        assert result.exit_code == 0, result.output
        frame = pd.read_csv(tmp_path / "out.csv").set_index("recipe")
        assert list(frame.index) == ["pgd_at", "trades"]
        assert frame["dataset"].tolist() == ["fashion_mnist"] * 2
        assert frame["seeds"].tolist() == [len(list(SHIPPED.glob("pgd_at/seed*/record.json"))), 1]
        worst = pd.Series(
            [
                100 * max(json.loads(path.read_text(encoding="utf-8"))["natural"])
                for path in SHIPPED.glob("pgd_at/seed*/record.json")
            ]
        )
        row = frame.loc["pgd_at"]
        assert row["natural, worst"] == pytest.approx(worst.mean())
        assert row["natural, worst sd"] == pytest.approx(worst.std())
        assert row["natural, worst low"] < worst.mean() < row["natural, worst high"]
        assert row["natural, worst class"] == "Shirt"
        assert frame.loc["trades"].filter(like=" sd").isna().all()

    def test_what_is_printed_is_the_notebooks_summary(self, tmp_path: Path) -> None:
        result = table(SHIPPED / "pgd_at", "--format", "markdown", "--output", tmp_path / "out.md")
        assert result.exit_code == 0, result.output
        assert table(SHIPPED / "pgd_at").stdout == tables.rendered(tables.collect([SHIPPED / "pgd_at"]), "text")
        assert (tmp_path / "out.md").read_text(encoding="utf-8") == result.stdout
        head, _, row = (line.strip("| ").split(" | ") for line in result.stdout.splitlines())
        shown = dict(zip(head, row, strict=True))
        summary = tables.summary(tables.tidy(tables.collect([SHIPPED / "pgd_at"])["fashion_mnist"]))
        for measure in tables.MEASURES:
            for name, value in summary.loc["pgd_at", measure].items():
                assert shown[f"{measure}, {name}"] == value

    def test_parquet(self, tmp_path: Path) -> None:
        pytest.importorskip("pyarrow", reason="needs pyarrow: pip install pyarrow")
        for name in ("out.parquet", "out.csv"):
            assert table(SHIPPED / "trades", "--output", tmp_path / name).exit_code == 0
        found, expected = pd.read_parquet(tmp_path / "out.parquet"), pd.read_csv(tmp_path / "out.csv")
        pd.testing.assert_frame_equal(found, expected, check_dtype=False)

    def test_two_data_sets(self, tmp_path: Path) -> None:
        for dataset in ("digits", "fashion_mnist"):
            made = json.loads((SHIPPED / "natural" / "seed0" / "record.json").read_text(encoding="utf-8"))
            made["config"]["dataset"] = dataset
            place = tmp_path / dataset / "natural" / "seed0"
            place.mkdir(parents=True)
            (place / "record.json").write_text(json.dumps(made), encoding="utf-8")
        frame = tables.by_method(tables.collect([tmp_path]), tables.statistics)
        assert frame["dataset"].tolist() == ["digits", "fashion_mnist"]

    def test_overlapping_folders_count_once(self) -> None:
        records = tables.collect([SHIPPED / "trades", SHIPPED / "trades" / "seed0"])
        assert len(records["fashion_mnist"]["trades"]) == len(list((SHIPPED / "trades").glob("seed*/record.json")))

    @pytest.mark.parametrize(
        ("change", "said"),
        [({"seed": 1, "epochs": 3}, "epochs is 3 there and 15 here"), ({}, "are the same seed")],
    )
    def test_runs_that_do_not_belong_together(self, tmp_path: Path, change: dict[str, int], said: str) -> None:
        for number, changed in enumerate(({}, change)):
            made = json.loads((SHIPPED / "natural" / "seed0" / "record.json").read_text(encoding="utf-8"))
            made["config"] |= changed
            place = tmp_path / str(number) / "natural" / "seed0"
            place.mkdir(parents=True)
            (place / "record.json").write_text(json.dumps(made), encoding="utf-8")
        with pytest.raises(KitError, match=said):
            tables.collect([tmp_path / "0", tmp_path / "1"])

    def test_a_record_of_something_else(self, tmp_path: Path) -> None:
        other = {"dataset": "digits", "class_names": ["a", "b"], "attacks": []}  # of weights, not of a run
        (tmp_path / "record.json").write_text(json.dumps(other), encoding="utf-8")
        with pytest.raises(KitError, match="is no record of a run"):
            tables.collect([tmp_path])

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["nowhere"], "there are no finished runs in nowhere"),
            ([str(SHIPPED), "--output", "out.xlsx"], "use a name that ends in .csv, .json, .md, .parquet"),
            ([], "Missing argument 'RUNS...'"),
        ],
    )
    def test_bad_words(self, words: list[str], said: str) -> None:
        result = table(*words)
        assert result.exit_code != 0
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.stdout == ""
        assert said in result.stderr


def test_the_shipped_runs_fit_a_terminal() -> None:
    """Long recipes are broken behind commas; the numbers stand behind the last part."""
    text = tables.rendered(tables.collect([PROJECT / "checkpoints" / "fashion_mnist"]))
    assert max(map(len, text.splitlines())) <= 112
    recipes = {path.name for path in (PROJECT / "checkpoints" / "fashion_mnist").iterdir() if path.is_dir()}
    joined = "".join(re.sub(r" {2,}.*", "", line.strip()) for line in text.splitlines())
    assert all(recipe in joined for recipe in recipes)
