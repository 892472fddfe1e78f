"""Every family: a checkpoint is planned, written and run, and compared with its papers in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from checkpoints import CONFIGS, config_of, make_checkpoint, random_weights, write_gguf
from naive_hf import NaiveCheckpoint

from edgellama.convert.families import Plan, PlannedTensor, plan
from edgellama.convert.families.meta import translated
from edgellama.errors import ModelFileError, UnsupportedModelError
from edgellama.gguf import open_gguf
from edgellama.models.config import read_config
from edgellama.runtime.engine import Engine

IDS = [int(i) for i in np.random.default_rng(3).integers(0, 256, 100)]


def open_engine(path, **options) -> Engine:
    defaults: dict[str, Any] = {"n_ctx": 1024, "n_threads": 2, "kv_type": "f32"}
    with open_gguf(path) as gguf:
        return Engine(gguf, read_config(gguf), **defaults | options)


def plan_of(family: str, **changes) -> Plan:
    """The plan of a family whose configuration has `changes`."""
    config = config_of(family)
    return plan(make_checkpoint(config | changes, random_weights(config)))


def logits_of(path, ids=IDS, **options) -> np.ndarray:
    engine = open_engine(path, **options)
    logits = engine.logits(ids)
    engine.close()
    return logits


# --- what a family computes -----------------------------------------------------------------------
@pytest.mark.parametrize("family", CONFIGS)
def test_family_matches_its_papers(family, tmp_path):
    logits = logits_of(write_gguf(tmp_path / "m.gguf", plan_of(family)))
    config = config_of(family)
    expected = NaiveCheckpoint(config, random_weights(config)).logits(IDS)
    assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("family", ["phi3-long", "phi4-mini"])
def test_short_divisors_where_the_context_is_not_extended(family, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", plan_of(family))
    config = config_of(family)
    expected = NaiveCheckpoint(config, random_weights(config)).logits(IDS[:64])
    short = logits_of(path, IDS[:64], n_ctx=64)
    assert np.abs(short - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.abs(logits_of(path, IDS[:64], n_ctx=65) - expected).max() > 1e-2


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gemma2", {"attn_logit_softcapping": 1e5}), ("gemma2", {"final_logit_softcapping": 1e5}),
        ("gemma2", {"sliding_window": 1024}), ("gemma3", {"rope_local_base_freq": 1e6}),
        ("mistral", {"sliding_window": None}), ("phi3", {"sliding_window": None}),
        ("granite", {"attention_multiplier": None}), ("olmo3", {"layer_types": ["full_attention"] * 5}),
        ("granite", {"residual_multiplier": None}), ("granite", {"embedding_multiplier": None}),
        ("granite", {"logits_scaling": None}), ("stablelm", {"partial_rotary_factor": 0.5}),
        ("llama-3.1", {"rope_scaling": None}), ("olmo3", {"rope_scaling": None}),
        ("gemma2-scale", {"query_pre_attn_scalar": None}), ("gemma", {"rms_norm_eps": 0.1}),
    ],
)  # fmt: skip
def test_every_hyper_parameter_is_heard(family, change, tmp_path):
    """A change of it moves logits by more than what the comparison with the papers lets pass."""
    logits = logits_of(write_gguf(tmp_path / "a.gguf", plan_of(family)))
    others = logits_of(write_gguf(tmp_path / "b.gguf", plan_of(family, **change)))
    assert np.abs(logits - others).max() > 1e-3 * np.abs(logits).max()


CUT = [
    "gemma2",
    "gemma3",
    "granite",
    "mistral",
    "olmo3",
    "phi3",
    "qwen3",
    "smollm3",
    "stablelm-12b",
]


@pytest.mark.parametrize("family", CUT)
def test_results_do_not_depend_on_the_cut(family, tmp_path):
    """Bit-identical beyond the window: chunks, threads, fusion."""
    path = write_gguf(tmp_path / "m.gguf", plan_of(family), "Q8_0")
    logits = logits_of(path, kv_type="f16")
    assert np.array_equal(logits_of(path, kv_type="f16", n_threads=1, n_batch=7), logits)
    assert np.array_equal(logits_of(path, kv_type="f16", fuse=False), logits)
    engine = open_engine(path, kv_type="f16")
    sequence = engine.new_sequence()
    rows = np.array([engine.evaluate(sequence, [i]) for i in IDS])
    assert np.array_equal(rows, logits)
    engine.close()


@pytest.mark.parametrize("kind", ["F16", "Q4_0", "Q8_0"])
def test_stacked_projections_are_their_parts(kind, tmp_path):
    whole = plan_of("phi3")
    tensors = []
    for tensor in whole.tensors:
        parts = {"attn_qkv": ("attn_q", "attn_k", "attn_v"), "ffn_up": ("ffn_gate", "ffn_up")}
        layer, _, name = tensor.name.rpartition(".weight")[0].rpartition(".")
        names = parts.get(name, (name,))
        n = tensor.shape[0] // len(names)
        for i, part in enumerate(names):
            shape = (n, *tensor.shape[1:])
            read = lambda start, stop, at=i * n, read=tensor.read: read(at + start, at + stop)  # noqa: E731
            tensors.append(
                PlannedTensor(f"{layer}.{part}.weight".lstrip("."), shape, tensor.sources, read)
            )
    write_gguf(tmp_path / "whole.gguf", whole, kind)
    write_gguf(tmp_path / "parts.gguf", whole._replace(tensors=tensors), kind)
    assert np.array_equal(logits_of(tmp_path / "whole.gguf"), logits_of(tmp_path / "parts.gguf"))


# --- what a plan reads ----------------------------------------------------------------------------
@pytest.mark.parametrize("family", CONFIGS)
def test_rows_are_the_same_however_they_are_read(family):
    config = config_of(family)
    checkpoint = make_checkpoint(config, random_weights(config))
    for tensor in plan(checkpoint).tensors:
        n = tensor.shape[0]
        whole = tensor.read(0, n)
        assert whole.shape == tensor.shape
        for source in tensor.sources:
            checkpoint.tensors[source].most_rows = 0
        pieces = [tensor.read(at, min(at + 7, n)) for at in range(0, n, 7)]
        assert np.array_equal(np.concatenate(pieces), whole), tensor.name
        most = max((checkpoint.tensors[source].most_rows for source in tensor.sources), default=0)
        assert most <= 2 * 48, "a few rows cost no more than the heads they lie in"
        assert tensor.read(0, 0).shape == (0, *tensor.shape[1:])


def test_nothing_is_read_before_it_is_wanted():
    config = config_of("llama")
    checkpoint = make_checkpoint(config, random_weights(config))
    plan(checkpoint)
    assert all(tensor.most_rows == 0 for tensor in checkpoint.tensors.values())


def test_names_may_have_other_prefixes(tmp_path):
    config, weights = config_of("gemma3"), random_weights(config_of("gemma3"))
    expected = write_gguf(tmp_path / "m.gguf", plan(make_checkpoint(config, weights))).read_bytes()
    seeing = {"model_type": "gemma3", "text_config": config}
    for before in ("language_model.model.", "model.language_model.", ""):
        renamed = {name.replace("model.", before, 1): values for name, values in weights.items()}
        renamed |= {"vision_tower.blocks.0.weight": np.zeros((2, 2), np.float32)}
        path = write_gguf(tmp_path / "m.gguf", plan(make_checkpoint(seeing, renamed)))
        assert path.read_bytes() == expected


def test_an_untied_head_of_a_model_that_sees():
    config = config_of("gemma3") | {"tie_word_embeddings": False}
    weights = random_weights(config)
    renamed = {f"language_model.{name}": values for name, values in weights.items()}
    seeing = {"model_type": "gemma3", "text_config": config}
    names = {tensor.name for tensor in plan(make_checkpoint(seeing, renamed)).tensors}
    assert "output.weight" in names


def as_meta(weights: dict[str, np.ndarray], head_size: int) -> dict[str, np.ndarray]:
    """A Llama of Hugging Face under Meta's names, with the two of a rotated pair side by side."""
    names = {
        "model.": "", "embed_tokens": "tok_embeddings", "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm", "lm_head": "output", "self_attn": "attention",
        "mlp": "feed_forward", "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo",
        "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2",
    }  # fmt: skip
    out = {"rope.freqs": np.ones(head_size // 2, np.float32)}
    for name, values in weights.items():
        if "q_proj" in name or "k_proj" in name:
            pairs = np.arange(head_size).reshape(2, -1).T.reshape(-1)  # 0, E / 2, 1, E / 2 + 1 ...
            values = values.reshape(-1, head_size, values.shape[1])[:, pairs].reshape(values.shape)
        for old, new in names.items():
            name = name.replace(old, new)
        out[name] = values
    return out


@pytest.mark.parametrize("family", ["llama", "mistral", "llama-3.1"])
def test_metas_names(family, tmp_path):
    config = config_of(family) | {"head_dim": 32, "tie_word_embeddings": False}
    if family == "llama-3.1":
        config["rope_scaling"] = config["rope_scaling"] | {"original_max_position_embeddings": 8192}
    weights = random_weights(config)
    params = {
        "dim": 128, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 160,
        "vocab_size": -1, "norm_eps": 1e-5, "max_seq_len": 1024, "multiple_of": 256,
        "sliding_window": config.get("sliding_window"), "use_scaled_rope": family == "llama-3.1",
    }  # fmt: skip
    ours = plan(make_checkpoint(config, weights))
    theirs = plan(make_checkpoint(params, as_meta(weights, 32)))
    assert ours.metadata == theirs.metadata
    a, b = write_gguf(tmp_path / "a.gguf", ours), write_gguf(tmp_path / "b.gguf", theirs)
    assert np.array_equal(logits_of(a), logits_of(b))


@pytest.mark.parametrize(
    ("params", "ffn_width", "context_length"),
    [
        ({"dim": 4096, "multiple_of": 256, "norm_eps": 1e-6}, 11008, 2048),
        ({"dim": 4096, "multiple_of": 256, "norm_eps": 1e-5}, 11008, 4096),
        ({"dim": 4096, "multiple_of": 1024, "ffn_dim_multiplier": 1.3, "rope_theta": 5e5}, 14336, 8192),
        ({"dim": 2048, "multiple_of": 256, "ffn_dim_multiplier": 1.5, "rope_theta": 5e5,
          "use_scaled_rope": True}, 8192, 131072),
        ({"dim": 4096, "hidden_dim": 14336, "head_dim": 128, "sliding_window": 4096}, 14336, 32768),
    ],
)  # fmt: skip
def test_what_params_json_leaves_out(params, ffn_width, context_length):
    """Llama 1 7B, Llama 2 7B, Llama 3 8B, Llama 3.2 1B, Mistral 7B 0.1."""
    config = translated({"n_layers": 16, "n_heads": 32, "vocab_size": -1} | params, 32000)
    assert config["intermediate_size"] == ffn_width
    assert config["max_position_embeddings"] == context_length


@pytest.mark.parametrize(
    ("params", "named"),
    [({"moe": {}}, "'moe' is no known"), ({"dim": "x"}, "dim is 'x'"),
     ({"multiple_of": 0}, "multiple_of is 0"), ({"n_layers": None}, "n_layers is NoneType"),
     ({"n_heads": 0}, "num_attention_heads is 0")],
)  # fmt: skip
def test_params_json_that_does_not_do(params, named):
    weights = {"tok_embeddings.weight": np.zeros((300, 128), np.float32)}
    checkpoint = make_checkpoint({"dim": 128, "n_layers": 1, "n_heads": 4} | params, weights)
    with pytest.raises(ModelFileError, match=named):
        plan(checkpoint)


# --- what is refused ------------------------------------------------------------------------------
REFUSED: list[tuple[str, dict, str]] = [
    ("llama", {"model_type": "mamba"}, "model_type is 'mamba'"),
    ("llama", {"model_type": None}, "model_type is NoneType"),
    ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
    ("llama", {"hidden_size": None}, "hidden_size is missing"),
    ("llama", {"hidden_size": 0}, "hidden_size is 0"),
    ("llama", {"hidden_size": 128.5}, "hidden_size is 128.5"),
    ("llama", {"hidden_size": 130}, "130 is no multiple of num_attention_heads 4"),
    ("llama", {"num_key_value_heads": 3}, "4 is no multiple of num_key_value_heads 3"),
    ("llama", {"intermediate_size": 161}, "gate_proj.weight has shape"),
    ("llama", {"num_hidden_layers": 4}, "layers.3.input_layernorm.weight is missing"),
    ("llama", {"num_hidden_layers": 2}, "first being 'model.layers.2.input_layernorm"),
    ("llama", {"attention_bias": True}, "q_proj.bias is missing"),
    ("llama-biases", {"mlp_bias": False}, "'model.layers.0.mlp.down_proj.bias'"),
    ("llama", {"attention_bias": 1}, "attention_bias is 1"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ("llama", {"rope_theta": -1.0}, "rope_theta is -1.0"),
    ("llama", {"rope_scaling": "yarn"}, "rope_scaling is 'yarn'"),
    ("llama", {"rope_scaling": {"rope_type": "mrope"}}, "rope_type is 'mrope'"),
    ("llama", {"rope_scaling": {"type": ["yarn"]}}, "rope_type is an array"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "factor is missing"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2'"),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 1.0}}, "'mscale' is no known"),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "truncate"),
    ("llama", {"rope_scaling": {"type": "longrope"}}, "longrope, which llama has no place for"),
    ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "layer_types"),
    ("smollm3", {"no_rope_layers": [1, 1, 1, 1, 1]}, "no_rope_layers is an array"),
    ("phi3-long", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "long_factor"),
    ("phi3", {"num_key_value_heads": 2}, "qkv_proj.weight has shape"),
    ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
    ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping is missing"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    ("gemma3", {"layer_types": ["chunked_attention"] * 7}, "layer_types"),
    ("gemma3", {"rope_scaling": {"full_attention": {}, "sliding_attention": {"rope_type": "yarn"}}},
     "sliding_attention.rope_type is 'yarn'"),
    ("internlm2", {"bias": True}, "bias is True"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes", "named"), REFUSED, ids=lambda given: str(given)[:40])
def test_what_is_not_understood_is_refused(family, changes, named):
    with pytest.raises(ModelFileError, match=named):
        plan_of(family, **changes)


def test_a_window_of_no_layer_is_none():
    expected = plan_of("qwen2").metadata
    changes = {"use_sliding_window": True, "max_window_layers": 3}
    assert plan_of("qwen2", **changes).metadata == expected


def test_tensors_are_used_or_named():
    config = config_of("qwen3")
    weights = random_weights(config)
    expected = plan(make_checkpoint(config, weights))
    more = {
        "lm_head.weight": weights["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(24, np.float32),
    }
    given = plan(make_checkpoint(config, weights | more))
    assert [t[:3] for t in given.tensors] == [t[:3] for t in expected.tensors]
    more["model.layers.0.self_attn.sinks"] = np.ones(4, np.float32)
    with pytest.raises(
        UnsupportedModelError, match=r"first being 'model.layers.0.self_attn.sinks'"
    ):
        plan(make_checkpoint(config, weights | more))


# --- files that do not fit ------------------------------------------------------------------------
def tensor_of(name: str, *shape: int) -> PlannedTensor:
    return PlannedTensor(
        name, shape, (), lambda start, stop: np.ones((stop - start, *shape[1:]), np.float32)
    )


FILES: list[tuple[str, dict, list[PlannedTensor], str]] = [
    ("phi3", {}, [tensor_of("blk.0.attn_qkv.weight", 352, 128)], r"qkv.weight has shape \[128, 352\]"),
    ("phi3", {}, [tensor_of("blk.0.attn_qkv.weight", 384, 96)], r"qkv.weight has shape \[96, 384\]"),
    ("phi3", {}, [tensor_of("blk.1.ffn_up.weight", 160, 128)], r"ffn_up.weight has shape \[128, 160\]"),
    ("phi3", {}, [tensor_of("blk.0.attn_q.weight", 128, 128)], "attn_q.weight is also part of"),
    ("phi3", {}, [tensor_of("blk.0.attn_qkv.bias", 383)], r"attn_qkv.bias has shape \[383\]"),
    ("phi3", {"rope.scaling.type": "longrope"}, [], "longrope needs"),
    ("phi3", {}, [tensor_of("rope_factors_long.weight", 16)], "longrope needs"),
    ("phi3-long", {"rope.scaling.type": "yarn"}, [], "longrope needs"),
    ("phi3-long", {}, [tensor_of("rope_freqs.weight", 16)], "longrope needs"),
    ("phi3-long", {}, [tensor_of("rope_factors_short.weight", 12)], r"f32 \[16\] is needed"),
    ("phi3-long", {"rope.scaling.attn_factor": 0.0}, [], "attn_factor is 0.0"),
    ("qwen3", {}, [tensor_of("blk.2.attn_k_norm.weight", 47)], "attn_k_norm.weight has shape"),
    ("qwen2", {}, [tensor_of("blk.0.attn_q_norm.weight", 32)], "attn_q_norm.weight' has no place"),
    ("granite", {"rope.scaling.finetuned": False}, [], "finetuned is False"),
    ("granite", {"logit_scale": None}, [], "logit_scale is missing"),
    ("granite", {"logit_scale": 0.0}, [], "logit_scale is 0.0"),
    ("granite", {"attention.scale": float("nan")}, [], "attention.scale is nan"),
    ("gemma3", {"attention.sliding_window_pattern": [True] * 6}, [], "pattern has 6 entries"),
    ("gemma3", {"attention.sliding_window_pattern": [1] * 7}, [], "pattern has 7 entries"),
    ("gemma3", {"attention.sliding_window_pattern": "6"}, [], "pattern is '6'"),
    ("stablelm", {"attention.layer_norm_epsilon": None}, [], "layer_norm_epsilon is missing"),
    ("stablelm-12b", {}, [tensor_of("blk.1.attn_k_norm.weight", 3, 32)], "k_norm.weight has shape"),
    ("stablelm-12b", {}, [tensor_of("blk.1.attn_k_norm.weight", 4, 16)], "k_norm.weight has shape"),
    ("stablelm-12b", {}, [tensor_of("blk.1.ffn_norm.weight", 128)], "ffn_norm.weight' has no place"),
    ("olmo2", {}, [tensor_of("blk.0.attn_norm.weight", 128)], "attn_norm.weight' has no place"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "keys", "tensors", "named"), FILES)
def test_files_that_do_not_fit(family, keys, tensors, named, tmp_path):
    """`keys` and `tensors` replace what a sound file has, or stand beside it."""
    sound = plan_of(family)
    metadata = sound.metadata | {f"{sound.architecture}.{key}": v for key, v in keys.items()}
    all_tensors = {tensor.name: tensor for tensor in (*sound.tensors, *tensors)}
    path = tmp_path / "m.gguf"
    write_gguf(path, Plan(sound.architecture, metadata, list(all_tensors.values())))
    with open_gguf(path) as gguf, pytest.raises(ModelFileError, match=named):
        read_config(gguf)


def test_the_magnitude_of_yarn_may_be_told(tmp_path):
    """As llama.cpp's converter writes it: in place of yarn's own, which it is close to."""
    sound = plan_of("olmo3")
    metadata = dict(sound.metadata)
    del metadata["olmo2.rope.scaling.attn_factor"]
    metadata["olmo2.rope.scaling.yarn_attn_factor"] = 1.2
    logits = logits_of(write_gguf(tmp_path / "m.gguf", sound._replace(metadata=metadata)))
    config = config_of("olmo3")
    expected = NaiveCheckpoint(config, random_weights(config)).logits(IDS)
    assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(("family", "n_layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemmas_are_known_by_their_layers(family, n_layers, tmp_path):
    for n, expected in ((n_layers, (128 / 4) ** -0.5), (n_layers - 1, 48**-0.5)):
        config = config_of(family) | {"num_hidden_layers": n}
        planned = plan(make_checkpoint(config, random_weights(config)))
        with open_gguf(write_gguf(tmp_path / f"{n}.gguf", planned)) as gguf:
            assert read_config(gguf).attention_scale == pytest.approx(expected)


def test_which_layers_have_a_window_may_be_told(tmp_path):
    types = ["full_attention", "sliding_attention"] * 3 + ["full_attention"]
    path = write_gguf(tmp_path / "a.gguf", plan_of("gemma3", layer_types=types))
    with open_gguf(path) as gguf:
        assert read_config(gguf).windows == (0, 40, 0, 40, 0, 40, 0)
    path = write_gguf(tmp_path / "b.gguf", plan_of("gemma3", sliding_window_pattern=3))
    with open_gguf(path) as gguf:
        config = read_config(gguf)
    assert config.windows == (40, 40, 0, 40, 40, 0, 40)
    assert config.attention_scale == pytest.approx(48**-0.5)
