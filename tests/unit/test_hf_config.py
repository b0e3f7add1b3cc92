"""Strict configs: every key is used, irrelevant, or refused by name; absent keys take transformers' class defaults."""

import dataclasses
import math

import numpy as np
import pytest

from llmjax.errors import ConfigError
from llmjax.models.generation_keys import HEEDED, NEUTRAL
from llmjax.models.registry import architectures, read_config
from llmjax.models.rope import Rope
from llmjax.models.scalings import Dynamic, LongRope, Yarn

SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
RW = {"alibi": True, "multi_query": False, "parallel_attn": False}
# Nested: its text model's keys lie one level down.
NESTED = {"gemma3", "gemma3n", "gemma4", "mistral3", "qwen3_5"}
MINIMAL = {kind: SIZES for kind in architectures() if kind not in NESTED} | {
    "gemma": SIZES | {"num_key_value_heads": 1, "head_dim": 20},
    "mistral": SIZES | {"num_key_value_heads": 2},
    "qwen2": SIZES | {"num_key_value_heads": 2},
    "qwen3": SIZES | {"num_key_value_heads": 2},
    "falcon": {k: v for k, v in SIZES.items() if k != "intermediate_size"} | RW,
    "stablelm": SIZES | {"num_key_value_heads": 4},
    "gemma3n_text": SIZES | {"num_key_value_heads": 2, "num_kv_shared_layers": 0},
    "gemma4_text": SIZES | {"vocab_size_per_layer_input": 100},
    "lfm2": SIZES | {"num_key_value_heads": 2},
    "ministral": SIZES | {"num_key_value_heads": 2},
    "ministral3": SIZES | {"num_key_value_heads": 2},
    "qwen3_5_text": SIZES | {"num_key_value_heads": 2},
}
EVERY = pytest.mark.parametrize("kind", sorted(MINIMAL))


def read(kind, drop=(), **changes):
    config = {"model_type": kind, **MINIMAL[kind], **changes}
    return read_config({k: v for k, v in config.items() if k not in drop}, "config.json")[1]


def refusal(kind, drop=(), **changes):
    with pytest.raises(ConfigError) as error:
        read(kind, drop, **changes)
    return str(error.value)


@EVERY
def test_an_unknown_key_is_refused_by_name_and_value(kind):
    assert "mystery: llmjax does not know this key (value 7)" in refusal(kind, mystery=7)


def test_what_generation_heeds_or_warns_of_is_no_business_of_the_model():
    """``config.json`` may hold it where no ``generation_config.json`` lies beside it."""
    keys = dict.fromkeys([*HEEDED, *NEUTRAL, "do_sample", "max_length", "suppress_tokens"], 7)
    assert read("llama", **keys) == read("llama")


def test_a_single_problem_takes_one_line():
    assert refusal("phi3", mystery=7).startswith("config.json: mystery: llmjax does not know this key")


@EVERY
def test_all_problems_come_at_once(kind):
    message = refusal(kind, drop=["vocab_size"], mystery=7, num_hidden_layers="three")
    for problem in ("mystery", "vocab_size: missing", "num_hidden_layers: expected a positive integer, found 'three'"):
        assert problem in message


@EVERY
@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_sizes_are_never_guessed(kind, key):
    assert f"{key}: missing" in refusal(kind, drop=[key])


@EVERY
def test_bookkeeping_and_training_keys_are_irrelevant(kind):
    noise = {"torch_dtype": "bfloat16", "dtype": "float16", "use_cache": True, "initializer_range": 0.02}
    noise |= {"attention_dropout": 0.1, "hidden_dropout": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}
    noise |= {"num_labels": 2, "id2label": {"0": "LABEL_0"}}
    assert read(kind, **noise) == read(kind)


@pytest.mark.parametrize("kind", sorted(set(MINIMAL) - {"lfm2"}))
def test_unknown_activation(kind):
    other = {"gemma2", "gemma3_text", "gemma3n_text", "gemma4_text"}
    key = "activation" if kind == "falcon" else "hidden_activation" if kind in other else "hidden_act"
    assert f"{key}: 'xielu' is not supported" in refusal(kind, **{key: "xielu"})


@EVERY
def test_config_is_hashable(kind):
    assert hash(read(kind)) == hash(read(kind))


# Others have a rotation for each kind of layer, one that is more than a rotation, or of one type alone.
SEVERAL = {"gemma3_text", "gemma3n_text", "gemma4_text", "olmo3", "ministral3", "phi3"}
ROTARY = pytest.mark.parametrize("kind", sorted(set(MINIMAL) - {"falcon"} - SEVERAL))


@ROTARY
def test_both_rope_dialects(kind):
    old = read(kind, rope_theta=5e3, rope_scaling={"type": "linear", "factor": 2.0})
    new = read(kind, rope_parameters={"rope_type": "linear", "rope_theta": 5e3, "factor": 2.0})
    assert old == new
    assert (old.rope.theta, old.rope.linear) == (5e3, 2.0)


