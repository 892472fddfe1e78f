"""The tokenizer of a checkpoint becomes the `tokenizer.*` keys of a GGUF file.

Read are `tokenizer.json` (byte-level BPE, or BPE over characters with byte fallback), sentencepiece's
`tokenizer.model`, and tiktoken's list of ranks.  What comes out is tried on a text of many kinds before
it is written: the ids of edgellama's tokenizer must be those of the checkpoint's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgellama.errors import ModelFileError, UnsupportedModelError, shown
from edgellama.tokenizer import load_tokenizer
from edgellama.tokenizer.pre import PRE_TOKENIZERS, PreTokenizer
from edgellama.tokenizer.vocab import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

from .folder import inside, read_json
from .sentencepiece_model import read_sentencepiece
from .tiktoken import read_tiktoken

_PREFIX = "tokenizer.ggml."
_NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token",
          "seperator": "sep_token", "mask": "mask_token"}  # fmt: skip
PROBES = (
    "Hello world", " Hello  World!\n\nI'm here; we'll see, they've gone. IT'S 'quoted'",
    "1 12 123 1234 12345 3.14159 1,000,000 x2y3", "def f(x):\n\treturn x**2  # done\r\n\r\n  end",
    "   leading and trailing   ", "\n\n\n\t\t  \n mixed \t white\n space ", "äöü ÀÉÎ ñ ß œ Ǆ ﬁ",
    "你好，世界！今天天气很好。", "こんにちは世界 カタカナ", "안녕하세요 세계", "Привет, мир! Ёлка",
    "مرحبا بالعالم", "नमस्ते दुनिया", "👍🏽 🇫🇷 👨‍👩‍👧 ✓ → ∞", "http://a.b/c?d=e&f=g#h user@example.com",
    "<tag attr='v'>text</tag> {\"k\": [1, null]}", "a" * 40, "?!?! ... --- *** ___ $5.00 50% #1",
    "HTTPServer iPhone camelCase snake_case SCREAMING", "e\u0301 \u00a0nbsp \u200bzero\ufeff",
)  # fmt: skip
"""Texts on which two tokenizers are compared: scripts, cases, digits, white space, symbols."""


@dataclass
class _Vocabulary:
    """What the kinds of files have in common."""

    kind: str  # tokenizer.ggml.model
    tokens: list[str]
    types: np.ndarray
    scores: np.ndarray | None = None
    merges: list[str] = field(default_factory=list)
    pre: str = "default"
    flags: dict[str, bool] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)  # of special tokens, by GGUF's name for them

    def put(self, token: int, text: str, kind: int, n_most: int) -> None:
        """Set a token that the checkpoint adds to the model's vocabulary."""
        if not 0 <= token < n_most:
            raise ModelFileError(
                f"the token {shown(text)} has id {token}; the model has {n_most} rows of embeddings"
            )
        self.extend(token + 1)
        self.tokens[token] = text
        self.types[token] = kind

    def extend(self, n: int) -> None:
        """Fill up with tokens that no text gives."""
        old = len(self.tokens)
        self.tokens += [f"[PAD{i}]" for i in range(old, n)]
        more = n - old
        if more > 0:
            self.types = np.append(self.types, np.full(more, UNUSED, np.int32))
            if self.scores is not None:
                self.scores = np.append(self.scores, np.full(more, -1e4, np.float32))

    def metadata(self) -> dict[str, Any]:
        """The keys of the file."""
        out: dict[str, Any] = {_PREFIX + "model": self.kind, _PREFIX + "pre": self.pre}
        out[_PREFIX + "tokens"] = self.tokens
        if self.scores is not None:
            out[_PREFIX + "scores"] = self.scores.astype(np.float32)
        out[_PREFIX + "token_type"] = self.types.astype(np.int32)
        if self.merges:
            out[_PREFIX + "merges"] = self.merges
        out |= {f"{_PREFIX}{key}_token_id": token for key, token in self.ids.items()}
        return out | {_PREFIX + key: value for key, value in self.flags.items()}


