"""Parameters, command lines and files that nobody foresaw: accepted as something valid, or refused in one sentence."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from click.testing import CliRunner
from hypothesis import example, given, settings
from hypothesis import strategies as st

from frlkit import KitError, checkpoint, data, evaluation, models, notebook, recipes, records, runs
from frlkit.__main__ import main
from frlkit.audit.weights import find, fit
from frlkit.data import Dataset
from frlkit.sources.folders import Source, of_arrays
from frlkit.values import fields_of

fuzz = settings(max_examples=150, derandomize=True, database=None, deadline=None)

NUMBERS = st.one_of(
    st.integers(), st.floats(), st.booleans(), st.sampled_from([10**400, -(10**400), -8, 0, math.nan, -0.0, 2**31 + 1])
)
TEXTS = st.one_of(
    st.sampled_from(
        ["8/255", "true", "True", "", "nan", "inf", "-1", "0", "1e400", "1_0", "cifar10", "~no such user/x", "\0"]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
)
PLAIN = st.one_of(NUMBERS, TEXTS, st.none())
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=2))

ALLOWED: dict[str, Callable[[Any], bool]] = {  # a parameter, and what its rule must have let through
    "DATASET": lambda value: value in data.READERS or value.startswith("folder:"),
    "EPOCHS": lambda value: type(value) is int and 1 <= value <= 10**5,
    "ATTACKED": lambda value: type(value) is int and 0 <= value <= 10**6,
    "DEVICE": lambda value: value in ("auto", "cpu", "cuda"),
    "DRIVE": lambda value: value is True or value is False,
    "RUNS": lambda value: type(value) is str,
    "ALPHAS": lambda value: (
        bool(value) and all(type(x) in (int, float) and 0 <= x <= 1000 for x in value) and len(set(value)) == len(value)
    ),
}


def sentence(error: Exception) -> str:
    """The message of a refusal, which is one line."""
    assert isinstance(error, KitError)
    assert len(str(error).splitlines()) == 1, str(error)
    return str(error)


def everything_under(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestNotebookParameters:
    @fuzz
    @given(st.sampled_from(sorted(ALLOWED)), VALUES)
    @example("ALPHAS", [1, 1.0])
    def test_a_value(self, name: str, value: Any) -> None:
        try:
            checked = notebook.parameters({name: value})
        except notebook.ParameterError as error:
            assert sentence(error).startswith(f"parameter {name} = ")
        else:
            assert ALLOWED[name](getattr(checked, name))

    @fuzz
    @given(st.from_regex(r"[A-Z_]{1,12}", fullmatch=True))
    def test_a_name(self, name: str) -> None:
        cells = ["# Parameters\nRUNS: str = ''", f"# Parameters\n{name} = 1", "notebook.parameters(...)"]
        if name in notebook.PARAMETERS:
            return
        with pytest.raises(notebook.ParameterError) as caught:
            notebook.parameters({"RUNS": "", "In": cells})
        assert repr(name) in sentence(caught.value)

    @fuzz
    @given(TEXTS)
    def test_a_folder(self, path: str) -> None:
        try:
            assert notebook.folder(path, "checkpoints").is_absolute()
        except KitError as error:
            assert repr(path) in sentence(error)


class TestConfigurations:
    @fuzz
    @given(st.sampled_from([*recipes.BASE, "algorithm1_both", "dafa"]), st.data())
    def test_fields(self, recipe: str, data: st.DataObject) -> None:
        fields = st.sampled_from([*fields_of(recipes.FairConfig), "colour"])
        values = data.draw(
            st.dictionaries(fields.filter(lambda name: name not in ("dataset", "seed")), VALUES, max_size=2)
        )
        try:
            config = recipes.configure(recipe, "digits", 0, **values)
        except KitError as error:
            sentence(error)
        else:
            for name, value in values.items():
                assert getattr(config, name) == value
                field = fields_of(type(config))[name]
                if allowed := get_args(field.annotation):
                    assert value in allowed
                for part in field.metadata:
                    assert value >= getattr(part, "ge", value) and value <= getattr(part, "le", value)
                    assert not value <= getattr(part, "gt", -math.inf) and not value >= getattr(part, "lt", math.inf)

    @fuzz
    @given(VALUES, VALUES)
    def test_dataset_and_seed(self, dataset: Any, seed: Any) -> None:
        with pytest.raises(KitError) as caught:
            recipes.configure("natural", dataset, 0)
        sentence(caught.value)
        with contextlib.suppress(KitError):
            assert 0 <= recipes.configure("natural", "digits", seed).seed <= 2**31

    @fuzz
    @given(st.dictionaries(st.sampled_from(["eps_255", "step_255", "steps", "restarts", "loss", "seed"]), VALUES))
    def test_attack(self, values: dict[str, Any]) -> None:
        try:
            attack = evaluation.Attack(**values)
        except KitError as error:
            sentence(error)
        else:
            assert 0 <= attack.eps_255 <= 255
            assert 0 <= attack.step_255 <= 255
            assert attack.loss in ("ce", "kl", "margin")


WORD = st.one_of(NUMBERS.map(str), TEXTS).filter(lambda word: "\0" not in word)  # no command line can hold that
OPTIONS = {
    "train": ["--dataset", "--seed", "--epochs", "--batch-size", "--device", "--colour"],
    "evaluate": [
        "--model",
        "--dataset",
        "--eps",
        "--step-size",
        "--steps",
        "--restarts",
        "--loss",
        "--seed",
        "--device",
    ],
    "verify": ["--dataset", "--tolerance", "--device"],
    "reproduce": ["--dataset", "--profile"],
}


class TestCommandLine:
    @pytest.fixture
    def folder(self, tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Where the commands would write; what is valid stops there, since only refusals are of interest."""

        def accepted(*_: Any, **__: Any) -> Any:
            raise KitError("accepted")

        monkeypatch.setattr(runs, "run", accepted)
        monkeypatch.setattr(records, "evaluate", accepted)
        parts = {name: of_arrays(name, split.images[:, 0].numpy(), split.labels) for name, split in tiny.splits.items()}
        few = Source(tiny.class_names, parts, form=(32, 1), keep=False)
        monkeypatch.setitem(data.READERS, "digits", lambda: few)
        monkeypatch.setitem(data.READERS, "fashion_mnist", accepted)
        monkeypatch.setattr("frlkit.reproduce._execute", accepted)
        monkeypatch.chdir(tmp_path)
        torch.save(models.build("lenet5", seed=0).state_dict(), tmp_path / "weights.pt")
        return tmp_path

    @pytest.mark.parametrize("command", OPTIONS)
    def test_any_words(self, folder: Path, command: str) -> None:
        fixed = {
            "train": ["--runs", str(folder / "runs")],
            "evaluate": [str(folder / "weights.pt"), "--json", str(folder / "out.json")],
            "verify": ["--runs", str(folder / "runs")],
            "reproduce": ["--output", str(folder / "output")],
        }[command]
        first = (
            st.just([])
            if command != "train"
            else st.lists(
                st.one_of(
                    st.sampled_from(["natural", "uniform,beta=6", "natural,epochs=0", "uniform,beta", ","]), WORD
                ),
                max_size=2,
            )
        )
        before = everything_under(folder)

        @fuzz
        @given(first, st.lists(st.tuples(st.sampled_from(OPTIONS[command]), WORD), max_size=2))
        def check(arguments: list[str], options: list[tuple[str, str]]) -> None:
            words = [command, *fixed, *(word for option in options for word in option), "--", *arguments]
            result = CliRunner().invoke(main, words)
            assert isinstance(result.exception, SystemExit), (words, result.exception)
            assert result.exit_code in (1, 2)
            (_,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
            assert "Traceback" not in result.output
            assert everything_under(folder) == before

        check()


CONFIG = {"method": "natural", "seed": 0}


def state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    model = {"w": torch.randn(7, 5, generator=generator), "n": torch.tensor(3)}
    return {"config": CONFIG, "epoch": 1, "model": model, "history": [{"loss": 1.5, "lists": [[0.1], []]}]}


@st.composite
def damage(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file cut short, with some bits flipped, with bytes in the middle replaced, or of random bytes."""
    kind = draw(st.sampled_from(["cut", "flip", "replace", "random"]))
    if kind == "cut":
        return whole[: draw(st.integers(0, len(whole) - 1))]
    if kind == "random":
        return draw(st.binary(max_size=200))
    content = bytearray(whole)
    if kind == "flip":
        for position in draw(st.lists(st.integers(0, 8 * len(whole) - 1), min_size=1, max_size=4)):
            content[position // 8] ^= 1 << position % 8
    else:
        start = draw(st.integers(0, len(whole) - 1))
        piece = draw(st.binary(min_size=1, max_size=20))
        content[start : start + len(piece)] = piece
    return bytes(content)


class TestFiles:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "run" / "checkpoint.pt"

    def test_a_damaged_checkpoint(self, path: Path) -> None:
        checkpoint.save(path, state())
        whole, right = path.read_bytes(), checkpoint.digest(state())
        refused = 0

        @settings(fuzz, max_examples=300)
        @given(damage(whole))
        def check(content: bytes) -> None:
            nonlocal refused
            path.write_bytes(content)
            try:
                assert checkpoint.digest(checkpoint.read(path)) == right  # a few bytes of the format mean nothing
            except KitError as error:
                refused += 1
                assert str(path) in sentence(error)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = checkpoint.resume(path, CONFIG)
            assert found is None or checkpoint.digest(found) == right
            assert path.exists() == (found is not None)
            for file in path.parent.iterdir():
                file.unlink()

        check()
        assert refused > 150

    def test_damaged_weights_from_elsewhere(self, path: Path) -> None:
        path.parent.mkdir()
        tensors = models.build("lenet5", seed=0).state_dict()
        small = {name: value for name, value in tensors.items() if value.numel() < 500}
        torch.save(small, path)
        whole = path.read_bytes()

        @settings(fuzz, max_examples=300)
        @given(damage(whole))
        def check(content: bytes) -> None:
            path.write_bytes(content)
            with pytest.raises(KitError) as caught:  # at best there are too few tensors
                fit(models.build("lenet5"), find(path))
            assert str(path) in sentence(caught.value)

        check()

    def test_any_plain_state_comes_back(self, path: Path) -> None:
        @fuzz
        @given(st.dictionaries(TEXTS.filter(lambda key: key != "digest"), VALUES, max_size=4))  # that key is the file's
        def check(content: dict[str, Any]) -> None:
            checkpoint.save(path, {**content, "config": CONFIG})
            assert checkpoint.digest(checkpoint.read(path)) == checkpoint.digest({**content, "config": CONFIG})

        check()


def recursive() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return loop


@pytest.mark.parametrize(
    "odd",
    [
        torch.eye(3).to_sparse(),
        torch.zeros(3, device="meta"),
        torch.ones(3, dtype=torch.complex64),
        recursive(),
        "text",
        None,
    ],
    ids=["sparse", "without data", "complex", "recursive", "text", "None"],
)
def test_odd_things_in_a_file(tmp_path: Path, odd: Any) -> None:
    path = tmp_path / "odd.pt"
    torch.save({"model": {"w": odd}, "digest": "0" * 64}, path)
    with pytest.raises(KitError) as caught:
        checkpoint.read(path)
    sentence(caught.value)
    network = models.build("lenet5")
    shape = network.fc1.bias.shape
    fitting = odd
    if isinstance(odd, torch.Tensor):
        fitting = odd.new_zeros(shape) if odd.is_meta or odd.is_complex() else torch.zeros(shape).to_sparse()
    torch.save({**network.state_dict(), "fc1.bias": fitting}, path)
    before = checkpoint.digest(dict(network.state_dict()))
    with pytest.raises(KitError) as caught:
        fit(network, find(path))
    assert str(path) in sentence(caught.value)
    assert checkpoint.digest(dict(network.state_dict())) == before
