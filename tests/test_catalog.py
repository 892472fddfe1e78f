"""Fetching from a server that behaves badly, on this machine."""

from __future__ import annotations

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from edgellama import catalog
from edgellama.errors import DownloadError, EdgeLlamaError, UsageError

BODY = b"GGUF" + bytes(range(256)) * 4000


class Server(BaseHTTPRequestHandler):
    """Serves BODY; its class attributes say how it misbehaves."""

    drop_after: int | None = None
    ignore_range = False
    body = BODY
    requests: list[str | None]

    def do_GET(self):
        kind = type(self)
        asked = self.headers.get("Range")
        kind.requests.append(asked)
        if self.path.startswith("/absent"):
            self.send_error(404)
            return
        first = 0
        if asked and not kind.ignore_range:
            first = int(asked.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(kind.body) - first))
        self.send_header("ETag", '"one"')
        self.end_headers()
        piece = kind.body[first:]
        if kind.drop_after is not None:
            piece = piece[: kind.drop_after]
        self.wfile.write(piece)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGELLAMA_HOME", str(tmp_path))

    class Mine(Server):
        requests = []  # noqa: RUF012

    http = ThreadingHTTPServer(("127.0.0.1", 0), Mine)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{http.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    yield address, Mine
    http.shutdown()
    http.server_close()
    thread.join()


def test_url_and_hf_sources(server):
    address, kind = server
    assert catalog.resolve(f"{address}/m.gguf").read_bytes() == BODY
    path = catalog.resolve("hf:org/repo/m.gguf")
    assert path.read_bytes() == BODY
    n = len(kind.requests)
    assert catalog.resolve("hf:org/repo/m.gguf") == path
    assert len(kind.requests) == n
    assert {name for name, _, _ in catalog.installed()} >= {path.name}
    catalog.remove(path.name)
    assert not path.exists()


def test_dropped_connections_resume(server):
    address, kind = server
    kind.drop_after = 300_000
    assert catalog.pull(f"{address}/m.gguf").read_bytes() == BODY
    assert any(request for request in kind.requests)


def test_a_server_that_ignores_ranges(server):
    address, kind = server
    kind.drop_after = 300_000
    kind.ignore_range = True
    with pytest.raises(DownloadError, match="run again"):
        catalog.pull(f"{address}/m.gguf")
    kind.drop_after = None
    assert catalog.pull(f"{address}/m.gguf").read_bytes() == BODY


def test_what_does_not_verify_is_not_kept(server):
    address, kind = server
    with pytest.raises(DownloadError, match="SHA-256"):
        catalog.pull(f"{address}/m.gguf#sha256={'0' * 64}")
    digest = hashlib.sha256(BODY).hexdigest()
    assert catalog.pull(f"{address}/m.gguf#sha256={digest}").read_bytes() == BODY
    kind.body = b"<html>not a model</html>"
    with pytest.raises(DownloadError, match="not a GGUF"):
        catalog.pull(f"{address}/other.gguf")
    with pytest.raises(DownloadError, match="404"):
        catalog.pull(f"{address}/absent.gguf")
    assert len(catalog.installed()) == 1


def test_offline_and_odd_names(server):
    address, kind = server
    with pytest.raises(DownloadError, match="--offline"):
        catalog.resolve(f"{address}/m.gguf", offline=True)
    assert kind.requests == []
    for name in ("hf:org/../../x.gguf", "hf:org/x", f"{address}/..", "hf:a/b/.."):
        with pytest.raises(UsageError):
            catalog.pull(name)
    with pytest.raises(EdgeLlamaError, match="smollm2-135m"):
        catalog.resolve("no-such-model")
