"""MediaPipe's names: the guide's snippets, its options, its sessions."""

import dataclasses
import inspect
import re
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llmjax
from llmjax import LLM, ConfigError, LoraError, RequestError, genai
from llmjax.genai import (
    LlmInference,
    LlmInferenceOptions,
    LlmInferenceSession,
    LlmInferenceSessionOptions,
    PromptTemplates,
    bundler,
    converter,
)
from llmjax.lora.adapter import LoraSource
from tests.mediapipe_files import DATA, GEMMA, config, vocabulary

ROOT = Path(__file__).parents[2]
LORA = DATA / "GEMMA_2B_gpu_lora_r4_mp0.10.21.bin"
THEIRS, OURS = "from mediapipe.tasks.python.genai import", "from llmjax.genai import"
# Of the guide (https://ai.google.dev/edge/mediapipe/solutions/genai/llm_inference).
CONVERT = """
import mediapipe as mp
from mediapipe.tasks.python.genai import converter

config = converter.ConversionConfig(
  input_ckpt=INPUT_CKPT,
  ckpt_format=CKPT_FORMAT,
  model_type=MODEL_TYPE,
  backend=BACKEND,
  output_dir=OUTPUT_DIR,
  combine_file_only=False,
  vocab_model_file=VOCAB_MODEL_FILE,
  output_tflite_file=OUTPUT_TFLITE_FILE,
)

converter.convert_checkpoint(config)
"""
ADAPT = """
import mediapipe as mp
from mediapipe.tasks.python.genai import converter

config = converter.ConversionConfig(
  # Other params related to base model
  input_ckpt=INPUT_CKPT, ckpt_format=CKPT_FORMAT, model_type=MODEL_TYPE, output_dir=OUTPUT_DIR,
  vocab_model_file=VOCAB_MODEL_FILE, output_tflite_file=OUTPUT_TFLITE_FILE,
  # Must use gpu backend for LoRA conversion
  backend='gpu',
  # LoRA related params
  lora_ckpt=LORA_CKPT,
  lora_rank=LORA_RANK,
  lora_output_tflite_file=LORA_OUTPUT_TFLITE_FILE,
)

converter.convert_checkpoint(config)
"""
BUNDLE = """
import mediapipe as mp
from mediapipe.tasks.python.genai import bundler

config = bundler.BundleConfig(
    tflite_model=TFLITE_MODEL,
    tokenizer_model=TOKENIZER_MODEL,
    start_token=START_TOKEN,
    stop_tokens=STOP_TOKENS,
    output_filename=OUTPUT_FILENAME,
    enable_bytes_to_unicode_mapping=ENABLE_BYTES_TO_UNICODE_MAPPING,
)
bundler.create_bundle(config)
"""


def of_readme() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## From MediaPipe", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"```python\n(.*?)```", section, re.S)


