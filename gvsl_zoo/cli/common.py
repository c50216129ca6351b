"""What the commands share: the group, its options, how facts and errors are shown, progress on a terminal."""

from __future__ import annotations

import errno
import io
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from .. import __version__
from ..errors import ArgumentError, GvslZooError

DEFAULT_MODEL = "gvsl-unet-ct-nano"


class Commands(click.Group):
    """A group whose commands fail with one line instead of a traceback, unless --debug is given."""

    def invoke(self, ctx: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a file's name need not be UTF-8
                stream.reconfigure(errors="surrogateescape")
        warnings.showwarning = lambda message, *_: click.echo(f"warning: {message}", err=True)
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if ctx.params["debug"]:
                raise
            click.echo(f"error: {in_a_line(error)}", err=True)
            ctx.exit(2 if isinstance(error, ArgumentError) else 1)


def in_a_line(error: Exception) -> str:
    """What an error says, with its remedy: one of the package's own, of a file, or of memory; others are unexpected."""
    text = str(error)
    if isinstance(error, GvslZooError):
        return text
    if isinstance(error, OSError) and (error.filename is not None or error.errno == errno.ENOSPC):
        where = "" if error.filename is None else f"{error.filename}: "
        return f"{where}{error.strerror}; check the path, permissions and free space"
    full = isinstance(error, RuntimeError) and ("allocate memory" in text or "out of memory" in text)  # of any device
    if full or isinstance(error, MemoryError):
        return "not enough memory; crop the scan, take smaller crops or batches, --precision bf16, or another --device"
    return f"unexpected {type(error).__name__}: {text}; --debug shows where"


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gvsl-zoo")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Pre-trained backbones for medical volumes. Not a medical device."""


def with_json(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print facts as JSON.")(command)


def with_model(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps."),
        click.option("--model", "name", default=DEFAULT_MODEL, show_default=True, help="Registry name or path."),
    ):
        command = option(command)
    return command


@contextmanager
def progress_bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal's error stream, gone when done; nothing where there is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def check_ending(path: Path | None, *endings: str) -> None:
    """Refuse an output whose name ends otherwise; None is no output."""
    if path and not path.name.endswith(endings):
        raise ArgumentError(f"the output {path.name!r} has no ending for this", f"end it in {' or '.join(endings)}")


def check_picture(path: Path | None) -> None:
    """Refuse, before the work for it, a picture that cannot be drawn; None is no picture."""
    from ..report import check_drawing

    if path:
        check_ending(path, ".png", ".PNG")
        check_drawing()


def show(facts: dict[str, Any], as_json: bool) -> None:
    """Print facts as JSON, or a line each; a pair is a before and an after, more are sizes."""
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts), default=0)
    for key, value in facts.items():
        if isinstance(value, dict):
            click.echo(key)
            show({f"  {name}": item for name, item in value.items()}, False)
        else:
            parts = value if isinstance(value, tuple) else [value]
            text = (" -> " if len(parts) == 2 else " x ").join(
                f"{part:.4g}" if isinstance(part, float) else str(part) for part in parts
            )
            click.echo(f"{key:<{width}}  {text}")


def load_for_registration(name: str, device: str) -> Any:
    """A model with its matching heads, or its backbone where it has none."""
    from ..zoo import load

    entry: Any = load(name).entry
    return load(name, task="registration" if "registration" in entry.tasks else "backbone", device=device)