@ROTARY
def test_two_descriptions_of_one_rope_must_agree(kind):
    """transformers takes the older one and drops the newer whole, its base, too."""
    linear = {"rope_type": "linear", "factor": 2.0}
    both = read(kind, rope_theta=5e3, rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters=linear)
    assert both == read(kind, rope_theta=5e3, rope_scaling=linear)
    assert read(kind, rope_scaling={}, rope_parameters=linear) == read(kind, rope_scaling=linear)
    for other in ({"factor": 3.0}, {"rope_type": "dynamic"}, {"rope_theta": 7.0}):
        message = refusal(kind, rope_scaling=linear, rope_parameters=linear | other)
        assert "rope_scaling and rope_parameters: two descriptions of one rope" in message


def test_what_one_description_of_a_rope_leaves_to_its_default_the_other_may_say():
    """transformers 5 writes all of it into ``rope_parameters``."""
    linear = {"rope_type": "linear", "factor": 2.0}
    assert (
        read("falcon", alibi=False, rope_scaling=linear, rope_parameters=linear | {"rope_theta": 1e4}).rope.theta == 1e4
    )
    assert read("phi3", rope_scaling={"type": "default"}, rope_parameters={"partial_rotary_factor": 1.0})
    long = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    whole = {"rope_scaling": long, "original_max_position_embeddings": 8, "max_position_embeddings": 32}
    inside = long | {"original_max_position_embeddings": 8, "rope_theta": 1e4}
    assert read("phi3", **whole, rope_parameters=inside) == read("phi3", **whole)
    message = refusal("phi3", **whole, rope_parameters=inside | {"original_max_position_embeddings": 16})
    assert "two descriptions of one rope" in message


def test_descriptions_of_global_layers_must_agree():
    parameters = {"full_attention": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 7.0}}
    both = read("olmo3", rope_scaling={"type": "yarn", "factor": 4.0}, rope_parameters=parameters)
    assert both == read("olmo3", rope_parameters=parameters)
    message = refusal("olmo3", rope_scaling={"type": "yarn", "factor": 2.0}, rope_parameters=parameters)
    assert "rope_scaling and rope_parameters.full_attention: two descriptions" in message


@pytest.mark.parametrize("kind", ["gemma3_text", "gemma3n_text", "olmo3"])
def test_a_kind_of_scaling_that_not_every_transformers_reads_is_refused(kind):
    """5 writes its own default beside ``type`` where global layers alone are scaled, and goes by that."""
    linear = {"type": "linear", "factor": 2.0}
    assert "rope_scaling.type: 'linear' scales the rotation of global" in refusal(kind, rope_scaling=linear)
    assert read(kind, rope_scaling=linear | {"rope_type": "linear"}) != read(kind)
    assert read(kind, rope_scaling={"type": "default"}) == read(kind)


@ROTARY
def test_other_rope_types_are_refused(kind):
    message = refusal(kind, rope_parameters={"rope_type": "axial", "factor": 2.0})
    assert "rope_type: 'axial' is not supported" in message


