"""Fetching from a server of this machine that behaves badly; names, the cache, the index."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import DATA

from edgellama import catalog, fetch
from edgellama.errors import DownloadError, EdgeLlamaError, UsageError

BODY = (DATA / "gguf_ok" / "le_default.gguf").read_bytes()
SHA256 = hashlib.sha256(BODY).hexdigest()


class Server(BaseHTTPRequestHandler):
    """Serves `body`; its class attributes say how it misbehaves."""

    body: bytes
    drop_after: int | None  # bytes, then the connection closes
    ignore_range: bool
    wrong_range: bool
    announce: int | None  # Content-Length instead of the truth; 0 sends none
    tag: str | None
    statuses: list[int]  # answered first, in order
    linked: str | None  # X-Linked-ETag
    redirect: str | None
    requests: list[tuple[str, str | None]]

    @classmethod
    def reset(cls) -> None:
        cls.body, cls.tag, cls.requests, cls.statuses = BODY, '"one"', [], []
        cls.drop_after = cls.announce = cls.linked = cls.redirect = None
        cls.ignore_range = cls.wrong_range = False

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.requests.append((self.path, asked))
        if self.statuses:
            self.send_error(self.statuses.pop(0))
            return
        if self.redirect and self.path != "/stored":
            self.send_response(302)
            self.send_header("Location", self.redirect)
            if self.linked:
                self.send_header("X-Linked-ETag", f'"{self.linked}"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        first = self.first_byte(asked)
        if first >= len(self.body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(self.body)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if first else 200)
        if first:
            start = first - 1 if self.wrong_range else first
            self.send_header(
                "Content-Range", f"bytes {start}-{len(self.body) - 1}/{len(self.body)}"
            )
        length = len(self.body) - first if self.announce is None else self.announce
        if length:
            self.send_header("Content-Length", str(length))
        if self.tag:
            self.send_header("ETag", self.tag)
        self.end_headers()
        self.wfile.write(self.body[first:][: self.drop_after])

    def first_byte(self, asked: str | None) -> int:
        if not asked or self.ignore_range:
            return 0
        if_range = self.headers.get("If-Range")
        if if_range is not None and if_range != self.tag:
            return 0
        return int(asked.removeprefix("bytes=").rstrip("-"))

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    Server.reset()
    http = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = f"http://127.0.0.1:{http.server_port}"
    monkeypatch.setenv("EDGELLAMA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetch, "PAUSE_S", 0.0)
    yield url
    http.shutdown()
    http.server_close()
    thread.join()


def in_cache() -> set[str]:
    """Names of the files in the cache, without locks."""
    return {p.name for p in (catalog.home() / "models").iterdir() if not p.name.endswith(".lock")}


# --- sources and names ----------------------------------------------------------------------------
def test_url_and_hf_sources(address):
    assert catalog.resolve(f"{address}/m.gguf").read_bytes() == BODY
    path = catalog.resolve("hf:org/repo/sub/m.gguf")
    assert path.read_bytes() == BODY
    assert [asked for asked, _ in Server.requests] == [
        "/m.gguf",
        "/org/repo/resolve/main/sub/m.gguf",
    ]
    assert catalog.resolve("hf:org/repo/sub/m.gguf") == path
    assert catalog.resolve(path.name) == path
    assert len(Server.requests) == 2
    assert len(catalog.installed()) == 2
    catalog.remove("hf:org/repo/sub/m.gguf")
    assert not path.exists()
    with pytest.raises(UsageError, match="not in the cache"):
        catalog.remove("hf:org/repo/sub/m.gguf")


@pytest.mark.parametrize(
    "name",
    [
        "hf:org/../../x.gguf", "hf:org/x", "hf:a/b/..", "hf:a/b/c.bin", "hf:/b/c.gguf",
        "hf:a/b/c d.gguf", "http://[/m.gguf", "ftp://h/m.gguf", "",
        "http://h", "http://h/", "http://h/..", "http:///m.gguf", "http://h:x/m.gguf",
        "https://h/a b.gguf", "https://h/m.gguf#sha256=12", "https://h/m.gguf#main",
    ],
)  # fmt: skip
def test_odd_names_are_refused(name, address):
    with pytest.raises(UsageError):
        catalog.pull(name)
    assert Server.requests == []


@pytest.mark.parametrize(
    "name", ["%2e%2e%2f%2e%2e%2fevil", "..%5c..%5cevil.gguf", "a%00b", "m" * 300]
)
def test_names_stay_in_the_cache(name, address):
    path = catalog.pull(f"{address}/x/{name}?download=true")
    assert path.parent == catalog.home() / "models"
    assert path in [p for _, p, _ in catalog.installed()]
    with pytest.raises(UsageError):
        catalog.remove("../models/" + path.name)


def test_unknown_names_list_the_known(address):
    for call in (catalog.resolve, catalog.pull, catalog.remove):
        with pytest.raises(EdgeLlamaError, match=r"smollm2-135m.*hf:org/repo/file\.gguf"):
            call("no-such-model")


def test_parts_of_a_split_file_come_with_the_first(address):
    path = catalog.pull(f"{address}/big-00001-of-00003.gguf")
    assert len(catalog.installed()) == 3
    stem = path.name.removesuffix("-00001-of-00003.gguf")
    assert in_cache() == {f"{stem}-{i:05d}-of-00003.gguf" for i in (1, 2, 3)}
    catalog.remove(path.name)
    assert in_cache() == set()


def test_home_is_made_for_this_user_alone(address, tmp_path, monkeypatch):
    assert catalog.home() == tmp_path / "home"
    if os.name == "posix":
        assert stat.S_IMODE((tmp_path / "home").stat().st_mode) == 0o700
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGELLAMA_HOME", str(tmp_path / "file" / "x"))
    with pytest.raises(UsageError, match="set EDGELLAMA_HOME"):
        catalog.resolve(f"{address}/m.gguf")


def test_offline_never_touches_the_network(address):
    for name in (f"{address}/m.gguf", "hf:org/repo/m.gguf", "smollm2-135m", None):
        with pytest.raises(DownloadError, match="--offline"):
            catalog.resolve(name, offline=True)
    assert Server.requests == []
    path = catalog.pull(f"{address}/m.gguf")
    assert catalog.resolve(f"{address}/m.gguf", offline=True) == path


# --- servers that misbehave -----------------------------------------------------------------------
def test_dropped_connections_resume(address):
    Server.drop_after = 1000
    path = catalog.pull(f"{address}/m.gguf")
    assert path.read_bytes() == BODY
    assert [r for _, r in Server.requests] == [None, "bytes=1000-", "bytes=2000-"]
    assert in_cache() == {path.name}


def test_an_interrupted_fetch_resumes_in_another_run(address, monkeypatch):
    monkeypatch.setattr(fetch, "_MOST_TRIES", 1)
    Server.drop_after = 1000
    with pytest.raises(DownloadError, match="run again"):
        catalog.pull(f"{address}/m.gguf")
    assert catalog.installed() == []
    Server.drop_after = None
    assert catalog.pull(f"{address}/m.gguf").read_bytes() == BODY
    assert Server.requests[-1][1] == "bytes=1000-"


def test_ctrl_c_keeps_what_came(address, monkeypatch):
    Server.drop_after = 1000

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "_total", lambda *_, **__: None)  # believes that 1000 bytes are all
        patch.setattr(fetch, "_check", lambda *_: interrupt(0))
        with pytest.raises(KeyboardInterrupt):
            catalog.pull(f"{address}/m.gguf")
    assert catalog.installed() == []
    Server.drop_after = None
    assert catalog.pull(f"{address}/m.gguf").read_bytes() == BODY
    assert Server.requests[-1][1] == "bytes=1000-"


def test_what_changed_meanwhile_is_fetched_anew(address, monkeypatch):
    monkeypatch.setattr(fetch, "_MOST_TRIES", 1)
    Server.drop_after, Server.body = 1000, b"GGUF" + bytes(4000)
    with pytest.raises(DownloadError):
        catalog.pull(f"{address}/m.gguf")
    Server.drop_after, Server.body, Server.tag = None, BODY, '"two"'
    assert catalog.pull(f"{address}/m.gguf").read_bytes() == BODY


@pytest.mark.parametrize("tag", [None, 'W/"weak"'])
def test_without_a_validator_nothing_is_continued(address, tag):
    Server.drop_after, Server.tag = 2000, tag
    with pytest.raises(DownloadError, match="run again"):
        catalog.pull(f"{address}/m.gguf")
    assert {asked for _, asked in Server.requests} == {None}
    # A digest says that the pieces belong together.
    assert catalog.pull(f"{address}/m.gguf#sha256={SHA256}").read_bytes() == BODY
    assert Server.requests[-1][1] == "bytes=2000-"


def test_a_server_that_ignores_ranges(address):
    Server.drop_after, Server.ignore_range = 1000, True
    with pytest.raises(DownloadError, match="run again"):
        catalog.pull(f"{address}/m.gguf")
    assert len(Server.requests) <= fetch.PATIENCE + 1
    Server.drop_after = None
    assert catalog.pull(f"{address}/m.gguf").read_bytes() == BODY


def test_a_server_that_sends_other_ranges(address):
    Server.drop_after, Server.wrong_range = 1000, True
    with pytest.raises(DownloadError, match=r"sent others|after 1000"):
        catalog.pull(f"{address}/m.gguf")
    assert len(Server.requests) <= 2 * fetch.PATIENCE
    Server.drop_after = None
    assert catalog.pull(f"{address}/m.gguf").read_bytes() == BODY


def test_a_length_that_is_too_large_does_not_loop(address):
    Server.announce = 10 * len(BODY)
    assert catalog.pull(f"{address}/m.gguf").read_bytes() == BODY  # the 416 names the true length
    assert len(Server.requests) == 2


def test_a_length_that_is_too_small_is_no_model(address):
    Server.announce = len(BODY) - 100
    with pytest.raises(DownloadError, match="not sound"):
        catalog.pull(f"{address}/m.gguf")
    assert in_cache() == set()


def test_no_length_at_all(address):
    Server.announce = 0
    assert catalog.pull(f"{address}/m.gguf").read_bytes() == BODY


def test_a_file_that_is_complete_already_is_taken(address, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "_check", interrupt)
        with pytest.raises(KeyboardInterrupt):
            catalog.pull(f"{address}/m.gguf")
    assert catalog.pull(f"{address}/m.gguf").read_bytes() == BODY
    assert [asked for _, asked in Server.requests] == [None, f"bytes={len(BODY)}-"]


def test_busy_servers_are_asked_again_and_refusals_are_not(address):
    Server.statuses = [503, 429, 500]
    assert catalog.pull(f"{address}/m.gguf").read_bytes() == BODY
    for status, hint in ((404, "check the name"), (401, "private"), (403, "private"), (410, "410")):
        Server.statuses, before = [status], len(Server.requests)
        with pytest.raises(DownloadError, match=hint):
            catalog.pull(f"{address}/{status}.gguf")
        assert len(Server.requests) == before + 1


def test_nobody_there(address, monkeypatch):
    monkeypatch.setattr(fetch, "PATIENCE", 2)
    with pytest.raises(DownloadError, match=r"could not be fetched: .*refused"):
        catalog.pull("http://127.0.0.1:9/m.gguf")


# --- redirects and digests ------------------------------------------------------------------------
def test_the_digest_of_a_redirect_is_checked(address):
    Server.redirect, Server.linked = f"{address}/stored", SHA256
    assert catalog.pull("hf:org/repo/m.gguf").read_bytes() == BODY
    Server.linked = "0" * 64
    with pytest.raises(DownloadError, match="SHA-256"):
        catalog.pull("hf:org/repo/other.gguf")
    assert len(in_cache()) == 1


def test_redirects_end(address):
    Server.redirect = f"{address}/again"
    with pytest.raises(DownloadError, match="302"):
        catalog.pull(f"{address}/m.gguf")
    assert len(Server.requests) <= 7
    Server.redirect = "file:///etc/passwd"
    with pytest.raises(DownloadError):
        catalog.pull(f"{address}/m.gguf")


def test_what_does_not_verify_is_not_kept(address):
    with pytest.raises(DownloadError, match="SHA-256"):
        catalog.pull(f"{address}/m.gguf#sha256={'0' * 64}")
    assert in_cache() == set()
    assert catalog.pull(f"{address}/m.gguf#sha256={SHA256.upper()}").read_bytes() == BODY
    Server.body = b"<html>not a model</html>"
    with pytest.raises(DownloadError, match=r"not sound.*GGUF"):
        catalog.pull(f"{address}/other.gguf")
    assert len(in_cache()) == 1


# --- the disk, and other processes ----------------------------------------------------------------
def test_a_full_disk_is_one_line(address, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    for name in (f"{address}/m.gguf", "smollm2-135m"):
        with pytest.raises(DownloadError, match="MB are needed and 0 MB are free") as caught:
            catalog.pull(name)
        assert "\n" not in str(caught.value)
    assert not [name for name in in_cache() if name.endswith((".gguf", ".fetch"))]


def test_no_permission_is_one_line(address, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(fetch, "_fetch", refuse)
    with pytest.raises(DownloadError, match="Permission denied"):
        catalog.pull(f"{address}/m.gguf")


def test_two_processes_fetch_once(address):
    command = [sys.executable, "-m", "edgellama", "pull", f"{address}/m.gguf"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    paths = {process.communicate(timeout=60)[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(paths) == 1
    assert len(Server.requests) == 1


# --- wheels ---------------------------------------------------------------------------------------
def make_index(folder: Path, parts: list[bytes]) -> tuple[str, ...]:
    """Write wheels that hold a file in parts, for pip's --find-links, and return their names."""
    for i, part in enumerate(parts):
        meta = f"made_up_part{i}-1.0.dist-info"
        with zipfile.ZipFile(folder / f"made_up_part{i}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"made_up_part{i}/data/m.gguf.part{i:02d}", part)
            wheel.writestr(
                f"{meta}/METADATA", f"Metadata-Version: 2.1\nName: made-up-part{i}\nVersion: 1.0\n"
            )
            wheel.writestr(f"{meta}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr(f"{meta}/RECORD", "")
    return tuple(f"made-up-part{i}==1.0" for i in range(len(parts)))


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A catalogue entry whose two wheels lie in a folder."""
    wheels = make_index(tmp_path, [BODY[:1000], BODY[1000:]])
    monkeypatch.setenv("EDGELLAMA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)

    def put(**changes):
        values = {"file": "m.gguf", "nbytes": len(BODY), "sha256": SHA256, "wheels": wheels}
        entry = catalog.Entry(**(values | changes), licence="")
        monkeypatch.setitem(catalog.CATALOGUE, "made-up", entry)

    put()
    return put


def test_wheels_are_joined_and_nothing_else_is_kept(made_up):
    path = catalog.resolve("made-up")
    assert path.read_bytes() == BODY
    assert in_cache() == {"m.gguf"}
    assert ("made-up", path, len(BODY)) in catalog.installed()
    catalog.remove("made-up")
    assert in_cache() == set()


def test_wheels_that_are_not_what_they_should_be(made_up, tmp_path):
    made_up(sha256="0" * 64)
    with pytest.raises(DownloadError, match="SHA-256"):
        catalog.pull("made-up")
    made_up(nbytes=1500)
    with pytest.raises(DownloadError, match="more than 1500"):
        catalog.pull("made-up")
    made_up(wheels=("made-up-part0==2.0",))
    with pytest.raises(DownloadError, match=r"pip could not fetch made-up-part0==2\.0") as caught:
        catalog.pull("made-up")
    assert "\n" not in str(caught.value)
    assert in_cache() == set()


def test_an_environment_without_pip_says_so(made_up, tmp_path, monkeypatch):
    (tmp_path / "bare").mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    python = tmp_path / "bare" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    monkeypatch.setattr(fetch.sys, "executable", str(python))
    with pytest.raises(DownloadError, match="needs pip"):
        catalog.pull("made-up")


def test_the_two_models_of_the_package_index(smollm2, gemma3):
    for name, path in (("smollm2-135m", smollm2), ("gemma3-270m", gemma3)):
        entry = catalog.CATALOGUE[name]
        assert path.stat().st_size == entry.nbytes
        assert hashlib.sha256(path.read_bytes()).hexdigest() == entry.sha256
        assert catalog.resolve(name, offline=True) == path
