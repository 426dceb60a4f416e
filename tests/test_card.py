"""The report card: its numbers against brute force, its sentences, and what Chromium shows of it."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from scipy import stats

from frlkit import KitError
from frlkit.evaluation import Attack
from frlkit.report import card, card_figures, card_words, statistics

ODD = ["$x_1$ & <b>", "\u05e9\u05dc\u05d5\u05dd", "\"quoted\" 'name'", "two\nlines", "\u732b", "a" * 70, " "]


def audit(classes: int = 10, each: int | list[int] = 100, seed: int = 0, **changed: Any) -> dict[str, Any]:
    """An audit as `frlkit.audit.audit` returns it, drawn at random: class k is hard in proportion to k."""
    draw = np.random.default_rng(seed)
    images = np.broadcast_to(each, classes)
    last = np.array([draw.binomial(n, 0.1 + 0.8 * k / classes) for k, n in enumerate(images)])
    radii = [0, 2, 4, 8, 16]
    falls = np.array([[round(n * part) for n in last] for part in (0.2, 0.3, 0.5, 0.8, 1)])
    taken = np.array([draw.multinomial(wrong, _others(k, classes)) for k, wrong in enumerate(falls[3])])
    np.fill_diagonal(taken, images - falls[3])
    robust = falls / images
    return {
        "dataset": "digits",
        "class_names": [f"class {k}" for k in range(classes)],
        "images": int(images.sum()),
        "labels_per_class": images.tolist(),
        "attack": asdict(Attack()),
        "natural": robust[0].tolist(),
        "robust": robust[3].tolist(),
        "boundary": (robust[3] - robust[0]).tolist(),
        "confusion": {"natural": taken.tolist(), "robust": taken.tolist()},
        "curve": [{"eps_255": float(eps), "robust": r.tolist()} for eps, r in zip(radii, robust, strict=True)],
        "reading": {
            **{"model": "lenet5", "mean": [0.5], "std": [0.5], "size": 32, "channels": 1, "value_range": "[0, 1]"},
            **{"key": "", "prefix": "", "tried": [{"reading": "tanh", "natural": 0.9}]},
        },
        "doubts": [],
        "fingerprints": {"weights": "a" * 64, "data": "b" * 64},
        "command": "frlkit audit weights.pt",
        "versions": {"frlkit": "0"},
        "seconds": 12.5,
        **changed,
    }


def _others(k: int, classes: int) -> np.ndarray:
    shares = np.ones(classes) / (classes - 1)
    shares[k] = 0
    return shares


def full(**changed: Any) -> dict[str, Any]:
    """With a ladder, certificates and doubts."""
    plain = audit(**changed)
    robust = np.array(plain["robust"])
    ladder = [("clean", plain["natural"]), ("PGD-20 at 8/255, step 2/255", plain["robust"])]
    ladder += [("AutoAttack (standard)", np.minimum(robust + 0.05, 1).tolist())]
    plain["ladder"] = [{"rung": name, "robust": errors, "images": plain["images"]} for name, errors in ladder]
    shares = {"falsified": robust, "verified": (1 - robust) / 4, "undecided": 3 * (1 - robust) / 4}
    plain["certified"] = {"eps_255": 8.0, "images": 50} | {key: value.tolist() for key, value in shares.items()}
    return {**plain, "doubts": ["gradients seem to be masked", "<script>document.title = 'bad'</script>"]}


def test_two_audits_of_one_title_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KitError, match="title = 'net' is there twice: give each audit of a card a title of its own"):
        card.write([audit(title="net"), audit(title="net")], tmp_path)
    assert not list(tmp_path.iterdir())


def test_classes_that_err_alike() -> None:
    """None is named as hardest or least hit."""
    given = audit()
    given |= {key: [0.0] * len(given["class_names"]) for key in ("natural", "robust", "boundary")}
    said = card_words.sentences(given, card.summary(given))
    assert "All classes are hit alike, 0.0 %." in said["headline"]
    assert said["classes"] == "No class is hardest: all err alike under attack."


class TestNumbers:
    def test_wilson_by_its_formula(self) -> None:
        """(p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)."""
        z = stats.norm.ppf(0.975)
        for k, n in ((0, 10), (3, 10), (10, 10), (413, 1000)):
            middle, half = k / n + z**2 / 2 / n, z * np.sqrt(k / n * (1 - k / n) / n + z**2 / 4 / n**2)
            expected = np.array([middle - half, middle + half]) / (1 + z**2 / n)
            assert statistics.wilson([k], [n])[0] == pytest.approx(expected, abs=1e-12)

    def test_hardest_by_a_permutation_test(self) -> None:
        """Fisher's exact two-sided p of 9 of 10 against 4 of 10, summed over the tables by hand."""
        tables = [stats.hypergeom(20, 13, 10).pmf(k) for k in range(3, 11)]
        expected = sum(p for p in tables if p <= tables[9 - 3] * (1 + 1e-9))
        worst, p = statistics.hardest([4, 9, 0], [10, 10, 10])
        assert worst == 1
        assert p.tolist() == pytest.approx([expected, 1, stats.fisher_exact([[9, 1], [0, 10]]).pvalue])

    def test_hardest_is_rarely_established_where_all_classes_are_alike(self) -> None:
        """Of 200 draws from ten equal classes, at most the nominal twentieth (plus three standard errors)."""
        draws = np.random.default_rng(0).binomial(50, 0.4, (200, 10))
        found = [(np.sort(statistics.hardest(wrong, [50] * 10)[1])[-2] < 0.05) for wrong in draws]
        assert np.mean(found) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)

    def test_summary_against_counts(self) -> None:
        given = audit(classes=3, each=[50, 100, 200])
        found = card.summary(given)
        assert [each["number"] for each in found["classes"]] == np.argsort(-np.array(given["robust"])).tolist()
        taken = np.array(given["confusion"]["robust"])
        source, target = found["pairs"][0]["source"], found["pairs"][0]["target"]
        share = max(taken[i, j] / given["labels_per_class"][i] for i in range(3) for j in range(3) if i != j)
        assert found["pairs"][0]["share"] == share == taken[source, target] / given["labels_per_class"][source]
        wrong = sum(taken[i, j] for i in range(3) for j in range(3) if i != j)
        assert found["receives"][0] == pytest.approx((taken[1, 0] + taken[2, 0]) / wrong)
        for each in found["classes"]:
            assert each["natural"] + each["boundary"] == pytest.approx(each["robust"])
            assert each["robust_interval"][0] < each["robust"] < each["robust_interval"][1]

    def test_a_network_without_an_error(self) -> None:
        right = np.diag([20, 20]).tolist()
        none = {"natural": [0.0] * 2, "robust": [0.0] * 2, "boundary": [0.0] * 2, "confusion": {"robust": right}}
        given = audit(classes=2, each=20, **none, curve=[{"eps_255": 0.0, "robust": [0.0] * 2}])
        found = card.summary(given)
        assert found["pairs"] == []
        assert not found["hardest"]["established"]
        says = card_words.sentences(given, found)
        assert "no image" in says["confusion"]
        assert "never, up to 0/255" in says["curve"]


