"""Which runs a notebook reads, and with which lengths."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from frlkit import PROJECT, KitError, evaluation, records, training
from frlkit.data import Dataset
from frlkit.recipes import configure, described, start_of
from frlkit.report import names, studies

SHIPPED = PROJECT / "checkpoints"
LENGTHS = {"epochs": 15, "frl_epochs": 0, "batch_size": 100}


@pytest.mark.parametrize(
    ("recipe", "frl_epochs", "expected"),
    [
        ("pgd_at", 0, {"epochs": 15}),
        ("uniform", 0, {"epochs": 12, "start_epochs": 15}),
        ("uniform", 3, {"epochs": 3, "start_epochs": 15}),
        ("official_both", 0, {"epochs": 40, "start_epochs": 15}),
        ("intercept_uniform", 0, {"epochs": 24, "start_epochs": 12}),  # starts from a retrained run
        ("intercept_uniform", 3, {"epochs": 3, "start_epochs": 3}),
    ],
)
def test_lengths(recipe: str, frl_epochs: int, expected: dict[str, int]) -> None:
    values = studies.values(recipe, **{**LENGTHS, "frl_epochs": frl_epochs})
    config = vars(configure(recipe, "fashion_mnist", 0, **values))
    assert {key: config[key] for key in expected} == expected


def test_a_length_that_was_asked_for_wins_over_the_first_editions(tmp_path: Path) -> None:
    """In its configuration and in its folder's name; a length that the user wrote into a recipe stays."""
    short, own = names.recipe("Report's control"), "report_uniform,epochs=9"
    for recipe, asked, epochs in ((short, 0, 8), (short, 2, 2), (own, 2, 9), ("uniform", 2, 2)):
        config, place = studies._run(recipe, "digits", 0, tmp_path, **{**LENGTHS, "frl_epochs": asked})
        assert config.epochs == epochs
        if "," in recipe:
            assert f",epochs={epochs}" in place.parent.name


