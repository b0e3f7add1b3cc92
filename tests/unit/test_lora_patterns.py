"""Regular expressions of an adapter's file: what PEFT's mean, in no more than a moment."""

import time

import pytest

from llmjax.errors import LoraError
from llmjax.lora.config import LoraConfig

MODULE = "model.layers.11.self_attn.q_proj"
# In "re" each takes longer than anyone waits.
FOREVER = [r"(?:a{1,5000}){1,5000}[^a]{5}", r"(\w|.)*(\w|\.)*(.|\w)*[^a-z0-9._]\d?"]


def config(**values):
    return LoraConfig.from_peft({"peft_type": "LORA", **values}, "adapter_config.json")


def test_meanings():
    found = config(
        target_modules=r".*\.(q|v)_proj",
        rank_pattern={"layers.1.*": 4, r"layers\.11\..*q_proj": 6, "q_proj": 2},
        alpha_pattern={"(?:q|k)_proj": 3.5, "proj": 1},
    )
    assert found.targets(MODULE) and not found.targets("model.layers.1.self_attn.k_proj")
    assert found.rank_of(MODULE) == 4 and found.rank_of("q_proj") == 2 and found.rank_of("k_proj") == 8
    assert found.scale_of(MODULE, 7) == 0.5 and found.scale_of("model.v_proj", 2) == 4.0
    named = config(target_modules=["q_proj"], layers_to_transform=[1, 11], layers_pattern=["(?:h|layers)"])
    assert named.targets(MODULE) and not named.targets(MODULE.replace("11", "2"))
    # The number is the last group, whatever groups a pattern has, and a number of any length is no layer.
    named = config(target_modules=["q_proj"], layers_to_transform=11, layers_pattern="(h|layers)")
    assert named.targets(MODULE) and not named.targets(MODULE.replace("11", "1" * 5000))
    named = config(target_modules=["q_proj"], layers_to_transform=11, layers_pattern="")  # as none
    assert named.targets(MODULE) and not named.targets(MODULE.replace("11", "2"))
    assert config(target_modules=["q_proj"], layers_pattern="").targets(MODULE)


@pytest.mark.parametrize("pattern", FOREVER)
def test_backtracking_ends(pattern):
    target = {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": [pattern]}
    for values in ({"target_modules": pattern}, {"rank_pattern": {pattern: 4}}, target):
        found = config(**values)
        found.matcher._left /= 10
        began = time.process_time()
        try:
            for i in range(100):  # all of them together
                module = "a" * 40 + f".{i}.{MODULE * 8}"
                found.targets(module), found.rank_of(module)
        except LoraError as error:
            assert "takes too long" in str(error) and len(str(error)) < 300
        assert time.process_time() - began < 1.5


@pytest.mark.parametrize(
    "pattern",
    ["(", "a{99999999999999999999}", "(" * 5000 + "a" + ")" * 5000, "a" * 10_001, "*", "[z-a]", r"\1", "(?<=a+)b"],
)
def test_what_is_no_expression(pattern):
    for values in ({"target_modules": pattern}, {"rank_pattern": {pattern: 2}}, {"layers_pattern": [pattern]}):
        with pytest.raises(LoraError, match="is no regular expression") as caught:
            config(**values)
        assert len(str(caught.value)) < 500


def test_many_patterns_take_a_moment_together():
    found = config(rank_pattern={f"(x{i}+)+y": 4 for i in range(100)})
    found.matcher._left = 0.05
    began = time.process_time()
    with pytest.raises(LoraError, match="takes too long"):
        for _ in range(1000):
            found.rank_of("x" * 100)
    assert time.process_time() - began < 1