class TestSentences:
    def test_established_or_not(self) -> None:
        given = audit(classes=2, each=1000)
        assert "is established" in card_words.sentences(given, card.summary(given))["classes"]
        few = audit(classes=5, each=4)
        said = card_words.sentences(few, card.summary(few))["classes"]
        assert "not established" in said
        assert "cannot be told from" in said

    def test_a_class_of_two_images_is_not_called_hit_hardest(self) -> None:
        given = audit(classes=5, each=[500, 400, 300, 200, 2])
        found = card.summary(given)
        assert not found["hardest"]["established"]
        said = card_words.sentences(given, found)["headline"]
        assert "The largest error is that of “\u2068class 4\u2069”" in said
        assert "of its 2 images" in said
        rivals = [given["robust"][k] for k in found["hardest"]["not_told_from"]]
        assert rivals == sorted(rivals, reverse=True)

    @pytest.mark.parametrize(
        ("taken", "said"),
        [
            ([[4, 6], [3, 7]], "With two classes, a mistake can only be the other one."),
            ([[4, 3, 3], [3, 7, 0], [1, 0, 9]], "no pair is more frequent; “\u2068class 0\u2069” receives 40.0 %"),
        ],
    )
    def test_of_frequent_mistakes_only_what_is_so(self, taken: list[list[int]], said: str) -> None:
        """Equally frequent pairs, and two classes, where where mistakes end is no finding."""
        robust = [1 - taken[k][k] / 10 for k in range(len(taken))]
        given = audit(classes=len(taken), each=10, robust=robust, confusion={"natural": taken, "robust": taken})
        found = card_words.sentences(given, card.summary(given))["confusion"]
        assert said in found
        assert ("receives" in found) == (len(taken) > 2)

    def test_half_of_the_hardest_class(self) -> None:
        given = audit(classes=2, curve=[{"eps_255": 0.0, "robust": [0.0, 0.1]}, {"eps_255": 4.0, "robust": [0.1, 0.6]}])
        said = card_words.sentences(given, card.summary(given))["curve"]
        assert "class 1\u2069” from 4/255 on" in said
        assert "class 0\u2069” never, up to 4/255" in said

    def test_what_stronger_attacks_and_proofs_add(self) -> None:
        given = full(each=100)
        said = card_words.sentences(given, card.summary(given))
        assert "missed 5.0 points" in said["ladder"]
        assert "2 reasons to doubt" in said["trust"]
        verified = np.mean(given["certified"]["verified"])
        assert f"{100 * verified:.1f} % of 50 images" in said["certified"]

    def test_changes_against_before_and_control(self) -> None:
        """A method that halves the hardest class's error is told from both; the control from nothing."""
        before = audit(each=1000, title="before")
        better = {**before, "robust": [r / 2 for r in before["robust"]], "title": "method"}
        found = card.comparison([before, {**before, "title": "control"}, better])
        control, against_before, against_control = found["says"]
        assert control.endswith("not established to differ.")
        worst = 100 * max(before["robust"]) / 2
        for said, reference in ((against_before, "before"), (against_control, "control")):
            assert f"against “\u2068{reference}\u2069”" in said
            assert f"\u2212{worst:.1f} points" in said
            assert said.endswith(": lower.")
        assert card.comparison([before]) == {}


