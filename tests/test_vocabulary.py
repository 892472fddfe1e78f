"""Tokenizers of checkpoints become GGUF metadata, and give the same ids."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from make_tokenizer import TEXT, byte_level

from edgellama.convert.probes import PROBES
from edgellama.convert.tiktoken import read_tiktoken
from edgellama.convert.vocabulary import read_vocabulary, sampling_defaults
from edgellama.errors import ModelFileError, UnsupportedModelError
from edgellama.tokenizer import load_tokenizer
from edgellama.tokenizer.bpe import byte_of_character
from edgellama.tokenizer.pre import PRE_TOKENIZERS

tokenizers = pytest.importorskip("tokenizers")
STORIES = Path(__file__).parents[2] / "shared" / "data" / "tiny_models" / "stories260K"


@pytest.mark.parametrize("name", ["gpt-2", "starcoder", "llama3", "dbrx", "qwen2"])
def test_byte_level_bpe(tmp_path, name):
    folder = byte_level(tmp_path, name)
    metadata = read_vocabulary(folder, {}, 512)
    assert PRE_TOKENIZERS[metadata["tokenizer.ggml.pre"]] == PRE_TOKENIZERS[name]
    ours = load_tokenizer(metadata)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in [*PROBES, "something else 12345, isn't it?"]:
        assert ours.encode(text, add_special=False) == theirs.encode(text).ids
    assert len(metadata["tokenizer.ggml.tokens"]) == 512
    assert metadata["tokenizer.ggml.token_type"][-1] == 5  # a row of the embedding without a text
    assert metadata["tokenizer.ggml.bos_token_id"] == 0
    assert metadata["tokenizer.ggml.eos_token_id"] == 1
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert ours.encode("<plain>", add_special=False) == [400]  # user-defined: always one token


def test_a_text_that_begins_with_bos(tmp_path):
    metadata = read_vocabulary(byte_level(tmp_path, "llama3", bos=True), {}, 401)
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert load_tokenizer(metadata).encode("x")[0] == 0


def test_a_pattern_that_is_not_known(tmp_path):
    folder = byte_level(tmp_path, "gpt-2")
    document = json.loads((folder / "tokenizer.json").read_text())
    document["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "[aeiou]"}, "behavior": "Isolated",
             "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": False},
        ],
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(UnsupportedModelError, match="cuts text as no known pre-tokenizer does"):
        read_vocabulary(folder, {}, 512)


def sentencepiece(folder: Path, **options) -> Path:
    """A small trained sentencepiece model."""
    library = pytest.importorskip("sentencepiece")
    (folder / "text").write_text("\n".join(TEXT * 3), "utf-8")
    library.SentencePieceTrainer.Train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"),
        vocab_size=600, model_type="bpe", byte_fallback=True, character_coverage=0.99,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2, **options,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(tmp_path, prefix):
    library = pytest.importorskip("sentencepiece")
    folder = sentencepiece(
        tmp_path, add_dummy_prefix=prefix, user_defined_symbols=["<tool>"], control_symbols=["<c>"]
    )
    metadata = read_vocabulary(folder, {}, 640)
    assert metadata["tokenizer.ggml.add_space_prefix"] is prefix
    types = metadata["tokenizer.ggml.token_type"]
    by_text = {text: i for i, text in enumerate(metadata["tokenizer.ggml.tokens"])}
    kinds = [types[by_text[t]] for t in ("<unk>", "<s>", "<tool>", "<c>", "<0x0A>", "[PAD600]")]
    assert kinds == [2, 3, 4, 3, 6, 5]
    processor = library.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ours = load_tokenizer(metadata)
    for text in PROBES:
        assert ours.encode(text, add_special=False) == processor.EncodeAsIds(text)


def test_damaged_sentencepiece(tmp_path):
    folder = sentencepiece(tmp_path)
    model = folder / "tokenizer.model"
    whole = model.read_bytes()
    for cut in (5, 100, len(whole) // 2):
        model.write_bytes(whole[:cut])
        with pytest.raises(ModelFileError, match="damaged or no sentencepiece model"):
            read_vocabulary(folder, {}, 640)
    model.write_bytes(b"\x0a" + b"\xff" * 40)
    with pytest.raises(ModelFileError, match="damaged or no sentencepiece model"):
        read_vocabulary(folder, {}, 640)
    model.write_bytes(b"not base64\n")
    with pytest.raises(ModelFileError, match="line 1 holds no token in base64 and rank"):
        read_vocabulary(folder, {}, 640)


def test_sentencepiece_in_a_tokenizer_json(tmp_path):
    """Merges stand in for scores: the same ids as from the model file itself."""
    folder = sentencepiece(tmp_path)
    wanted = read_vocabulary(folder, {}, 600)
    tokens, scores = wanted["tokenizer.ggml.tokens"], wanted["tokenizer.ggml.scores"]
    ids = {text: i for i, text in enumerate(tokens)}
    merges = [
        (-scores[ids[text]], text[:cut], text[cut:])
        for text in tokens[259:] for cut in range(1, len(text))
        if text[:cut] in ids and text[cut:] in ids
    ]  # fmt: skip
    model = tokenizers.models.BPE(
        ids, [(a, b) for _, a, b in sorted(merges)], unk_token="<unk>", fuse_unk=True,
        byte_fallback=True,
    )  # fmt: skip
    tokenizer = tokenizers.Tokenizer(model)
    normalizers = tokenizers.normalizers
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    both = read_vocabulary(folder, {}, 600)
    assert wanted["tokenizer.ggml.add_bos_token"] is True
    assert both["tokenizer.ggml.add_bos_token"] is False  # tokenizer.json knows better
    (folder / "tokenizer.model").unlink()
    metadata = read_vocabulary(folder, {"bos_token_id": 1, "eos_token_id": [2, 0]}, 600)
    assert metadata["tokenizer.ggml.tokens"] == tokens
    assert (metadata["tokenizer.ggml.token_type"] == wanted["tokenizer.ggml.token_type"]).all()
    assert metadata["tokenizer.ggml.add_space_prefix"] is True
    assert metadata["tokenizer.ggml.eos_token_id"] == 2


def test_tiktoken(tmp_path):
    folder = byte_level(tmp_path, "dbrx")
    document = json.loads((folder / "tokenizer.json").read_text())
    table = byte_of_character()
    texts = [bytes(table[c] for c in t) for t in document["model"]["vocab"] if t[0] != "<"]
    order = {bytes([b]): b for b in range(256)}
    order |= {t: i for i, t in enumerate((t for t in texts if len(t) > 1), 256)}
    lines = [f"{base64.b64encode(t).decode()} {rank}" for t, rank in order.items()]
    path = tmp_path / "tokenizer.model"
    path.write_text("\n".join(lines))
    ranks = read_tiktoken(path)
    assert len(ranks.tokens) == len(order)
    pairs = [m if isinstance(m, str) else " ".join(m) for m in document["model"]["merges"]]
    assert ranks.merges == pairs
    assert ranks.special[len(order)] == "<|begin_of_text|>"
    (folder / "tokenizer.json").rename(folder / "aside")  # a folder of Meta has none
    (folder / "tokenizer_config.json").unlink()
    metadata = read_vocabulary(folder, {}, len(order) + 256)
    ours = load_tokenizer(metadata)
    assert ours.encode("it") == [len(order), *ours.encode("it", add_special=False)]
    assert {len(order) + 1, len(order) + 9} <= set(ours.eog_ids)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(document))
    shift = {text: i for i, text in enumerate(metadata["tokenizer.ggml.tokens"])}
    for text in PROBES:
        expected = [shift[t] for t in theirs.encode(text, add_special_tokens=False).tokens]
        assert ours.encode(text, add_special=False) == expected
    path.write_text("\n".join(lines[:-1]) + "\nAAAA 9999")
    with pytest.raises(ModelFileError, match="the ranks are not 0 to"):
        read_tiktoken(path)
    path.write_text("\n".join(lines) + f"\n{base64.b64encode(b'x' * 5000).decode()} {len(order)}")
    with pytest.raises(ModelFileError, match="has 5000 bytes; 1 to 1024 are read"):
        read_tiktoken(path)


def test_templates_and_defaults(tmp_path):
    named = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    metadata = read_vocabulary(byte_level(tmp_path, "gpt-2", chat_template=named), {}, 401)
    assert metadata["tokenizer.chat_template"] == "A"
    assert metadata["tokenizer.chat_template.tool_use"] == "B"
    (tmp_path / "chat_template.jinja").write_text("C")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag-1.jinja").write_text("D")
    metadata = read_vocabulary(tmp_path, {}, 401)
    assert metadata["tokenizer.chat_template"] == "C"
    assert metadata["tokenizer.chat_template.rag_1"] == "D"
    assert metadata["tokenizer.chat_templates"] == ["tool_use", "rag_1"]
    given = {"temperature": 0.6, "top_k": 20, "do_sample": True, "top_p": None}
    assert sampling_defaults(given) == {"general.sampling.temp": 0.6, "general.sampling.top_k": 20}


def test_bad_folders(tmp_path):
    with pytest.raises(ModelFileError, match=r"no tokenizer\.json and no tokenizer\.model"):
        read_vocabulary(tmp_path, {}, 10)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelFileError, match="is not sound JSON"):
        read_vocabulary(tmp_path, {}, 10)
    word_piece = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    word_piece.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedModelError, match="of type 'WordPiece'; BPE is needed"):
        read_vocabulary(tmp_path, {}, 10)
    byte_level(tmp_path, "gpt-2")
    with pytest.raises(ModelFileError, match="the model has 300 rows of embeddings"):
        read_vocabulary(tmp_path, {}, 300)


@pytest.mark.skipif(not STORIES.exists(), reason="needs ../shared/data/tiny_models")
def test_a_published_model():
    from edgellama.gguf import open_gguf

    metadata = read_vocabulary(STORIES / "hf", {}, 512)
    with open_gguf(STORIES / "stories260K.f32.gguf") as gguf:
        for key, value in metadata.items():
            if key in gguf.metadata and isinstance(value, list | np.ndarray):
                assert list(value) == list(gguf.metadata[key]), key