class TestRopeTypes:
    def test_yarn(self):
        scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
        assert read("llama", rope_scaling=scaling).rope.scaling == Yarn(4.0, 32.0)
        assert read("llama", rope_scaling=scaling).rope.scaling.attention_factor == 0.1 * math.log(4) + 1
        ratio = read("llama", rope_scaling=scaling | {"mscale": 2.0, "mscale_all_dim": 1.0}).rope.scaling
        assert ratio.attention_factor == (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1)
        alone = read("llama", rope_scaling=scaling | {"mscale": 2.0}).rope.scaling
        assert alone.attention_factor == 0.1 * math.log(4) + 1
        explicit = read("llama", rope_scaling=scaling | {"attention_factor": 1.5, "beta_fast": None, "beta_slow": 0})
        assert explicit.rope.scaling == Yarn(4.0, 32.0, attention=1.5)
        assert read("llama", rope_scaling={"type": "yarn", "factor": 4.0}).rope.scaling.original == 2048
        for idle in ({"finetuned": True}, {"mystery": None}):  # the former in the paper's own models
            assert read("llama", rope_scaling=scaling | idle).rope.scaling == Yarn(4.0, 32.0)
        assert "mystery" in refusal("llama", rope_scaling=scaling | {"mystery": 1})
        for value, whole in ((True, True), (False, False), (None, False)):  # as transformers takes null
            assert read("llama", rope_scaling=scaling | {"truncate": value}).rope.scaling.truncate is whole

    @pytest.mark.parametrize(
        ("scaling", "context"),
        [
            ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
            ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}, 64),
            ({"type": "dynamic", "factor": 4.0}, 256),
            ({"type": "dynamic", "factor": 1e6}, 64_000_000),
            ({"type": "dynamic", "factor": 0.5}, 64),
            ({"type": "linear", "factor": 4.0}, 64),
        ],
    )
    def test_the_context_that_a_rope_was_stretched_to(self, scaling, context):
        """Qwen2.5's model cards add such a rope and leave the length; others have multiplied it already."""
        found = read("qwen2", rope_scaling=scaling, max_position_embeddings=64)
        assert found.max_position_embeddings == context
        huge = read("qwen2", rope_scaling=scaling | {"factor": 1e6}, max_position_embeddings=2**30)
        assert huge.max_position_embeddings <= 2**31 - 1

    def test_dynamic_stretches_the_declared_context(self):
        rope = read("llama", rope_scaling={"type": "dynamic", "factor": 4.0}, max_position_embeddings=64).rope
        assert rope.scaling == Dynamic(4.0, 64)
        config = read("llama", rope_scaling={"type": "dynamic", "factor": 4.0}, max_position_embeddings=64)
        assert [config.length_kind(n) for n in (1, 64, 65)] == [64, 64, 65] and config.renewal is None

    def test_the_declared_context_of_every_kind(self):
        """Where ropes are one for all layers."""
        for kind in sorted(set(MINIMAL) - SEVERAL):
            config = read(kind, rope_scaling={"type": "dynamic", "factor": 4.0}, max_position_embeddings=64, alibi=None)
            assert config.rope.scaling == Dynamic(4.0, 64), kind

    def test_ministral3(self):
        """Its default is one object: a rope given in part has no part of it."""
        assert read("ministral3").rope.theta == 1e6
        own = {k: v for k, v in MINISTRAL.items() if k != "rope_theta"}
        for dialect in ("rope_scaling", "rope_parameters"):
            config = read("ministral3", **{dialect: own | {"factor": 3.0}})
            assert (config.rope.theta, config.rope.scaling.factor, config.beta) == (1e4, 3.0, 0.1)
            # Scores grow by the context that the rotation was trained for, which stands beside the object or in it.
            for inner in ({}, {"original_max_position_embeddings": 16}):
                rope = {k: v for k, v in own.items() if k != "original_max_position_embeddings"} | inner
                for beside in ({}, {"original_max_position_embeddings": 8}):
                    config = read("ministral3", max_position_embeddings=64, **{dialect: rope}, **beside)
                    expected = {"original_max_position_embeddings": 64, **inner, **beside}
                    assert [config.original, config.rope.scaling.original] == 2 * list(expected.values())

    def test_a_local_base_is_not_the_global_one(self):
        """OLMo 3: transformers' one base is for global layers, and their scaling as well."""
        scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8}
        config = read("olmo3", rope_theta=1e4, rope_scaling=scaling)
        assert (config.rope.theta, config.local_rope.theta) == (1e4, 5e5)
        assert (config.rope.scaling, config.local_rope.scaling) == (Yarn(8.0, 8.0), None)
        # Which transformers does not read there, where layers have ropes of two kinds.
        for kind in ("olmo3", "gemma3_text", "gemma3n_text"):
            message = refusal(kind, rope_scaling=scaling, original_max_position_embeddings=16)
            assert "original_max_position_embeddings: llmjax does not know this key" in message

    @ROTARY
    def test_two_names_of_one_type_must_agree(self, kind):
        """As transformers saves what it took for the default."""
        scaling = {"type": "linear", "factor": 2.0}
        message = refusal(kind, rope_parameters=scaling | {"rope_type": "default"})
        assert "rope_type: 'default' contradicts type, which says 'linear'" in message
        assert read(kind, rope_parameters=scaling | {"rope_type": "linear"}) == read(kind, rope_parameters=scaling)
        assert "rope_type: '' is not supported" in refusal(kind, rope_parameters={"rope_type": ""})

    def test_two_global_layers_shortened(self):
        """Not every pair is about two layers."""
        config = read("gemma4_text", num_hidden_layers=2, layer_types=["full_attention"] * 2, global_head_dim=24)
        assert config.shortened(1).attention(0) == config.attention(1) == (4, 24)

    def test_proportional(self):
        rope = read("gemma4_text").global_rope
        assert (rope.theta, rope.dims, rope.turning) == (1e6, 512, 64)
        assert np.count_nonzero(rope.frequencies()) == 64
        assert read("gemma4_text").local_rope == Rope(1e4, 256)


def test_a_scale_that_transformers_saves_and_does_not_apply():
    architecture, name = architectures()["gemma3n_text"], "model.layers.3.altup.correct_output_scale"
    assert architecture.drops(name, read("gemma3n_text", altup_correct_scale=False))
    assert not architecture.drops(name, read("gemma3n_text"))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"])
def test_whole_heads_rotate(kind):
    assert read(kind, partial_rotary_factor=1.0) == read(kind, partial_rotary_factor=None) == read(kind)
    assert "partial_rotary_factor: 0.5 is not supported here" in refusal(kind, partial_rotary_factor=0.5)


