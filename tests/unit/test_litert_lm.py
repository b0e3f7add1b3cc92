"""Our files in LiteRT-LM itself: the ids it generates, the tokens it cuts texts into, the conversations it renders.

Where ids are compared they are its text: its tokenizer is exchanged for one whose tokens are ``<0>``, ``<1>``, ...
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import llmjax
from converters.litert import container
from converters.readers.mediapipe.package import Package
from converters.readers.mediapipe.parameters import LlmMetadata
from llmjax import writing
from tests.mediapipe_files import DATA
from tests.tiny import checkpoint

litert_lm = pytest.importorskip("litert_lm")
pytestmark = pytest.mark.slow
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '<u>' + m['content'].strip() + eos_token }}{% endfor %}"
    "{{ '<m>' if add_generation_prompt }}"
)


def engine(path: Path):
    litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)
    folder = path.parent / f"{path.name}.cache"
    folder.mkdir(exist_ok=True)
    backend = litert_lm.Backend.CPU(thread_count=1)
    return litert_lm.Engine(str(path), backend=backend, max_num_tokens=64, cache_dir=str(folder))


def with_ids_for_text(path: Path, tokens: int) -> Path:
    package, sections = Package(path), []
    vocab = {f"<{i}>": i for i in range(tokens)}
    state = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"<\d+>"}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<0>"},
    }
    for part in package.parts:
        content = bytes(package.view(part))
        if part.kind == "metadata":
            content = LlmMetadata(stop_tokens=[{"token_ids": {"ids": [256]}}], max_num_tokens=64).SerializeToString()
        elif part.kind == "huggingface":
            content = container.packed_json(json.dumps(state).encode())
        sections.append(container.Section(part.name, content, part.notes))
    changed = path.with_name(f"ids-{path.name}")
    with open(changed, "xb") as file:
        container.write(file, sections, {})
    return changed


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = checkpoint(tmp_path_factory.mktemp("lm") / "m", vocab_size=288)
    state = json.loads((folder / "tokenizer.json").read_text())
    for number, text in ((257, "<s>"), (258, "<u>"), (259, "<m>")):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        state["added_tokens"].append({"id": number, "content": text, "special": True, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(state))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("quantize", [None, "int8", "mixed-8-4-8"])
def test_greedy_ids(source, tmp_path, quantize):
    path = tmp_path / "m.litertlm"
    options = {"quantize": quantize, "context": 64, "prefill_lengths": [4, 16], "verify": False}
    writing.convert(source, path, to="litertlm", **options)
    model = llmjax.load(path)
    prompt = np.random.default_rng(1).integers(0, 256, 11).tolist()
    ids: list[int] = []
    while len(ids) < 12 and 256 not in ids:
        logits, _ = model.follow([*prompt, *ids], len(prompt) - 1)
        ids.append(int(logits[-1].argmax()))
    greedy = litert_lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0, seed=0)
    with engine(with_ids_for_text(path, 288)) as found:
        session = found.create_session(apply_prompt_template=False, sampler_config=greedy, max_output_tokens=12)
        session.run_prefill(["".join(f"<{i}>" for i in prompt)])
        text = session.run_decode().texts[0]
        del session
    assert [int(i) for i in re.findall(r"<(\d+)>", text)][:12] == [i for i in ids if i != 256]


def test_tokens_and_conversations(source, tmp_path):
    """This tokenizer starts no text with BOS, its template does: so the template writes it as text, once."""
    path = tmp_path / "m.litertlm"
    writing.convert(source, path, to="litertlm", context=64, prefill_lengths=[4], verify=False)
    tokenizer = llmjax.load(source).tokenizer
    messages = [
        {"role": "system", "content": " S "},
        {"role": "user", "content": "U\n"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "<m>é"},
    ]
    with engine(path) as found:
        assert found.tokenize("Hi <u>é") == tokenizer.encode("Hi <u>é")
        assert found.bos_token_id is None and found.eos_token_ids == [[256]]
        with found.create_conversation(messages=messages[:-1]) as conversation:
            text = conversation.render_message_to_string(messages[-1])
    assert text == tokenizer.render_chat(messages)


@pytest.mark.parametrize("to", ["litertlm", "task"])
def test_a_template_of_prefixes_and_suffixes(tmp_path, to):
    """Of a ``.bin`` file, in words that MiniJinja lacks."""
    source, path, template = DATA / "GEMMA_2B_gpu_int8_mp0.10.21.bin", tmp_path / f"m.{to}", tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{{ '<%s> ' % m.role + m.content + ' </%s>\\n' % m.role }}{% endfor %}"
        "{{ '<assistant> ' if add_generation_prompt }}"
    )
    options = {"context": 16, "prefill_lengths": [4], "verify": False, "chat_template": template}
    writing.convert(source, path, to=to, **options)
    messages = [
        {"role": "system", "content": " S "},
        {"role": "user", "content": "{{ U }}\n"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "Q"},
    ]
    if to == "task":  # of whose parts LiteRT-LM knows the user's alone
        messages = messages[1:2]
    with engine(path) as found, found.create_conversation(messages=messages[:-1]) as conversation:
        text = conversation.render_message_to_string(messages[-1])
    expected = "".join(f"<{m['role']}> {m['content']} </{m['role']}>\n" for m in messages) + "<assistant> "
    assert text == expected == llmjax.load(path).tokenizer.render_chat(messages)