class TestFiles:
    @pytest.mark.parametrize("given", [[], [audit(2), audit(3)]], ids=["none", "other classes"])
    def test_refused(self, given: list[dict[str, Any]], tmp_path: Path) -> None:
        with pytest.raises(KitError, match="report card needs|has another class_names"):
            card.write(given, tmp_path)

    @pytest.mark.parametrize(
        "given",
        [
            full(class_names=[*ODD, "8", "9", "10"]),
            audit(classes=2, each=[3, 500]),
            audit(classes=101, each=5),
        ],
        ids=["odd names", "two classes", "a hundred classes"],
    )
    def test_page_is_alone_and_says_what_the_json_says(self, given: dict[str, Any], tmp_path: Path) -> None:
        text = card.write([given], tmp_path).read_text(encoding="utf-8")
        assert "<script" not in text
        assert "http" not in text
        assert " %<" not in text  # a number and its sign stay on one line
        assert ("the first 100 classes" in text) == (len(given["class_names"]) > 100)
        (kept,) = json.loads((tmp_path / "card.json").read_text(encoding="utf-8"))
        assert kept["robust"] == given["robust"]
        assert kept["summary"]["classes"][0]["robust"] == max(given["robust"])
        pictures = sorted(path.stem for path in tmp_path.glob("*.png"))
        expected = ["card_classes", "card_confusion", "card_curve", *(["card_ladder"] if "ladder" in given else [])]
        assert pictures == sorted(expected + (["card_certified"] if "certified" in given else []))
        for path in tmp_path.glob("*.png"):
            shape = matplotlib.image.imread(io.BytesIO(path.read_bytes())).shape
            assert 600 < shape[1] < 1000
            assert 200 < shape[0] < 2000

    def test_names_as_pictures_show_them(self) -> None:
        shown = [card_figures.label(name, number) for number, name in enumerate(ODD)]
        assert shown[0] == r"\$x_1\$ & <b>"
        assert shown[3:5] == ["two lines", "class 4"]  # the font has no letters of Chinese
        assert shown[5] == "a" * 23 + "…"
        assert shown[6] == "class 6"
