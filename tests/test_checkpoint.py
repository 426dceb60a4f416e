"""Checkpoints: whole or absent after any failure, damage noticed, strangers' files refused."""

from __future__ import annotations

import contextlib
import copy
import errno
import fcntl
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from frlkit import PROJECT, KitError, checkpoint, disk, drive, models, records

CONFIG = {"method": "natural", "lr": 0.001, "seed": 0}


def state(epoch: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(epoch)
    return {
        "config": dict(CONFIG),
        "epoch": epoch,
        "model": {"w": torch.randn(40, 30, generator=generator), "b": torch.zeros(0), "n": torch.tensor(3)},
        "history": [{"loss": 1.5, "rates": [0.1, 0.2]}, {"loss": 1.25, "rates": []}],
        "kernel": "portable",
        "none": None,
        "flag": True,
    }


def same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, torch.Tensor):
        return isinstance(found, torch.Tensor) and found.dtype == wanted.dtype and torch.equal(found, wanted)
    if isinstance(wanted, dict):
        return list(found) == list(wanted) and all(same(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    return type(found) is type(wanted) and found == wanted


def flip_a_bit(path: Path, of: bytes) -> None:
    """Flip one bit inside these bytes of a file; they must be there exactly once."""
    content = bytearray(path.read_bytes())
    assert content.count(of) == 1
    content[content.index(of) + len(of) // 2] ^= 1
    path.write_bytes(content)


def failing(number: int) -> Callable[..., Any]:
    """In place of a function of the file system: it fails with this error."""

    def fail(*arguments: Any, **_: Any) -> Any:
        name = arguments[0] if arguments and isinstance(arguments[0], (str, Path)) else None
        raise OSError(number, os.strerror(number), name)

    return fail


class Malicious:
    """Unpickled without care, this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoint.pt"


class TestRoundTrip:
    def test_read_returns_what_was_saved(self, path: Path) -> None:
        checkpoint.save(path, state())
        assert same(checkpoint.read(path), state())
        assert os.listdir(path.parent) == ["checkpoint.pt"]

    @pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
    def test_who_may_read_the_file_is_the_users_to_say(self, path: Path, mask: int, mode: int) -> None:
        before = os.umask(mask)
        try:
            checkpoint.save(path, state())
            with disk.only_one(path.parent):
                assert (path.parent / "run.lock").stat().st_mode & 0o777 == mode
        finally:
            os.umask(before)
        assert path.stat().st_mode & 0o777 == mode

    def test_the_generation_before_is_kept_if_asked(self, path: Path) -> None:
        for epoch in (1, 2, 3):
            checkpoint.save(path, state(epoch))
        assert checkpoint.read(path)["epoch"] == 3
        assert checkpoint.read(checkpoint.previous(path))["epoch"] == 2
        assert sorted(os.listdir(path.parent)) == ["checkpoint.previous.pt", "checkpoint.pt"]

    def test_what_made_a_run_is_plain_data(self, path: Path) -> None:
        checkpoint.save(path, {"made_by": [{"versions": records.versions()}]})
        assert checkpoint.read(path) == {"made_by": [{"versions": records.versions()}]}

    def test_the_saved_state_is_not_changed(self, path: Path) -> None:
        saved = state()
        checkpoint.save(path, saved)
        assert same(saved, state())

    def test_a_view_into_a_larger_tensor(self, path: Path) -> None:
        large = torch.arange(12.0).view(3, 4)
        checkpoint.save(path, {"column": large[:, 1], "turned": large.T})
        found = checkpoint.read(path)
        assert found["column"].tolist() == [1, 5, 9]
        assert torch.equal(found["turned"], large.T)


class TestDigest:
    CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
        "one number of a tensor": lambda s: s["model"]["w"].__setitem__((7, 7), 0.5),
        "the last bit": lambda s: s["model"]["w"].view(torch.int32)[0, 0].bitwise_xor_(1),
        "tensor type": lambda s: s["model"].update(n=torch.tensor(3, dtype=torch.int32)),
        "tensor shape": lambda s: s["model"].update(w=s["model"]["w"].view(30, 40)),
        "shape of an empty tensor": lambda s: s["model"].update(b=torch.zeros(0, 2)),
        "tensor to number": lambda s: s["model"].update(n=3),
        "nested number": lambda s: s["history"][1].update(loss=1.2500000000000002),
        "number type": lambda s: s.update(epoch=1.0),
        "number to text": lambda s: s.update(epoch="1"),
        "text": lambda s: s.update(kernel="native"),
        "true to one": lambda s: s.update(flag=1),
        "none to false": lambda s: s.update(none=False),
        "item of a list": lambda s: s["history"][0]["rates"].__setitem__(1, 0.3),
        "item moved to the next list": lambda s: s["history"][1]["rates"].append(s["history"][0]["rates"].pop()),
        "shorter list": lambda s: s["history"].pop(),
        "key name": lambda s: s["model"].update(v=s["model"].pop("w")),
        "missing key": lambda s: s["config"].pop("seed"),
        "new key": lambda s: s["config"].update(new=None),
        "key moved one level up": lambda s: s.update(n=s["model"].pop("n")),
    }

    @pytest.mark.parametrize("name", CHANGES)
    def test_any_change_shows(self, name: str) -> None:
        changed = copy.deepcopy(state())
        self.CHANGES[name](changed)
        assert checkpoint.digest(changed) != checkpoint.digest(state())

    def test_equal_content_is_equal(self) -> None:
        assert checkpoint.digest(state()) == checkpoint.digest(copy.deepcopy(state()))
        values = torch.arange(6.0).view(2, 3)
        assert checkpoint.digest({"a": values.T}) == checkpoint.digest({"a": values.T.contiguous()})
        assert checkpoint.digest({"a": values.requires_grad_()}) == checkpoint.digest({"a": values.detach()})

    def test_the_end_of_a_dictionary_counts(self) -> None:
        assert checkpoint.digest({"a": {"b": 1}, "c": 2}) != checkpoint.digest({"a": {"b": 1, "c": 2}})


class TestAtomicity:
    def full_disk(self, path: Any, mode: str) -> Any:
        class Half(io.FileIO):
            """The first half of what is written fits."""

            def write(self, content: Any) -> int:
                super().write(content[: len(content) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")

        return Half(path, mode)

    def broken(self, *_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    def interrupted(self, *_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    @pytest.mark.parametrize("kept", [False, True])
    @pytest.mark.parametrize(
        ("function", "failure"),
        [
            ("replace", "broken"),
            ("fsync", "broken"),
            ("open", "full_disk"),
            ("replace", "interrupted"),
            ("fsync", "interrupted"),
        ],
    )
    def test_a_failed_write_leaves_the_old_file_whole(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, function: str, failure: str, kept: bool
    ) -> None:
        checkpoint.save(path, state(1))
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            target = checkpoint if function == "open" else os
            patch.setattr(target, function, getattr(self, failure), raising=False)
            with pytest.raises((OSError, KeyboardInterrupt)):
                checkpoint.write_atomically(path, b"2", keep=checkpoint.previous(path) if kept else None)
        assert os.listdir(path.parent) == ["checkpoint.pt"]
        assert path.read_bytes() == before

    def test_failure_between_the_two_renames_leaves_the_old_generation(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        checkpoint.save(path, state(1))
        checkpoint.save(path, state(2))
        rename, calls = os.replace, []

        def replace(source: Any, target: Any) -> None:
            calls.append(target)
            if len(calls) == 2:
                raise OSError(errno.EIO, "Input/output error")
            rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            with pytest.raises(OSError, match="Input/output"):
                checkpoint.save(path, state(3))
        assert not list(path.parent.glob("*.tmp"))
        found = checkpoint.resume(path, CONFIG)
        assert found is not None
        assert found["epoch"] == 2

    def test_data_reach_the_disk_before_the_name(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        order: list[str] = []
        for name in ("fsync", "replace"):
            function = getattr(os, name)

            def spy(*arguments: Any, name: str = name, function: Callable[..., Any] = function) -> Any:
                order.append(name)
                return function(*arguments)

            monkeypatch.setattr(os, name, spy)
        checkpoint.save(path, state())
        assert order[:2] == ["fsync", "replace"]

    def test_json_refuses_what_json_has_not(self, tmp_path: Path) -> None:
        checkpoint.write_json(tmp_path / "a.json", {"x": [1.5, "é", None]})
        assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"x": [1.5, "é", None]}
        with pytest.raises(ValueError, match="JSON compliant"):
            checkpoint.write_json(tmp_path / "a.json", {"x": float("nan")})
        assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"x": [1.5, "é", None]}


class TestDamage:
    TENSOR = state(2)["model"]["w"].numpy().tobytes()

    @pytest.fixture
    def two(self, path: Path) -> Path:
        for epoch in (1, 2):
            checkpoint.save(path, state(epoch))
        return path

    def damage(self, path: Path, how: str) -> None:
        content = path.read_bytes()
        if how == "bit of a tensor":
            flip_a_bit(path, self.TENSOR)
        else:
            path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "last byte": content[:-1]}[how])

    @pytest.mark.parametrize("how", ["empty", "cut", "last byte", "bit of a tensor"])
    def test_the_generation_before_takes_over(self, two: Path, how: str) -> None:
        self.damage(two, how)
        damaged = two.read_bytes()
        with pytest.raises(KitError, match=re.escape(str(two))):
            checkpoint.read(two)
        with pytest.warns(UserWarning, match="generation before it") as caught:
            found = checkpoint.resume(two, CONFIG)
        assert len(caught) == 1
        assert same(found, state(1))
        assert not two.exists()
        assert two.with_name("checkpoint.pt.damaged").read_bytes() == damaged
        again = checkpoint.resume(two, CONFIG)  # without a second warning
        assert same(again, state(1))

    def test_going_on_after_damage_keeps_a_whole_file_at_all_times(self, two: Path) -> None:
        self.damage(two, "cut")
        with pytest.warns(UserWarning, match="generation before it"):
            checkpoint.resume(two, CONFIG)
        checkpoint.save(two, state(2))
        assert checkpoint.read(two)["epoch"] == 2
        assert checkpoint.read(checkpoint.previous(two))["epoch"] == 1

    def test_both_damaged_is_a_fresh_start_with_two_warnings(self, two: Path) -> None:
        self.damage(two, "bit of a tensor")
        self.damage(checkpoint.previous(two), "cut")
        with pytest.warns(UserWarning, match=r"\.damaged") as caught:
            assert checkpoint.resume(two, CONFIG) is None
        assert len(caught) == 2
        assert sorted(os.listdir(two.parent)) == ["checkpoint.previous.pt.damaged", "checkpoint.pt.damaged"]

    @pytest.mark.parametrize("part", ["model", "average"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_weights_that_are_not_finite_are_of_no_use(self, two: Path, part: str, value: float) -> None:
        bad = {**state(2), "average": copy.deepcopy(state(2)["model"])}
        assert models.nonfinite(bad[part]) == ""
        bad[part]["w"][3, 4] = value
        checkpoint.save(two, bad)
        with pytest.warns(UserWarning, match=rf"NaN or infinity in {part}\.w; kept as .*generation before it"):
            found = checkpoint.resume(two, CONFIG)
        assert same(found, state(2))

    def test_a_disk_that_does_not_answer_is_no_damage(self, two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A whole checkpoint is not moved aside because reading it failed once."""
        for function in ("read_bytes", "stat"):
            with (
                monkeypatch.context() as patch,
                pytest.raises(KitError, match=r"cannot be read \(Input/output error\)"),
            ):
                patch.setattr(Path, function, failing(errno.EIO))
                checkpoint.resume(two, CONFIG)
        assert same(checkpoint.resume(two, CONFIG), state(2))

    def test_what_cannot_be_moved_aside_or_removed_is_said(self, two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.damage(two, "cut")
        with monkeypatch.context() as patch, pytest.raises(KitError, match="cannot be written"):
            patch.setattr(os, "replace", failing(errno.EACCES))
            checkpoint.resume(two, CONFIG)
        with monkeypatch.context() as patch, pytest.raises(KitError, match="cannot be written"):
            patch.setattr(Path, "unlink", failing(errno.EIO))
            checkpoint.remove(two)

    def test_the_kits_own_file_of_another_kind_is_moved_aside(self, two: Path) -> None:
        checkpoint.save(two, {"config": CONFIG, "num_classes": 10, "model": state(2)["model"]})
        with pytest.warns(UserWarning, match="is no checkpoint of a run"):
            found = checkpoint.resume(two, CONFIG)
        assert same(found, state(2))

    def test_no_file_is_a_fresh_start(self, path: Path) -> None:
        assert checkpoint.resume(path, CONFIG) is None

    def test_a_killed_writes_litter_is_swept_up(self, two: Path) -> None:
        litter = [
            two.with_name(name)
            for name in ("checkpoint.pt.0123abcd.tmp", "record.json.00000000.tmp", "weights.pt.ffffffff.tmp")
        ]
        for file in litter:
            assert disk.at_rest(two.parent)
            file.write_bytes(b"half a file")
            assert not disk.at_rest(two.parent)
            with disk.only_one(two.parent):
                assert not file.exists()
        mine = two.with_name("notes.tmp")
        mine.write_text("someone else's", encoding="utf-8")
        with disk.only_one(two.parent):
            assert not disk.at_rest(two.parent)
        assert disk.at_rest(two.parent)
        assert mine.exists()

    def test_a_disk_that_fails_once_leaves_no_lock(self, two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        unlink, struck = Path.unlink, []

        def fails_once(path: Path, missing_ok: bool = False) -> None:
            struck.append(path.name)
            if len(struck) == 1:
                raise OSError(errno.EIO, "Input/output error")
            unlink(path, missing_ok)

        monkeypatch.setattr(Path, "unlink", fails_once)
        with disk.only_one(two.parent):
            assert (two.parent / "run.lock").exists()
        assert struck[0] == "run.lock"
        assert disk.at_rest(two.parent)

    def test_a_bit_anywhere_is_refused_or_harmless(self, path: Path) -> None:
        checkpoint.save(path, state())
        whole, chance = path.read_bytes(), random.Random(0)
        refused = 0
        for _ in range(400):
            damaged = bytearray(whole)
            damaged[chance.randrange(1500)] ^= 1 << chance.randrange(8)  # mostly the structure, less the tensors
            path.write_bytes(damaged)
            try:
                assert same(checkpoint.read(path), state())  # the zip format has a few bytes that mean nothing
            except KitError as error:
                refused += 1
                assert len(str(error).splitlines()) == 1
        assert refused > 200


class TestStrangers:
    def test_a_pickle_with_code_is_refused_and_not_run(self, path: Path, tmp_path: Path) -> None:
        path.parent.mkdir()
        torch.save({**state(), "digest": "0", "extra": Malicious(tmp_path / "ran")}, path)
        with pytest.raises(KitError, match="is no whole file of plain tensors") as caught:
            checkpoint.read(path)
        assert len(str(caught.value).splitlines()) == 1
        with pytest.warns(UserWarning, match=r"\.damaged"):
            assert checkpoint.resume(path, CONFIG) is None
        assert not (tmp_path / "ran").exists()

    def test_and_it_would_have_run(self, tmp_path: Path) -> None:
        torch.save(Malicious(tmp_path / "ran"), tmp_path / "x.pt")
        torch.load(tmp_path / "x.pt", weights_only=False)
        assert (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        "content",
        [
            {"model": {"w": torch.ones(2)}},
            {"model": {"w": torch.ones(2)}, "digest": "0" * 64},
            {"digest": None},
            torch.ones(3),
            [1, 2],
            "text",
            None,
        ],
        ids=["no digest", "wrong digest", "no text", "tensor", "list", "text", "None"],
    )
    def test_a_torch_file_of_another_make_is_refused(self, tmp_path: Path, content: Any) -> None:
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(KitError, match=re.escape(str(tmp_path / "x.pt"))) as caught:
            checkpoint.read(tmp_path / "x.pt")
        assert len(str(caught.value).splitlines()) == 1

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(KitError, match=r"nothing\.pt"):
            checkpoint.read(tmp_path / "nothing.pt")


class TestOtherConfiguration:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"lr": 0.002}, "lr is 0.001 there and 0.002 here"),
            ({"method": "trades", "seed": 1}, "method is 'natural' there and 'trades' here, seed is 0 there and 1"),
            ({"new": 3}, "new is None there and 3 here"),
        ],
    )
    def test_refused_naming_the_fields(self, path: Path, change: dict[str, Any], said: str) -> None:
        checkpoint.save(path, state())
        before = path.read_bytes()
        with pytest.raises(KitError) as caught:
            checkpoint.resume(path, {**CONFIG, **change})
        assert said in str(caught.value)
        assert str(path) in str(caught.value)
        for name in set(CONFIG) - set(change):
            assert f"{name} is" not in str(caught.value)
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == ["checkpoint.pt"]

    def test_a_field_that_only_the_file_has(self, path: Path) -> None:
        checkpoint.save(path, state())
        with pytest.raises(KitError, match="seed is 0 there and None here"):
            checkpoint.resume(path, {"method": "natural", "lr": 0.001})


class TestMirror:
    """Google Drive as a folder whose writes can fail."""

    @pytest.fixture(autouse=True)
    def forget(self) -> Iterator[None]:
        yield
        drive._mirrors.clear()
        drive._waiting.clear()

    def test_every_file_is_copied_with_its_generation_before(self, tmp_path: Path) -> None:
        local, remote = tmp_path / "local", tmp_path / "remote"
        drive.mirror(local, remote)
        path = local / "run" / "checkpoint.pt"
        for epoch in (1, 2):
            checkpoint.save(path, state(epoch))
        checkpoint.write_json(local / "run" / "record.json", {"a": 1})
        copies = {file.name: file.read_bytes() for file in (remote / "run").iterdir()}
        assert copies == {file.name: file.read_bytes() for file in (local / "run").iterdir()}
        assert sorted(copies) == ["checkpoint.previous.pt", "checkpoint.pt", "record.json"]
        checkpoint.remove(path)
        assert [file.name for file in (remote / "run").iterdir()] == ["record.json"]

    def test_a_new_session_takes_over_what_is_whole(self, tmp_path: Path) -> None:
        remote = tmp_path / "remote"
        for name in ("good.pt", "cut.pt"):
            checkpoint.save(remote / name, state(3))
        (remote / "cut.pt").write_bytes((remote / "cut.pt").read_bytes()[:-300])
        (remote / "empty.json").write_bytes(b"")
        with pytest.warns(UserWarning, match="was not taken over"):
            drive.mirror(tmp_path / "local", remote)
        assert [file.name for file in (tmp_path / "local").iterdir()] == ["good.pt"]
        assert checkpoint.read(tmp_path / "local" / "good.pt")["epoch"] == 3

    def test_the_set_up_cell_run_again_takes_nothing_older_over(self, tmp_path: Path) -> None:
        local, remote = tmp_path / "local", tmp_path / "remote"
        drive.mirror(local, remote)
        checkpoint.save(local / "checkpoint.pt", state(1))
        lagging = (remote / "checkpoint.pt").read_bytes()
        checkpoint.save(local / "checkpoint.pt", state(2))
        (remote / "checkpoint.pt").write_bytes(lagging)
        drive.mirror(local, remote)
        assert checkpoint.read(local / "checkpoint.pt")["epoch"] == 2

    def test_a_lost_mount_is_said_and_made_up_for(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        local, remote = tmp_path / "local", tmp_path / "remote"
        drive.mirror(local, remote)
        copy = shutil.copyfile

        def lost(*_: Any) -> None:
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

        monkeypatch.setattr(drive.time, "sleep", lambda _: None)
        with monkeypatch.context() as patch, pytest.warns(UserWarning, match="not connected.*: 1 files are kept here"):
            patch.setattr(shutil, "copyfile", lost)
            checkpoint.write_json(local / "one.json", {})
        assert (local / "one.json").exists()
        checkpoint.write_json(local / "two.json", {})
        assert sorted(file.name for file in remote.iterdir()) == ["one.json", "two.json"]
        assert shutil.copyfile is copy

    def test_a_copy_that_arrives_damaged_is_tried_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        copy, calls = shutil.copyfile, []

        def cut_the_first(source: Path, target: Path) -> None:
            copy(source, target)
            calls.append(target)
            if len(calls) == 1:
                Path(target).write_bytes(b"")

        drive.mirror(tmp_path / "local", tmp_path / "remote")
        monkeypatch.setattr(shutil, "copyfile", cut_the_first)
        checkpoint.write_json(tmp_path / "local" / "a.json", {"a": 1})
        assert json.loads((tmp_path / "remote" / "a.json").read_text(encoding="utf-8")) == {"a": 1}
        assert len(calls) == 2

    def test_no_draft_of_a_copy_stays(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        local, remote = tmp_path / "local", tmp_path / "remote"
        drive.mirror(local, remote)
        rename = os.replace

        def replace(source: Path, target: Path) -> None:
            if Path(target).is_relative_to(remote):
                raise OSError(errno.EIO, "Input/output error")
            rename(source, target)

        monkeypatch.setattr(drive.time, "sleep", lambda _: None)
        with monkeypatch.context() as patch, pytest.warns(UserWarning, match="could not be written"):
            patch.setattr(os, "replace", replace)
            checkpoint.write_json(local / "a.json", {"a": 1})
        assert list(remote.iterdir()) == []
        (remote / "b.json.copy").write_text("a killed session's", encoding="utf-8")
        drive._mirrors.clear()  # a new session
        drive.mirror(local, remote)
        assert list(remote.iterdir()) == []
        assert [file.name for file in local.iterdir()] == ["a.json"]


HOLD = """
import sys
from pathlib import Path
from frlkit import disk
with disk.only_one(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
    print("free", flush=True)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """A process that holds a run's folder until its input ends."""
    environment, pipe = {**os.environ, "PYTHONPATH": str(PROJECT)}, subprocess.PIPE
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_waits_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with holder(tmp_path) as process:
        sleep = disk.time.sleep
        # it waits: only now does the other let go
        monkeypatch.setattr(disk.time, "sleep", lambda seconds: (process.stdin.close(), sleep(seconds)))
        with disk.only_one(tmp_path):
            assert (
                process.stdin.closed and process.stdout.readline() == "free\n"
            )  # inside only once the other is through
    assert "another process works on" in capsys.readouterr().out
    assert not (tmp_path / "run.lock").exists()


def test_a_killed_process_holds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with holder(tmp_path) as process:
        process.kill()
        process.wait()
        with disk.only_one(tmp_path):
            pass
    assert capsys.readouterr().out == ""


class TestLock:
    """Whatever the disk or Ctrl-C does, this process does not keep what it does not use."""

    def free(self, folder: Path) -> bool:
        """Whether another process could have the folder; a lock of this process's counts as taken, too."""
        folder.mkdir(exist_ok=True)
        hold = disk.claim(folder / "run.lock")
        if hold is not None:
            hold.release()
            (folder / "run.lock").unlink()
        return hold is not None

    FAULTS: dict[str, tuple[Any, str]] = {
        "open": (os, "open"),
        "flock": (fcntl, "flock"),
        "stat": (os, "stat"),
        "fstat": (os, "fstat"),
        "mkdir": (Path, "mkdir"),
        "unlink": (Path, "unlink"),
        "rmdir": (Path, "rmdir"),
        "list": (Path, "glob"),
    }

    @pytest.mark.parametrize("when", ["before", "in the middle"])
    @pytest.mark.parametrize(
        ("name", "number"),
        [
            (name, number)
            for name in FAULTS
            for number in (errno.EIO, errno.EACCES, errno.EROFS, errno.ENOSPC, errno.ENOTCONN)
            if (name, number) != ("flock", errno.EACCES)  # in these words some file systems say that another has it
        ],
    )
    def test_a_folder_that_fails_is_said_and_free_afterwards(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int, when: str
    ) -> None:
        folder, place = tmp_path / "run", self.FAULTS[name]
        (folder / "x").mkdir(parents=True)
        with monkeypatch.context() as patch, contextlib.suppress(KitError):
            if when == "before":
                patch.setattr(*place, failing(number))
            with disk.only_one(folder):
                patch.setattr(*place, failing(number))
        assert self.free(folder)
        with disk.only_one(folder):  # the same call again, in this process
            assert not self.free(folder)
        assert [file.name for file in folder.iterdir()] == ["x"]

    @pytest.mark.parametrize("how", ["gone", "a file", "a dangling link"])
    def test_a_folder_that_is_not_there_any_more(self, tmp_path: Path, how: str) -> None:
        folder = tmp_path / "run"
        with pytest.raises(KitError, match="cannot be") as caught, disk.only_one(folder):
            shutil.rmtree(folder)
            if how == "a file":
                folder.write_text("", encoding="utf-8")
            elif how == "a dangling link":
                folder.symlink_to(tmp_path / "nowhere")
            (folder / "x").read_bytes()
        assert "Errno" not in str(caught.value)

    @pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
    def test_a_disks_error_that_names_no_file_names_the_folder(self, tmp_path: Path, number: int) -> None:
        words = re.escape(f"{tmp_path} cannot be written ({os.strerror(number)})")
        with pytest.raises(disk.WriteError, match=words), disk.only_one(tmp_path):
            raise OSError(number, os.strerror(number))  # as write does
        assert not list(tmp_path.parent.glob("*/run.lock"))

    def test_other_errors_pass_as_they_are(self, tmp_path: Path) -> None:
        for error in (
            OSError("of something else"),
            FileNotFoundError(2, "no such file", "/elsewhere"),
            ValueError("x"),
        ):
            with pytest.raises(type(error)) as caught, disk.only_one(tmp_path / "run"):
                raise error
            assert caught.value is error
        assert self.free(tmp_path / "run")

    def test_a_file_system_without_locks_is_said(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fcntl, "flock", failing(errno.ENOTSUP))
        with pytest.warns(UserWarning, match="knows no locks"), disk.only_one(tmp_path / "run"):
            pass

    def test_ctrl_c_at_any_line_leaves_nothing_held(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """And what it leaves all the same, the next call in this thread takes over."""
        folder, lines, kept = tmp_path / "run", 0, []

        def once(stop: int) -> int:
            count = 0

            def line(frame: Any, event: str, _: Any) -> Any:
                nonlocal count
                if event == "line":
                    count += 1
                    if count == stop:
                        raise KeyboardInterrupt
                return line

            def call(frame: Any, *_: Any) -> Any:
                return line if frame.f_code.co_filename == disk.__file__ else None

            try:
                sys.settrace(call)
                with disk.only_one(folder):
                    pass
            except KeyboardInterrupt as error:
                kept.append(error)  # as a notebook keeps the last traceback, and all that it refers to
            finally:
                sys.settrace(None)
            return count

        lines = once(-1)
        for stop in range(1, lines + 1):
            once(stop)
            with disk.only_one(folder):
                pass
            assert self.free(folder)
            folder.rmdir()
        assert len(kept) == lines > 30
        assert "another process" not in capsys.readouterr().out

    def test_a_lock_that_its_holder_removed_is_no_lock(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Opened before the holder removed it and locked afterwards: its name may be another process's by then."""
        path, opened = tmp_path / "run.lock", os.open

        def slow(*arguments: Any) -> int:
            descriptor = opened(*arguments)
            path.unlink()
            return descriptor

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", slow)
            assert disk.claim(path) is None
        hold = disk.claim(path)
        assert hold is not None
        assert disk.claim(path) is None
        hold.release()

    def test_a_forked_child_does_not_keep_it(self, tmp_path: Path) -> None:
        with disk.only_one(tmp_path / "run"):
            child = os.fork()
            if child == 0:
                signal.pause()
        try:
            assert self.free(tmp_path / "run")
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


class TestDrafts:
    """Temporary files of writes outside a run's folder, such as those of `evaluate` and the ladder."""

    def test_the_next_write_of_the_same_file_removes_a_dead_one(self, tmp_path: Path) -> None:
        path = tmp_path / "a[1].json"
        dead = tmp_path / "a[1].json.01234567.tmp"
        others = [
            tmp_path / name for name in ("a[1].json.0123456x.tmp", "b.json.01234567.tmp", "notes.tmp", "a[1].tmp")
        ]
        for file in (dead, *others):
            file.touch()
        checkpoint.write_json(path, {})
        assert sorted(tmp_path.iterdir()) == sorted([path, *others])

    def test_but_not_one_that_is_being_written(self, tmp_path: Path) -> None:
        alive = tmp_path / "a.json.01234567.tmp"
        hold = disk.claim(alive)
        checkpoint.write_json(tmp_path / "a.json", {})
        with disk.only_one(tmp_path):
            assert alive.exists()
        hold.release()
        with disk.only_one(tmp_path):
            assert not alive.exists()
