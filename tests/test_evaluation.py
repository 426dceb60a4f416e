"""Class-wise errors against counting by hand, and records that are reused only where they may be."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from frlkit import KitError, attacks, checkpoint, evaluation, models, records
from frlkit.data import Dataset, Split
from frlkit.evaluation import Attack
from frlkit.report import studies

QUICK = Attack(eps_255=8, step_255=4, steps=2)
OTHER = Attack(eps_255=16, step_255=4, steps=2, loss="margin")


@pytest.fixture(scope="module")
def model(tiny: Dataset) -> nn.Module:
    """A LeNet-5 after a few steps on the digits: some classes right, some wrong."""
    network = models.build("lenet5", seed=0)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.005)
    x, y = tiny.train.batch(slice(0, 200))
    for _ in range(25):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    return network


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("computed again")


def test_what_is_wrong_clean_is_not_attacked(model: nn.Module, tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing shows of it: errors and confusions are those of an attack on everything."""
    attacked = []

    def spy(network: nn.Module, x: Tensor, y: Tensor, *rest: Any, only: Tensor | None = None, **more: Any) -> Tensor:
        attacked.append(len(x) if only is None else int(only.sum()))
        return attacks.pgd(network, x, y, *rest, **more)

    found = evaluation.class_errors(model, tiny.test, QUICK)
    monkeypatch.setattr(evaluation, "pgd", spy)
    everything = evaluation.class_errors(model, tiny.test, QUICK)
    assert attacked == [int(found.right.sum())]
    assert 0 < attacked[0] < len(tiny.test)
    assert found.confusion.tolist() == everything.confusion.tolist()
    assert found.robust.tolist() == everything.robust.tolist()


