"""Every error that edgellama raises on purpose, as one tree.

    EdgeLlamaError
    ├── ModelFileError            the file is damaged, truncated or hostile
    │   └── UnsupportedModelError  the file is sound, but asks for something that is not built
    ├── ContextOverflowError      more tokens than the context holds
    ├── TemplateError             a chat template is missing, broken or ran too long
    ├── GrammarError              a grammar or schema cannot be used
    ├── SessionError              a session file is damaged, or of another model
    ├── OutOfMemoryError          memory for weights, cache or arena could not be had
    ├── DownloadError             a model could not be fetched or did not verify
    ├── KernelError               a kernel pack could not be built or loaded
    └── UsageError                an argument is out of range or unknown

A message says what was seen, what was needed and what to do, in one line; the command line prints it
after ``edgellama:`` and exits with status 2.
"""

from __future__ import annotations

from collections.abc import Sized


class EdgeLlamaError(Exception):
    """Anything that edgellama reports to its user."""


class ModelFileError(EdgeLlamaError):
    """A model file is damaged, truncated or hostile."""


class UnsupportedModelError(ModelFileError):
    """A sound model file asks for something edgellama does not have."""


class ContextOverflowError(EdgeLlamaError):
    """More tokens were given than the context holds."""


class TemplateError(EdgeLlamaError):
    """A chat template is missing, broken, or passed its limits."""


class GrammarError(EdgeLlamaError):
    """A grammar or schema cannot be used as it stands."""


class SessionError(EdgeLlamaError):
    """A session file is damaged, or was saved with another model or another cache."""


class OutOfMemoryError(EdgeLlamaError):
    """Memory for weights, cache or arena could not be had."""


class DownloadError(EdgeLlamaError):
    """A model could not be fetched, or what came did not verify."""


class KernelError(EdgeLlamaError):
    """A kernel pack could not be built, checked or loaded."""


class UsageError(EdgeLlamaError, ValueError):
    """An argument is out of range, unknown, or does not fit the others."""


def shown(value: object) -> str:
    """Return a value of a file as it may stand in a message: printable, in one line, not long."""
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else f"{value[:57]}...")
    if isinstance(value, int | float):
        return repr(value)
    return f"an array of {len(value)}" if isinstance(value, Sized) else type(value).__name__
