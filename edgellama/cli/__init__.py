"""The command line: one file per subcommand, imported when it is chosen.

The answer goes to stdout, everything else to stderr.  A known error is one line and exit status 2;
Ctrl-C is 130; a reader that goes away is no error.
"""

from __future__ import annotations

import atexit
import importlib
import io
import os
import signal
import sys
import threading
from contextlib import suppress
from typing import NoReturn

import click

from edgellama import __version__
from edgellama.errors import EdgeLlamaError

# Where each command lies (module.name) and its short help, so that --help imports none of them.
_COMMANDS = {
    "run": ("run.command", "Answer a prompt, or continue a text."),
    "chat": ("chat.command", "Chat in a terminal."),
    "pull": ("pull.command", "Fetch a model into the cache."),
    "list": ("list_.command", "Show the models in the cache and in the catalogue."),
    "rm": ("rm.command", "Delete a model from the cache."),
    "info": ("inspect.info", "Show what is in a model file."),
    "verify": ("inspect.verify", "Check a model file: structure, shapes, numbers."),
    "convert": ("convert.convert", "Make a GGUF file of a checkpoint."),
    "quantize": ("convert.quantize", "Write a GGUF file in other block formats."),
    "batch": ("batch.command", "Do the tasks of a file of JSON lines."),
    "imatrix": ("imatrix.command", "Measure which columns of the weights matter."),
    "gguf": ("gguf.command", "Split, merge, edit, print and compare GGUF files."),
    "bench": ("bench.command", "Measure how fast a model runs, and how near the ceiling."),
    "doctor": ("doctor.doctor", "Show what edgellama sees of this machine."),
    "warmup": ("doctor.warmup", "Make ready what a model needs: kernels, threads."),
}


class _Commands(click.Group):
    """A group that knows its subcommands by name only."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            ctx.fail(f"no command is called {name!r}; commands: {', '.join(_COMMANDS)}")
        module, _, attribute = _COMMANDS[name][0].partition(".")
        command: click.Command = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edgellama")
def cli() -> None:
    """Run Llama-family language models fast on a commodity CPU."""


def main() -> NoReturn:
    """Run the `edgellama` command and exit with its status."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a model file may hold any character
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = cli.main(prog_name="edgellama", standalone_mode=False)
        sys.stdout.flush()
        sys.exit(status if isinstance(status, int) else 0)
    except EdgeLlamaError as error:
        click.echo(f"edgellama: {plain(' '.join(str(error).split()))}", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except BrokenPipeError:
        _silence_stdout()
        sys.exit(0)
    except MemoryError:
        click.echo(
            "edgellama: memory ran out; close other programs or use a smaller model", err=True
        )
        sys.exit(2)
    except OSError as error:  # a full disk, a file that may not be read
        _silence_stdout()
        reason = ": ".join(str(part) for part in (error.filename, error.strerror) if part)
        click.echo(f"edgellama: {plain(reason or str(error))}", err=True)
        sys.exit(2)


def process() -> NoReturn:
    """Be the `edgellama` command, a process of its own: `main`, and then no dismantling.

    To free the interpreter object by object takes 40 ms in which the answer is out already.  What was
    registered to be done at exit is done, and a thread that is left is waited for as ever.
    """
    for name in ("SIGTERM", "SIGHUP"):  # end as an error does: nothing half-written is left
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        main()
    except SystemExit as done:
        if not isinstance(done.code, int) or threading.active_count() > 1:
            raise
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                with suppress(OSError):  # nobody is left to be told
                    stream.flush()
        os._exit(done.code)


def plain(text: str) -> str:
    """Return a text of a file or a template without what a terminal would obey."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _silence_stdout() -> None:
    """Keep Python from complaining again when it flushes stdout at exit."""
    with suppress(OSError):  # where it is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