@pytest.mark.parametrize(
    ("kind", "default"), [("phi", 8), ("stablelm", 4)], ids=["phi: half of 16", "stablelm: a quarter of 16"]
)
def test_partial_rotation(kind, default):
    assert read(kind).rope == Rope(10000.0, default)
    assert read(kind, partial_rotary_factor=0.4).rope.dims == 6
    assert read(kind, rope_parameters={"partial_rotary_factor": 0.4, "rope_theta": 1e4}).rope.dims == 6
    assert "rotary width: 16 * 0.2 = 3" in refusal(kind, partial_rotary_factor=0.2)
    assert "partial_rotary_factor: expected a number in (0, 1]" in refusal(kind, partial_rotary_factor=None)


def test_class_defaults_of_heads():
    assert read("gemma", drop=["head_dim"]).head_dim == 256
    assert read("gemma2").head_dim == 256
    assert read("gemma2").num_key_value_heads == 4
    assert read("phi").num_key_value_heads == 4
    assert read("gemma", drop=["num_key_value_heads"], num_attention_heads=16).num_key_value_heads == 16
    assert read("gemma3_text").num_key_value_heads == 4
    assert read("mistral", drop=["num_key_value_heads"], num_attention_heads=16).num_key_value_heads == 8
    assert read("qwen3").head_dim == 128
    assert read("qwen2").head_dim == 16
    assert read("mistral", num_key_value_heads=None).num_key_value_heads == 4
    message = refusal("stablelm", drop=["num_key_value_heads"])
    assert "num_attention_heads: 4 is not a multiple of num_key_value_heads 32" in message


@pytest.mark.parametrize(
    ("kind", "tied"),
    [
        ("llama", False),
        ("mistral", False),
        ("qwen2", False),
        ("qwen3", False),
        ("gemma", True),
        ("gemma2", True),
        ("gemma3_text", True),
        ("phi", False),
        ("phi3", False),
        ("falcon", True),
        ("stablelm", False),
    ],
)
def test_class_default_of_the_head(kind, tied):
    assert read(kind).tie_word_embeddings is tied
    assert read(kind, tie_word_embeddings=not tied).tie_word_embeddings is not tied


@pytest.mark.parametrize(
    ("kind", "context"),
    [
        ("llama", 2048),
        ("mistral", 131072),
        ("qwen2", 32768),
        ("qwen3", 32768),
        ("gemma", 8192),
        ("gemma2", 8192),
        ("gemma3_text", 131072),
        ("phi", 2048),
        ("phi3", 4096),
        ("falcon", 2048),
        ("stablelm", 4096),
    ],
)
def test_class_default_of_the_context(kind, context):
    assert read(kind).max_position_embeddings == context


class TestGemma:
    def test_gelu_means_tanh(self):
        assert read("gemma", hidden_act="gelu").hidden_act == "gelu_pytorch_tanh"

    def test_hidden_activation_may_only_agree(self):
        expected = read("gemma")
        assert read("gemma", hidden_act="gelu", hidden_activation=None) == expected
        assert read("gemma", hidden_act="gelu", hidden_activation="gelu_pytorch_tanh") == expected
        assert "hidden_activation: 'relu' contradicts hidden_act" in refusal("gemma", hidden_activation="relu")

    @pytest.mark.parametrize("kind", ["gemma", "gemma2"])
    def test_bidirectional_attention(self, kind):
        read(kind, use_bidirectional_attention=False)
        message = refusal(kind, use_bidirectional_attention=True)
        assert "use_bidirectional_attention: True is not supported" in message

    def test_attention_bias_is_honoured(self):
        assert read("gemma", attention_bias=True).attention_bias


class TestGemma2:
    def test_layers_alternate_and_the_first_slides(self):
        assert read("gemma2", sliding_window=8).windows == (8, None, 8, None)
        assert read("gemma2").windows == (4096, None, 4096, None)

    def test_layer_types_win(self):
        types = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
        assert read("gemma2", sliding_window=8, layer_types=types).windows == (None, None, 8, None)

    @pytest.mark.parametrize(
        "types", [["full_attention"] * 3, ["chunked_attention"] * 4, "full_attention", [["full_attention"]] * 4]
    )
    def test_wrong_layer_types(self, types):
        assert "layer_types: expected 4 of" in refusal("gemma2", layer_types=types)

    def test_null_window(self):
        assert "sliding_window: null" in refusal("gemma2", sliding_window=None)
        full = read("gemma2", sliding_window=None, layer_types=["full_attention"] * 4)
        assert full.windows == (None,) * 4

    def test_caps_absent_null_and_given(self):
        caps = ("attn_logit_softcapping", "final_logit_softcapping")
        assert [getattr(read("gemma2"), c) for c in caps] == [50.0, 30.0]
        assert [getattr(read("gemma2", **{c: None}), c) for c in caps] == [None, None]
        assert [getattr(read("gemma2", **{c: 7}), c) for c in caps] == [7.0, 7.0]
        assert "final_logit_softcapping: expected a positive number, found 0" in refusal(
            "gemma2", final_logit_softcapping=0
        )

    def test_hidden_act_is_not_the_activation(self):
        assert read("gemma2", hidden_act="relu", cache_implementation="hybrid") == read("gemma2")