class TestTally:
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
    clean = np.array([0, 0, 0, 1, 1, 1, 2, 0, 0, 2])
    attacked = np.array([0, 2, 2, 0, 1, 1, 0, 0, 0, 0])

    def test_by_hand(self) -> None:
        found = evaluation.tally(self.labels, self.clean, self.attacked)
        assert found.natural.tolist() == [1 / 4, 0, 1 / 2]
        assert found.robust.tolist() == [3 / 4, 0, 1]  # the fourth, wrong clean and right attacked, is an error too
        assert found.boundary.tolist() == [1 / 2, 0, 1 / 2]
        assert found.counts.tolist() == [4, 2, 4]
        assert found.confusion.tolist() == [[2, 0, 2], [0, 2, 0], [4, 0, 0]]

    @given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), max_size=40))
    def test_against_counting(self, rows: list[tuple[int, int, int]]) -> None:
        rows += [(label, label, label) for label in range(4)]  # every class has an image
        found = evaluation.tally(*np.array(rows).T)
        for label in range(4):
            mine = [(clean, attacked) for own, clean, attacked in rows if own == label]
            natural = sum(clean != label for clean, _ in mine)
            boundary = sum(clean == label != attacked for clean, attacked in mine)
            assert found.natural[label] == pytest.approx(natural / len(mine))
            assert found.boundary[label] == pytest.approx(boundary / len(mine), abs=1e-12)
            assert found.robust[label] == pytest.approx((natural + boundary) / len(mine))
            assert found.counts[label] == found.confusion[label].sum() == len(mine)

    def test_a_prediction_beyond_the_labels_has_its_column(self) -> None:
        found = evaluation.tally(np.array([0, 1]), np.array([0, 1]), np.array([0, 4]))
        assert found.confusion.tolist() == [[1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]

    def test_a_class_without_images(self) -> None:
        with pytest.raises(KitError, match="class 1 has no image"):
            evaluation.tally(np.array([0, 2]), np.array([0, 2]), np.array([0, 2]))


class TestClassErrors:
    def test_without_a_radius_robust_is_natural(self, model: nn.Module, tiny: Dataset) -> None:
        found = evaluation.class_errors(model, tiny.test, Attack(eps_255=0, steps=2))
        assert found.robust.tolist() == found.natural.tolist()
        assert 0 < found.natural.mean() < 0.9

    def test_one_image_at_a_time(self, model: nn.Module, tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
        """With an attack that is a fixed function of the image, in batches that do not divide the split."""

        def darken(model: nn.Module, x: Tensor, *_: Any, **__: Any) -> Tensor:
            return 0.6 * x

        monkeypatch.setattr(evaluation, "pgd", darken)
        monkeypatch.setattr(evaluation, "BATCH", 16)
        found = evaluation.class_errors(model, tiny.test, QUICK)
        wrong_clean, wrong_attacked, confusion = np.zeros(10), np.zeros(10), np.zeros((10, 10), dtype=int)
        for image, label in zip(tiny.test.images.float() / 255, tiny.test.labels.tolist(), strict=True):
            clean = int(model(image[None]).argmax())
            attacked = int(model(0.6 * image[None]).argmax()) if clean == label else clean
            wrong_clean[label] += clean != label
            wrong_attacked[label] += attacked != label
            confusion[label, attacked] += 1
        assert found.natural.tolist() == (wrong_clean / 5).tolist()
        assert found.robust.tolist() == (wrong_attacked / 5).tolist()
        assert found.confusion.tolist() == confusion.tolist()
        assert found.boundary.sum() > 0

    def test_the_attack_is_the_one_described(
        self, model: nn.Module, tiny: Dataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def spy(model: nn.Module, x: Tensor, y: Tensor, *rest: Any, **names: Any) -> Tensor:
            calls.append((rest, {key: value for key, value in names.items() if key not in ("generator", "only")}))
            return x

        monkeypatch.setattr(evaluation, "pgd", spy)
        evaluation.class_errors(model, tiny.test, Attack(12, 3, 7, 2, "margin"))
        assert calls == [((12 / 255, 3 / 255, 7), {"restarts": 2, "loss": "margin"})]

    def test_the_seed_decides_the_random_starts(
        self, model: nn.Module, tiny: Dataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        starts: list[Tensor] = []

        def spy(*arguments: Any, **names: Any) -> Tensor:
            starts.append(attacks.pgd(*arguments, **names))
            return starts[-1]

        monkeypatch.setattr(evaluation, "pgd", spy)
        monkeypatch.setattr(evaluation, "BATCH", 25)
        twice = Split(tiny.test.images[:25].repeat(2, 1, 1, 1), torch.arange(10).repeat(5))
        for seed, noise in ((0, 0), (0, 7), (1, 0)):
            torch.manual_seed(noise)
            evaluation.class_errors(model, twice, Attack(step_255=0, steps=1, seed=seed))
        assert torch.equal(starts[0], starts[2])
        assert torch.equal(starts[1], starts[3])
        assert not torch.equal(starts[0], starts[1])  # the same images in another batch start elsewhere
        assert not torch.equal(starts[0], starts[4])

    def test_a_larger_radius_is_not_easier(self, model: nn.Module, tiny: Dataset) -> None:
        errors = [evaluation.class_errors(model, tiny.test, Attack(eps, 4, 10)).robust.mean() for eps in (0, 8, 32)]
        assert errors[0] < errors[1] < errors[2]

    def test_predictions_are_eval_modes(self, tiny: Dataset) -> None:
        network = nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, 10), nn.Dropout(0.9))
        images, _ = tiny.test.batch(slice(None))
        wanted = network[1](images.flatten(1)).argmax(1)
        assert torch.equal(evaluation.predict(network.train(), images), wanted)
        assert network.training

    def test_the_mode_is_restored(self, model: nn.Module, tiny: Dataset) -> None:
        for training in (True, False):
            model.train(training)
            evaluation.class_errors(model, tiny.test, QUICK)
            assert model.training is training
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_modules_in_mixed_modes_are_restored(self) -> None:
        network = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(4, 2))
        network.train()
        network[1].eval()
        evaluation.predict(network, torch.rand(3, 1, 2, 2))
        assert [module.training for module in network] == [True, False, True]

    def test_a_class_without_images(self, model: nn.Module, tiny: Dataset) -> None:
        kept = tiny.test.labels != 3
        split = Split(tiny.test.images[kept], tiny.test.labels[kept])
        with pytest.raises(KitError, match="class 3 has no image"):
            evaluation.class_errors(model, split, QUICK)

    def test_an_empty_split(self, model: nn.Module, tiny: Dataset) -> None:
        with pytest.raises(KitError, match="no image"):
            evaluation.class_errors(model, Split(tiny.test.images[:0], tiny.test.labels[:0]), QUICK)

    @pytest.mark.parametrize("loss", attacks.LOSSES)
    def test_a_network_with_too_few_outputs(self, tiny: Dataset, loss: str) -> None:
        network = models.build("lenet5", num_classes=7, seed=0)
        with pytest.raises(KitError, match="7"):
            evaluation.class_errors(network, tiny.test, replace(QUICK, loss=loss))


class TestAttack:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("eps_255", value) for value in (-1, 256, float("nan"), "8", True, None)),
            *(("step_255", value) for value in (-0.5, float("inf"), "2")),
            *(("steps", value) for value in (-1, 2.0, "20", True)),
            *(("restarts", value) for value in (0, 1.0, None)),
            *(("loss", value) for value in ("dlr", None)),
            *(("seed", value) for value in (-1, 0.5, "0", None)),
        ],
    )
    def test_refused_by_name_with_the_value(self, name: str, value: Any) -> None:
        with pytest.raises(KitError, match=f"^{name} = "):
            Attack(**{name: value})

    def test_in_words(self) -> None:
        assert str(Attack()) == "PGD-20 at 8/255, step 2/255"
        assert str(Attack(4.5, 1, 7, 3, "margin")) == "PGD-7 at 4.5/255, step 1/255, 3 restarts, margin loss"
        assert str(Attack(seed=2)) == "PGD-20 at 8/255, step 2/255, seed 2"  # outcomes are kept under this name

    def test_the_standard(self) -> None:
        assert [(a.eps_255, a.step_255, a.steps, a.restarts, a.loss, a.seed) for a in evaluation.STANDARD] == [
            (8, 2, 20, 1, "ce", 0),
            (16, 2, 20, 1, "ce", 0),
        ]


