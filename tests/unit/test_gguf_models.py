"""GGUF files of every architecture hold the same model as the Hugging Face directory they were written from.

Config and parameters equal means logits equal, so few of these tests run a model.  The conventions themselves were
checked against llama.cpp (scripts/check_llama_cpp.py).
"""

import contextlib
import dataclasses
import json
from pathlib import Path

import gguf
import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

import llmjax
from converters.readers.gguf import GgufSource
from llmjax import CheckpointError, ConfigError
from llmjax.checkpoint import gguf_config, gguf_gemma, gguf_names, gguf_ropes
from llmjax.models.gemma import GemmaConfig
from llmjax.models.gemma2 import Gemma2Config
from llmjax.models.gemma3 import Gemma3Config
from llmjax.models.names import TornError
from llmjax.models.qwen3_5 import Qwen3_5Config
from llmjax.models.registry import architectures, read_config
from llmjax.quant.gguf import unpack
from llmjax.quant.qtensor import QTensor, dequantize
from llmjax.text.reading import from_gguf, from_huggingface
from tests import gguf_files
from tests.parity import checkpoints, golden
from tests.tiny import some

STORED = Path(__file__).parents[1] / "data" / "cases"

# Of the golden test's models, those that llama.cpp has a form for, with what it has no key for as it assumes it.
CASES = {
    "llama": {},
    "llama_biases_tied": {},
    "llama_linear": {},
    "llama_llama3": {},
    "mistral": {},
    "mistral_full_mqa_tied": {},
    "qwen2": {},
    "qwen3": {},
    "phi": {},
    "phi3": {},
    "phi3_partial_mha_tied": {},
    "gemma_mqa": {},
    "gemma_mha_wide": {"hidden_act": "gelu_pytorch_tanh"},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16},
    "falcon_7b": {},
    "falcon_40b": {"rope_theta": 10000.0},
    "stablelm": {},
    "stablelm_qkv_bias_qk_norm": {},
    "stablelm_parallel_tied": {},
}
# Of the stored checkpoints, those that llama.cpp has a form for.
KINDS = ("gemma3n_cond", "gemma4_cond", "gemma4_moe", "granite", "lfm2", "ministral3_cond", "olmo3_yarn", "qwen3_moe")
KINDS = (*KINDS, "qwen3_5_cond", "smollm3", "phi35_mini_longrope")
# Keys that llama.cpp reads and its converter leaves out.
ADDED = {
    "mistral": lambda writer: writer.add_sliding_window(6),
    "gemma3": lambda writer: writer.add_sliding_window_pattern(3),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A case's Hugging Face directory, and a GGUF file of it."""

    def make(name, kind="F32", **options):
        if name in KINDS:
            path = tmp_path_factory.mktemp(name) / "model.gguf"
            return STORED / name, gguf_files.write(STORED / name, path, kind, **options)
        m = golden.meta(name)
        folder = tmp_path_factory.mktemp(name)
        checkpoints.write(folder, m["config"] | CASES[name], m["shapes"], m["seed"])
        options.setdefault("add", ADDED.get(name, lambda writer: None))
        return folder, gguf_files.write(folder, folder / "model.gguf", kind, **options)

    return make


def facts(model):
    """The config's fields, but for Llama 3's scaling: a formula in one and its values in the other."""
    found = dataclasses.asdict(model.config)
    if found.get("rope"):
        found["rope"] |= {"divisors": None, "llama3": None}
    found.pop("per_layer_vocab_size", None)  # the file has zeros for the tokens of images
    return as_float32(found)


def as_float32(value):
    """Numbers as a file holds them."""
    if isinstance(value, dict):
        return {key: as_float32(x) for key, x in value.items()}
    if isinstance(value, tuple):
        return tuple(map(as_float32, value))
    return float(np.float32(value)) if isinstance(value, float) else value


def assert_same_model(folder, path):
    ours, expected = llmjax.load(path), llmjax.load(folder)
    assert facts(ours) == facts(expected)
    found = dict(jax.tree_util.tree_leaves_with_path(ours.params))
    one_more = isinstance(expected.config, GemmaConfig | Gemma2Config | Gemma3Config | Qwen3_5Config)
    for place, wanted in jax.tree_util.tree_leaves_with_path(expected.params):
        value, wanted = found.pop(place), np.asarray(wanted, np.float32)
        if "embed" in jax.tree_util.keystr(place):
            value = value[: len(wanted)]  # see above
        if one_more and "norm" in jax.tree_util.keystr(place):
            # w is stored as 1 + w in float32: what is lost is half a unit of 1 + w, and the model multiplies by that.
            np.testing.assert_allclose(value, wanted, rtol=0, atol=2**-24 * (1 + np.abs(wanted).max()))
            value, wanted = 1 + value, 1 + wanted
        if "a_log" in jax.tree_util.keystr(place):  # stored as -exp(a_log), and that is rounded
            np.testing.assert_allclose(value, wanted, rtol=0, atol=2**-23)
            continue
        np.testing.assert_array_equal(value, wanted, err_msg=str(place))
    assert not found


@pytest.mark.parametrize("name", some({*list(CASES)[::2], *KINDS}, (*CASES, *KINDS)))
def test_same_model(written, name):
    assert_same_model(*written(name))


def test_every_architecture_is_here():
    """What the registry says has a GGUF form is read, and all that is read is tested."""
    wanted = {a.gguf for a in architectures().values() if a.gguf}
    assert wanted == set(gguf_config.ARCHITECTURES)
    configs = [golden.meta(name)["config"] for name in CASES]
    configs += [json.loads((STORED / name / "config.json").read_text()) for name in KINDS]
    tested = {gguf_files.ARCHITECTURES[c.get("text_config", c)["model_type"]] for c in configs}
    assert wanted == {gguf.MODEL_ARCH_NAMES[a] for a in tested}


def test_llama3_scaling(written):
    """The golden logits, with the frequencies from the file's ``rope_freqs``, which are a scaling that configs have."""
    folder, path = written("llama_llama3")
    model, expected = llmjax.load(path), golden.arrays("llama_llama3")
    assert model.config.rope == llmjax.load(folder).config.rope and model.config.rope.llama3
    ids, rows = expected["long"].tolist(), golden.meta("llama_llama3")["rows"]
    assert golden.error(model.logits([ids])[0][rows], expected["logits_long"]) < golden.TOLERANCE
    uses = {t["name"]: t["use"] for t in llmjax.inspect(path).tensors if not t["fills"]}
    assert uses == {"rope_freqs.weight": "in the config"}


def test_llama3_scaling_becomes_part_of_a_directory(written, tmp_path):
    _, path = written("llama_llama3")
    llmjax.convert(path, tmp_path / "hf", to="hf")
    assert llmjax.load(tmp_path / "hf").config == llmjax.load(path).config


def test_divisors_of_another_kind_divide_and_have_no_place_in_a_directory(written, tmp_path):
    _, path = written("llama_llama3", change=lambda t: t["rope_freqs.weight"].__setitem__(1, 3.0))
    assert llmjax.load(path).config.rope.divisors[1] == 3
    with pytest.raises(ConfigError, match=r"rope_freqs.weight: the files to be written have no place for it"):
        llmjax.convert(path, tmp_path / "hf", to="hf")


def test_a_scaling_is_applied_once_where_a_given_configuration_has_it_too(written):
    folder, path = written("llama_llama3")
    config = json.loads((folder / "config.json").read_text())
    assert llmjax.load(path, config=config).config.rope == llmjax.load(folder).config.rope
    other = config | {"rope_scaling": config["rope_scaling"] | {"factor": 4.0}}
    with pytest.raises(ConfigError, match=r"rope_freqs.weight: the file scales its rotation otherwise"):
        llmjax.load(path, config=other)


def test_logits_equal(written):
    """Gemma, whose norms are the one thing that is not stored as it was.  A file may have no tokenizer."""
    folder, path = written("gemma_mqa")
    ids = golden.arrays("gemma_mqa")["long"].tolist()
    ours, theirs = llmjax.load(path).logits([ids])[0], llmjax.load(folder).logits([ids])[0]
    assert np.abs(ours - theirs).max() <= 1e-6 * np.abs(theirs).max()


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_types_of_values(written, kind):
    """Fused and permuted tensors come apart packed as well as expanded: rows are what blocks lie in."""
    folder, path = written("phi3", kind)
    q_heads, width = 4, 16
    ours, theirs = llmjax.load(path).params["layers_1"], llmjax.load(folder).params["layers_1"]
    for found, exact in (
        (ours["attn"]["k"]["weight"], theirs["attn"]["k"]["weight"]),
        (ours["mlp"]["up"]["weight"], theirs["mlp"]["up"]["weight"]),
    ):
        assert isinstance(found, QTensor) == kind.startswith("Q")
        values = dequantize(found.map(np.asarray)) if isinstance(found, QTensor) else found
        np.testing.assert_array_equal(values, gguf_files.dequantized(np.asarray(exact), kind))
    assert ours["attn"]["q"]["weight"].shape == (q_heads * width, 64)
    kinds = {t["dtype"] for t in llmjax.inspect(path).tensors}
    assert kinds == {"F32", kind}


@pytest.mark.parametrize(("name", "role"), [("gemma4_moe", "gate"), ("gemma4_moe", "up"), ("qwen3_moe", "up")])
def test_experts_stay_packed(written, name, role):
    folder, path = written(name, "Q4_1")
    found = llmjax.load(path).params["layers_1"]["experts"][role]["weight"]
    exact = np.asarray(llmjax.load(folder).params["layers_1"]["experts"][role]["weight"], np.float32)
    assert isinstance(found, QTensor) and found.shape == exact.shape
    np.testing.assert_array_equal(dequantize(found.map(np.asarray)), gguf_files.dequantized(exact, "Q4_1"))


def test_layers_that_guess_are_left_out(written):
    """Behind the others, and counted with them."""

    def with_guesser(tensors):
        last = {name: x for name, x in tensors.items() if name.startswith("blk.1.")}
        tensors |= {name.replace("blk.1.", "blk.4."): x for name, x in last.items()}
        tensors["blk.4.nextn.eh_proj.weight"] = np.zeros((36, 72), np.float32)

    def said(writer):
        writer.kv_data[0]["qwen35.block_count"].value = 5
        writer.kv_data[0]["qwen35.attention.recurrent_layers"].value.append(False)
        writer.add_nextn_predict_layers(1)

    folder, path = written("qwen3_5_cond", change=with_guesser, add=said)
    assert_same_model(folder, path)
    dropped = {t["name"].split(".")[1] for t in llmjax.inspect(path).tensors if not t["fills"]}
    assert dropped == {"4"}


@pytest.mark.parametrize(("kind", "width"), [("Q4_1", 32), ("Q5_0", 64), ("Q8_0", 16)])
def test_heads_are_moved_as_they_are_packed(kind, width):
    """Where a group lies within a head: llama.cpp has the columns of two key heads' three value heads in turn."""
    config = json.loads((STORED / "qwen3_5_cond" / "config.json").read_text())["text_config"]
    config |= {"linear_value_head_dim": width}
    entry = gguf_names.names(read_config(config, "x")[1], "qwen3_5_text", ())["layers.{}.delta.o"]
    x = np.random.default_rng(0).standard_normal((4, 6 * width)).astype(np.float32)
    raw = gguf.quants.quantize(x, gguf.GGMLQuantizationType[kind])
    q = unpack(raw, kind, x.shape)
    if width < 32:
        with pytest.raises(TornError):
            jax.tree.map(lambda leaf: entry.make([leaf]), q)
        return
    found = dequantize(jax.tree.map(lambda leaf: entry.make([leaf]), q))
    heads = gguf_files.dequantized(x, kind).reshape(4, 3, 2, width)
    wanted = [heads[:, group, key] for key in range(2) for group in range(3)]
    np.testing.assert_array_equal(found, np.concatenate(wanted, 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3n_cond", "gemma4_moe", "qwen3_moe"])
def test_packed_kinds_mean_their_values(written, name):
    _, path = written(name, "Q8_0")
    ours, exact = (llmjax.load(path, dtype=dtype).logits([list(range(3, 15))])[0] for dtype in (None, "float32"))
    assert np.abs(ours - exact).max() <= 3e-5 * np.abs(exact).max()


def fuse(tensors):
    """q, k and v in one tensor, as Phi-2's first files and llama.cpp's ``--fuse`` have them."""
    for i in range(3):
        for end in ("weight", "bias"):
            parts = [tensors.pop(f"blk.{i}.attn_{x}.{end}", None) for x in "qkv"]
            if parts[0] is not None:
                tensors[f"blk.{i}.attn_qkv.{end}"] = np.concatenate(parts)


@pytest.mark.parametrize("name", ["phi", "llama_biases_tied"])
def test_fused_attention(written, name):
    assert_same_model(*written(name, change=fuse))


def test_untied_head_of_a_tied_model(written):
    """A head of its own type, which quantized files have, is a head."""
    folder, path = written("qwen2", change=lambda t: t.update({"output.weight": t["token_embd.weight"] * 2}))
    model = llmjax.load(path)
    assert not model.config.tie_word_embeddings
    np.testing.assert_array_equal(model.params["head"]["weight"], model.params["embed"]["weight"] * 2)


def as_it_is(*_):
    return lambda x: x


def turned_round(parts):
    """Parts of a fused tensor in another order."""
    return lambda module, rows: parts(module, dict(sorted(rows.items(), reverse=True)))


def one_more(windows):
    return lambda e, c, window, period: windows(e, c, window + 1, period)


def without(key):
    """The rotation without one of its keys."""

    def make(rope):
        def read(e, c, **options):
            rope(e, c, **options)
            c.pop(key)

        return read

    return make


def experts_turned_round(stacked):
    """Gate and up of every expert."""

    def make(*arguments):
        table = stacked(*arguments)
        gate, up = "layers.{}.experts.gate", "layers.{}.experts.up"
        return table | {gate: table[up], up: table[gate]}

    return make


SWAPPED_NORMS = {"attn_norm": "ffn_norm", "mlp_norm": "attn_norm"}
# A case, and what stands in the place of one of our conventions.
MUTATIONS = {
    "permutation left as it is": ("llama", gguf_names, "_unpermuted", lambda right: as_it_is),
    "permutation by the wrong heads": ("llama", gguf_names, "_unpermuted", lambda right: lambda heads: right(2)),
    "1 left in the norms": ("gemma2", gguf_names, "_minus_one", as_it_is),
    "q, k, v turned round": ("falcon_40b", gguf_names, "fused", turned_round),
    "gate and up turned round": ("phi3", gguf_names, "fused", turned_round),
    "norms swapped": ("stablelm", gguf_names, "_LAYER", lambda right: right | SWAPPED_NORMS),
    "window": ("gemma3", gguf_gemma, "sliding", one_more),
    "rotary width": ("phi", gguf_config, "rope", without("partial_rotary_factor")),
    "streams in another order": (
        "gemma3n_cond",
        gguf_names,
        "_one_of",
        lambda right: lambda m, i, n: right(m, n - i, n),
    ),
    "cut in other layers": ("gemma3n_cond", gguf_gemma, "_sparsity", lambda right: lambda e, n: right(e, n)[::-1]),
    "experts turned round": ("gemma4_moe", gguf_names, "stacked_experts", experts_turned_round),
    "all pairs turn": ("gemma4_moe", gguf_ropes, "_STILL", lambda right: 1e29),
    "linear scaling": ("llama_linear", gguf_config, "rope", without("rope_scaling")),
}


@pytest.mark.parametrize("mutation", some(set(list(MUTATIONS)[::3]), MUTATIONS))
def test_a_wrong_convention_is_seen(written, monkeypatch, mutation):
    name, owner, attribute, make = MUTATIONS[mutation]
    files = written(name)
    monkeypatch.setattr(owner, attribute, make(getattr(owner, attribute)))
    with pytest.raises(AssertionError):
        assert_same_model(*files)


LLAMA = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 128,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
}
SHAPES = {"token_embd.weight": (160, 64)} | {f"blk.{i}.ffn_down.weight": (64, 96) for i in range(46)}


def other(architecture, **changes):
    """The metadata of another architecture."""
    epsilon = "layer_norm_epsilon" if architecture in ("phi2", "stablelm", "falcon") else "layer_norm_rms_epsilon"
    values = {k.replace("llama.", f"{architecture}."): v for k, v in LLAMA.items()}
    values[f"{architecture}.attention.{epsilon}"] = values.pop(f"{architecture}.attention.layer_norm_rms_epsilon")
    return values | {"general.architecture": architecture, **changes}


def configured(metadata):
    return read_config(gguf_config.hf_config(metadata, SHAPES, "x.gguf"), "x.gguf")[1]


def test_what_llama_cpp_hard_codes():
    """Gemma's query scale by size, its patterns of windows, its two bases."""
    gemma2 = configured(other("gemma2"))
    assert (gemma2.query_pre_attn_scalar, gemma2.windows) == (16, (4096, None))
    assert (gemma2.attn_logit_softcapping, gemma2.final_logit_softcapping) == (50, 30)
    wide = {"attention.key_length": 32, "attention.value_length": 32}
    large = configured(other("gemma2", **{f"gemma2.{k}": v for k, v in ({"block_count": 46} | wide).items()}))
    assert (large.query_pre_attn_scalar, large.head_dim) == (16, 32)
    assert (
        configured(other("gemma2", **{"gemma2.attention.scale": float(np.float32(18**-0.5))})).query_pre_attn_scalar
        == 18
    )
    values = {"block_count": 13, "attention.sliding_window": 512, "rope.freq_base": 1e6, "rope.scaling.factor": 8.0}
    gemma3 = configured(other("gemma3", **{f"gemma3.{k}": v for k, v in values.items()}))
    assert [i for i, w in enumerate(gemma3.windows) if w is None] == [5, 11]
    assert (gemma3.local_rope.theta, gemma3.local_rope.linear) == (1e4, 1)
    assert (gemma3.global_rope.theta, gemma3.global_rope.linear) == (1e6, 8)
    pattern = np.array([False] + [True] * 12)
    given = configured(
        other(
            "gemma3", **{f"gemma3.{k}": v for k, v in (values | {"attention.sliding_window_pattern": pattern}).items()}
        )
    )
    assert [i for i, w in enumerate(given.windows) if w is None] == [0]
    assert configured(other("gemma3")).windows == (None, None)


@pytest.mark.parametrize("scaling", ["none", "yarn"])
def test_the_base_of_olmo3s_local_layers(scaling):
    """The file's one, as in llama.cpp; what transformers has there where a config does not say it is another."""
    values = {"attention.sliding_window": 512, "rope.freq_base": 1e4, "rope.scaling.factor": 4.0}
    values["rope.scaling.type"] = scaling
    metadata = other("olmo2", **{f"olmo2.{k}": v for k, v in values.items()})
    config = configured(metadata)
    assert (config.rope.theta, config.local_rope.theta, config.local_rope.scaling) == (1e4, 1e4, None)
    assert (config.rope.scaling is None) == (scaling == "none")
    with pytest.raises(ConfigError, match="rope.freq_base_swa: 77.0 is not supported, expected 10000.0"):
        configured(metadata | {"olmo2.rope.freq_base_swa": 77.0})


QWEN35 = {
    "rope.dimension_count": 8,
    "rope.dimension_sections": np.array([2, 1, 1, 0]),
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 32,
    "ssm.state_size": 8,
    "ssm.time_step_rank": 4,
    "ssm.group_count": 2,
    "block_count": 7,
}


def test_layers_that_attend_and_pairs_that_turn():
    """Every fourth unless the file says otherwise; llama.cpp would not turn the third pair of sections (3, 1, 0)."""

    def qwen35(**changes):
        return other("qwen35", **{f"qwen35.{k}": v for k, v in (QWEN35 | changes).items()})

    assert [i for i, kind in enumerate(configured(qwen35()).kinds_of_layers) if kind == "full_attention"] == [3]
    listed = {"attention.recurrent_layers": np.array([False] * 6 + [True])}
    assert configured(qwen35(**listed)).kinds_of_layers == ("full_attention",) * 6 + ("linear_attention",)
    with pytest.raises(ConfigError, match=r"recurrent_layers: expected 7 booleans, found \[True\]"):
        configured(qwen35(**{"attention.recurrent_layers": np.array([True])}))
    with pytest.raises(ConfigError, match=r"dimension_sections: \[3, 1, 0, 0\] leaves out some of the 4 pairs"):
        configured(qwen35(**{"rope.dimension_sections": np.array([3, 1, 0, 0])}))
    with pytest.raises(ConfigError, match="ssm.inner_size: 30 is not a multiple of ssm.time_step_rank 4"):
        configured(qwen35(**{"ssm.inner_size": 30}))


def test_values_that_say_nothing_new():
    """One value a layer, defaults written out, the old name of a factor, epsilons as the decimals they stand for."""
    config = configured(
        LLAMA
        | {
            "llama.attention.head_count_kv": np.array([2, 2]),
            "llama.rope.scale_linear": 4.0,
            "llama.rope.scaling.finetuned": True,
            "llama.expert_count": 0,
            "llama.attention.scale": 0.25,
            "llama.attention.sliding_window": 0,
            "llama.vocab_size": 160,
        }
    )
    assert (config.num_key_value_heads, config.rope.linear, config.rms_norm_eps) == (2, 4, 1e-5)
    unscaled = configured(LLAMA | {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0})
    assert unscaled.rope.linear == 1
    windowed = gguf_config.hf_config(LLAMA | {"llama.attention.sliding_window": 32}, SHAPES, "x.gguf")
    assert (windowed["model_type"], windowed["sliding_window"]) == ("mistral", 32)


def test_any_rotary_width_survives_being_a_fraction():
    for width in range(2, 258, 2):
        for dims in range(2, width + 1, 2):
            values = {"attention.key_length": width, "rope.dimension_count": dims}
            metadata = other("phi2", **{f"phi2.{k}": v for k, v in values.items()})
            fraction = gguf_config.hf_config(metadata, SHAPES, "x.gguf")["partial_rotary_factor"]
            assert int(width * fraction) == dims


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "mamba"}, "general.architecture 'mamba' is not supported; llmjax has falcon, gemma,"),
        ({"general.architecture": None}, "general.architecture None is not supported"),
        ({"general.architecture": np.array([1])}, r"general.architecture \[1\] is not supported"),
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type: 'longrope' is not supported, expected 'none'"),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_beta_fast": -1},
            "beta_fast: expected a positive",
        ),
        ({"llama.logit_scale": 0.5}, r"llama.logit_scale: llmjax does not know this key \(value 0.5\)"),
        ({"llama.expert_count": 8}, "llama.expert_count: 8 is not supported, expected 0"),
        ({"llama.attention.scale": 0.3}, "llama.attention.scale: 0.3 is not supported, expected 0.25"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count: 8 is not supported, expected 16"),
        ({"llama.block_count": 2.0}, "llama.block_count: expected a positive integer, found 2.0"),
        ({"llama.block_count": 1 << 31}, "llama.block_count: 2147483648 layers, but there is no tensor blk.2147483647"),
        ({"llama.rope.scaling.type": np.array([1])}, r"llama.rope.scaling.type: \[1\] is not supported"),
        (
            {"llama.attention.scale": np.array([1, 2])},
            "llama.attention.scale: expected a positive number, found values",
        ),
        ({"llama.block_count": True}, "llama.block_count: expected a positive integer, found True"),
        ({"llama.block_count": None}, "llama.block_count: missing, expected a positive integer"),
        ({"llama.rope.freq_base": "1e4"}, "llama.rope.freq_base: expected a positive number, found '1e4'"),
        ({"llama.rope.freq_base": float("nan")}, "llama.rope.freq_base: expected a positive number, found nan"),
        ({"llama.attention.head_count": 5}, "llama.attention.head_count: embedding_length 64 is not a multiple of 5"),
        ({"llama.attention.head_count_kv": 3}, "head_count_kv: attention.head_count 4 is not a multiple of 3"),
        ({"llama.attention.head_count_kv": np.array([2, 4])}, r"values that differ by layer: \[2, 4\]"),
        ({"llama.vocab_size": 161}, "llama.vocab_size: 161 is not supported, expected 160"),
    ],
)
def test_metadata_that_is_refused(changes, message):
    metadata = {k: v for k, v in (LLAMA | changes).items() if v is not None}
    with pytest.raises(ConfigError, match=f"(?s)^x.gguf: .*{message}"):
        gguf_config.hf_config(metadata, SHAPES, "x.gguf")


