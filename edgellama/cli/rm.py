"""`edgellama rm`: delete a model, or what an interrupted fetch left of it, from the cache."""

from __future__ import annotations

import click

from edgellama import catalog


@click.command()
@click.argument("name")
def command(name: str) -> None:
    """Delete NAME, as `edgellama list` shows it or as it was pulled."""
    click.echo(f"deleted {catalog.remove(name)}", err=True)
