"""What the command line's commands share: errors as one sentence, names as choices, common options."""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from frlkit import PROJECT, KitError, disk, unwatched


class Group(click.Group):
    """Shows a `KitError`, or a file that cannot be read or written, as one sentence; Ctrl-C ends with status 130.

    A terminal that knows fewer characters, such as one of code page 1252, shows "?" for the others.
    """

    def main(self, *values: Any, **named: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        return super().main(*values, **named)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """``-q`` holds for every command, so it may stand behind one, too."""
        quiet = [word for word in args if word in ("-q", "--quiet")]
        return super().parse_args(ctx, quiet[:1] + [word for word in args if word not in quiet])

    def invoke(self, context: click.Context) -> Any:
        quiet = context.params["quiet"]
        try:
            with contextlib.ExitStack() as silence, unwatched(quiet):
                for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr) if quiet else ():
                    silence.enter_context(redirect(io.StringIO()))  # an error is shown outside
                return super().invoke(context)
        except BrokenPipeError:  # of `| head`: click knows what to do
            raise
        except KitError as error:
            raise click.ClickException(str(error)) from None
        except OSError as error:
            named = disk.not_read(Path(os.fsdecode(error.filename)), error) if error.filename else error
            raise click.ClickException(str(named)) from None
        except ModuleNotFoundError as error:
            if (error.name or "frlkit").partition(".")[0] == "frlkit":
                raise
            what = "--no-deps torchattacks" if error.name == "torchattacks" else "'frlkit[notebooks]'"
            raise click.ClickException(f"this needs {error.name}, which is not installed: pip install {what}") from None
        except KeyboardInterrupt:
            stopped = click.ClickException(_interrupted(context))
            stopped.exit_code = 130
            raise stopped from None


def goes_on_from(kept: Callable[[], Iterable[Path]]) -> None:
    """Say of the command that is running which files, or folders, it would go on from if it were interrupted."""
    click.get_current_context().meta["kept"] = kept


def _interrupted(context: click.Context) -> str:
    """What Ctrl-C says: that the command goes on, where a file is kept by now that is no lock and no draft."""
    found = False
    with contextlib.suppress(OSError):
        for path in context.meta.get("kept", tuple)():
            files = [path] if path.is_file() else (file for file in path.rglob("*") if file.is_file())
            found |= any(file.suffix not in (".lock", ".tmp") for file in files)
    return "interrupted" + found * "; the same command goes on from here"


GRACE = 10.0  # seconds


@contextlib.contextmanager
def sure_to_end() -> Iterator[None]:
    """From Ctrl-C on this process ends within `GRACE` seconds, and at once after a second one, whatever hangs.

    For a command with processes and threads of its own, whose locks an exception can leave behind, or lose the
    exception. What it does then is as safe as a kill; the status is 130.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    context = click.get_current_context()
    ours, told = socket.socketpair()
    told.setblocking(False)

    def watch() -> None:  # told by the signal itself, not by Python code that would have to run for it
        with ours:
            while signal.SIGINT not in (heard := ours.recv(1)):
                if not heard:
                    return  # the command has ended
            try:
                select.select([ours], [], [], GRACE)
                click.echo(f"Error: {_interrupted(context)}", file=sys.__stderr__)  # also where -q silences the other
            finally:
                os._exit(130)

    def interrupt(*_: Any) -> None:
        signal.signal(signal.SIGINT, lambda *_: None)  # the second one is the watch's alone, without a traceback
        raise KeyboardInterrupt

    with contextlib.ExitStack() as after:
        after.callback(told.close)
        after.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False))
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as in the background
            after.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, interrupt))
        threading.Thread(target=watch, daemon=True).start()
        try:
            yield
        except KeyboardInterrupt:
            after.pop_all()  # the process's own end may hang yet: all stays,
            told.detach()  # and open
            raise


class Choice(click.Choice):
    """Names, known only when they are needed: importing what knows them takes seconds."""

    def __init__(self, names: Callable[[], list[str]], others: str = "") -> None:
        super().__init__([])
        self.names, self.others = names, others

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return f"[{'|'.join([*self.names(), *([self.others] if self.others else [])])}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)  # what it names refuses it in a sentence

    def get_missing_message(self, param: click.Parameter, ctx: click.Context | None) -> str:
        return f"Use one of {', '.join(self.names())}."

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in self.names() if name.startswith(incomplete)]


def names_of(module: str, table: str) -> Callable[[], list[str]]:
    """The keys of a module's table, such as ``recipes.RECIPES``, once they are asked for."""
    return lambda: list(getattr(import_module(f"frlkit.{module}"), table))


DATA = click.option(
    "--dataset",
    type=Choice(names_of("data", "READERS"), "folder:PATH"),
    default="fashion_mnist",
    show_default=True,
    help="A known data set, or a folder of your own images.",
)
DEVICE = click.option(
    "--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True, help="Where it computes."
)
PATH = click.Path(path_type=Path)
BATCH_SIZE = click.option("--batch-size", type=int, default=100, show_default=True, help="Images in a batch.")
RUNS = click.option(
    "--runs",
    type=PATH,
    default=PROJECT / "checkpoints",
    help="Where runs lie. Default: checkpoints/.",
)
