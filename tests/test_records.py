"""Files of results: whatever their JSON says is a record, or refused in one sentence; an outcome a bit an image."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from frlkit import KitError, checkpoint, evaluation, models, recipes, records
from frlkit.audit import certify, ladder
from frlkit.data import Dataset
from frlkit.evaluation import Attack
from frlkit.report import studies, tables
from frlkit.scale import clusters, sweeps

QUICK, OTHER = Attack(steps=2), Attack(eps_255=16.0, steps=2)
ERRORS = {"robust": [0.5, 0.25], "boundary": [0.25, 0.0], "confusion": [[2, 2], [1, 3]]}
RECORD: dict[str, Any] = {
    **{"config": {"seed": 0, "dataset": "digits", "model": "lenet5", "batch_size": 100}, "dataset": "digits"},
    **{"data_sha256": "0", "split": "test", "class_names": ["a", "b"], "training_counts": [30, 60]},
    **{"weights_sha256": "1", "images": 8, "class_counts": [4, 4], "natural": [0.25, 0.25]},
    "attacks": [{"attack": asdict(Attack(eps_255=eps_255)), **ERRORS} for eps_255 in (8.0, 16.0)],
}
HISTORY: dict[str, Any] = {
    **{"config": asdict(recipes.configure("pgd_at", "digits", 0)), "data_sha256": "0", "made_by": []},
    **{"kernel": "native", "threads": 1, "versions": {}},
    "epochs": [
        {"lr": 0.1, "loss": 1.5, "seconds": 2.0, "validation": {"natural": [0.1, 0.2], "robust": [0.3, 0.4]}}
        for _ in range(2)
    ],
}
LADDER: dict[str, Any] = {
    **{"weights_sha256": "1", "images_sha256": "2", "eps_255": 8.0, "rungs": ["clean", "PGD"]},
    **{"labels": [0, 0, 1, 1], "fell": [0, 2, 1, 2], "kernel": "native"},
}
VERDICTS = ("verified", "falsified", "undecided")
CERTIFIED: dict[str, Any] = {
    **{"weights_sha256": "1", "images_sha256": "2", "attack": asdict(Attack()), "labels": [0, 0, 1, 1]},
    **{"verdicts": [*VERDICTS, "verified"], "margins": [0.5, None, -0.25, 0.125]},
    **{"steps": [0, None, 2, 2], "limits": [0.0, 0.0, 1.5, 0.0], "seconds": 1.5},
}
READERS: dict[str, tuple[Callable[[Path], dict[str, Any]], dict[str, Any]]] = {
    "record": (records.read, RECORD),
    "history": (records.read_history, HISTORY),
    "ladder": (ladder.read, LADDER),
    "certification": (certify.read, CERTIFIED),
}
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e308, -0.5, 1.5, 10**9, 10**30, "", "0", "nan", [], {}, [[]]]),
    st.lists(st.floats(0, 1), max_size=3),
    st.dictionaries(st.sampled_from(["attack", "natural", "x"]), st.integers(), max_size=2),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every part of a JSON value."""
    keys = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, part in keys for found in places(part, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn, whole: Any) -> Any:
    """One to three parts of a JSON value replaced, removed or doubled."""
    for _ in range(draw(st.integers(1, 3))):
        whole = copy.deepcopy(whole)
        path = draw(st.sampled_from(places(whole)))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return draw(ODD)
            continue
        above = whole
        for key in path[:-1]:
            above = above[key]
        what = draw(st.sampled_from(["replace", "replace", "remove", "double"]))
        if what == "remove":
            del above[path[-1]]
        elif what == "double" and isinstance(above, list):
            above.append(above[path[-1]])
        else:
            above[path[-1]] = draw(ODD)
    return whole


@pytest.mark.parametrize("kind", READERS)
def test_a_json_of_another_shape(tmp_path: Path, kind: str) -> None:
    """What is let through can be worked with; everything else is one sentence that names the file."""
    (read, whole), path, refused = READERS[kind], tmp_path / f"{kind}.json", []
    path.write_text(json.dumps(whole), encoding="utf-8")
    assert read(path) == whole

    @settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
    @given(mutated(whole))
    def check(content: Any) -> None:
        path.write_text(json.dumps(content), encoding="utf-8")
        try:
            found = read(path)
        except KitError as error:
            assert f"the {kind} {path} cannot be read (" in str(error)
            assert len(str(error).splitlines()) == 1
            refused.append(error)
            return
        if kind == "record":
            assert studies.largest_difference(found, found) == 0
            assert all(0 <= error <= 1 for entry in found["attacks"] for error in entry["robust"])
            with contextlib.suppress(KitError):  # it may lack an attack
                assert tables.rendered(tables.collect([path.parent]), "text")
        elif kind == "history":
            assert all(math.isfinite(entry["loss"]) for entry in found["epochs"])
            assert not tables.last_epoch({"pgd_at": [found]}).empty
        elif kind == "certification":
            with contextlib.suppress(KitError):  # it may be unfinished
                assert certify.summary(found, list("abcd")).iloc[-1]["images"] == len(found["labels"])
        else:
            for errors in ladder.errors(found).values():
                assert np.isfinite(errors).all()

    check()
    assert len(refused) > 150


