"""`edgellama pull`, `list` and `rm`: the models in the cache."""

from __future__ import annotations

import click

from edgellama import catalog


@click.command("pull")
@click.argument("name")
@click.option("--offline", is_flag=True, help="Never touch the network.")
def pull(name: str, offline: bool) -> None:
    """Fetch NAME: a name of the catalogue, hf:org/repo/file.gguf or a URL."""
    click.echo(catalog.pull(name, offline=offline))


@click.command("list")
def list_models() -> None:
    """Show the models in the cache, and those of the catalogue that are not there."""
    here = catalog.installed()
    for name, path, nbytes in here:
        click.echo(f"{name:24} {nbytes / 1e6:8.1f} MB  {path}")
    for name in catalog.CATALOGUE:
        if name not in {entry[0] for entry in here}:
            click.echo(f"{name:24} not fetched")


@click.command("rm")
@click.argument("name")
def remove(name: str) -> None:
    """Delete NAME from the cache."""
    click.echo(f"deleted {catalog.remove(name)}")


COMMANDS = {"pull": pull, "list": list_models, "rm": remove}
