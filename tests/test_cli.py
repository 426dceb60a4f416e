"""The commands `train` and `evaluate`: what they print and write, and one sentence for everything that goes wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from frlkit import (
    PROJECT,
    KitError,
    __version__,
    attacks,
    checkpoint,
    data,
    evaluation,
    models,
    recipes,
    runs,
    training,
    watched,
)
from frlkit.__main__ import main
from frlkit.commands import options
from frlkit.data import Dataset
from frlkit.evaluation import Attack
from frlkit.report import studies


@pytest.fixture(autouse=True)
def tiny_digits(tiny: Dataset, tiny28: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digits are the tiny ones; the fashion images are nowhere."""
    load = data.load

    def tiny_load(name: str, **rest: Any) -> Dataset:
        return load(name, **rest) if name != "digits" else tiny28 if rest.get("size") == 28 else tiny

    monkeypatch.setattr(data, "load", tiny_load)
    monkeypatch.setenv("FRLKIT_DATA", str(tmp_path / "no data"))


def call(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [*map(str, words)])


def sentence(result: Result) -> str:
    """The one line with which a command failed."""
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit), result.exception  # nothing else got out
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    if lines[0].startswith("Usage:"):  # click's own two lines of help
        lines = [line for line in lines[2:] if line]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    return lines[0]