class TestGemma3:
    def test_every_sixth_layer_is_global(self):
        windows = read("gemma3_text", num_hidden_layers=13, sliding_window=8).windows
        assert windows == ((8,) * 5 + (None,)) * 2 + (8,)

    def test_the_pattern(self):
        assert read("gemma3_text", sliding_window_pattern=2).windows == (4096, None, 4096, None)
        types = ["full_attention"] * 3 + ["sliding_attention"]
        assert read("gemma3_text", layer_types=types, sliding_window_pattern=2).windows == (None, None, None, 4096)

    def test_the_pattern_that_transformers_writes_beside_the_types_and_does_not_read(self):
        other = "_sliding_window_pattern"
        types = ["full_attention"] * 3 + ["sliding_attention"]
        assert read("gemma3_text", layer_types=types, **{other: 2}).windows == (None, None, None, 4096)
        assert read("gemma3_text", **{other: 6}) == read("gemma3_text")
        assert read("gemma3_text", sliding_window_pattern=2, **{other: 2}).windows == (4096, None, 4096, None)
        assert f"{other}: 2 is not supported, expected 6" in refusal("gemma3_text", **{other: 2})
        assert f"{other}: 6 is not supported, expected 2" in refusal(
            "gemma3_text", sliding_window_pattern=2, **{other: 6}
        )

    def test_rotations_in_both_dialects(self):
        scaling = {"rope_type": "linear", "factor": 8.0}
        old = read("gemma3_text", rope_theta=5e5, rope_local_base_freq=2e4, rope_scaling=scaling)
        assert old.global_rope == Rope(5e5, 256, linear=8.0)
        assert old.local_rope == Rope(2e4, 256)
        kinds = {"full_attention": scaling | {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 2e4}}
        assert read("gemma3_text", rope_parameters=kinds) == old
        assert read("gemma3_text").global_rope == Rope(1e6, 256)
        assert read("gemma3_text").local_rope == Rope(1e4, 256)

    def test_rope_parameters_without_kinds(self):
        message = refusal("gemma3_text", rope_parameters={"rope_theta": 1e4})
        assert "rope_parameters.rope_theta: expected an object for each of 'full_attention'" in message
        assert "rope_parameters: expected an object, found [1]" in refusal("gemma3_text", rope_parameters=[1])

    def test_other_rope_types_are_refused(self):
        message = refusal("gemma3_text", rope_scaling={"rope_type": "axial", "factor": 2.0})
        assert "rope_type: 'axial' is not supported" in message

    def test_soft_caps(self):
        assert read("gemma3_text").final_logit_softcapping is None
        assert read("gemma3_text", final_logit_softcapping=7).final_logit_softcapping == 7.0
        assert read("gemma3_text", attn_logit_softcapping=50.0) == read("gemma3_text")  # as transformers


class TestGemma3Multimodal:
    TEXT = {k: v for k, v in SIZES.items() if k not in ("vocab_size", "num_attention_heads")}

    def read(self, text=None, **top):
        config = {"model_type": "gemma3", "text_config": self.TEXT | (text or {}), "vision_config": {"any": 1}, **top}
        return read_config(config, "config.json")[1]

    def refusal(self, *args, **kwargs):
        with pytest.raises(ConfigError) as error:
            self.read(*args, **kwargs)
        return str(error.value)

    def test_the_text_model_with_the_defaults_that_published_files_rely_on(self):
        found = self.read()
        expected = read("gemma3_text", vocab_size=262208, num_attention_heads=8)
        assert dataclasses.asdict(found) == dataclasses.asdict(expected)
        assert self.read({"num_attention_heads": 16, "sliding_window": 8}).windows[0] == 8

    def test_problems_name_the_section(self):
        message = self.refusal({"mystery": 7, "num_hidden_layers": "three"}, other=1)
        for problem in ("other: llmjax", "text_config.mystery: llmjax", "text_config.num_hidden_layers: expected a"):
            assert f"\n  {problem}" in message
        assert "text_config: expected an object, found None" in self.refusal(text_config=None)

    @pytest.mark.parametrize("tied", [True, False])
    def test_the_head_is_tied_as_the_outer_object_says(self, tied):
        """transformers asks no other, and saves the text model's own default beside it."""
        assert self.read(tie_word_embeddings=tied).tie_word_embeddings is tied
        assert self.read({"tie_word_embeddings": not tied}, tie_word_embeddings=tied).tie_word_embeddings is tied
        message = self.refusal({"tie_word_embeddings": "no"}, tie_word_embeddings=tied)
        assert "text_config.tie_word_embeddings: expected true or false, found 'no'" in message

    def test_where_the_outer_object_says_nothing_of_the_head_the_text_model_does_not_contradict_its_default(self):
        assert "text_config.tie_word_embeddings: False is not" in self.refusal({"tie_word_embeddings": False})

    def test_tokens_of_images_by_both_names(self):
        assert self.read(image_token_id=7, boi_token_id=8, eoi_token_id=9) == self.read(image_token_index=7)

    def test_a_cap_that_transformers_applies_to_the_text_model_alone(self):
        assert "text_config.final_logit_softcapping: transformers applies" in self.refusal(
            {"final_logit_softcapping": 30.0}
        )

    def test_another_text_model(self):
        assert "text_config.model_type: 'gemma2' is not supported" in self.refusal({"model_type": "gemma2"})