KEYS = """block_count embedding_length attention.head_count attention.head_count_kv attention.key_length
    attention.value_length rope.dimension_count rope.freq_base rope.scaling.type rope.scaling.factor
    attention.sliding_window attention.sliding_window_pattern attn_logit_softcapping attention.scale vocab_size
    expert_count rope.freq_base_swa use_parallel_residual tensor_data_layout nextn_predict_layers ssm.inner_size
    ssm.time_step_rank ssm.group_count full_attention_interval attention.recurrent_layers
    rope.dimension_sections""".split()
ODD = [0, 2, -1, 1 << 40, 1.5, float("nan"), 1e-200, 1e300, True, "linear", ["a"], np.array([2, 2]), np.array([]), 64]


@hypothesis.given(
    st.sampled_from(sorted(gguf_config.ARCHITECTURES)),
    st.dictionaries(st.sampled_from(KEYS), st.sampled_from(ODD), min_size=1, max_size=4),
)
def test_odd_values_are_errors_not_crashes(architecture, values):
    with contextlib.suppress(ConfigError):
        configured(other(architecture, **{f"{architecture}.{k}": v for k, v in values.items()}))


def test_problems_come_together():
    bad = LLAMA | {"llama.block_count": -1, "llama.x": "\x1b", "llama.attention.sliding_window": -3}
    del bad["llama.context_length"]
    with pytest.raises(ConfigError) as caught:
        gguf_config.hf_config(bad, {}, "x.gguf")
    assert str(caught.value).count("\n") == 6
    assert "tensor token_embd.weight: missing" in str(caught.value) and "\x1b" not in str(caught.value)


