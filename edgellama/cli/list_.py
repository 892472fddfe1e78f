"""`edgellama list`: what is in the cache, and what the catalogue could put there."""

from __future__ import annotations

import click

from edgellama import catalog


@click.command("list")
def command() -> None:
    """Show name, size and path of the models and checkpoints in the cache, and models to be had."""
    rows = [(name, nbytes, str(path)) for name, path, nbytes in catalog.installed()]
    here = {name for name, _, _ in rows}
    rows += [
        (name, entry.nbytes, "not fetched")
        for name, entry in catalog.CATALOGUE.items()
        if name not in here
    ]
    rows += [(name, nbytes, f"checkpoint {path}") for name, path, nbytes in catalog.checkpoints()]
    width = max(len(name) for name, _, _ in rows)
    for name, nbytes, where in rows:
        click.echo(f"{name:{width}}  {nbytes / 1e6:9.1f} MB  {where}")
