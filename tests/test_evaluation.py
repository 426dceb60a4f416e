"""Class-wise errors against counting by hand and one image at a time; records that are reused, or are not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from frlkit import KitError, evaluation, models
from frlkit.data import Dataset, Split
from frlkit.evaluation import Attack, class_errors, evaluate, tally

WEAK = Attack(eps_255=8, steps=2)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return models.build("lenet5", seed=0)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> list[Attack]:
    """The attacks that `evaluate` really computes, from here on."""
    computed: list[Attack] = []
    original = evaluation.class_errors

    def spy(model: nn.Module, split: Split, attack: Attack, *rest: Any, **options: Any) -> evaluation.ClassErrors:
        computed.append(attack)
        return original(model, split, attack, *rest, **options)

    monkeypatch.setattr(evaluation, "class_errors", spy)
    return computed


class TestAttack:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("eps_255", value) for value in (-1, 256, math.nan, math.inf, "8", None, True)),
            *(("step_255", value) for value in (-1, 256, math.nan, "2")),
            *(("steps", value) for value in (-1, 2.0, True, "20")),
            *(("restarts", value) for value in (0, 1.5, True)),
            *(("loss", value) for value in ("CE", "dlr", None)),
            *(("seed", value) for value in (-1, 1.5, "0", None, True)),
        ],
    )
    def test_refuses_by_name(self, name: str, value: Any) -> None:
        with pytest.raises(KitError) as caught:
            Attack(**{name: value})
        assert f"{name} = {value!r}" in str(caught.value)

    def test_says_everything_that_matters(self) -> None:
        assert str(Attack()) == "PGD-20 at 8/255, step 2/255"
        assert str(Attack(2.5, 0.5, 7, 3, "margin")) == "PGD-7 at 2.5/255, step 0.5/255, 3 restarts, margin loss"


class TestTally:
    def test_by_hand(self) -> None:
        labels = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
        clean = np.array([0, 0, 0, 1, 1, 1, 0, 1, 2, 2])
        attacked = np.array([0, 1, 2, 1, 1, 0, 0, 1, 0, 2])
        errors = tally(labels, clean, attacked)
        assert errors.counts.tolist() == [4, 2, 4]
        assert errors.natural.tolist() == [0.25, 0.0, 0.5]
        assert errors.robust.tolist() == [0.75, 0.5, 0.75]
        assert errors.boundary.tolist() == [0.5, 0.5, 0.25]
        assert errors.confusion.tolist() == [[1, 2, 1], [1, 1, 0], [2, 1, 1]]

    def test_wrong_clean_is_wrong_attacked(self) -> None:
        """An attack that happens to repair a sample does not lower the robust error: the clean image is in the ball."""
        errors = tally(np.array([0, 1]), np.array([1, 1]), np.array([0, 1]))
        assert errors.robust.tolist() == [1.0, 0.0]

    @given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(0, 4)), max_size=40))
    def test_the_identity_and_the_loop(self, extra: list[tuple[int, int, int]]) -> None:
        samples = [(0, 0, 0), (1, 2, 2), (2, 2, 1), *extra]
        errors = tally(*map(np.array, zip(*samples, strict=True)))
        for label in range(3):
            mine = [(c, a) for t, c, a in samples if t == label]
            natural = sum(c != label for c, _ in mine) / len(mine)
            boundary = sum(c == label and a != label for c, a in mine) / len(mine)
            assert errors.natural[label] == pytest.approx(natural)
            assert errors.boundary[label] == pytest.approx(boundary)
            assert errors.robust[label] == pytest.approx(natural + boundary)
        assert errors.confusion.sum() == len(samples)

    def test_a_class_without_images(self) -> None:
        with pytest.raises(KitError, match="class 1 has no image"):
            tally(np.array([0, 2]), np.array([0, 2]), np.array([0, 2]))


class TestPredict:
    def test_eval_mode_inside_every_modules_mode_kept_outside(self) -> None:
        torch.manual_seed(0)
        network = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3))
        network[0].eval()
        images = torch.rand(50, 1, 4, 4)
        modes = [module.training for module in network.modules()]
        assert torch.equal(evaluation.predict(network, images), evaluation.predict(network, images))
        assert [module.training for module in network.modules()] == modes


class TestClassErrors:
    def test_radius_0_equals_one_image_at_a_time(self, model: nn.Module, tiny: Dataset) -> None:
        wrong, total = [0] * 10, [0] * 10
        for image, label in zip(tiny.test.images, tiny.test.labels.tolist(), strict=True):
            with torch.no_grad():
                row = model(image[None].float() / 255)[0].tolist()
            wrong[label] += row.index(max(row)) != label
            total[label] += 1
        errors = class_errors(model, tiny.test, Attack(eps_255=0, steps=2))
        assert errors.counts.tolist() == total
        assert errors.natural.tolist() == pytest.approx([w / t for w, t in zip(wrong, total, strict=True)])
        assert errors.robust.tolist() == errors.natural.tolist()
        assert 0 < sum(wrong) < sum(total)

    def test_batches_do_not_matter_to_a_fixed_attack(
        self, model: nn.Module, tiny: Dataset, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def darken(model: nn.Module, x: Tensor, y: Tensor, eps: float, *_: Any, **__: Any) -> Tensor:
            return (x - eps).clamp(min=0)

        monkeypatch.setattr(evaluation, "pgd", darken)
        expected = []
        for image, label in zip(tiny.test.images, tiny.test.labels.tolist(), strict=True):
            x = image[None].float() / 255
            with torch.no_grad():
                rows = model(x)[0], model((x - 128 / 255).clamp(min=0))[0]
            expected.append(any(int(row.argmax()) != label for row in rows))
        found = []
        for size in (7, 1000):
            monkeypatch.setattr(evaluation, "BATCH", size)
            errors = class_errors(model, tiny.test, Attack(eps_255=128))
            found.append(errors.robust.tolist())
            assert (errors.robust * errors.counts).sum() == pytest.approx(sum(expected))
        assert found[0] == found[1]

    def test_the_attacks_numbers_arrive(self, model: nn.Module, tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[Any] = []

        def spy(model: nn.Module, x: Tensor, y: Tensor, eps: float, step: float, steps: int, **options: Any) -> Tensor:
            seen.append((eps, step, steps, options["restarts"], options["loss"]))
            return x

        monkeypatch.setattr(evaluation, "pgd", spy)
        class_errors(model, tiny.test, Attack(16, 4, 7, 3, "margin"))
        assert seen == [(pytest.approx(16 / 255), pytest.approx(4 / 255), 7, 3, "margin")]

    def test_the_seed_decides_and_the_global_generator_does_not(self, model: nn.Module, tiny: Dataset) -> None:
        def starts(seed: int) -> list[float]:
            return torch.rand(3, generator=evaluation.stream(seed, 0)).tolist()

        assert starts(0) == starts(0)
        assert starts(0) != starts(1)
        results = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            results.append(class_errors(model, tiny.test, WEAK).confusion.tolist())
        assert results[0] == results[1]

    def test_a_network_with_too_few_outputs(self, tiny: Dataset) -> None:
        with pytest.raises(KitError):
            class_errors(models.build("lenet5", num_classes=5), tiny.test, WEAK)

    def test_a_class_without_images(self, model: nn.Module, tiny: Dataset) -> None:
        kept = tiny.test.labels != 4
        with pytest.raises(KitError, match="class 4 has no image"):
            class_errors(model, Split(tiny.test.images[kept], tiny.test.labels[kept]), WEAK)


class TestEvaluate:
    def test_the_record(self, model: nn.Module, tiny: Dataset, tmp_path: Path) -> None:
        path = tmp_path / "record.json"
        record = evaluate(model, tiny, [WEAK], path=path, about={"config": {"seed": 0}})
        assert json.loads(path.read_text(), parse_constant=pytest.fail) == record
        assert record["dataset"] == "digits"
        assert record["split"] == "test"
        assert record["class_names"] == list("0123456789")
        assert record["class_counts"] == [5] * 10
        assert record["images"] == 50
        assert record["config"] == {"seed": 0}
        (entry,) = record["attacks"]
        assert Attack(**entry["attack"]) == WEAK
        np.testing.assert_allclose(np.add(record["natural"], entry["boundary"]), entry["robust"], atol=1e-12)
        assert np.sum(entry["confusion"], axis=1).tolist() == [5] * 10
        assert entry["kernel"] in ("native", "portable")
        assert entry["versions"]["torch"] == torch.__version__

    def test_a_second_call_computes_nothing(
        self, model: nn.Module, tiny: Dataset, tmp_path: Path, counting: list[Attack]
    ) -> None:
        path = tmp_path / "record.json"
        first = evaluate(model, tiny, [WEAK], path=path)
        before = path.stat().st_mtime_ns
        assert evaluate(model, tiny, [WEAK], path=path) == first
        assert counting == [WEAK]
        assert path.stat().st_mtime_ns == before

    def test_only_missing_attacks_are_computed(
        self, model: nn.Module, tiny: Dataset, tmp_path: Path, counting: list[Attack]
    ) -> None:
        path, other = tmp_path / "record.json", Attack(eps_255=4, steps=1)
        evaluate(model, tiny, [WEAK], path=path)
        record = evaluate(model, tiny, [other, WEAK], path=path)
        assert counting == [WEAK, other]
        assert [Attack(**entry["attack"]) for entry in record["attacks"]] == [WEAK, other]
        assert evaluation.read_record(path) == record

    @pytest.mark.parametrize("change", ["one weight", "the data set's name", "about"])
    def test_what_belongs_to_something_else_is_computed_again(
        self, tiny: Dataset, tmp_path: Path, counting: list[Attack], change: str
    ) -> None:
        path, model, data = tmp_path / "record.json", models.build("lenet5", seed=0), tiny
        first = evaluate(model, data, [WEAK], path=path, about={"config": {"seed": 0}})
        if change == "one weight":
            with torch.no_grad():
                model.fc2.bias[3] += 1e-6
        elif change == "the data set's name":
            data = Dataset("other", tiny.class_names, tiny.train, tiny.validation, tiny.test)
        seed = 1 if change == "about" else 0
        record = evaluate(model, data, [WEAK], path=path, about={"config": {"seed": seed}})
        assert counting == [WEAK, WEAK]
        assert len(record["attacks"]) == 1
        assert (record["weights_sha256"] != first["weights_sha256"]) == (change == "one weight")
        assert evaluation.read_record(path) == record

    def test_a_crash_keeps_the_attacks_that_were_done(
        self, model: nn.Module, tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, other, original = tmp_path / "record.json", Attack(eps_255=4, steps=1), evaluation.class_errors

        def stop(model: nn.Module, split: Split, attack: Attack, *rest: Any, **options: Any) -> Any:
            if attack == other:
                raise KeyboardInterrupt
            return original(model, split, attack, *rest, **options)

        monkeypatch.setattr(evaluation, "class_errors", stop)
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, tiny, [WEAK, other], path=path)
        assert [Attack(**entry["attack"]) for entry in evaluation.read_record(path)["attacks"]] == [WEAK]

    def test_the_last_class_without_images(self, model: nn.Module, tiny: Dataset) -> None:
        """Nine classes have images and ten have names: the tenth has no error, and must not vanish in silence."""
        kept = tiny.test.labels != 9
        test = Split(tiny.test.images[kept], tiny.test.labels[kept])
        with pytest.raises(KitError, match="class 9 has no image"):
            evaluate(model, Dataset("digits", tiny.class_names, tiny.train, tiny.validation, test), [WEAK])


class TestRecords:
    RECORD: dict[str, Any] = {
        "natural": [0.1, 0.2],
        "attacks": [
            {"attack": vars(Attack(eps_255=8, steps=50)), "robust": [0.9, 0.9]},
            {"attack": vars(Attack(eps_255=8)), "robust": [0.3, 0.5]},
            {"attack": vars(Attack(eps_255=16.0)), "robust": [0.6, 0.7]},
        ],
    }

    def test_looks_up_the_standard_attack(self) -> None:
        assert evaluation.robust_errors(self.RECORD, 8).tolist() == [0.3, 0.5]
        assert evaluation.robust_errors(self.RECORD, 16).tolist() == [0.6, 0.7]
        with pytest.raises(KitError, match="no PGD-20 at 4/255"):
            evaluation.robust_errors(self.RECORD, 4)

    def test_largest_difference(self) -> None:
        other = json.loads(json.dumps(self.RECORD))
        assert evaluation.largest_difference(self.RECORD, other) == 0
        other["attacks"][2]["robust"][1] = 0.45
        other["natural"][0] = 0.2
        assert evaluation.largest_difference(self.RECORD, other) == pytest.approx(0.25)
        other["natural"][1] = 0.6
        assert evaluation.largest_difference(self.RECORD, other) == pytest.approx(0.4)
        with pytest.raises(KitError, match="only one of the two records has PGD-20 at 16/255"):
            evaluation.largest_difference(self.RECORD, {**other, "attacks": other["attacks"][:2]})

    @pytest.mark.parametrize("content", [None, b"", b"{", b"[1, 2]", b"\xff\xfe"])
    def test_a_record_that_cannot_be_read(self, tmp_path: Path, content: bytes | None) -> None:
        path = tmp_path / "record.json"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(KitError, match="delete it") as caught:
            evaluation.read_record(path)
        assert str(path) in str(caught.value)
