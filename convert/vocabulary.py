"""The tokenizer of a checkpoint becomes the `tokenizer.*` keys of a GGUF file.

`tokens.py` reads the tokens; here come those that the checkpoint adds, what they mean, and the chat
templates.  The ids that edgellama gives are compared with those of the checkpoint's own tokenizer
(`probes.py`) before anything is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from edgellama.errors import ModelFileError, shown
from edgellama.tokenizer.vocab import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)

from .folder import inside, read_file, read_json
from .probes import compare, ids_of_library, ids_of_sentencepiece, load_library_tokenizer
from .sentencepiece_model import is_sentencepiece
from .tokens import Tokens, read_tokens

_NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token",
          "seperator": "sep_token", "mask": "mask_token"}  # fmt: skip
"""Special tokens by GGUF's name for them (llama.cpp's spelling) and Hugging Face's."""


def read_vocabulary(folder: Path, config: Mapping[str, Any], n_vocab: int) -> dict[str, Any]:
    """Return the `tokenizer.*` metadata of a checkpoint's folder; `n_vocab` rows of embeddings.

    Raises: ModelFileError naming the file and what is wrong; UnsupportedModelError for a tokenizer
    that cannot be carried over.
    """
    settings = read_settings(folder, "tokenizer_config.json")
    defaults = read_settings(folder, "generation_config.json")
    document = read_settings(folder, "tokenizer.json")
    library = load_library_tokenizer(folder / "tokenizer.json", document) if document else None
    tokens = read_tokens(folder, document, library, n_vocab)
    _add_tokens(tokens, document, settings, folder, n_vocab)
    tokens.extend(n_vocab)
    _name_special(tokens, settings, (defaults, config))
    _ask_for_flags(tokens, library, settings)
    metadata = tokens.metadata() | _chat_templates(folder, settings)
    model_file = folder / "tokenizer.model"
    if library is not None:
        compare(metadata, ids_of_library(library))
    elif model_file.is_file() and is_sentencepiece(model_file):
        compare(metadata, ids_of_sentencepiece(model_file))
    return metadata


def read_settings(folder: Path, name: str) -> dict[str, Any]:
    """Return the JSON object in a file of a checkpoint's folder, or an empty one where it is not.

    Raises: ModelFileError for a file that is no JSON object.
    """
    return read_json(inside(folder, name)) if (folder / name).exists() else {}


# --- special tokens and settings ------------------------------------------------------------------
def _added_tokens(
    document: dict[str, Any], settings: dict[str, Any], folder: Path
) -> Iterator[tuple[int, tuple[str, bool]]]:
    """Yield id, text and whether it is special of what stands outside the model's vocabulary."""
    for text, token in read_settings(folder, "added_tokens.json").items():
        if type(token) is not int:
            raise ModelFileError(
                f"added_tokens.json: {shown(text)} has the id {shown(token)}; a number is needed"
            )
        yield token, (text, False)
    decoder = settings.get("added_tokens_decoder") or {}
    for key, entry in decoder.items() if isinstance(decoder, dict) else (("", decoder),):
        content = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(content, str) or not re.fullmatch(r"[0-9]{1,9}", key):
            raise ModelFileError(
                f"tokenizer_config.json: added_tokens_decoder holds {shown(key)}: {shown(entry)}; "
                "ids are needed, and a content for each"
            )
        yield int(key), (content, bool(entry.get("special")))
    for entry in document.get("added_tokens") or ():  # which the library has checked
        yield entry["id"], (entry["content"], bool(entry.get("special")))


def _add_tokens(
    tokens: Tokens, document: dict[str, Any], settings: dict[str, Any], folder: Path, n_vocab: int
) -> None:
    """Put added tokens, as control or user-defined ones; of two files, the later one is right."""
    added = dict(_added_tokens(document, settings, folder))
    for token, (text, special) in sorted(added.items()):
        known = tokens.types[token] if 0 <= token < len(tokens.types) else UNUSED
        if known in (UNKNOWN, CONTROL, BYTE):
            continue
        kind = CONTROL if special or _looks_special(text) else USER_DEFINED
        if tokens.kind == "llama" and kind == USER_DEFINED:
            text = text.replace("\u2581", " ")
        tokens.put(token, text, kind, n_vocab)


def _looks_special(text: str) -> bool:
    """Some checkpoints forget to call them special."""
    framed = (text.startswith("<|") and text.endswith("|>")) or text.startswith("<\uff5c")
    return framed or text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")