@pytest.mark.parametrize(
    "change",
    [
        *({"natural": errors} for errors in ([1.0, 1.0], [0.5, 0.6])),
        {"class_counts": [4, 5]},
        *({"attacks": [{**RECORD["attacks"][0], key: [0.0, 0.0]}]} for key in ("robust", "boundary")),
        *({"attacks": [{**RECORD["attacks"][0], "confusion": table}]} for table in ([[4, 0], [0, 4]], [[2], [1]])),
    ],
    ids=lambda change: str(change)[:60],
)
def test_errors_are_those_of_the_images_counted(change: dict[str, Any]) -> None:
    assert clusters.counted(RECORD)
    assert not clusters.counted({**RECORD, **change})


@pytest.mark.parametrize("which", ["record", "history"])
def test_a_plan_beside_files_of_another_shape(tmp_path: Path, which: str) -> None:
    """What a sweep would read of finished runs, to know what is done and how long the rest takes."""
    grid, place = tmp_path / "grid.yaml", tmp_path / "digits" / "pgd_at" / "seed0"
    grid.write_text("dataset: digits\nseed: [0, 1]\ngrid: [{recipe: pgd_at}]\n", encoding="utf-8")
    place.mkdir(parents=True)
    whole = {"record": {**RECORD, "config": HISTORY["config"]}, "history": HISTORY}
    (place / "weights.safetensors").touch()

    @settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
    @given(mutated(whole[which]))
    def check(content: Any) -> None:
        for name, value in {**whole, which: content}.items():
            (place / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
        with contextlib.suppress(KitError):
            assert "2 runs" in sweeps.preview(sweeps.plan(grid, tmp_path), tmp_path, 1)

    check()


@pytest.mark.parametrize(
    "change",
    [
        *({key: value} for key in ("labels", "verdicts", "margins", "steps", "limits") for value in ([], [None])),
        *({"verdicts": [*VERDICTS, verdict]} for verdict in ("undecided", "falsified", "proved", None)),
        *({"margins": [margin, None, -0.25, 0.125]} for margin in (0.0, -0.5, None, math.inf, "1")),
        *({"margins": [0.5, margin, -0.25, 0.125]} for margin in (1.0, -1.0)),
        *({"margins": [0.5, None, margin, 0.125]} for margin in (None, 0.5)),
        *({"steps": [0, None, value, 2]} for value in (None, -1, 0.5)),
        *({"labels": [0, 0, 1, label]} for label in (-1, 10**9, 1.0)),
    ],
    ids=str,
)
def test_an_impossible_certification_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "certified.json"
    path.write_text(json.dumps({**CERTIFIED, **change}), encoding="utf-8")
    with pytest.raises(KitError, match=r"the certification .*certified\.json cannot be read"):
        certify.read(path)


@pytest.mark.parametrize(
    "change",
    [
        *({"class_names": names} for names in (["a", "a"], ["a b", "a  b"], ["a"])),
        *({"class_counts": counts} for counts in ([4, 0], [4])),
        *({"training_counts": counts} for counts in ([0, 0], [1], [-1, 2], [10**400, 1])),
        *({"images": images} for images in ("x", None, [1], {}, 10**400, 0)),
        *({"config": config} for config in ({"seed": "0"}, {"seed": -1}, {"dataset": ["digits"], "seed": 0})),
        *({"attacks": [{**RECORD["attacks"][0], "attack": attack}]} for attack in ({}, {"eps_255": 8.0})),
        *({"attacks": [{**RECORD["attacks"][0], key: [0.5]}]} for key in ("robust", "boundary", "confusion")),
    ],
    ids=lambda change: str(change)[:60],
)
def test_an_impossible_record_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps({**RECORD, **change}), encoding="utf-8")
    with pytest.raises(KitError, match=r"the record .*record\.json cannot be read"):
        records.read(path)


