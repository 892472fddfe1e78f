"""Checkpoints of Hugging Face, from a server of this machine: what is fetched, resumed, refused."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from command_line import command, refused
from make_checkpoint import safetensors, write_torch

from edgellama import catalog, fetch
from edgellama.catalog import is_repository
from edgellama.convert.checkpoint import open_checkpoint
from edgellama.convert.download import fetch_checkpoint
from edgellama.errors import DownloadError, ModelFileError, UsageError

ONE = safetensors({"a": np.ones((2, 3), np.float32)})
TWO = safetensors({"b": np.zeros((2, 3), np.float32)})
COMMIT = "0123456789" * 4
INDEX = json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}).encode()
SHARDED = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors.index.json": INDEX,
    "m-1.safetensors": ONE,
    "m-2.safetensors": TWO,
    "tokenizer.json": b"{}",
    "README.md": b"---\nlicense: mit\n---\n",
    "additional_chat_templates/tool.jinja": b"{{ messages }}",
}
OTHERS = {
    "pytorch_model.bin": b"not wanted",
    "additional_chat_templates/model.safetensors": b"not wanted",
    "additional_chat_templates/../evil.jinja": b"not wanted",
    "docs/tool.jinja": b"not wanted",
    "original/consolidated.00.pth": b"not wanted",
    "../evil.json": b"not wanted",
    ".complete": b"not wanted",
    "flax_model.msgpack": b"not wanted",
}


class Hub(BaseHTTPRequestHandler):
    """Serves `files` at `commit`; class attributes say how it misbehaves."""

    files: dict[str, bytes]
    commit: str
    digests: dict[str, str]
    private: bool
    elsewhere: str | None  # files are redirected there
    drop_after: int | None
    requests: list[tuple[str, str | None]]  # path, Authorization

    @classmethod
    def reset(cls) -> None:
        cls.files, cls.commit, cls.digests = SHARDED | OTHERS, COMMIT, {}
        cls.private, cls.elsewhere, cls.drop_after, cls.requests = False, None, None, []

    def do_GET(self) -> None:
        token = self.headers.get("Authorization")
        self.requests.append((self.path, token))
        if self.path.startswith("/stored/"):
            return self.send(self.files[self.path.removeprefix("/stored/")])
        if self.private and token != "Bearer secret":
            return self.send_error(401)
        if self.path.startswith("/api/models/org/repo/revision/"):
            siblings = [
                {"rfilename": name, "size": len(body)}
                | ({"lfs": {"sha256": self.digests[name]}} if name in self.digests else {})
                for name, body in self.files.items()
            ]
            return self.send(json.dumps({"sha": self.commit, "siblings": siblings}).encode())
        name = self.path.removeprefix(f"/org/repo/resolve/{self.commit}/")
        if name not in self.files:
            return self.send_error(404)
        if self.elsewhere:
            self.send_response(302)
            self.send_header("Location", f"{self.elsewhere}/stored/{name}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        return self.send(self.files[name])

    def send(self, body: bytes) -> None:
        asked = self.headers.get("Range")
        first = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - first))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.end_headers()
        self.wfile.write(body[first:][: self.drop_after])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    Hub.reset()
    http = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = f"http://127.0.0.1:{http.server_port}"
    monkeypatch.setenv("EDGELLAMA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(fetch, "PAUSE_S", 0.0)
    yield url
    http.shutdown()
    http.server_close()
    thread.join()


def fetched() -> list[str]:
    asked = [path.partition("/resolve/")[2] for path, _ in Hub.requests]
    return [path.partition("/")[2] for path in asked if path]


def test_only_what_is_read_comes(hub):
    folder = fetch_checkpoint("hf:org/repo")
    assert folder.parent == catalog.home() / "checkpoints"
    assert sorted(fetched()) == sorted(SHARDED)
    assert (folder / "additional_chat_templates" / "tool.jinja").read_text() == "{{ messages }}"
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config == {"model_type": "llama"}
        np.testing.assert_array_equal(checkpoint.tensors["a"].read(), np.ones((2, 3)))
        assert set(checkpoint.tensors) == {"a", "b"}
    seen = len(Hub.requests)
    assert fetch_checkpoint("hf:org/repo") == folder
    assert fetch_checkpoint("hf:org/repo", offline=True) == folder
    assert len(Hub.requests) == seen


def test_a_revision_is_a_folder_of_its_own(hub):
    assert fetch_checkpoint("hf:org/repo@v1.0") != fetch_checkpoint("hf:org/repo")
    assert Hub.requests[0][0] == "/api/models/org/repo/revision/v1.0?blobs=true"


def test_pickles_come_where_there_is_nothing_else(hub, tmp_path):
    weights = write_torch(tmp_path / "x", {"a": np.ones(3, np.float32)}).read_bytes()
    Hub.files = {"config.json": b"{}", "pytorch_model.bin": weights, "tf_model.h5": b""}
    assert set(open_checkpoint(fetch_checkpoint("hf:org/repo")).tensors) == {"a"}
    Hub.files = {"params.json": b'{"dim": 3}', "consolidated.00.pth": weights}
    Hub.files |= {"consolidated.01.pth": weights, "tokenizer.model": b"x"}
    folder = fetch_checkpoint("hf:org/repo@meta")
    assert {p.name for p in folder.iterdir()} > set(Hub.files)


def test_offline_never_touches_the_network(hub):
    with pytest.raises(DownloadError, match="--offline"):
        fetch_checkpoint("hf:org/repo", offline=True)
    assert Hub.requests == []


@pytest.mark.parametrize(
    "name",
    ["hf:org", "hf:org/", "hf:/repo", "hf:../repo", "hf:org/..", "hf:org/repo@", "hf:org/repo@..",
     "hf:org/repo@a/b", "hf:org/repo/x", "hf:o rg/repo", "org/repo", ""],
)  # fmt: skip
def test_odd_names_are_refused(hub, name):
    with pytest.raises(UsageError, match="not of the form hf:org/repo"):
        fetch_checkpoint(name)
    assert Hub.requests == []


def test_files_of_gguf_are_no_repositories():
    assert is_repository("hf:org/repo")
    assert not is_repository("hf:org/repo/m.gguf")
    assert not is_repository("hf:org/repo/m.gguf#sha256=00")
    assert not is_repository("folder")


# --- resuming -------------------------------------------------------------------------------------
def test_a_dropped_connection_is_resumed(hub):
    Hub.drop_after = 60
    folder = fetch_checkpoint("hf:org/repo")
    assert (folder / "m-1.safetensors").read_bytes() == ONE
    assert fetched().count("m-1.safetensors") == -(-len(ONE) // 60)


def test_a_second_run_goes_on(hub, monkeypatch):
    """What is whole is not fetched again, what is not goes on where it stopped."""
    Hub.files = {k: v for k, v in Hub.files.items() if k != "m-2.safetensors"}
    with pytest.raises(DownloadError, match=r"has no 'm-2\.safetensors', which its model\."):
        fetch_checkpoint("hf:org/repo")
    with pytest.raises(DownloadError, match="--offline"):
        fetch_checkpoint("hf:org/repo", offline=True)
    before = set(fetched())
    Hub.files["m-2.safetensors"] = TWO
    Hub.requests = []
    assert (fetch_checkpoint("hf:org/repo") / "m-2.safetensors").read_bytes() == TWO
    assert before == set(SHARDED) - {"m-2.safetensors"}
    assert fetched() == ["m-2.safetensors"]


def test_commits_are_not_mixed(hub):
    Hub.files = {k: v for k, v in Hub.files.items() if k != "m-2.safetensors"}
    with pytest.raises(DownloadError):
        fetch_checkpoint("hf:org/repo")
    Hub.commit, Hub.files = "9" * 40, SHARDED | {"m-1.safetensors": TWO, "m-2.safetensors": ONE}
    folder = fetch_checkpoint("hf:org/repo")
    assert (folder / "m-1.safetensors").read_bytes() == TWO
    assert (folder / "m-2.safetensors").read_bytes() == ONE


def test_checkpoints_are_listed_and_removed(hub, capsys):
    main, other = fetch_checkpoint("hf:org/repo"), fetch_checkpoint("hf:org/repo@v--1")
    nbytes = sum(len(body) for body in SHARDED.values())
    lines = [line for line in command(capsys, "list")[1].splitlines() if "checkpoint" in line]
    assert [line.split()[0] for line in lines] == ["hf:org/repo", "hf:org/repo@v--1"]
    assert lines[0].endswith(f"MB  checkpoint {main}")
    assert {name for name, *_ in catalog.installed()} == set()
    (_, _, size), _ = catalog.checkpoints()
    assert nbytes <= size < nbytes + 2000  # and what it was fetched from
    status, _, said = command(capsys, "rm", "hf:org/repo@v--1")
    assert (status, said) == (0, f"deleted {other}\n")
    assert not other.exists()
    assert [name for name, *_ in catalog.checkpoints()] == ["hf:org/repo"]
    (main / ".complete").unlink()  # an interrupted fetch
    assert catalog.checkpoints() == []
    assert command(capsys, "rm", "hf:org/repo")[0] == 0
    assert not main.exists()
    assert "is not in the cache" in refused(capsys, "rm", "hf:org/repo")
    assert "is not of the form hf:org/repo" in refused(capsys, "rm", "hf:org/../..")


# --- what is refused ------------------------------------------------------------------------------
def test_digests_are_checked(hub):
    Hub.digests = {"m-1.safetensors": hashlib.sha256(ONE).hexdigest()}
    fetch_checkpoint("hf:org/repo")
    Hub.digests = {"m-1.safetensors": hashlib.sha256(TWO).hexdigest()}
    with pytest.raises(DownloadError, match="SHA-256"):
        fetch_checkpoint("hf:org/repo@other")


@pytest.mark.parametrize("file", ["../evil.json", "/etc/passwd", "x/y", "none.safetensors", 3])
def test_an_index_names_files_of_the_repository(hub, file, tmp_path):
    Hub.files = dict(SHARDED)
    Hub.files["model.safetensors.index.json"] = json.dumps({"weight_map": {"a": file}}).encode()
    with pytest.raises(DownloadError, match="which its model"):
        fetch_checkpoint("hf:org/repo")
    assert not list(tmp_path.rglob("evil*"))


def test_listings_that_are_none(hub):
    for commit in ("main", "../x", "", 3):
        Hub.commit = commit  # type: ignore[assignment]
        with pytest.raises(DownloadError, match="names no commit"):
            fetch_checkpoint("hf:org/repo")
    Hub.commit, Hub.files = COMMIT, {"README.md": b""}
    with pytest.raises(ModelFileError, match="hf:org/repo holds no checkpoint"):
        fetch_checkpoint("hf:org/repo")


def test_a_full_disk_is_one_line(hub, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    with pytest.raises(DownloadError, match="MB are needed and 0 MB are free"):
        fetch_checkpoint("hf:org/repo")


# --- HF_TOKEN -------------------------------------------------------------------------------------
def test_the_token_goes_to_hugging_face_alone(hub, monkeypatch):
    Hub.private = True
    with pytest.raises(DownloadError, match=r"private.*HF_TOKEN"):
        fetch_checkpoint("hf:org/repo")
    monkeypatch.setenv("HF_TOKEN", "secret\n")
    Hub.requests = []
    fetch_checkpoint("hf:org/repo")
    assert {token for _, token in Hub.requests} == {"Bearer secret"}
    Hub.requests = []
    Hub.elsewhere = hub.replace("127.0.0.1", "localhost")  # another server
    fetch_checkpoint("hf:org/repo@v2")
    stored = [token for path, token in Hub.requests if path.startswith("/stored/")]
    asked = [token for path, token in Hub.requests if not path.startswith("/stored/")]
    assert set(stored) == {None}
    assert set(asked) == {"Bearer secret"}
    Hub.requests = []
    Hub.elsewhere = hub  # the same server
    fetch_checkpoint("hf:org/repo@v3")
    assert {token for _, token in Hub.requests} == {"Bearer secret"}
    monkeypatch.setenv("HF_ENDPOINT", "https://huggingface.co")
    Hub.requests, Hub.elsewhere = [], None  # a URL that is not Hugging Face's gets none
    with pytest.raises(DownloadError):
        catalog.pull(f"{hub}/m.gguf")
    assert {token for _, token in Hub.requests} == {None}