def _name_special(
    tokens: Tokens, settings: dict[str, Any], configs: tuple[Mapping[str, Any], ...]
) -> None:
    """Note the ids of special tokens: by their text, else by the id that a configuration gives."""
    ids = {text: i for i, text in reversed(list(enumerate(tokens.texts)))}
    for key, name in _NAMED.items():
        entry = settings.get(name)
        text = entry.get("content") if isinstance(entry, dict) else entry
        if text is not None and not isinstance(text, str):
            raise ModelFileError(
                f"tokenizer_config.json: {name} is {shown(entry)}; a text is needed"
            )
        if text in ids:
            tokens.ids[key] = ids[text]
    ends: list[int] = []
    for config in configs:
        for key, name in (("bos", "bos_token_id"), ("eos", "eos_token_id"),
                          ("padding", "pad_token_id")):  # fmt: skip
            given = [i for i in _integers(config, name) if 0 <= i < len(tokens.texts)]
            if given:
                tokens.ids.setdefault(key, given[0])
            if key == "eos":
                ends += [i for i in given if i not in ends]
    others = [i for i in ends if i != tokens.ids.get("eos")]
    tokens.ids |= dict(zip(("eot", "eom"), others, strict=False))
    for key in ("bos", "eos", "padding", "eot", "eom"):
        token = tokens.ids.get(key)
        if token is not None and tokens.types[token] in (NORMAL, UNUSED, USER_DEFINED):
            tokens.types[token] = CONTROL


def _integers(config: Mapping[str, Any], name: str) -> list[int]:
    """The integer of a setting, or its list of them; -1 and the like mean that there is none."""
    value = config.get(name)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int for i in values):
        raise ModelFileError(f"{name} is {shown(value)}; an id or a list of ids is needed")
    return values


def _ask_for_flags(tokens: Tokens, library: Any, settings: dict[str, Any]) -> None:
    """Find out by trying what the tokenizer adds to a text, and note it where settings say it."""
    for key in ("add_bos_token", "add_eos_token"):
        given = settings.get(key)
        if not isinstance(given, bool | None):
            raise ModelFileError(
                f"tokenizer_config.json: {key} is {shown(given)}; it is true or false"
            )
        if given is not None:
            tokens.flags[key] = given
    if library is None:
        return
    plain = library.encode("a", add_special_tokens=False).ids
    whole = library.encode("a", add_special_tokens=True).ids
    if plain and whole != plain:
        tokens.flags["add_bos_token"] = whole[0] == tokens.ids.get("bos")
        tokens.flags["add_eos_token"] = whole[-1] == tokens.ids.get("eos")
    elif settings.get("add_bos_token") is None:
        tokens.flags["add_bos_token"] = False
    if tokens.kind == "llama" and plain:
        tokens.flags["add_space_prefix"] = tokens.texts[plain[0]].startswith("\u2581")


# --- chat templates and generation defaults -------------------------------------------------------
def _chat_templates(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The default template and others by name: files before settings, as Hugging Face has it."""
    given = settings.get("chat_template")
    if given is None:
        given = read_settings(folder, "chat_template.json").get("chat_template")
    listed = given if isinstance(given, list) else [{"name": "default", "template": given}]
    templates: dict[str, str] = {}
    for entry in listed if given is not None else ():
        name, text = (
            (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, entry)
        )
        if not isinstance(name, str) or not isinstance(text, str):
            raise ModelFileError(
                f"the chat template {shown(name)} is {shown(text)}; a text is needed, or a list of "
                "texts with names"
            )
        templates[name] = text
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = _text_of(inside(folder, "chat_template.jinja"))
    more = folder / "additional_chat_templates"
    for path in sorted(more.glob("*.jinja")):
        templates[path.stem] = _text_of(inside(more, path.name))
    plain = {re.sub("[^A-Za-z0-9]", "_", name): text for name, text in templates.items()}
    default = plain.pop("default", None)
    out: dict[str, Any] = {} if default is None else {"tokenizer.chat_template": default}
    out |= {f"tokenizer.chat_template.{name}": text for name, text in plain.items()}
    return out | ({"tokenizer.chat_templates": list(plain)} if plain else {})


def _text_of(path: Path) -> str:
    try:
        return read_file(path).decode()
    except UnicodeDecodeError:
        raise ModelFileError(f"{path} is not UTF-8; fetch it again") from None


def sampling_defaults(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The generation defaults of a checkpoint, as GGUF's `general.sampling.*` keys.

    Raises: ModelFileError for what is no number.
    """
    names: tuple[tuple[str, str, type], ...] = (
        ("temperature", "temp", float), ("top_k", "top_k", int), ("top_p", "top_p", float),
        ("min_p", "min_p", float), ("repetition_penalty", "penalty_repeat", float),
    )  # fmt: skip
    out = {}
    for name, ours, kind in names:
        value = defaults.get(name)
        if value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not isfinite(value) or abs(value) >= 1 << 31:
            raise ModelFileError(
                f"generation_config.json: {name} is {shown(value)}; a number is needed"
            )
        out[f"general.sampling.{ours}"] = kind(value)
    return out
