"""Models by name."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def home() -> Path:
    """Where models and kernel packs live: EDGELLAMA_HOME, or this platform's user cache."""
    wanted = os.environ.get("EDGELLAMA_HOME")
    if wanted:
        path = Path(wanted)
    elif sys.platform == "win32":
        path = Path(os.environ.get("LOCALAPPDATA", Path.home())) / "edgellama"
    elif sys.platform == "darwin":
        path = Path.home() / "Library" / "Caches" / "edgellama"
    else:
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgellama"
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path
