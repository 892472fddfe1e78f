"""`python -m edgellama` is the `edgellama` command."""

from edgellama.cli import process

process()