class TestRecord:
    def test_what_it_holds(self, model: nn.Module, tiny: Dataset, tmp_path: Path) -> None:
        path = tmp_path / "record.json"
        record = records.evaluate(model, tiny, [QUICK, OTHER], path=path, about={"config": {"seed": 3}})
        assert record["training_counts"] == [20] * 10
        assert record == json.loads(path.read_text(encoding="utf-8"), parse_constant=never)
        assert record["config"] == {"seed": 3}
        assert record["dataset"] == "digits"
        assert record["split"] == "test"
        assert record["class_names"] == list("0123456789")
        assert record["weights_sha256"] == checkpoint.digest(dict(model.state_dict()))
        assert record["images"] == 50
        assert record["class_counts"] == [5] * 10
        assert [entry["attack"] for entry in record["attacks"]] == [asdict(QUICK), asdict(OTHER)]
        for entry, attack in zip(record["attacks"], (QUICK, OTHER), strict=True):
            errors = evaluation.class_errors(model, tiny.test, attack)
            assert record["natural"] == errors.natural.tolist()
            assert entry["robust"] == errors.robust.tolist()
            assert np.add(record["natural"], entry["boundary"]).tolist() == pytest.approx(entry["robust"])
            assert entry["confusion"] == errors.confusion.tolist()
            assert entry["kernel"] in ("native", "portable")
            assert entry["versions"]["torch"] == torch.__version__

    def test_the_second_time_computes_nothing(
        self, model: nn.Module, tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "record.json"
        first = records.evaluate(model, tiny, [QUICK, OTHER], path=path)
        before = path.read_bytes()
        monkeypatch.setattr(records, "class_errors", never)
        assert records.evaluate(model, tiny, [QUICK, OTHER], path=path) == first
        assert records.evaluate(model, tiny, [OTHER], path=path) == first
        assert path.read_bytes() == before

    def test_only_missing_attacks_are_computed(
        self, model: nn.Module, tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "record.json"
        records.evaluate(model, tiny, [QUICK], path=path)
        computed: list[Attack] = []
        straight = evaluation.class_errors

        def spy(model: nn.Module, split: Split, attack: Attack) -> evaluation.ClassErrors:
            computed.append(attack)
            return straight(model, split, attack)

        monkeypatch.setattr(records, "class_errors", spy)
        record = records.evaluate(model, tiny, [OTHER, QUICK], path=path)
        assert computed == [OTHER]
        assert [Attack(**entry["attack"]) for entry in record["attacks"]] == [QUICK, OTHER]

    def test_an_interruption_keeps_what_was_computed(
        self, model: nn.Module, tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "record.json"
        straight = evaluation.class_errors

        def stop_at_other(model: nn.Module, split: Split, attack: Attack) -> evaluation.ClassErrors:
            if attack == OTHER:
                raise KeyboardInterrupt
            return straight(model, split, attack)

        monkeypatch.setattr(records, "class_errors", stop_at_other)
        with pytest.raises(KeyboardInterrupt):
            records.evaluate(model, tiny, [QUICK, OTHER], path=path)
        (entry,) = json.loads(path.read_text(encoding="utf-8"))["attacks"]
        assert Attack(**entry["attack"]) == QUICK

    def test_other_weights_are_computed_anew(self, model: nn.Module, tiny: Dataset, tmp_path: Path) -> None:
        path = tmp_path / "record.json"
        first = records.evaluate(model, tiny, [QUICK, OTHER], path=path)
        second = records.evaluate(models.build("lenet5", seed=8), tiny, [QUICK], path=path)
        assert second["weights_sha256"] != first["weights_sha256"]
        assert second["natural"] != first["natural"]
        assert len(second["attacks"]) == 1
        assert json.loads(path.read_text(encoding="utf-8")) == second

    def test_other_data_or_company_are_computed_anew(self, model: nn.Module, tiny: Dataset, tmp_path: Path) -> None:
        path = tmp_path / "record.json"
        records.evaluate(model, tiny, [QUICK], path=path, about={"config": {"seed": 0}})
        other = records.evaluate(model, tiny, [OTHER], path=path, about={"config": {"seed": 1}})
        assert [Attack(**entry["attack"]) for entry in other["attacks"]] == [OTHER]
        renamed = records.evaluate(model, replace(tiny, name="others"), [QUICK], path=path)
        assert [Attack(**entry["attack"]) for entry in renamed["attacks"]] == [QUICK]

    @pytest.mark.parametrize("content", ["", "{", "[1]", "null", '"x"', "\x00"])
    def test_a_damaged_record_is_named(self, model: nn.Module, tiny: Dataset, tmp_path: Path, content: str) -> None:
        path = tmp_path / "record.json"
        path.write_text(content, encoding="utf-8")
        with pytest.raises(KitError, match=r"record\.json") as caught:
            records.evaluate(model, tiny, [QUICK], path=path)
        assert len(str(caught.value).splitlines()) == 1
        assert path.read_text(encoding="utf-8") == content

    def test_missing_and_undecodable_records_are_named(self, tmp_path: Path) -> None:
        (tmp_path / "record.json").write_bytes(b"\xff\xfe{}")
        for name in ("nothing.json", "record.json"):
            with pytest.raises(KitError, match=name):
                records.read(tmp_path / name)

    def test_weights_that_are_not_finite_are_not_recorded_as_a_number(self, tiny: Dataset, tmp_path: Path) -> None:
        network = models.build("lenet5", seed=0)
        with torch.no_grad():
            network.fc2.bias[0] = float("nan")
        record = records.evaluate(network, tiny, [QUICK], path=tmp_path / "record.json")
        json.loads((tmp_path / "record.json").read_text(encoding="utf-8"), parse_constant=never)
        assert sum(record["natural"]) == pytest.approx(9)  # argmax of NaN is one class: nine are all wrong


class TestLookUps:
    RECORD = {
        "natural": [0.1, 0.2],
        "attacks": [
            {"attack": asdict(Attack(eps_255=8, steps=50)), "robust": [0.9, 0.9]},
            {"attack": asdict(Attack(eps_255=8)), "robust": [0.3, 0.5]},
            {"attack": asdict(Attack(eps_255=16)), "robust": [0.6, 0.7]},
        ],
    }

    def test_robust_errors_are_the_standard_attacks(self) -> None:
        assert studies.robust_errors(self.RECORD, 8).tolist() == [0.3, 0.5]
        assert studies.robust_errors(self.RECORD, 16.0).tolist() == [0.6, 0.7]
        with pytest.raises(KitError, match="no PGD-20 at 4/255"):
            studies.robust_errors(self.RECORD, 4)

    def test_largest_difference_by_hand(self) -> None:
        other = json.loads(json.dumps(self.RECORD))
        assert studies.largest_difference(self.RECORD, other) == 0
        other["attacks"][2]["robust"] = [0.6, 0.75]
        assert studies.largest_difference(self.RECORD, other) == pytest.approx(0.05)
        other["natural"] = [0.1, 0.1]
        assert studies.largest_difference(self.RECORD, other) == pytest.approx(0.1)
        other["attacks"].reverse()
        assert studies.largest_difference(self.RECORD, other) == pytest.approx(0.1)

    @pytest.mark.parametrize("swapped", [False, True])
    def test_records_under_different_attacks_are_refused(self, swapped: bool) -> None:
        other = {**self.RECORD, "attacks": self.RECORD["attacks"][1:]}
        pair = (other, self.RECORD) if swapped else (self.RECORD, other)
        with pytest.raises(KitError, match="only one of the two records has PGD-50 at 8/255"):
            studies.largest_difference(*pair)


class TestStream:
    def test_depends_on_the_numbers_and_their_order_alone(self) -> None:
        draws = [
            torch.rand(3, generator=evaluation.stream(*keys)).tolist()
            for keys in ((0, 1), (0, 1), (1, 0), (0, 1, 1), (0, 2))
        ]
        assert draws[0] == draws[1]
        assert len({tuple(draw) for draw in draws}) == 4
