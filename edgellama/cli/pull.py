"""`edgellama pull`: fetch a model into the cache and print where it lies."""

from __future__ import annotations

import click

from edgellama import catalog


@click.command()
@click.argument("name")
@click.option("--offline", is_flag=True, help="Never touch the network.")
def command(name: str, offline: bool) -> None:
    """Fetch NAME: a name of the catalogue, hf:org/repo/file.gguf or a URL.

    A URL may end in #sha256= and the digest that the file must have.
    """
    click.echo(catalog.pull(name, offline=offline))