def test_the_authors_recipes_are_read_at_their_own_length(tmp_path: Path) -> None:
    assert names.recipe("Authors' both") == "official_both"
    assert names.title("official_both,epochs=8,updates=5") not in names.METHODS  # the first edition's
    for asked, epochs in ((0, 40), (4, 4)):
        config, place = studies._run("official_both", "digits", 0, tmp_path, **{**LENGTHS, "frl_epochs": asked})
        assert (config.epochs, config.updates, place.parent.name) == (epochs, 1, "official_both")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_record_is_checked_on_a_batch_or_without_outcomes_on_all_images(
    channels: int, sound: nn.Module, tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image of a class may be another, two may not."""
    for module in (studies, evaluation):
        monkeypatch.setattr(module, "BATCH", 20)
    tiny = replace(tiny, test=replace(tiny.test, images=tiny.test.images.expand(-1, channels, -1, -1)))
    grey = nn.Conv2d(channels, 1, 1, bias=False)
    nn.init.constant_(grey.weight, 1 / channels)
    network = sound if channels == 1 else nn.Sequential(grey, sound).eval()
    monkeypatch.setattr(studies.runs, "load", lambda *_: network)
    path = tmp_path / "digits" / "uniform" / "seed0" / "record.json"
    record = records.evaluate(network, tiny, path=path, about={"config": {"seed": 0}})

    def said() -> str:
        return studies.recheck({"uniform": [record]}, "uniform", tmp_path, tiny, **LENGTHS)

    assert "20 of the test images" in said()
    kept, labels = records.outcomes(path.with_name(records.OUTCOMES)), tiny.test.labels[:20].numpy()
    monkeypatch.setattr(records, "outcomes", lambda *_: {"clean": kept["clean"]})  # without the attacks': all images
    assert "test images" not in said()
    monkeypatch.setattr(records, "outcomes", lambda *_: kept)
    alike = {k: np.flatnonzero((labels == k) & kept["clean"][:20])[:2] for k in range(10)}
    label = next(k for k, two in alike.items() if len(two) == 2)
    for index in alike[label]:
        said()
        kept["clean"][index] = False
        record["natural"][label] += 0.2
    for found in (kept, {}):
        monkeypatch.setattr(records, "outcomes", lambda *_, found=found: found)
        with pytest.raises(KitError, match=rf"uniform, clean: . images of {label} are wrong here, and . by the record"):
            said()


def test_a_network_of_ones_own_is_also_the_starts() -> None:
    values = studies.values("uniform", **LENGTHS, model="preact_resnet18_w16")
    config = configure("uniform", "cifar10", 0, **values)
    assert config.model == start_of(config).model == "preact_resnet18_w16"


@pytest.mark.parametrize(("epochs", "every"), [(100, 40), (15, 6), (1, 1)])
def test_a_short_run_has_the_papers_schedule(epochs: int, every: int) -> None:
    assert configure("pgd_at", "cifar10", 0, epochs=epochs).lr_every == every
    assert configure("pgd_at,lr_every=7", "cifar10", 0, epochs=epochs).lr_every == 7
    assert configure("uniform", "cifar10", 0, epochs=epochs).lr_every == 40  # retraining keeps its rate
    assert configure("pgd_at", "gtsrb", 0, epochs=epochs).lr_every == 4


@pytest.mark.parametrize(
    ("dataset", "eps"), [("fashion_mnist", 8.0), ("gtsrb", 12.0), ("gtsrb17", 12.0), ("cifar10", 8.0)]
)
def test_one_larger_radius_is_larger_than_the_data_sets_own(dataset: str, eps: float) -> None:
    for recipe, reference in (("constant_radius", "natural_only"), ("constant_margin", "uniform")):
        wide, own = (asdict(configure(name, dataset, 0)) for name in (recipe, reference))
        changed = {key: wide[key] for key in wide if wide[key] != own[key]}
        assert (own["eps_255"], changed) == (eps, {"eps_255": 1.5 * eps, "step_255": 1.5 * own["step_255"]})
    assert configure("constant_radius,eps_255=20", dataset, 0).eps_255 == 20


def test_small_colour_studies_need_no_bf16() -> None:
    """CIFAR-10's small network, GTSRB's 17 classes: what no recipe says itself, and so in the starts of retraining."""
    small = {"model": "preact_resnet18_w16"}
    for dataset, values, precision in (
        ("cifar10", small, "tf32"),
        ("cifar10", {}, "bf16"),
        ("gtsrb17", {}, "tf32"),
        ("gtsrb", {}, "bf16"),
        ("fashion_mnist", {}, "float32"),
    ):
        for recipe in ("pgd_at", "trades", "uniform", "algorithm1_both", "baseline_reweight"):
            config = configure(recipe, dataset, 0, **values)
            assert (config.steps, config.precision) == (10, precision)
            start = start_of(config)
            assert start is None or (start.steps, start.precision) == (10, precision)
        assert configure("n_fgsm", dataset, 0, **values).steps == 1
        assert configure("official_both", dataset, 0, **values).steps == 10
        assert configure("pgd_at,steps=7", dataset, 0, **values).steps == 7
    assert configure("pgd_at,model=preact_resnet18_w16", "cifar10", 0).precision == "tf32"


@pytest.mark.parametrize("title", names.METHODS)
def test_every_title_has_a_recipe(title: str) -> None:
    configure(names.recipe(title), "fashion_mnist", 0)


def test_finished_runs_are_read_and_others_left_out(tmp_path: Path) -> None:
    record, history = (
        json.loads((SHIPPED / "fashion_mnist" / "natural" / "seed0" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("record", "history")
    )

    def put(recipe: str, seed: int, **changed: Any) -> None:
        config = described(configure(recipe, "fashion_mnist", seed, **studies.values(recipe, **LENGTHS)))
        place = tmp_path / "fashion_mnist" / recipe / f"seed{seed}"
        place.mkdir(parents=True)
        for name, made in (("record", record), ("history", history)):
            made = {**made, "config": {**config, **changed}}
            (place / f"{name}.json").write_text(json.dumps(made), encoding="utf-8")

    control = names.recipe("Control")
    put(control, 0)
    put(control, 2)
    put(control, 1)  # being attacked: the record grows attack by attack
    growing = tmp_path / "fashion_mnist" / control / "seed1" / "record.json"
    content = json.loads(growing.read_text(encoding="utf-8"))
    growing.write_text(json.dumps({**content, "attacks": content["attacks"][:1]}), encoding="utf-8")
    put(names.recipe("DAFA"), 0, epochs=3)  # another length than asked for
    titles = ["Control", "DAFA", "Reweight", "no such recipe"]
    found, histories = studies.study(titles, [0, 1, 2], "fashion_mnist", tmp_path, None, **LENGTHS)
    assert list(found) == list(histories) == [control]
    with pytest.raises(KitError, match=r"no finished run of DAFA \(fashion_mnist\) in .*, and no data to train it"):
        studies.study(titles, [0], "fashion_mnist", tmp_path, None, needed=["Control", "DAFA"], **LENGTHS)
    assert [one["config"]["seed"] for one in found[control]] == [0, 2]


def test_outcomes_of_the_seeds_that_both_kept(tmp_path: Path) -> None:
    found: dict[str, list[dict[str, Any]]] = {}
    for recipe, seeds in ((names.recipe("Control"), (0, 1)), (names.recipe("DAFA"), (1, 2))):
        for seed in seeds:
            place = tmp_path / "fashion_mnist" / recipe / f"seed{seed}"
            place.mkdir(parents=True)
            right = np.array([seed == 1, True, "dafa" in recipe])
            kept = {"images": np.array(3), "weights_sha256": np.array("w"), "clean": np.packbits(right)}
            np.savez(place / "outcomes.npz", **kept)
            found.setdefault(recipe, []).append({"config": {"seed": seed}, "weights_sha256": "w"})
    ours, theirs = studies.outcomes(found, ["DAFA", "Control"], tmp_path, "clean", "fashion_mnist", **LENGTHS)
    assert ours.tolist() == [[True, True, True]]
    assert theirs.tolist() == [[True, True, False]]
    ours, _ = studies.outcomes(found, ["DAFA", "Control"], tmp_path, "PGD", "fashion_mnist", **LENGTHS)
    assert len(ours) == 0


def test_shipped_base_runs_are_found() -> None:
    found, _ = studies.finished(["PGD-AT", "TRADES"], range(5), "fashion_mnist", SHIPPED, **LENGTHS)
    assert [len(seeds) for seeds in found.values()] == [5, 5]


class TestStudy:
    LENGTHS = {"epochs": 1, "frl_epochs": 0, "batch_size": 100}

    @pytest.fixture
    def place(self, tiny: Dataset, tmp_path: Path) -> Path:
        """Two finished runs."""
        self.study(tmp_path, tiny)
        return tmp_path

    def study(self, place: Path, tensors: Dataset | None, *seeds: int, titles: Sequence[str] = ("natural",)) -> Any:
        return studies.study(titles, seeds or (0, 1), "digits", place, tensors, **self.LENGTHS)

    def test_without_data_the_records_are_read(self, place: Path) -> None:
        records, histories = self.study(place, None)
        assert list(records) == list(histories) == ["natural"]
        for seed in (0, 1):
            run = place / "digits" / "natural" / f"seed{seed}"
            assert records["natural"][seed] == json.loads((run / "record.json").read_text(encoding="utf-8"))
            assert histories["natural"][seed] == json.loads((run / "history.json").read_text(encoding="utf-8"))
            assert records["natural"][seed]["config"]["seed"] == seed
        weights = [record["weights_sha256"] for record in records["natural"]]
        assert weights[0] != weights[1]

    def test_a_run_of_another_configuration_is_refused(self, place: Path, tiny: Dataset) -> None:
        with pytest.raises(KitError, match="epochs is 1 there and 2 here"):
            studies.study(["natural"], [0], "digits", place, tiny, **{**self.LENGTHS, "epochs": 2})

    def test_a_history_of_another_configuration_is_refused(self, place: Path, tiny: Dataset) -> None:
        path = place / "digits" / "natural" / "seed0" / "history.json"
        history = json.loads(path.read_text(encoding="utf-8"))
        history["config"]["lr"] = 0.5
        path.write_text(json.dumps(history), encoding="utf-8")
        with pytest.raises(KitError, match=r"lr is 0\.5 there"):
            self.study(place, tiny)

    def test_a_record_without_a_configuration_is_left_out(self, place: Path) -> None:
        (place / "digits" / "natural" / "seed0" / "record.json").write_text("{}\n", encoding="utf-8")
        records, _ = self.study(place, None)
        assert [record["config"]["seed"] for record in records["natural"]] == [1]

    def test_finished_runs_are_not_trained_again(
        self, place: Path, tiny: Dataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trained: list[int] = []
        straight: Callable[..., Any] = training.train_epoch

        def train_epoch(run: training.Progress, *rest: Any) -> Iterator[tuple[int, float]]:
            trained.append(run.config.seed)
            yield from straight(run, *rest)

        monkeypatch.setattr(training, "train_epoch", train_epoch)
        records, _ = self.study(place, tiny, 0, 1, 2)
        assert trained == [2]
        assert [record["config"]["seed"] for record in records["natural"]] == [0, 1, 2]