@pytest.mark.parametrize(
    "change",
    [
        *({"fell": [0, 2, 1, value]} for value in (3, 99, -2, math.nan, 1.0, None, "0", 10**30)),
        *({"labels": labels} for labels in ([0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 10**9], [0, 0, 0, 1], [1, 1, 2, 2])),
        *({"labels": labels} for labels in ([], [0, 0, 1], [-1, -1, 0, 0], [0, 0, 1, 1.0])),
        *({"fell": []}, {"fell": [0, 2, 1]}, {"rungs": []}, {"eps_255": math.nan}, {"eps_255": 300}),
    ],
    ids=str,
)
def test_an_impossible_ladder_is_refused_at_once(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "ladder.json"
    path.write_text(json.dumps({**LADDER, **change}), encoding="utf-8")
    for read in (ladder.read, ladder.finished):
        with pytest.raises(KitError, match=r"the ladder .*ladder\.json cannot be read"):
            read(path)


def test_a_ladders_labels_are_its_images(tiny: Dataset, tmp_path: Path) -> None:
    """Two classes relabelled as one are in order, but not those images'."""
    part, path = ladder.subset(tiny.test, 10, 10), tmp_path / "ladder.json"
    model = models.build("lenet5", seed=0)
    about = {"weights_sha256": checkpoint.digest(dict(model.state_dict()))}
    about["images_sha256"] = checkpoint.digest({"images": part.images, "labels": part.labels})
    rungs = list(ladder.rungs(8.0))
    checkpoint.write_json(path, {**about, "eps_255": 8.0, "rungs": rungs, "labels": [0] * 10, "fell": [-1] * 10})
    with pytest.raises(KitError, match="its labels are not those of its images"):
        ladder.climb(model, part, 8.0, path)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return models.build("lenet5", seed=1)


class TestOutcomes:
    def test_a_bit_for_each_image_and_attack(self, model: nn.Module, tiny: Dataset, tmp_path: Path) -> None:
        record = records.evaluate(model, tiny, [QUICK, OTHER], path=tmp_path / "record.json")
        found = records.outcomes(tmp_path / records.OUTCOMES, record["weights_sha256"])
        assert list(found) == ["clean", str(QUICK), str(OTHER)]
        labels = tiny.test.labels.numpy()
        x, _ = tiny.test.batch(slice(None))
        with torch.no_grad():
            assert found["clean"].tolist() == (model(x).argmax(1).numpy() == labels).tolist()
        for attack, entry in zip((QUICK, OTHER), record["attacks"], strict=True):
            stands = found[str(attack)]
            assert stands.dtype == bool and stands.shape == labels.shape
            assert not (stands & ~found["clean"]).any()
            errors = [1 - stands[labels == label].mean() for label in range(10)]
            assert errors == pytest.approx(entry["robust"])
            assert stands.tolist() == evaluation.class_errors(model, tiny.test, attack).stands.tolist()

    def test_other_weights_begin_anew(self, model: nn.Module, tiny: Dataset, tmp_path: Path) -> None:
        path = tmp_path / records.OUTCOMES
        records.evaluate(model, tiny, [QUICK, OTHER], path=tmp_path / "record.json")
        other = records.evaluate(models.build("lenet5", seed=2), tiny, [QUICK], path=tmp_path / "record.json")
        assert list(records.outcomes(path)) == ["clean", str(QUICK)]
        assert list(records.outcomes(path, other["weights_sha256"])) == ["clean", str(QUICK)]
        assert records.outcomes(path, "another") == {}

    def test_none_and_damage(self, model: nn.Module, tiny: Dataset, tmp_path: Path) -> None:
        path = tmp_path / records.OUTCOMES
        assert records.outcomes(path) == {}
        records.evaluate(model, tiny, [QUICK], path=tmp_path / "record.json")
        whole, right = path.read_bytes(), {name: values.tolist() for name, values in records.outcomes(path).items()}

        @settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
        @given(st.integers(0, 8 * len(whole) - 1), st.sampled_from(["cut", "flip", "noise"]), st.binary(max_size=50))
        def check(bit: int, kind: str, noise: bytes) -> None:
            content = bytearray(whole)
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes({"cut": whole[: bit // 8], "flip": bytes(content), "noise": noise}[kind])
            try:
                found = records.outcomes(path)
            except KitError as error:
                assert f"the outcomes {path} cannot be read" in str(error)
                assert len(str(error).splitlines()) == 1
            else:  # bits of the archive that say nothing: dates, flags
                assert {name: values.tolist() for name, values in found.items()} == right

        check()