def read_vocabulary(folder: Path, config: dict[str, Any], n_vocab: int) -> dict[str, Any]:
    """Return the `tokenizer.*` metadata of a checkpoint's folder; `n_vocab` rows of embeddings.

    Raises: ModelFileError naming the file and what is wrong; UnsupportedModelError for a tokenizer
    that cannot be carried over.
    """
    settings = read_settings(folder, "tokenizer_config.json")
    defaults = read_settings(folder, "generation_config.json")
    document = read_settings(folder, "tokenizer.json")
    model_file = folder / "tokenizer.model"
    if document and _is_byte_level(document):
        vocabulary = _from_byte_level(document, n_vocab)
    elif model_file.is_file():
        vocabulary = _from_model_file(model_file, n_vocab)
    elif document:
        vocabulary = _from_fallback_bpe(document, n_vocab)
    elif (old := folder / "tok512.bin").is_file() or (old := folder / "tokenizer.bin").is_file():
        vocabulary = _from_llama2c(old, n_vocab)
    else:
        raise ModelFileError(
            f"{folder} has no tokenizer.json and no tokenizer.model; put the model's own beside it"
        )
    _add_tokens(vocabulary, document, settings, folder, n_vocab)
    vocabulary.extend(n_vocab)
    _name_special(vocabulary, config, settings, defaults)
    _ask_for_flags(vocabulary, document, settings)
    metadata = vocabulary.metadata() | _chat_template(folder, settings)
    _compare(metadata, document, model_file)
    return metadata


def read_settings(folder: Path, name: str) -> dict[str, Any]:
    """Return the JSON object in a file of a checkpoint's folder, or an empty one where it is not.

    Raises: ModelFileError for a file that is no JSON object.
    """
    return read_json(inside(folder, name)) if (folder / name).exists() else {}