@pytest.fixture
def placeholders(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mediapipe", types.ModuleType("mediapipe"))
    return {
        "INPUT_CKPT": str(DATA / "GEMMA_2B"),
        "CKPT_FORMAT": "safetensors",
        "MODEL_TYPE": "GEMMA_2B",
        "BACKEND": "gpu",
        "OUTPUT_DIR": str(tmp_path / "out"),
        "VOCAB_MODEL_FILE": str(vocabulary(tmp_path)),
        "OUTPUT_TFLITE_FILE": str(tmp_path / "model.bin"),
        "LORA_CKPT": str(DATA / "GEMMA_2B_lora"),
        "LORA_RANK": 4,
        "LORA_OUTPUT_TFLITE_FILE": str(tmp_path / "lora.bin"),
        "TFLITE_MODEL": graph(tmp_path / "graph.tflite"),
        "TOKENIZER_MODEL": str(tmp_path / "spm.model"),
        "START_TOKEN": "<bos>",
        "STOP_TOKENS": ["<eos>"],
        "OUTPUT_FILENAME": str(tmp_path / "bundle.task"),
        "ENABLE_BYTES_TO_UNICODE_MAPPING": False,
        "MODEL": str(tmp_path / "model.bin"),
        "LORA": str(tmp_path / "lora.bin"),
    }


def graph(path: Path) -> str:
    from converters.readers.mediapipe.package import MODEL, Package

    package = Package(DATA / "tiny_bundle_0.10.21.task")
    (part,) = (p for p in package.parts if p.name == MODEL)
    path.write_bytes(package.view(part))
    return str(path)


@pytest.mark.parametrize("snippets", [[CONVERT, ADAPT, BUNDLE], "README"], ids=["guide", "readme"])
def test_the_guides_snippets_run_with_one_line_changed(snippets, placeholders, tmp_path):
    """And write what the real converter wrote of the same checkpoint."""
    for snippet in of_readme() if snippets == "README" else snippets:
        exec(snippet.replace(THEIRS, OURS), dict(placeholders))
    same = (tmp_path / "model.bin").read_bytes()[1 << 16 :] == GEMMA.read_bytes()[1 << 16 :]
    adapter = (tmp_path / "lora.bin").read_bytes()[1 << 16 :] == LORA.read_bytes()[1 << 16 :]
    assert same and adapter
    assert llmjax.inspect(tmp_path / "bundle.task").tokenizer["vocab_size"] == 100


# Of the guide's tables; then of later versions, and llmjax's.
GUIDE = {
    "LlmInferenceOptions": "modelPath maxTokens topK temperature randomSeed loraPath resultListener errorListener",
    "LlmInferenceSessionOptions": "topK topP temperature randomSeed loraPath",
    "ConversionConfig": "inputCkpt ckptFormat modelType backend outputDir outputTfliteFile vocabModelFile loraCkpt "
    "loraRank loraOutputTfliteFile",
    "BundleConfig": "tfliteModel tokenizerModel startToken stopTokens outputFilename enableBytesToUnicodeMapping",
}
CLASSES = {
    c.__name__: c
    for c in (LlmInferenceOptions, LlmInferenceSessionOptions, converter.ConversionConfig, bundler.BundleConfig)
}


def table() -> dict[str, list[list[str]]]:
    """By class, the rows: option, default, range, what llmjax does."""
    lines = inspect.getdoc(genai).split("\n")
    first, second, last = (i for i, line in enumerate(lines) if line.startswith("===="))
    ends = [m.end() for m in re.finditer("=+", lines[first])]
    rows: dict[str, list[list[str]]] = {}
    for line in lines[second + 1 : last]:
        if line in CLASSES:
            rows[line] = []
        else:
            starts = [0, *(end + 2 for end in ends)]
            cells = [line[a:b].strip() for a, b in zip(starts, [*ends[:-1], len(line)], strict=False)]
            rows[list(rows)[-1]].append(cells)
    return rows


def test_the_table_has_every_option_of_the_guide_in_its_order():
    found = table()
    assert list(found) == list(GUIDE)
    for name, options in GUIDE.items():
        snake = [re.sub("([A-Z])", lambda m: "_" + m[1].lower(), option) for option in options.split()]
        assert [row[0] for row in found[name]][: len(snake)] == snake
        fields = {f.name: f.default for f in dataclasses.fields(CLASSES[name])}
        for option, default, span, does in found[name]:
            expected = "-" if fields[option] is dataclasses.MISSING else fields[option]
            assert default == (repr(expected) if expected == "" else str(expected)), option
            assert span and does, option
    own = ("LlmInferenceOptions", "LlmInferenceSessionOptions")
    assert all(len(found[name]) == len(dataclasses.fields(CLASSES[name])) for name in own)


@pytest.mark.parametrize(
    ("option", "inside", "outside"),
    [
        ("max_tokens", [2], [1, 2.5]),
        ("top_k", [1], [0, 1.5]),
        ("temperature", [0, 100], [-0.1, 101]),
        ("random_seed", [0, 2**64 - 1], [-1, 2**64]),
        ("max_top_k", [1], [0]),
        ("supported_lora_ranks", [(), (4, 8)], [(0,), "48"]),
        ("preferred_backend", [None, "cpu"], ["tpu", "gpu"]),
    ],
)
def test_the_ranges_are_those_of_the_table(option, inside, outside):
    """A right one gets as far as the model that is not there."""
    for value in inside:
        with pytest.raises(llmjax.CheckpointError, match="no such file"):
            LlmInference.create_from_options(LlmInferenceOptions("nowhere", **{option: value}))
    for value in outside:
        with pytest.raises(RequestError, match=option):
            LlmInference.create_from_options(LlmInferenceOptions("nowhere", **{option: value}))


def second_adapter(folder: Path) -> Path:
    """A LoRA file of another rank."""
    factors = load_file(DATA / "GEMMA_2B_lora" / "adapter_model.safetensors")
    rng = np.random.default_rng(3)
    for name, values in factors.items():
        shape = [2 if n == 4 else n for n in values.shape]
        factors[name] = rng.normal(size=shape).astype(np.float32)
    save_file(factors, folder / "second.safetensors")
    options = {"lora_ckpt": str(folder / "second.safetensors"), "lora_rank": 2}
    path = folder / "second.bin"
    converter.convert_checkpoint(config("GEMMA_2B", "gpu", folder, **options, lora_output_tflite_file=str(path)))
    return path


def task_of(**options) -> LlmInference:
    """With small chunks, so that short prompts share some."""
    llm = LLM(llmjax.load(GEMMA, numerics="fast"), max_batch=1, chunk=8, block=8)
    return LlmInference(LlmInferenceOptions(str(GEMMA), max_tokens=64, **options), llm)


@pytest.fixture(scope="module")
def task():
    with task_of() as task:
        yield task


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    return second_adapter(tmp_path_factory.mktemp("second"))


def session_of(task, *chunks, **options):
    session = LlmInferenceSession.create_from_options(task, LlmInferenceSessionOptions(**options))
    for chunk in chunks:
        session.add_query_chunk(chunk)
    return session


def test_chunks_and_turns_are_one_prompt(task):
    session = session_of(task, "the quick br", "own ", "fox")
    first = session.generate_response()
    assert first == task.generate_response("the quick brown fox") and first
    session.add_query_chunk(" jumps over the lazy dog")
    assert session.generate_response() == task.generate_response(f"the quick brown fox{first} jumps over the lazy dog")
    assert session.size_in_tokens("the quick") == task.size_in_tokens("the quick")


@pytest.mark.slow
def test_clones_go_their_own_ways_from_what_is_computed(task):
    progress = task._llm.engine.progress
    session = session_of(task, "my sphinx of black quartz, judge the vow of the lazy dog")
    clone = session.clone()
    answer = session.generate_response()
    clone.add_query_chunk(" and the fox")
    before = progress.reused_tokens
    other = clone.generate_response()
    assert progress.reused_tokens - before >= 16
    session.add_query_chunk(" once more")
    again = session.generate_response()
    session.close()
    with task_of() as fresh:
        prompt = "my sphinx of black quartz, judge the vow of the lazy dog"
        assert other == fresh.generate_response(f"{prompt} and the fox") != answer
        assert again == fresh.generate_response(f"{prompt}{answer} once more")
        assert answer == fresh.generate_response(prompt)
    clone.add_query_chunk(" still here")
    assert clone.generate_response()


@pytest.mark.slow
def test_adapters_side_by_side(task, second):
    """Sessions in turn: each what its adapter alone gives to the one prompt, and the model without one the same."""
    chunks = ("the quick ", "brown fox")
    sessions = [session_of(task, chunks[0], lora_path=lora) for lora in (None, LORA, str(second), LORA)]
    for session in sessions:
        session.add_query_chunk(chunks[1])
    found = [session.generate_response() for session in sessions]
    assert len(set(found)) == 3 and found[1] == found[3]
    prompt = "".join(chunks)
    assert found[0] == task.generate_response(prompt)
    with task_of(lora_path=LORA) as whole:
        assert whole.generate_response(prompt) == session_of(whole, *chunks).generate_response() == found[1]
    alone = LLM(llmjax.load(GEMMA, lora=second, numerics="fast"), max_batch=1, chunk=8, block=8)
    assert LlmInference(LlmInferenceOptions(str(GEMMA), max_tokens=64), alone).generate_response(prompt) == found[2]


def test_async_tells_pieces_and_keeps_others_out(task):
    session, seen, go = session_of(task, "the quick brown fox"), [], threading.Event()

    def listen(piece, done):
        go.wait(60)
        seen.append((piece, done))

    future = session.generate_response_async(listen)
    for call in (session.generate_response, lambda: session.add_query_chunk("x"), session.clone):
        with pytest.raises(RequestError, match="still under way"):
            call()
    go.set()
    answer = future.result(timeout=120)
    assert answer == task.generate_response("the quick brown fox")
    assert "".join(piece for piece, _ in seen) == answer and [done for _, done in seen][-2:] == [False, True]
    session.add_query_chunk(" jumps")
    assert session.generate_response_async().result(timeout=120) == task.generate_response(
        f"the quick brown fox{answer} jumps"
    )


def test_templates_stand_where_roles_change(task, monkeypatch):
    fed = []
    monkeypatch.setattr(task, "_pieces", lambda text, sampling, lora: fed.append(text) or iter(["yes"]))
    templates = PromptTemplates("<u>", "</u>", "<m>", "</m>", "<s>", "</s>")
    session = session_of(task, prompt_templates=templates)
    session.add_query_chunk("be short", role="system")
    for chunk in ("a", "b"):
        session.add_query_chunk(chunk)
    session.generate_response()
    session.add_query_chunk("c")
    session.generate_response()
    first = "<s>be short</s><u>ab</u><m>"
    assert fed == [first, f"{first}yes</m><u>c</u><m>"]


def test_options_of_a_session_draw(task):
    prompt = "the quick brown fox"
    answers = [session_of(task, prompt, random_seed=seed, top_p=0.9).generate_response() for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    greedy = [session_of(task, prompt, **{name: 1 if name == "top_k" else 0}) for name in ("top_k", "temperature")]
    assert len({session.generate_response() for session in greedy}) == 1


def test_what_sessions_refuse(task, second):
    for option in ("constraint_handle", "graph_options"):
        with pytest.raises(RequestError, match=f"{option}: not supported"):
            session_of(task, **{option: 1})
    with pytest.raises(RequestError, match="prompt_templates: expected PromptTemplates, found dict"):
        session_of(task, prompt_templates={})
    for options, message in (({"top_k": 41}, "max_top_k of 40"), ({"top_p": 0}, "top_p"), ({"top_k": 0}, "top_k")):
        with pytest.raises(RequestError, match=message):
            session_of(task, **options)
    session = session_of(task)
    with pytest.raises(RequestError, match="add_query_chunk first"):
        session.generate_response()
    session.add_query_chunk("the quick brown fox")
    with pytest.raises(RequestError, match="leave no room"):
        session.add_query_chunk(" fox" * 80)
    assert session.generate_response() == task.generate_response("the quick brown fox")
    with pytest.raises(RequestError, match="add_query_chunk first"):
        session.clone().generate_response()
    with pytest.raises(RequestError, match="role"):
        session.add_query_chunk("x", role="tool")
    session.close()
    for call in (session.generate_response, session.clone, lambda: session.size_in_tokens("x")):
        with pytest.raises(RequestError, match="session is closed"):
            call()
    with pytest.raises(LoraError, match=r"rank 4, but supported_lora_ranks are \[2\]"):
        session_of(task_of(supported_lora_ranks=[2]), lora_path=LORA)
    other = task_of()
    open_session = session_of(other, "x")
    other.close()
    with pytest.raises(RequestError, match="task is closed"):
        open_session.generate_response()


@pytest.mark.slow
def test_an_adapters_scale_is_the_options(task):
    strong = session_of(task, "the quick brown fox", lora_path=LoraSource(LORA, alpha=40.0)).generate_response()
    assert strong != session_of(task, "the quick brown fox", lora_path=LORA).generate_response()


def test_options_of_another_kind():
    for call, name in ((converter.convert_checkpoint, "ConversionConfig"), (bundler.create_bundle, "BundleConfig")):
        with pytest.raises(ConfigError, match=f"config: expected a {name}, found {{'input_ckpt': 'x'}}"):
            call({"input_ckpt": "x"})