def test_falcon_rw_has_no_gguf():
    shapes = SHAPES | {"blk.0.attn_qkv.bias": (192,)}
    with pytest.raises(ConfigError, match=r"attn_qkv.bias: Falcon-RW \(ALiBi, biases\) has no GGUF form"):
        gguf_config.hf_config(other("falcon"), shapes, "x.gguf")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("blk.1.attn_k.weight", None, "missing tensor blk.1.attn_k.weight, needed for layers.1.attn.k.weight"),
        ("blk.1.ffn_up.weight", (3, 56), r"blk.1.ffn_up.weight: expected shape \[104, 56\], found \[3, 56\]"),
        ("blk.7.ffn_up.weight", (3,), r"blk.7.ffn_up.weight \[3\] is not part of a llama model"),
    ],
)
def test_tensors_that_do_not_fit(written, name, shape, message):
    def change(tensors):
        tensors.pop(name, None)
        if shape:
            tensors[name] = np.ones(shape, np.float32)

    _, path = written("llama", change=change)
    with pytest.raises(CheckpointError, match=message):
        llmjax.load(path)


def test_decays_that_are_none(written):
    _, path = written("qwen3_5_cond", change=lambda t: np.negative(t["blk.0.ssm_a"], out=t["blk.0.ssm_a"]))
    with pytest.raises(
        CheckpointError, match=r"model.gguf: layers.0.delta.a_log \(from blk.0.ssm_a\): expected numbers below 0"
    ):
        llmjax.load(path)


