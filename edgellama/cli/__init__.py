"""The command line: one file per subcommand, imported when it is chosen.

The answer goes to stdout, everything else to stderr.  A known error is one line and exit status 2.
"""

from __future__ import annotations

import importlib
import os
import sys

import click

from edgellama import __version__
from edgellama.errors import EdgeLlamaError

# Short help lives here, so that --help imports no subcommand.
_COMMANDS = {
    "run": ("run", "Answer a prompt, or continue a text."),
    "pull": ("models", "Fetch a model into the cache."),
    "list": ("models", "Show the models in the cache and in the catalogue."),
    "rm": ("models", "Delete a model from the cache."),
    "info": ("inspect", "Show what is in a model file."),
    "verify": ("inspect", "Check a model file: structure, shapes, numbers."),
    "doctor": ("doctor", "Show what edgellama sees of this machine."),
    "warmup": ("doctor", "Build the kernels that a model needs."),
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module = importlib.import_module(f"{__name__}.{_COMMANDS[name][0]}")
        return module.COMMANDS[name]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edgellama")
def cli() -> None:
    """Run Llama-family language models fast on a commodity CPU."""


def main() -> None:
    """Entry point of the `edgellama` command."""
    try:
        cli.main(standalone_mode=False)
        sys.stdout.flush()
    except EdgeLlamaError as error:
        click.echo(f"edgellama: {error}", err=True)
        sys.exit(2)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except BrokenPipeError:
        # The reader has gone; keep Python from complaining when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