# --- the kinds of files ---------------------------------------------------------------------------
def _parts_of(node: Any) -> Iterable[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder, and what it is made of."""
    if isinstance(node, dict):
        yield node
        for key in ("normalizers", "pretokenizers", "decoders", "processors"):
            for part in node.get(key) or ():
                yield from _parts_of(part)


def _is_byte_level(document: dict[str, Any]) -> bool:
    nodes = (document.get("pre_tokenizer"), document.get("decoder"))
    return any(part.get("type") == "ByteLevel" for node in nodes for part in _parts_of(node))


def _bpe(document: dict[str, Any]) -> tuple[dict[str, int], list[str]]:
    """Return vocabulary and merges of a tokenizer.json."""
    model = document.get("model")
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    if not isinstance(model, dict) or kind != "BPE":
        raise UnsupportedModelError(f"tokenizer.json holds a model of type {kind}; BPE is needed")
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise ModelFileError("tokenizer.json: model.vocab or model.merges is missing")
    if not all(isinstance(i, int) and i >= 0 for i in vocab.values()):
        raise ModelFileError("tokenizer.json: model.vocab holds an id that is no number")
    joined = [" ".join(merge) if isinstance(merge, list) else merge for merge in merges]
    return vocab, joined


def _listed(vocab: dict[str, int], n_most: int) -> list[str]:
    """Tokens in the order of their ids; a gap is filled."""
    n = max(vocab.values(), default=-1) + 1
    if n > n_most:
        raise ModelFileError(
            f"tokenizer.json has tokens up to id {n - 1}; the model has {n_most} rows of embeddings"
        )
    tokens = [f"[PAD{i}]" for i in range(n)]
    for text, token in vocab.items():
        tokens[token] = text
    return tokens


def _from_byte_level(document: dict[str, Any], n_vocab: int) -> _Vocabulary:
    vocab, merges = _bpe(document)
    tokens = _listed(vocab, n_vocab)
    types = np.full(len(tokens), UNUSED, np.int32)
    types[list(vocab.values())] = NORMAL
    ignore_merges = bool(document["model"].get("ignore_merges", False))
    pre = _find_pre_tokenizer(document, ignore_merges)
    return _Vocabulary("gpt2", tokens, types, merges=merges, pre=pre)


def _from_model_file(path: Path, n_vocab: int) -> _Vocabulary:
    if not _is_sentencepiece(path):
        ranks = read_tiktoken(path)
        types = np.full(len(ranks.tokens), NORMAL, np.int32)
        out = _Vocabulary("gpt2", ranks.tokens, types, merges=ranks.merges, pre="llama-bpe")
        for token, text in ranks.special.items():
            out.put(token, text, CONTROL, n_vocab)
        return out
    model = read_sentencepiece(path)
    if len(model.pieces) > n_vocab:
        raise ModelFileError(
            f"{path} has {len(model.pieces)} pieces; the model has {n_vocab} rows of embeddings"
        )
    flags = {
        "add_space_prefix": model.add_dummy_prefix,
        "remove_extra_whitespaces": model.remove_extra_whitespaces,
        "add_bos_token": True,
    }
    ids = {"bos": model.bos_id, "eos": model.eos_id, "unknown": model.unk_id}
    return _Vocabulary(
        "llama",
        [piece.text for piece in model.pieces],
        np.array([piece.kind for piece in model.pieces], np.int32),
        np.array([piece.score for piece in model.pieces], np.float32),
        flags=flags,
        ids={key: token for key, token in ids.items() if token >= 0},
    )


def _is_sentencepiece(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(1) == b"\x0a"  # field 1, a message: the first piece


def _from_fallback_bpe(document: dict[str, Any], n_vocab: int) -> _Vocabulary:
    """BPE over characters with byte tokens: a sentencepiece model in other clothes.

    A merge's rank becomes the score of what it makes, for that is how its converters ranked them.
    """
    vocab, merges = _bpe(document)
    if not document["model"].get("byte_fallback"):
        raise UnsupportedModelError("tokenizer.json is BPE without byte level and byte_fallback")
    tokens = _listed(vocab, n_vocab)
    types = np.full(len(tokens), UNUSED, np.int32)
    types[list(vocab.values())] = NORMAL
    scores = np.full(len(tokens), -1e4, np.float32)
    for rank, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        token = vocab.get(left + right)
        if token is not None and scores[token] == -1e4:
            scores[token] = -rank
    for byte in range(256):
        token = vocab.get(f"<0x{byte:02X}>")
        if token is not None:
            types[token] = BYTE
    unknown = document["model"].get("unk_token")
    if unknown in vocab:
        types[vocab[unknown]] = UNKNOWN
    return _Vocabulary("llama", tokens, types, scores)


def _from_llama2c(path: Path, n_vocab: int) -> _Vocabulary:
    """llama2.c's tokenizer.bin: the longest token's length, then score, length and text of each."""
    data = path.read_bytes()
    tokens: list[str] = []
    scores: list[float] = []
    at = 4
    while at < len(data) and len(tokens) < n_vocab:
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if at + 8 + size > len(data):
            raise ModelFileError(f"{path} is cut off at byte {at}; fetch it again")
        scores.append(float(np.frombuffer(data, "<f4", 1, at)[0]))
        tokens.append(data[at + 8 : at + 8 + size].decode("utf-8", "replace"))
        at += 8 + size
    if len(tokens) < n_vocab:
        raise ModelFileError(f"{path} has {len(tokens)} tokens; the model has {n_vocab}")
    # The exporter wrote U+2581 as a space and framed the two special tokens in newlines.
    tokens = [text.replace(" ", "\u2581") for text in tokens]
    tokens[:3] = ["<unk>", "<s>", "</s>"]
    types = np.full(len(tokens), NORMAL, np.int32)
    types[:3] = UNKNOWN, CONTROL, CONTROL
    types[3:259] = BYTE
    flags = {"add_space_prefix": True, "add_bos_token": True}
    ids = {"unknown": 0, "bos": 1, "eos": 2}
    return _Vocabulary("llama", tokens, types, np.array(scores, np.float32), flags=flags, ids=ids)


# --- special tokens and settings ------------------------------------------------------------------
def _add_tokens(
    vocabulary: _Vocabulary, document: dict[str, Any], settings: dict[str, Any], folder: Path,
    n_vocab: int,
) -> None:  # fmt: skip
    """Put the tokens that stand outside the model's vocabulary, as control or user-defined ones."""
    added: dict[int, tuple[str, bool]] = {}
    for text, token in read_settings(folder, "added_tokens.json").items():
        added[token] = (text, False)
    for key, entry in (settings.get("added_tokens_decoder") or {}).items():
        added[int(key)] = (entry["content"], bool(entry.get("special")))
    for entry in document.get("added_tokens") or ():
        added[entry["id"]] = (entry["content"], bool(entry.get("special")))
    for token, (text, special) in sorted(added.items()):
        known = token < len(vocabulary.types) and vocabulary.types[token]
        if known in (UNKNOWN, CONTROL, BYTE):
            continue
        kind = CONTROL if special or _looks_special(text) else USER_DEFINED
        if vocabulary.kind == "gpt2" or kind == CONTROL:
            vocabulary.put(token, text, kind, n_vocab)
        else:
            vocabulary.put(token, text.replace("\u2581", " "), kind, n_vocab)


def _looks_special(text: str) -> bool:
    """Some checkpoints forget to call them special."""
    framed = (text.startswith("<|") and text.endswith("|>")) or text.startswith("<\uff5c")
    return framed or text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")


def _name_special(
    vocabulary: _Vocabulary, config: dict[str, Any], settings: dict[str, Any],
    defaults: dict[str, Any],
) -> None:  # fmt: skip
    ids = {text: i for i, text in reversed(list(enumerate(vocabulary.tokens)))}
    for key, name in _NAMED.items():
        entry = settings.get(name)
        text = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(text, str) and text in ids:
            vocabulary.ids[key] = ids[text]
    ends: list[int] = []
    for source in (defaults, config):
        for key, name in (("bos", "bos_token_id"), ("eos", "eos_token_id"),
                          ("padding", "pad_token_id")):  # fmt: skip
            value = source.get(name)
            known = range(len(vocabulary.tokens))
            wanted = value if isinstance(value, list) else [value]
            given = [i for i in wanted if isinstance(i, int) and i in known]
            if given:
                vocabulary.ids.setdefault(key, given[0])
            if key == "eos":
                ends += [i for i in given if i not in ends]
    others = [i for i in ends if i != vocabulary.ids.get("eos")]
    vocabulary.ids |= dict(zip(("eot", "eom"), others, strict=False))
    for key in ("bos", "eos", "padding", "eot", "eom"):
        token = vocabulary.ids.get(key)
        if token is not None and vocabulary.types[token] in (NORMAL, UNUSED, USER_DEFINED):
            vocabulary.types[token] = CONTROL


def _ask_for_flags(
    vocabulary: _Vocabulary, document: dict[str, Any], settings: dict[str, Any]
) -> None:
    """Find out by trying what the tokenizer adds to a text, and note it where settings say it."""
    for key in ("add_bos_token", "add_eos_token"):
        if isinstance(settings.get(key), bool):
            vocabulary.flags[key] = settings[key]
    if not document:
        return
    tokenizer = _library_tokenizer(document)
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    if plain and whole != plain:
        vocabulary.flags["add_bos_token"] = whole[0] == vocabulary.ids.get("bos")
        vocabulary.flags["add_eos_token"] = whole[-1] == vocabulary.ids.get("eos")
    elif "add_bos_token" not in settings:
        vocabulary.flags["add_bos_token"] = False
    if vocabulary.kind == "llama" and plain:
        vocabulary.flags["add_space_prefix"] = vocabulary.tokens[plain[0]].startswith("\u2581")


def _chat_template(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The chat templates: the default one, and others by name."""
    file = folder / "chat_template.jinja"
    given = file.read_text("utf-8") if file.is_file() else settings.get("chat_template")
    if isinstance(given, str):
        return {"tokenizer.chat_template": given}
    out: dict[str, Any] = {}
    for entry in given if isinstance(given, list) else ():
        name, template = entry.get("name"), entry.get("template")
        if not isinstance(name, str) or not isinstance(template, str):
            raise ModelFileError("tokenizer_config.json: chat_template has an entry without a name")
        out["tokenizer.chat_template" + ("" if name == "default" else f".{name}")] = template
    return out


# --- comparison with the checkpoint's own tokenizer -----------------------------------------------
def _library_tokenizer(document: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(json.dumps(document))
    except Exception as error:  # the library has no type of its own
        raise ModelFileError(f"tokenizer.json cannot be used: {error}") from None


def _find_pre_tokenizer(document: dict[str, Any], ignore_merges: bool) -> str:
    """Return the name of the pre-tokenizer that cuts the probes as this one does."""
    from tokenizers import pre_tokenizers

    wanted = _library_tokenizer(document).pre_tokenizer
    if wanted is None:
        raise UnsupportedModelError("tokenizer.json has no pre_tokenizer; none is known that fits")
    expected = [_pieces(wanted, text) for text in PROBES]
    seen: list[PreTokenizer] = []
    best, fewest = "", len(PROBES) + 1
    for name, kind in PRE_TOKENIZERS.items():
        if kind.raw or kind in seen or kind.ignore_merges != ignore_merges:
            continue
        seen.append(kind)
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        cutter = pre_tokenizers.Sequence([kind.cutter(), bytes_])
        wrong = sum(_pieces(cutter, t) != e for t, e in zip(PROBES, expected, strict=True))
        if wrong < fewest:
            best, fewest = name, wrong
        if not wrong:
            break
    if fewest:
        raise UnsupportedModelError(
            f"tokenizer.json cuts text as no known pre-tokenizer does; the nearest, {best}, cuts "
            f"{fewest} of {len(PROBES)} probes otherwise"
        )
    return best


def _pieces(cutter: Any, text: str) -> list[str]:
    return [piece for piece, _ in cutter.pre_tokenize_str(text)]


def _compare(metadata: dict[str, Any], document: dict[str, Any], model_file: Path) -> None:
    """Raise: UnsupportedModelError where the ids differ from those of the checkpoint's tokenizer."""
    reference = _reference(document, model_file)
    if reference is None:
        return
    ours = load_tokenizer(metadata)
    for text in PROBES:
        expected, got = list(reference(text)), ours.encode(text, add_special=False)
        if got != expected:
            at = next(
                (
                    i
                    for i, pair in enumerate(zip(got, expected, strict=False))
                    if pair[0] != pair[1]
                ),
                min(len(got), len(expected)),
            )
            raise UnsupportedModelError(
                f"the tokenizer cannot be carried over: for {shown(text)} it gives "
                f"{expected[at : at + 4]} at token {at} where the GGUF's gives {got[at : at + 4]}"
            )


def _reference(document: dict[str, Any], model_file: Path) -> Any:
    """The checkpoint's own way from text to ids."""
    if document:
        tokenizer = _library_tokenizer(document)
        return lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    if model_file.is_file() and _is_sentencepiece(model_file):
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor()
        processor.Load(str(model_file))
        return lambda text: processor.EncodeAsIds(text)
    return None


def sampling_defaults(defaults: dict[str, Any]) -> dict[str, Any]:
    """The generation defaults of a checkpoint, as GGUF's `general.sampling.*` keys."""
    names: Sequence[tuple[str, str, type]] = (
        ("temperature", "temp", float), ("top_k", "top_k", int), ("top_p", "top_p", float),
        ("min_p", "min_p", float), ("repetition_penalty", "penalty_repeat", float),
    )  # fmt: skip
    return {
        f"general.sampling.{ours}": kind(defaults[name])
        for name, ours, kind in names
        if isinstance(defaults.get(name), int | float) and not isinstance(defaults[name], bool)
    }
