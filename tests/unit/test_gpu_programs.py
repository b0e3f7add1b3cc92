"""Programs as XLA compiles them for an NVIDIA H100, and for others, which needs its compiler and no card: what they
read, write and wait for (``scripts/gpu_programs.py``)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmjax.device import knows_cuda

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not knows_cuda(), reason="needs jax[cuda12]")]
CARDS = [("a100", "int4"), ("b200", "int4-g32"), ("l4", "int8"), ("rtx5090", "int4")]


def reports(kind, profile, *programs, model="config:gemma-2b", card="h100", layers=1):
    command = [sys.executable, "scripts/gpu_programs.py", "--json", "--layers", str(layers), "--model", model]
    command += ["--card", card, "--kinds", kind, "--profile", profile, "--programs", *programs]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_any(found):
    """Its buffers are written where they stand, and nothing is asked of the host or rounded to TF32."""
    assert found["in_place"] == found["state"]
    assert not found["host_calls"] and not found["tf32"]


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int8-asym", "int4", "int4-g32", "int4-g128-asym"])
def test_a_step_reads_each_weight_once_as_it_is_stored(kind):
    (found,) = reports(kind, "fast", "decode-1")
    check_any(found)
    assert found["reads_of_a_weight"] == [1]
    assert found["extra"] < 0.05  # of all bytes read and written, of one layer and the head
    assert not found["copied_weights"]
    assert found["temporaries"] < 6e6  # the logits, four times
    # Of a layer 12, of packed weights 4 more that cut a float32 x in pieces, 5 that sum it up for their offsets; of a
    # call 4 for what is given and got.
    assert found["kernels"] <= 52 + 4 * kind.startswith("int") + 5 * kind.endswith("asym")
    # All of a step is one command buffer; whether there is another, the host is told, and in the end what came of it.
    assert (found["waits"], found["launched"]) == (1, 2)


@pytest.mark.parametrize(("kind", "profile"), [("bfloat16", "fast"), ("bfloat16", "hf"), ("int8", "fast")])
def test_many_rows_read_a_weight_once(kind, profile):
    """In products of the library, alone, or in our kernel."""
    for found in reports(kind, profile, "decode-64", "prefill-128"):
        check_any(found)
        assert found["reads_of_a_weight"] == [1]
        assert not found["copied_weights"] and not found["tiled"] and not found["epilogues"]
        assert found["waits"] == (found["program"] == "decode-64")
        # Logits, 66 MB, are written once and read once, and so is what parts of 2,048 positions gave attention, 34.
        if (profile, found["program"]) == ("fast", "decode-64"):
            assert found["read"] + found["written"] - found["must"] < 2.8e8


@pytest.mark.parametrize(("kind", "profile"), [("int4", "fast"), ("int4-g32", "dynamic_int8")])
def test_many_rows_read_a_packed_weight_as_it_is_stored(kind, profile):
    """It is unpacked nowhere but in registers."""
    for found in reports(kind, profile, "decode-64", "prefill-128"):
        check_any(found)
        assert found["reads_of_a_weight"] == [1]
        assert not found["copied_weights"]


@pytest.mark.parametrize(("model", "profile"), [("phi-2", "fast"), ("falcon-rw-1b", "hf"), ("gemma-2-2b", "hf")])
def test_heads_of_any_width_and_other_scores_are_the_kernels(model, profile):
    """Folded block by block, they are waited for in each layer, and the cache is copied."""
    for found in reports("bfloat16", profile, "decode-1", "prefill-128", model=f"config:{model}"):
        check_any(found)
        assert 2 * found["waits"] == found["launched"] == 2 * (found["program"] == "decode-1")
        if found["program"] == "decode-1":
            assert found["written"] < 5e6


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_wide_heads_fit_into_the_smallest_memory(kind):
    """Gemma 4's fifth layer has heads of 512; keys of packed models are float32."""
    for found in reports(kind, "fast", "decode-1", "prefill-128", model="config:gemma-4-e2b-it", card="l4", layers=5):
        check_any(found)
        assert 2 * found["waits"] == found["launched"] == 2 * (found["program"] == "decode-1")


def test_a_gate_that_is_cut_off_is_computed_once():
    """Gemma 3n asks for its mean and its deviation, too."""
    (found,) = reports("bfloat16", "fast", "decode-1", model="config:gemma-3n-e2b-it")
    check_any(found)
    assert found["bound"]["of_limit"] > 0.97


def test_a_state_is_carried_on_where_it_lies():
    """Turned for a step's sums, all of it would be copied at every call, and copied back."""
    (found,) = reports("bfloat16", "fast", "decode-1", model="config:qwen3.5-0.8b")
    check_any(found)
    assert found["temporaries"] < 6e6 and found["written"] < 5e6  # of which 4 are logits; the state of two slots is 2
    assert found["waits"] == 1


@pytest.mark.parametrize("kind", ["bfloat16", "int4-g32"])
def test_a_mixture_waits_for_none_of_its_experts(kind):
    """All tiles are one kernel's, which reads no expert's weight but those in use."""
    for found in reports(kind, "fast", "decode-1", "decode-64", "prefill-128", model="config:qwen3-30b-a3b"):
        check_any(found)
        assert found["waits"] == (found["program"] != "prefill-128")
        assert found["launched"] <= 3  # one is a sort of the draw, one puts together what the host gets
        if found["program"] == "decode-1":
            assert found["read"] < 0.32 * found["must"] and found["temporaries"] < 6e6


@pytest.mark.parametrize(("card", "kind"), CARDS)
def test_other_cards(card, kind):
    """No kernel asks for more shared memory than they have."""
    for found in reports(kind, "fast", "decode-64", "prefill-128", card=card):
        check_any(found)
        assert found["reads_of_a_weight"] == [1]


@pytest.mark.parametrize("profile", ["reference", "dynamic_int8", "mediapipe_gpu"])
@pytest.mark.parametrize("kind", ["bfloat16", "int4"])
def test_other_profiles(kind, profile):
    for found in reports(kind, profile, "decode-1", "prefill-128", "score-2", model="config:smollm2-135m-instruct"):
        check_any(found) if found["state"] else None
        assert found["waits"] == (found["program"] == "decode-1") and not found["tiled"]
        if found["program"] == "decode-1":
            assert not found["copied_weights"] and found["reads_of_a_weight"] == [1]


def test_what_a_step_needs_beside_the_model():
    for found in reports("bfloat16", "fast", "draw-1", "grow"):
        assert not found["host_calls"] and not found["waits"]
