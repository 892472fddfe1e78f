"""Metadata of one architecture, read with type and range checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgellama.errors import ModelFileError, shown
from edgellama.gguf import GGUFFile

INT32_MAX = (1 << 31) - 1


class Keys:
    """The keys that begin with the architecture's name; `defaults` stand in for missing ones."""

    def __init__(self, gguf: GGUFFile, arch: str, defaults: Mapping[str, float]) -> None:
        self.metadata = gguf.metadata
        self.file = gguf.path.name
        self.arch = arch
        self.defaults = defaults

    def has(self, key: str) -> bool:
        """Whether the file has the key, or the family a value of its own."""
        return f"{self.arch}.{key}" in self.metadata or key in self.defaults

    def _get(self, key: str, default: Any) -> Any:
        value = self.metadata.get(f"{self.arch}.{key}", self.defaults.get(key, default))
        if value is None:
            raise ModelFileError(f"{self.file}: {self.arch}.{key} is missing")
        return value

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number in a range, which a default must keep to as well."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ModelFileError(
                f"{self.file}: {self.arch}.{key} is {shown(value)}; one integer is needed"
            )
        if not low <= value <= high:
            raise ModelFileError(
                f"{self.file}: {self.arch}.{key} is {value}; it must be {low} to {high}"
            )
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A number in a range, which no NaN and no infinity is."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelFileError(
                f"{self.file}: {self.arch}.{key} is {shown(value)}; a number is needed"
            )
        if not low <= value <= high:
            raise ModelFileError(
                f"{self.file}: {self.arch}.{key} is {value}; it must be {low:g} to {high:g}"
            )
        return float(value)