class TestMistral:
    def test_all_layers_slide(self):
        assert read("mistral").windows == (4096,) * 4
        assert read("mistral", sliding_window=8).windows == (8,) * 4
        assert read("mistral", sliding_window=None).windows == (None,) * 4

    def test_those_that_slide_are_as_layer_types_says(self):
        """With that key transformers makes a Ministral of it, which is a Mistral but for its windows."""
        kinds = ["full_attention", "sliding_attention"] * 2
        assert read("mistral", sliding_window=8, layer_types=kinds).windows == (None, 8, None, 8)
        assert read("mistral", sliding_window=None, layer_types=["full_attention"] * 4).windows == (None,) * 4
        with pytest.raises(ConfigError, match="sliding_window: null or switched off, but there are layers of type"):
            read("mistral", sliding_window=None, layer_types=kinds)


class TestQwen:
    KINDS = pytest.mark.parametrize("kind", ["qwen2", "qwen3"])

    @KINDS
    def test_windows_are_off_unless_switched_on(self, kind):
        assert read(kind, sliding_window=8, max_window_layers=1).windows == (None,) * 4
        on = {"use_sliding_window": True, "sliding_window": 8}
        assert read(kind, **on).windows == (None,) * 4
        assert read(kind, **on, max_window_layers=1).windows == (None, 8, 8, 8)
        assert read(kind, **on, max_window_layers=0).windows == (8,) * 4
        assert read(kind, **(on | {"sliding_window": None}), max_window_layers=1).windows == (None,) * 4

    @KINDS
    def test_layer_types_win(self, kind):
        types = ["sliding_attention", "full_attention", "full_attention", "full_attention"]
        on = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
        assert read(kind, **on, layer_types=types).windows == (8, None, None, None)
        assert "sliding_window: null or switched off" in refusal(kind, sliding_window=8, layer_types=types)

    def test_biases_and_norms(self):
        def options(c):
            return c.qkv_bias, c.out_bias, c.mlp_bias, c.qk_norm

        assert options(read("qwen2")) == (True, False, False, False)
        assert options(read("qwen3")) == (False, False, False, True)
        assert options(read("qwen3", attention_bias=True)) == (True, True, False, True)
        assert options(read("llama", attention_bias=True, mlp_bias=True)) == (True, True, True, False)


