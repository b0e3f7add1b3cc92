"""The demo model, real weights expanded to float32, against transformers' float32 eager run of the same file."""

import functools
import json
from pathlib import Path

import gguf
import numpy as np
import pytest

import llmjax
from tests.tiny import shortened, slow

torch = pytest.importorskip("torch", reason="parity extra not installed")
transformers = pytest.importorskip("transformers", reason="parity extra not installed")

PROMPTS = Path(__file__).parents[2] / "configs/prompts/mixed.jsonl"


@pytest.fixture(scope="module", params=[3, slow(30)])
def layers(request):
    """Of the model's 30, from the first on."""
    return request.param


@pytest.fixture(scope="module", autouse=True)
def opened_once():
    """transformers opens the file for the configuration, the tokenizer and the weights, and asks for the same table of
    names at every module: what gguf's own Python makes of 49,000 tokens takes seconds each time."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        yield


@pytest.fixture(scope="module")
def theirs(smollm2_path, layers):
    file = dict(pretrained_model_name_or_path=smollm2_path.parent, gguf_file=smollm2_path.name)
    config = transformers.AutoConfig.from_pretrained(**file, num_hidden_layers=layers)
    return transformers.AutoModelForCausalLM.from_pretrained(
        **file, config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def llm(smollm2_path, layers):
    return llmjax.LLM(shortened(llmjax.load(smollm2_path, numerics="reference", dtype="float32"), layers))


@pytest.fixture(scope="module")
def prompts():
    return [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()]


def test_tokens_are_transformers_tokens(llm, prompts, smollm2_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    assert [llm.tokenizer.encode(p) for p in prompts] == [tokenizer.encode(p) for p in prompts]


def test_log_probs_of_given_text(llm, theirs, prompts, capsys):
    ids = llm.tokenizer.encode("\n\n".join(prompts))
    assert len(ids) >= 300
    with torch.no_grad():
        logits = theirs(torch.tensor([ids])).logits[0]
    reference = torch.log_softmax(logits.double(), -1).numpy()
    rows = np.arange(len(ids) - 1)
    expected = reference[rows, ids[1:]]
    ours = llm.model.logits([ids])[0].astype(np.float64)
    ours -= np.logaddexp.reduce(ours, -1, keepdims=True)
    (score,) = llm.score([ids])
    worst = np.abs(ours - reference).max()
    chunked = np.abs(np.array(score.scored) - expected).max()
    nll = abs(score.nll + expected.mean())
    with capsys.disabled():
        print(f"\n{len(ids)} tokens: max |d log-prob| {worst:.2e} (all), {chunked:.2e} (chunked), |d NLL| {nll:.2e}")
    assert worst <= 1e-3
    assert chunked <= 1e-3
    assert nll <= 1e-5
    assert score.top1[1:] == reference[:-1].argmax(-1).tolist()


@pytest.mark.slow
def test_greedy_tokens(llm, theirs, prompts):
    """By default steps behind a cache are those of stored tokens (``test_golden``), of these weights one answer
    (``test_cli``)."""
    assert len(prompts) >= 20
    params = llmjax.SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
        ids = output.prompt_token_ids
        with torch.no_grad():
            found = theirs.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                do_sample=False,
                max_new_tokens=48,
                eos_token_id=None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        expected = found.sequences[0, len(ids) :].tolist()
        ours = output.outputs[0].token_ids
        if ours != expected:  # only where the reference itself is undecided
            at = next(i for i, (a, b) in enumerate(zip(ours, expected, strict=True)) if a != b)
            best = torch.topk(found.logits[at][0], 2).values
            assert best[0] - best[1] <= 1e-3, f"{prompt!r}: token {at}"
