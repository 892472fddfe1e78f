"""A checkpoint of Hugging Face: `hf:org/repo` or `hf:org/repo@revision`, into the cache.

Only what is read is fetched: one form of the weights, safetensors before pickles, and the files of
configuration and tokenizer.  All files are of one commit.  A folder is whole once it holds `.complete`;
until then a second call goes on where the first one stopped.
"""

from __future__ import annotations

import fnmatch
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote

from edgellama.catalog import COMPLETE, checkpoint, hugging_face, lock
from edgellama.errors import DownloadError, shown

from .checkpoint import main_file
from .folder import read_json

_SMALL = (
    "config.json", "params.json", "generation_config.json", "quantize_config.json",
    "quant_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "*.tiktoken",
    "chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja", "README.md",
)  # fmt: skip
_COMMIT, _LISTING = ".commit", ".listing.json"


def fetch_checkpoint(source: str, *, offline: bool = False) -> Path:
    """Return the folder of a repository's checkpoint, fetching what is not there.

    Raises: UsageError for an odd name; DownloadError; ModelFileError when it holds no checkpoint.
    """
    repo, revision, folder = checkpoint(source)
    if (folder / COMPLETE).exists():
        return folder
    if offline:
        raise DownloadError(f"{source} is not in the cache, and --offline forbids fetching it")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with lock(folder.with_name(f".{folder.name}.lock")):
            if not (folder / COMPLETE).exists():
                _fetch(folder, repo, revision)
                (folder / COMPLETE).touch()
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise DownloadError(f"{source} could not be put into {folder}: {reason}") from None
    return folder


def _fetch(folder: Path, repo: str, revision: str) -> None:
    from edgellama.fetch import from_url

    commit, digests = _listing(folder, repo, revision)

    def fetch(name: str) -> Path:
        path = folder / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True, mode=0o700)
            url = f"{hugging_face()}/{repo}/resolve/{commit}/{quote(name)}"
            from_url(url, path, digests[name], is_gguf=False)
        return path

    main = main_file(digests, f"hf:{repo}")
    for name in digests:
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in _SMALL):
            fetch(name)
    weights = [main]
    if main.endswith(".index.json"):
        files = read_json(fetch(main)).get("weight_map")
        weights = sorted({str(file) for file in files.values()}) if isinstance(files, dict) else []
    elif main == "consolidated.00.pth":
        weights = fnmatch.filter(sorted(digests), "consolidated.[0-9][0-9].pth")
    for name in weights:
        if name not in digests:
            raise DownloadError(f"hf:{repo} has no {shown(name)}, which its {main} names")
        fetch(name)


def _listing(folder: Path, repo: str, revision: str) -> tuple[str, dict[str, str]]:
    """The commit of a revision, and its files with the SHA-256 of each, as far as it is told."""
    from edgellama.fetch import from_url

    path = folder / _LISTING
    url = f"{hugging_face()}/api/models/{repo}/revision/{revision}?blobs=true"
    from_url(url, path, is_gguf=False)
    listing = read_json(path)
    commit, files = listing.get("sha"), listing.get("siblings")
    if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise DownloadError(f"{url} names no commit, but {shown(commit)}")
    record = folder / _COMMIT
    if not record.exists() or record.read_text("utf-8") != commit:
        for old in folder.iterdir():  # of another commit
            if old.is_dir():
                shutil.rmtree(old)
            elif old != path:
                old.unlink()
        record.write_text(commit, "utf-8")
    return commit, dict(_files(files))


def _files(files: Any) -> list[tuple[str, str]]:
    found = []
    for entry in files if isinstance(files, list) else []:
        name = entry.get("rfilename") if isinstance(entry, dict) else None
        # Files of the top folder, and more templates; a dot in front is ours.
        if isinstance(name, str) and re.fullmatch(
            r"[\w\-][\w.\- ]*|additional_chat_templates/[\w\-][\w.\- ]*\.jinja", name, re.ASCII
        ):
            stored = entry.get("lfs")
            digest = str(stored.get("sha256")) if isinstance(stored, dict) else ""
            found.append((name, digest if re.fullmatch(r"[0-9a-f]{64}", digest) else ""))
    return found