class TestPhi3:
    def test_whole_heads_rotate_unless_said_otherwise(self):
        assert read("phi3").rope == Rope(10000.0, 16)
        assert read("phi3", partial_rotary_factor=0.75).rope.dims == 12
        assert read("phi3", rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.75}).rope.dims == 12

    def test_window(self):
        assert read("phi3").windows == (None,) * 4
        assert read("phi3", sliding_window=8).windows == (8,) * 4

    @pytest.mark.parametrize("kind", ["su", "longrope", "yarn"])
    def test_long_context_models(self, kind):
        scaling = {"type": kind, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
        own = {"original_max_position_embeddings": 16, "max_position_embeddings": 256}
        config = read("phi3", rope_scaling=scaling, **own)
        assert config.rope.scaling == LongRope((1.0,) * 8, (2.0,) * 8, 16, (1 + math.log(16) / math.log(16)) ** 0.5)
        assert config.renewal == 16
        assert [config.length_kind(n) for n in (1, 16, 17)] == [0, 0, 1]
        message = refusal("phi3", rope_scaling=scaling | {"short_factor": [1.0] * 7}, **own)
        assert "rope parameter short_factor: expected 8 positive numbers" in message

    def test_the_original_context_stands_beside_the_rope(self):
        """transformers reads it there, 4096 where it is absent, whatever the rope says."""
        scaling = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
        rope = read("phi3", rope_scaling=scaling | {"original_max_position_embeddings": 16}).rope
        assert rope.scaling.original == 4096

    @pytest.mark.parametrize("scaling", [{"type": "linear", "factor": 2.0}, {"rope_type": "yarn", "factor": 2.0}])
    def test_other_scalings(self, scaling):
        """transformers, and what reads configs by it, has none for this model, and yarn is a name of longrope there."""
        assert "rope_scaling: no version of transformers" in refusal("phi3", rope_scaling=scaling)
        assert "rope_scaling: no version of transformers" in refusal("phi3", rope_parameters=scaling)

    def test_no_biases(self):
        assert read("phi3", attention_bias=False, original_max_position_embeddings=4096) == read("phi3")
        assert "attention_bias: True is not supported" in refusal("phi3", attention_bias=True)


@pytest.mark.parametrize(
    ("outer", "inner", "tied"), [(True, False, True), (False, True, False), (None, True, True), (None, None, False)]
)
def test_the_head_of_mistral3_is_as_the_outer_object_says(outer, inner, tied):
    text = {"model_type": "ministral3", **MINIMAL["ministral3"], "tie_word_embeddings": inner}
    config = {"model_type": "mistral3", "text_config": text, "vision_config": {}, "tie_word_embeddings": outer}
    assert read_config(config, "config.json")[1].tie_word_embeddings is tied


@pytest.mark.parametrize("named", [{"model_type": "mistral"}, {}])
def test_the_text_model_of_mistral3_may_be_mistral(named):
    """As in Mistral Small 3.1; transformers takes it where the text model has no name."""
    options = {"num_key_value_heads": 2, "head_dim": 20, "rope_theta": 1e9, "rms_norm_eps": 1e-5, "sliding_window": 3}
    text = {**SIZES, **options, **named}
    config = {"model_type": "mistral3", "text_config": text, "vision_config": {"model_type": "pixtral"}}
    assert read_config(config, "config.json")[1] == read("mistral", **options)
    with pytest.raises(ConfigError, match="text_config.model_type: 'llama' is not supported, expected 'mistral' or"):
        read_config(config | {"text_config": text | {"model_type": "llama"}}, "config.json")
    kinds = ["sliding_attention", "full_attention"] * 2
    with pytest.raises(ConfigError, match="text_config.layer_types: .* is not supported"):  # transformers: all slide
        read_config(config | {"text_config": text | {"layer_types": kinds}}, "config.json")


def test_keys_that_published_configs_keep_of_other_code():
    """Qwen3-Coder's, LFM2.5's, DeepSeek-R1-0528-Qwen3's."""
    own = {"qkv_bias": False, "shared_expert_intermediate_size": 0, "use_qk_norm": True}
    assert read("qwen3_moe", **own) == read("qwen3_moe")
    for key, value in own.items():
        other = 8 if key.startswith("shared") else not value
        assert f"{key}: {other} is not supported" in refusal("qwen3_moe", **own | {key: other})
    assert read("lfm2", ffn_te_autocast=False, block_ffn_te_autocast=False) == read("lfm2")
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attn_factor": 0.878}
    assert "attn_factor: transformers leaves it out, vLLM multiplies" in refusal("qwen3", rope_scaling=yarn)


SEVEN_B = {"alibi": False, "multi_query": True, "parallel_attn": True}
FORTY_B = SEVEN_B | {"new_decoder_architecture": True, "num_kv_heads": 2}


class TestFalcon:
    @pytest.mark.parametrize(
        ("key", "value"), [("apply_residual_connection_post_layernorm", True), ("head_dim", 8), ("n_embed", 32)]
    )
    def test_what_transformers_does_not_do_either(self, key, value):
        assert f"{key}: {value} is not supported" in refusal("falcon", **{key: value})

    def test_an_absent_key_means_falcon_7b(self):
        assert read("falcon", drop=RW) == read("falcon", **SEVEN_B)

    def test_layouts(self):
        def layout(c):
            return c.num_key_value_heads, c.rope is not None, c.parallel_attn, c.separate_norms

        assert layout(read("falcon")) == (4, False, False, False)
        assert layout(read("falcon", **SEVEN_B)) == (1, True, True, False)
        assert layout(read("falcon", **FORTY_B)) == (2, True, True, True)
        assert layout(read("falcon", **FORTY_B, num_ln_in_parallel_attn=1)) == (2, True, True, False)

    @pytest.mark.parametrize("multi_query", [True, False])
    def test_40b_ignores_multi_query(self, multi_query):
        assert read("falcon", **(FORTY_B | {"multi_query": multi_query})) == read("falcon", **FORTY_B)

    def test_null_is_false(self):
        """To transformers, whose class has no checked fields."""
        keys = ("multi_query", "parallel_attn", "tie_word_embeddings")
        assert read("falcon", **dict.fromkeys(keys)) == read("falcon", **dict.fromkeys(keys, False))

    def test_7b_ignores_its_number_of_key_heads(self):
        assert read("falcon", **SEVEN_B, num_kv_heads=71) == read("falcon", **SEVEN_B)

    def test_contradictions(self):
        assert "num_kv_heads: 2 is not supported without new_decoder_architecture" in refusal("falcon", num_kv_heads=2)
        assert "not a multiple of num_kv_heads 3" in refusal("falcon", **(FORTY_B | {"num_kv_heads": 3}))
        assert "parallel_attn: False is not supported with" in refusal("falcon", **(FORTY_B | {"parallel_attn": False}))
        assert "num_ln_in_parallel_attn: 2 is not" in refusal("falcon", **SEVEN_B, num_ln_in_parallel_attn=2)
        assert "num_ln_in_parallel_attn: 3 is not" in refusal("falcon", **FORTY_B, num_ln_in_parallel_attn=3)

    @pytest.mark.parametrize("key", ["n_head", "n_layer"])
    def test_names_of_refined_web_model(self, key):
        assert f"{key}: llmjax does not know this key" in refusal("falcon", **{key: 4})

    def test_rotation(self):
        assert read("falcon", **SEVEN_B).rope == Rope(10000.0, 16)
        scaling = {"type": "linear", "factor": 2.0}
        assert read("falcon", **SEVEN_B, rope_theta=5e3, rope_scaling=scaling).rope == Rope(5e3, 16, linear=2.0)
        assert "'axial' is not supported" in refusal("falcon", **SEVEN_B, rope_scaling={"type": "axial"})

    def test_mlp_width_defaults_to_four_times_the_model(self):
        assert read("falcon").intermediate_size == 256
        assert read("falcon", ffn_hidden_size=100).intermediate_size == 100

    def test_keys_of_other_layouts_are_irrelevant_to_rw(self):
        others = {"rope_theta": 5e3, "rope_scaling": {"type": "dynamic"}, "num_ln_in_parallel_attn": 2}
        assert read("falcon", **others) == read("falcon")

    def test_heads_must_divide_the_width(self):
        assert "hidden_size: 64 is not a multiple of num_attention_heads 5" in refusal("falcon", num_attention_heads=5)


class TestStableLm:
    def test_head_width_is_not_free(self):
        assert "head_dim: 20 is not supported, expected 16" in refusal("stablelm", head_dim=20)

    @pytest.mark.parametrize("key", ["use_qkv_bias", "qk_layernorm", "use_parallel_residual"])
    def test_options_are_honoured(self, key):
        assert getattr(read("stablelm"), key) is False
        assert getattr(read("stablelm", **{key: True}), key) is True
        assert f"{key}: expected true or false, found 'yes'" in refusal("stablelm", **{key: "yes"})


YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
LONG = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
MINISTRAL = YARN | {"rope_theta": 1e4, "llama_4_scaling_beta": 0.1}
ALTUP = {"altup_num_inputs": 3}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gemma3n_text", ALTUP | {"altup_active_idx": 3}, "altup_active_idx: expected one of 3 streams, found 3"),
        ("gemma3n_text", {"num_kv_shared_layers": 4}, "num_kv_shared_layers: 4 of 4 layers take keys and values"),
        ("gemma3n_text", {"num_kv_shared_layers": 9}, "num_kv_shared_layers: 9 of 4 layers take keys and values"),
        ("gemma3n_text", {"intermediate_size": [96, 96]}, "intermediate_size: expected a number for each of 4"),
        ("gemma3n_text", {"intermediate_size": 10**30}, "intermediate_size: expected a number for each of 4"),
        ("gemma3n_text", {"activation_sparsity_pattern": 1.0}, "sparsity_pattern: expected a number for"),
        ("gemma3n_text", {"sliding_window": 0}, "sliding_window: expected a positive integer, found 0"),
        ("gemma3n_text", {"layer_types": ["full_attention"]}, "layer_types: expected 4 of 'sliding_attention' or"),
        ("gemma4_text", {"num_kv_shared_layers": 3}, "num_kv_shared_layers: 3 of 4 layers take keys and values"),
        (
            "gemma4_text",
            {"rope_parameters": {"full_attention": {"rope_theta": "x"}}},
            "rope_theta: expected a",
        ),
        (
            "gemma4_text",
            {"enable_moe_block": True, "num_experts": 2, "top_k_experts": 3, "moe_intermediate_size": 8},
            "top_k_experts: 3 of 2 experts",
        ),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok: 5 of 4 experts"),
        ("qwen3_moe", {"mlp_only_layers": [4]}, "mlp_only_layers: expected numbers of layers from 0 to 3, found [4]"),
        ("lfm2", {"full_attn_idxs": [-1]}, "full_attn_idxs: expected numbers of layers from 0 to 3, found [-1]"),
        ("lfm2", {"conv_L_cache": 0}, "conv_L_cache: expected a positive integer, found 0"),
        ("smollm3", {"no_rope_layers": [True, 1, 1, 1]}, "no_rope_layers: expected 4 of 0 or 1, found [True, 1"),
        (
            "ministral3",
            {"rope_parameters": MINISTRAL | {"llama_4_scaling_beta": math.nan}},
            "_beta: expected a number",
        ),
        ("ministral3", {"rope_parameters": MINISTRAL | {"llama_4_scaling_beta": True}}, "_beta: expected a number"),
        (
            "ministral3",
            {"rope_parameters": MINISTRAL | {"original_max_position_embeddings": 1.5}},
            "original_max_position_embeddings: expected a number of tokens",
        ),
        ("llama", {"rope_scaling": YARN | {"beta_fast": []}}, "beta_fast: expected a positive number, found []"),
        ("llama", {"rope_scaling": YARN | {"factor": math.nan}}, "factor: expected a positive number, found nan"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor: expected a positive number, found None"),
        (
            "phi3",
            {"rope_scaling": LONG, "original_max_position_embeddings": 10**30},
            "original_max_position_embeddings: expected at most 2,147,483,647, found 1e+30",
        ),
    ],
)
def test_values_that_no_model_has(kind, changes, message):
    """In one line, whatever else they would have meant."""
    found = refusal(kind, **changes)
    assert message in found and "\n" not in found, found