@pytest.mark.parametrize(
    ("name", "tensor", "divisors", "message"),
    [
        ("llama", "rope_freqs", np.ones(3), r"rope_freqs.weight: expected shape \[7\], found \[3\]"),
        ("llama", "rope_freqs", np.array([1, 1, 1, 1, 1, 1, -8.0]), "rope_freqs.weight: expected positive numbers"),
        ("llama", "rope_factors_long", np.ones(7), "rope_factors_long.weight is not supported in this architecture"),
        ("gemma3", "rope_freqs", np.ones(8), "rope_freqs.weight is not supported in this architecture"),
        ("phi35_mini_longrope", "rope_factors_short", np.ones(5), r"short.weight: expected shape \[6\], found \[5\]"),
        ("gemma4_moe", "rope_freqs", np.ones(5), r"rope_freqs.weight: expected shape \[8\], found \[5\]"),
    ],
)
def test_frequencies_that_do_not_fit(written, name, tensor, divisors, message):
    _, path = written(name, change=lambda t: t.update({f"{tensor}.weight": divisors.astype(np.float32)}))
    with pytest.raises(ConfigError, match=message):
        llmjax.load(path)


def test_inspect_says_what_is_not_supported(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.add_tensor("blk.0.ssm_a.weight", np.ones((4, 4), np.float32))
    gguf_files.finish(writer)
    report = llmjax.inspect(tmp_path / "x.gguf")
    assert not report.supported and report.model_type == "mamba"
    assert "general.architecture 'mamba' is not supported" in report.problems[0]


@pytest.mark.parametrize(
    ("name", "pre"),
    [
        ("gemma_2b", None),
        ("llama", "llama-bpe"),
        ("phi2", "phi-2"),
        ("qwen2", "qwen2"),
        ("stablelm_3b", "olmo"),
        ("falcon_rw", "gpt-2"),
    ],
)
def test_tokenizers_give_the_same_ids(tmp_path, name, pre):
    """Through a file with the converter's keys, on texts whose ids the tokenizers' own libraries gave."""
    folder = Path(__file__).parents[1] / "data/tokenizers" / name
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    gguf_files.tokenizer(folder, pre, size=500)(writer)
    gguf_files.finish(writer)
    ours = from_gguf(GgufSource(tmp_path / "x.gguf").metadata, tmp_path / "x.gguf")
    theirs = from_huggingface(folder)
    assert (ours.bos_id, ours.add_bos, ours.chat_template) == (theirs.bos_id, theirs.add_bos, theirs.chat_template)
    assert set(ours.eos_ids) >= set(theirs.eos_ids)
    random = np.random.default_rng(0)
    noise = ["".join(map(chr, random.choice([*range(9, 14), *range(32, 0x3100)], 60))) for _ in range(50)]
    for text in [row["text"] for row in json.loads((folder / "tokenizer_cases.json").read_text())["rows"]] + noise:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))


def test_the_demo_model_survives_being_written(smollm2_path, tmp_path):
    """Read, written by the gguf package, read: the same metadata, bytes and report."""
    source = GgufSource(smollm2_path)
    writer = gguf.GGUFWriter(tmp_path / "again.gguf", "llama")
    for key, value in source.metadata.items():
        if key != "general.architecture":
            plain = value.tolist() if isinstance(value, np.ndarray) else value
            writer.add_key_value(key, plain, gguf.GGUFValueType.get_type(plain))
    for name in source.names():
        spec = source.spec(name)
        kind = gguf.GGMLQuantizationType[spec.dtype]
        raw = source.raw(name).reshape(*spec.shape[:-1], -1)
        writer.add_tensor(name, raw.view(np.float32) if spec.dtype == "F32" else raw, raw_dtype=kind)
    gguf_files.finish(writer)
    before, after = llmjax.inspect(smollm2_path), llmjax.inspect(tmp_path / "again.gguf")
    assert after.supported and dataclasses.replace(after, path=before.path) == before
    again = GgufSource(tmp_path / "again.gguf")
    for name in source.names():
        assert again.raw(name).tobytes() == source.raw(name).tobytes()