@pytest.fixture
def weights(tmp_path: Path, sound: nn.Module) -> Path:
    """LeNet-5's tensors in order, under names from somewhere else."""
    tensors = sound.state_dict().values()
    torch.save({"state_dict": {f"features.{i}": value for i, value in enumerate(tensors)}}, tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


@pytest.fixture
def own(tmp_path: Path, sound: nn.Module) -> Path:
    """The same as a finished run keeps them: the file says which network it is, so that nothing has to be found out."""
    runs.write_weights(tmp_path / "weights.safetensors", sound.state_dict(), {"model": "lenet5"}, 10)
    return tmp_path / "weights.safetensors"


class Malicious:
    """Unpickled without care, this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


class TestEvaluate:
    def test_weights_under_other_names(self, weights: Path, tmp_path: Path) -> None:
        out = tmp_path / "result.json"
        result = call("evaluate", weights, "--dataset", "digits", "--steps", "1", "--json", out)
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith("read as LeNet-5, tanh, ")
        assert all("could as well be read as" in line for line in result.stderr.splitlines())  # on so few images
        assert len(json.loads(out.read_text(encoding="utf-8"))["natural"]) == 10

    def test_what_the_json_holds(self, own: Path, sound: nn.Module, tiny: Dataset, tmp_path: Path) -> None:
        out = tmp_path / "new" / "result.json"
        words = ("--dataset", "digits", "--eps", "12.5", "--step-size", "3", "--steps", "4", "--loss", "margin")
        result = call("evaluate", own, *words, "--json", out)
        assert result.exit_code == 0, result.output
        assert result.stderr == ""
        found = json.loads(out.read_text(encoding="utf-8"))
        errors = evaluation.class_errors(sound, tiny.test, Attack(12.5, 3, 4, 1, "margin"))
        assert found["natural"] == errors.natural.tolist()
        assert found["robust"] == errors.robust.tolist()
        for natural, boundary, robust in zip(found["natural"], found["boundary"], found["robust"], strict=True):
            assert natural + boundary == pytest.approx(robust)
        asked = {"eps_255": 12.5, "step_255": 3, "steps": 4, "restarts": 1, "loss": "margin", "seed": 0}
        assert found["attack"] == asked
        assert found["class_names"] == list("0123456789")
        assert "attacks" not in found

    def test_the_printed_table(self, own: Path, sound: nn.Module, tiny: Dataset) -> None:
        result = call("evaluate", own, "--dataset", "digits", "--steps", "2")
        assert result.exit_code == 0, result.output
        lines = result.stdout.splitlines()
        assert "50 test images of digits" in lines[0]
        assert "PGD-2 at 8/255, step 2/255" in lines[0]
        assert lines[1].split() == ["natural", "boundary", "robust"]
        assert [line.split()[0] for line in lines[2:]] == [*"0123456789", "average", "worst"]
        errors = evaluation.class_errors(sound, tiny.test, Attack(steps=2))
        for line, natural, robust in zip(lines[2:], errors.natural, errors.robust, strict=False):
            numbers = [float(word) for word in line.split()[1:]]
            assert numbers == pytest.approx([100 * natural, 100 * (robust - natural), 100 * robust], abs=0.051)
        average, worst = ([float(word) for word in line.split()[1:]] for line in lines[-2:])
        assert average[2] == pytest.approx(100 * errors.robust.mean(), abs=0.051)
        assert worst[2] == pytest.approx(100 * errors.robust.max(), abs=0.051)

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--model", "resnet5"], "model = 'resnet5' is unknown"),
            (["--dataset", "minst"], "dataset = 'minst' is unknown"),
            (["--loss", "dlr"], "loss = 'dlr' is unknown"),
            (["--device", "tpu"], "'tpu' is not one of 'auto', 'cpu', 'cuda'"),
            (["--eps", "-1"], "eps_255 = -1.0"),
            (["--eps", "nan"], "eps_255 = nan"),
            (["--eps", "8/255"], "'8/255' is not a valid float"),
            (["--step-size", "999"], "step_255 = 999.0"),
            (["--steps", "-3"], "steps = -3"),
            (["--restarts", "0"], "restarts = 0"),
            (["--seed", "-1"], "seed = -1"),
            (["--colour", "red"], "--colour"),
        ],
    )
    def test_bad_options(self, weights: Path, tmp_path: Path, words: list[str], said: str) -> None:
        out = tmp_path / "out.json"
        result = call("evaluate", weights, "--dataset", "digits", "--json", out, *words)
        assert said in sentence(result)
        assert not out.exists()

    @pytest.mark.parametrize("content", ["missing", "folder", "text", "empty", "code", "shapes", "count", "nan"])
    def test_bad_weights(self, tmp_path: Path, content: str) -> None:
        path, out = tmp_path / "weights.pt", tmp_path / "out.json"
        tensors = dict(models.build("lenet5", seed=0).state_dict())
        if content == "folder":
            path.mkdir()
        elif content in ("text", "empty"):
            path.write_text("hello" if content == "text" else "", encoding="utf-8")
        elif content != "missing":
            if content == "code":
                tensors["fc2.bias"] = Malicious(tmp_path / "ran")
            elif content == "shapes":
                tensors["conv1.weight"] = torch.zeros(6, 3, 5, 5)
            elif content == "count":
                del tensors["fc2.bias"]
            else:
                tensors["fc1.bias"][2] = float("nan")
            torch.save(tensors, path)
        said = sentence(call("evaluate", path, "--dataset", "digits", "--json", out))
        assert str(path) in said
        assert not out.exists()
        assert not (tmp_path / "ran").exists()

    def test_out_that_cannot_be_written(self, weights: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way", encoding="utf-8")
        result = call(
            "evaluate", weights, "--dataset", "digits", "--steps", "1", "--json", tmp_path / "file" / "x.json"
        )
        assert result.exit_code != 0
        assert isinstance(result.exception, SystemExit), result.exception
        last = result.stderr.splitlines()[-1]
        assert last.startswith("Error: ")
        assert str(tmp_path / "file") in last

    def test_data_that_are_nowhere(self, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import torchvision

        def download(self: Any) -> None:
            raise RuntimeError("no route to host")

        monkeypatch.setattr(torchvision.datasets.FashionMNIST, "download", download)
        said = sentence(call("evaluate", weights, "--json", tmp_path / "out.json"))
        assert "FRLKIT_DATA" in said
        assert not (tmp_path / "out.json").exists()


class TestTrain:
    def test_a_run_and_its_files(self, tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        words = ("train", "natural", "--dataset", "digits", "--epochs", "1", "--batch-size", "50", "--runs", tmp_path)
        result = call(*words)
        assert result.exit_code == 0, result.output
        folder = tmp_path / "digits" / "natural" / "seed0"
        assert sorted(os.listdir(folder)) == sorted(runs.FILES)
        config = recipes.configure("natural", "digits", 0, epochs=1, batch_size=50)
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        assert recipes.Config(**record["config"]) == config
        assert record["weights_sha256"] == checkpoint.digest(dict(runs.load(folder, config).state_dict()))
        assert "digits/natural/seed0 epoch 1/1: loss " in result.output
        last = result.stdout.splitlines()[-1]  # the result in one line
        for errors in (record["natural"], *(entry["robust"] for entry in record["attacks"])):
            average, worst = 100 * sum(errors) / 10, 100 * max(errors)
            assert re.search(rf"{average:.1f}%, worst \d {worst:.1f}%", last)
        assert re.match(r"natural .* · PGD-20 8/255 .* · PGD-20 16/255 ", last)
        assert last.endswith(f" · {folder}")

        def train_epoch(*_: Any, **__: Any) -> Any:
            raise AssertionError("trained again")

        monkeypatch.setattr(training, "train_epoch", train_epoch)
        again = call(*words)
        assert again.exit_code == 0, again.output

    def test_what_train_wrote_evaluate_reads(self, tiny: Dataset, tmp_path: Path) -> None:
        call("train", "natural", "--dataset", "digits", "--epochs", "1", "--batch-size", "50", "--runs", tmp_path)
        folder = tmp_path / "digits" / "natural" / "seed0"
        result = call("evaluate", folder / runs.WEIGHTS, "--dataset", "digits", "--json", tmp_path / "out.json")
        assert result.exit_code == 0, result.output
        found, record = (
            json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "out.json", folder / "record.json")
        )
        assert found["natural"] == record["natural"]
        assert found["robust"] == record["attacks"][0]["robust"]
        assert found["weights_sha256"] == record["weights_sha256"]

    def test_several_seeds(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[tuple[recipes.Config, Path]] = []
        monkeypatch.setattr(runs, "run", lambda config, tensors, folder: asked.append((config, folder)))
        monkeypatch.setattr("frlkit.commands.studies._result", str)
        words = ("--dataset", "digits", "--seed", "3", "--seed", "5", "--runs", tmp_path)
        assert call("train", "trades", *words).exit_code == 0
        assert [(config.seed, folder.name) for config, folder in asked] == [(3, "seed3"), (5, "seed5")]
        assert {config.method for config, _ in asked} == {"trades"}

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["fgsm"], "recipe = 'fgsm' is unknown: use n_fgsm or another that `frlkit recipes` lists"),
            (["natural", "--epochs", "0"], "epochs = 0"),
            (["natural", "--epochs", "many"], "'many' is not a valid integer"),
            (["natural", "--batch-size", "0"], "batch_size = 0"),
            (["natural", "--seed", "-1"], "seed = -1"),
            (["natural", "--seed", "0", "--seed", "-2"], "seed = -2"),
            (["natural", "--dataset", "minst"], "dataset = 'minst' is unknown"),
            (["natural", "--device", "tpu"], "'tpu' is not one of 'auto', 'cpu', 'cuda'"),
            ([], "Missing argument 'RECIPE'. Use one of natural, pgd_at_half"),
        ],
    )
    def test_bad_words(self, tmp_path: Path, words: list[str], said: str) -> None:
        runs = tmp_path / "runs"
        assert said in sentence(call("train", "--dataset", "digits", "--runs", runs, *words))
        assert not runs.exists()

    def test_another_configuration_in_the_same_folder(self, tmp_path: Path) -> None:
        words = ("train", "natural", "--dataset", "digits", "--batch-size", "50", "--runs", tmp_path)
        assert call(*words, "--epochs", "1").exit_code == 0
        assert "epochs is 1 there and 2 here" in sentence(call(*words, "--epochs", "2"))

    def test_an_interruption_says_how_to_go_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Once there is something to go on from, be it of the run that it starts from."""
        made: list[str] = []

        def run(_: Any, __: Any, folder: Path) -> None:
            folder.mkdir(parents=True, exist_ok=True)
            for name in made:
                (folder.parents[1] / name).mkdir(parents=True, exist_ok=True)
                (folder.parents[1] / name / ("run.lock" if len(made) == 1 else "checkpoint.pt")).touch()
            raise KeyboardInterrupt

        monkeypatch.setattr(runs, "run", run)
        for names, goes_on in (([], False), (["uniform/seed0"], False), (["pgd_at/seed0", "other"], True)):
            made[:] = names
            result = call("train", "uniform", "--dataset", "digits", "--runs", tmp_path)
            assert sentence(result) == "Error: interrupted" + goes_on * "; the same command goes on from here"
            assert result.exit_code == 130
        made[:] = []
        assert sentence(call("train", "natural", "--dataset", "digits", "--runs", tmp_path)) == "Error: interrupted"

    def test_an_interruption_before_anything_is_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def stop(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("frlkit.reproduce.reproduce", stop)
        monkeypatch.setattr("frlkit.audit.readings.read", stop)
        monkeypatch.setattr("frlkit.scale.sweeps.preview", stop)
        (tmp_path / "digits/natural/seed0").mkdir(parents=True)
        (tmp_path / "digits/natural/seed0/checkpoint.pt").touch()
        (tmp_path / "a.yaml").write_text("{dataset: digits, grid: [{recipe: natural}]}", encoding="utf-8")
        for words in (
            ("reproduce", "--output", tmp_path / "out", "--retrain"),
            ("fairer", PROJECT / "checkpoints/example/lenet5.pth", "--output", tmp_path / "card", "--runs", tmp_path),
            ("sweep", tmp_path / "a.yaml", "--dry-run", "--runs", tmp_path),
        ):
            assert sentence(call(*words)) == "Error: interrupted"
        (tmp_path / "out/retrained/01").mkdir(parents=True)
        (tmp_path / "out/retrained/01/done.json").touch()
        result = call("reproduce", "--output", tmp_path / "out", "--retrain")
        assert sentence(result) == "Error: interrupted; the same command goes on from here"

    def test_only_what_is_kept_is_said_to_go_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def stop(*_: Any, path: Path | None, **__: Any) -> None:
            if path:
                path.touch()
            raise KeyboardInterrupt

        monkeypatch.setattr("frlkit.audit.certify.certify", stop)
        words = ("certify", PROJECT / "checkpoints/example/lenet5.pth", "--dataset", "digits")
        for more, goes_on in (((), False), (("--json", tmp_path / "a.json"), True)):
            result = call(*words, *more)
            assert result.exit_code == 130
            assert ("the same command goes on from here" in sentence(result)) is goes_on

    def test_runs_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way", encoding="utf-8")
        words = ("--dataset", "digits", "--epochs", "1", "--batch-size", "50", "--runs", tmp_path / "file")
        result = call("train", "natural", *words)
        assert result.exit_code != 0
        assert isinstance(result.exception, SystemExit), result.exception
        assert len([line for line in result.stderr.splitlines() if "Error" in line]) == 1
        assert "Traceback" not in result.stderr


def test_quiet_shows_no_progress_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JPY_SESSION_NAME", "a notebook")  # where progress is watched
    seen: list[bool] = []
    monkeypatch.setattr(studies, "verify", lambda *_: seen.append(watched()) or iter(()))
    for words in ((), ("-q",)):
        call(*words, "verify", "--dataset", "digits")
    assert seen == [True, False] and watched()


def test_a_package_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "papermill", None)
    result = call("reproduce", "--dataset", "digits", "--output", tmp_path / "out")
    assert "this needs papermill, which is not installed: pip install 'frlkit[notebooks]'" in sentence(result)


@pytest.mark.parametrize("words", [("evaluate", "--json", "/proc/none/a.json"), ("audit", "--output", "/proc/none")])
def test_an_output_that_cannot_be_is_refused_before_the_attack(words: tuple[str, ...]) -> None:
    command, *more = words
    result = call(command, PROJECT / "checkpoints/example/lenet5.pth", "--dataset", "digits", *more)
    assert "/proc/none cannot be written" in sentence(result)


class TestVerify:
    @pytest.fixture
    def made(self, tmp_path: Path) -> Path:
        assert call("train", "natural", "--dataset", "digits", "--epochs", 1, "--runs", tmp_path).exit_code == 0
        return tmp_path

    def test_a_true_record(self, made: Path) -> None:
        result = call("verify", "--dataset", "digits", "--runs", made)
        assert result.exit_code == 0, result.output
        assert "  0.00 points  natural/seed0" in result.stdout
        assert result.stdout.endswith("1 run recomputed; largest class-wise difference 0.00 points\n")
        words = ("verify", "--dataset", "digits", "--runs", made, "--recipe")
        assert "1 run recomputed" in call(*words, "trades", "--recipe", "natural/seed0").stdout
        assert "no finished runs of digits whose recipe begins with natural/seed1" in sentence(
            call(*words, "natural/seed1")
        )

    def test_an_altered_record(self, made: Path) -> None:
        path = made / "digits" / "natural" / "seed0" / "record.json"
        record = json.loads(path.read_text(encoding="utf-8"))
        record["attacks"][1]["robust"][3] -= 0.2
        path.write_text(json.dumps(record), encoding="utf-8")
        result = call("verify", "--dataset", "digits", "--runs", made)
        assert result.exit_code == 1
        assert result.stderr == (
            "Error: a record differs by 20.00 points, more than --tolerance 0.5: "
            "delete that run to make it anew, or allow more\n"
        )

    def test_other_weights(self, made: Path) -> None:
        place = made / "digits" / "natural" / "seed0"
        model, config = runs.read_weights(place / runs.WEIGHTS)
        state = {name: value + 1 for name, value in model.state_dict().items()}
        runs.write_weights(place / runs.WEIGHTS, state, config, 10)
        assert "record.json belongs to other weights" in sentence(call("verify", "--dataset", "digits", "--runs", made))

    def test_no_runs(self, tmp_path: Path) -> None:
        assert "there are no finished runs of digits" in sentence(
            call("verify", "--dataset", "digits", "--runs", tmp_path)
        )


class TestAsAProcess:
    def run(self, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
        command = [sys.executable, "-m", "frlkit", *words]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)

    def test_an_error_is_one_line_on_stderr(self, tmp_path: Path) -> None:
        done = self.run("train", "fgsm", "--dataset", "digits", "--runs", "runs", cwd=tmp_path)
        assert done.returncode == 1
        assert done.stdout == ""
        assert done.stderr.startswith("Error: recipe = 'fgsm'")
        assert len(done.stderr.splitlines()) == 1
        assert list(tmp_path.iterdir()) == []

    def test_from_any_folder(self, tmp_path: Path) -> None:
        torch.save(models.build("lenet5", seed=0).state_dict(), tmp_path / "w.pt")
        words = ("evaluate", "w.pt", "--dataset", "digits", "--steps", "1", "--json", "out.json")
        done = self.run(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["images"] == 360


class TestStandardOutput:
    """Of a group of the kit's kind in a process of its own, which needs no torch."""

    CODE = """
import click
from frlkit.commands.options import Group
group = Group("kit", params=[click.Option(["-q", "--quiet"])])
group.command("say")(lambda: [click.echo(line) for line in {lines}])
group(["say"])
"""

    def start(self, lines: str, **variables: str) -> subprocess.Popen[bytes]:
        code = self.CODE.format(lines=lines)
        env = {**os.environ, "PYTHONPATH": str(PROJECT), **variables}
        return subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def test_a_reader_that_has_enough_gets_no_traceback(self) -> None:
        with self.start("['x'] * 10**5") as process:
            assert process.stdout.read(1) == b"x"
            process.stdout.close()
            assert process.stderr.read() == b""

    def test_a_terminal_of_fewer_characters(self) -> None:
        process = self.start("['4.1 ± 0.2, τ = 7']", PYTHONIOENCODING="cp1252")
        assert process.communicate() == ("4.1 ± 0.2, ? = 7".encode("cp1252") + os.linesep.encode(), b"")
        assert process.returncode == 0


def test_quiet_prints_nothing_but_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--dataset", "digits", "--epochs", "1", "--runs", tmp_path)
    load = data.load
    monkeypatch.setattr(data, "load", lambda *a, **b: print("images become 32x32", file=sys.stderr) or load(*a, **b))
    for line in (("-q", "train", "natural", *words), ("train", "natural", *words, "-q")):
        result = call(*line)
        assert (result.exit_code, result.output) == (0, "")
    assert (tmp_path / "digits" / "natural" / "seed0" / "record.json").exists()
    assert sentence(call("--quiet", "train", "fgsm", *words)).startswith("Error: recipe = 'fgsm' is unknown")


def test_the_recipes_are_listed_with_source_and_title() -> None:
    lines = call("recipes").stdout.splitlines()
    assert len(lines) == len(recipes.RECIPES)
    for line, (name, recipe) in zip(lines, recipes.RECIPES.items(), strict=True):
        assert line.split("  ")[0].strip() == name
        assert recipe.source in line
        assert line.endswith(recipe.title)


def test_help_names_the_choices() -> None:
    for command, choices in (
        ("train", [*data.READERS, "folder:PATH", "auto|cpu|cuda"]),
        ("evaluate", [*models.MODELS, *attacks.LOSSES]),
        ("sweep", ["local|ray|dask"]),
    ):
        shown = re.sub(r"\s+", "", call(command, "--help").stdout)
        assert all(choice in shown for choice in choices)


def test_completion_offers_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for words, offered in (("train pgd", ["pgd_at_half", "pgd_at"]), ("evaluate --loss k", ["kl"])):
        monkeypatch.setenv("COMP_WORDS", f"frlkit {words}")
        monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
        result = CliRunner().invoke(main, env={"_FRLKIT_COMPLETE": "bash_complete"}, prog_name="frlkit")
        assert [line.partition(",")[2] for line in result.stdout.splitlines()] == offered


def test_version_and_help() -> None:
    assert __version__ in call("--version").stdout
    for words in ([], ["train"], ["evaluate"]):
        result = call(*words, "--help")
        assert result.exit_code == 0
        assert "Usage:" in result.stdout


HANGS = {
    "a lost interrupt": "while True:\n        with contextlib.suppress(KeyboardInterrupt):\n            time.sleep(60)",
    "the way out": "try:\n        time.sleep(60)\n    finally:\n        threading.Event().wait()",
    "the process's end": "threading.Thread(target=threading.Event().wait).start()\n    time.sleep(60)",
}


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("hang", HANGS.values(), ids=HANGS)
def test_ctrl_c_ends_a_sweep_that_hangs(hang: str, twice: bool) -> None:
    script = f"""
import contextlib, os, signal, sys, threading, time
import click
from frlkit.commands import options
leave = os._exit
os._exit = lambda status: (time.sleep(0.3), leave(status))  # whoever else would say something has the time
options.GRACE = {100 if twice else 0.2}
signal.signal(signal.SIGINT, signal.default_int_handler)
@click.group(cls=options.Group)
@click.option("--quiet", is_flag=True)
def main(quiet): ...
@main.command()
@options.sure_to_end()
def sweep():
    options.goes_on_from(lambda: [options.Path(options.__file__)])
    print("there", flush=True)
    {hang}
main(["sweep"])
"""
    command, pipe = [sys.executable, "-c", script], subprocess.PIPE
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    run = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)
    assert run.stdout is not None and run.stdout.readline() == "there\n"
    run.send_signal(signal.SIGINT)
    for _ in range(1500 * twice):  # two that come at once are one
        time.sleep(0.2)
        if run.poll() is not None:
            break
        run.send_signal(signal.SIGINT)
    try:
        said = set(run.communicate(timeout=300)[1].splitlines())  # a second time where the process's end hangs
        assert said == {"Error: interrupted; the same command goes on from here"}
    finally:
        run.kill()
    assert run.returncode == 130


def test_a_sweep_that_nobody_interrupts_ends_as_it_does() -> None:
    with click.Context(main):
        with options.sure_to_end():
            pass
        with pytest.raises(KitError), options.sure_to_end():
            raise KitError("no")
    assert signal.set_wakeup_fd(-1) == -1
