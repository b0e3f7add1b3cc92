"""Files of llama.cpp's (``tests/data/llama_cpp``, made by its programs) as ``llmjax compare`` reads them."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import llmjax
from llmjax.cli.main import main
from llmjax.errors import RequestError
from llmjax.oracle import patching
from llmjax.oracle.clock import Pulse
from llmjax.oracle.declared import allowed
from llmjax.oracle.dumps.opening import opened
from llmjax.oracle.floors import CLASSES
from llmjax.oracle.measure import measure
from llmjax.oracle.metrics import gap
from llmjax.oracle.names import named
from llmjax.oracle.stages import PLAIN, Stages
from tests import llama_files, tiny

DATA = Path(__file__).parents[1] / "data/llama_cpp"
BASE = DATA / "base.kld"
# llama-perplexity's own reading of the file (``--kl-divergence``): its perplexity, and by how much the file's is lower.
PERPLEXITY = 2450.6389 * np.exp(-0.17254)
CONTEXT, VOCAB, CHUNKS = 32, 35, 3
ROWS = 20 + 4 * CHUNKS * CONTEXT
LOGITS, TOKENS, PROMPT = "llamacpp-tiny.bin", "llamacpp-tiny-tokens.bin", "llamacpp-tiny-prompt.txt"


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return llama_files.model(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def model(path) -> llmjax.Model:
    return llmjax.load(path)


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z.astype(np.float64) - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def test_the_last_tokens_logits(path, model, capsys):
    assert main(["compare", "--model", str(path), str(DATA), "--class", "cache16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["explained_by"]) == ("equivalent", "cache16")
    text = llama_files.TEXT[: llama_files.TEXT.index(".") + 1]
    assert found["subject"]["token_ids"] == model.tokenizer.encode(text)
    coverage = found["coverage"]
    assert (coverage["taps"], coverage["positions"]) == (1, 1) and "llama-debug --save-logits" in coverage["file"]
    assert found["taps"][0]["token"] == coverage["tokens"] - 1 and found["logits"]["nll"] == [None, None]


def test_a_base_of_log_probabilities(model):
    found = llmjax.compare(model, BASE)
    assert (found.verdict, found.explained_by) == ("equivalent", "float32"), found.reason
    assert "the file's own rounding" in found.reason
    rows = CONTEXT // 2 - 1
    assert found.coverage["texts"] == [CHUNKS, CHUNKS] and found.coverage["positions"] == CHUNKS * rows
    assert np.exp(found.logits["nll"]) == pytest.approx([PERPLEXITY, PERPLEXITY], rel=5e-5)
    assert "text 0" in found.to_html() and f"{CHUNKS} of {CHUNKS} texts" in found.to_text()


def test_what_a_base_says_is_read_as_llama_cpp_wrote_it(model):
    dumps = opened(BASE, model)
    stored = np.fromfile(BASE, "<i4", CHUNKS * CONTEXT, offset=20).reshape(CHUNKS, CONTEXT)
    assert stored[0, 0] == 1 and (stored[1:, 0] != 1).all()
    for dump, ids in zip(dumps, stored, strict=True):
        # BOS goes in the place of a chunk's first token, and the file has that token.
        assert dump.token_ids.tolist() == [1, *ids[1:]]
        ours, window = model.logits([dump.token_ids.tolist()])[0], dump.windows["logits"]
        assert window.positions.tolist() == list(range(CONTEXT // 2, CONTEXT - 1))
        theirs, shown = dump.read("logits"), window.show(ours)
        rounding = window.rounding(theirs)
        wanted = log_softmax(ours[window.positions])
        least = theirs.min(-1, keepdims=True)
        np.testing.assert_allclose(shown, np.maximum(wanted, least), atol=2e-4)
        assert (np.abs(theirs - shown) <= rounding + 1e-5).all()
        assert (np.abs(theirs - np.maximum(wanted, least)).max(-1) > rounding.max(-1) / 4).all()  # it is that large
        np.testing.assert_allclose(window.show(ours + np.float32(3)), shown, atol=1e-5)  # a shift of all is none


@pytest.mark.parametrize("file, allowed", [(BASE, "float32"), tiny.slow(DATA / "llamacpp-tiny.bin", "cache16")])
def test_a_fault_is_no_rounding(model, file, allowed, monkeypatch):
    every = patching.catalogue  # to try them all takes long, and other tests do
    some = ("rope_theta", "rope_scaling", "norm_eps", "activation")
    monkeypatch.setattr(patching, "catalogue", lambda *of: (c for c in every(*of) if c.cause in some))
    rope = dataclasses.replace(model.config.rope, theta=50000.0)
    other = dataclasses.replace(model, config=dataclasses.replace(model.config, rope=rope))
    found = llmjax.compare(other, file, arithmetic=allowed, texts=1)
    assert found.verdict == "different" and found.exit_code == 1
    best = found.faults[0]["causes"][0]
    assert (best["cause"], best["detail"]) == ("rope_theta", "the base is 10000") and best["explains"] > 0.99


def test_steps_of_the_file_are_no_difference_and_several_are(model, tmp_path):
    rows, raw = CONTEXT // 2 - 1, bytearray(BASE.read_bytes())
    steps = np.frombuffer(raw, "<u2", offset=ROWS).reshape(CHUNKS, rows, -1)[:, :, 4 : 4 + VOCAB]
    original = steps.astype(int)
    for by, within in ((0, True), (3, False)):
        steps[...] = np.clip(original + by * (np.arange(VOCAB) % 2 * 2 - 1), 0, 65535)
        (tmp_path / "moved.kld").write_bytes(raw)
        dump = opened(tmp_path / "moved.kld", model)[0]
        stages = Stages(model, dump.token_ids)
        [(tap, _)] = measure(stages, named(dump, stages.shapes, model), lambda tap: None, ("float32",), Pulse())
        assert (tap.excess(("float32",)) <= 1) == within
        tap.rounding[:] = 0
        assert tap.excess(("float32",)) > 1  # without it the file's own steps would be a difference


def test_blocks_of_eight_bits_are_llama_cpps(model, tmp_path):
    """Where weights are quantized its products' inputs are, too: with ours rounded likewise nothing is left but the
    file's own rounding, and no wider class may explain it."""
    path = llama_files.model(tmp_path / "q8.gguf", "Q8_0")
    gelu = dataclasses.replace(model, config=dataclasses.replace(model.config, hidden_act="gelu_new"))
    wide = ("float32", "cache_float16", "float16", "block_int8")
    # Expanded to floats the weights are those of the same file.
    for one, file, classes in (
        (model, BASE, ("float32", "cache_float16")),
        (model, DATA, ("float32", "cache_float16", "cache16")),
        (gelu, BASE, ("float32", "gelu16", "cache_float16")),
        (llmjax.load(path), DATA / "q8.kld", wide),
        (llmjax.load(path, dtype="float32"), DATA / "q8.kld", wide),
    ):
        assert allowed(opened(file, one)[0].manifest, None).singles == classes
    model = llmjax.load(path)
    dump = opened(DATA / "q8.kld", model)[0]
    stages = Stages(model, dump.token_ids)
    known, errors = named(dump, stages.shapes, model), []
    for edit in (PLAIN, CLASSES["block_int8"]()[0]):
        flow = None
        for stage in range(-1, stages.layers + 1):
            flow, values = stages.run(stage, flow, {}, edit)
        errors.append(gap(known.shown(values)["logits"], dump.read("logits")).error)
    assert errors[0] > 5e-3 and errors[1] < 1e-5


def damaged(folder: Path, name: str, change) -> Path:
    shutil.copytree(DATA, folder, dirs_exist_ok=True)
    raw = change((folder / name).read_bytes())
    (folder / name).unlink() if raw is None else (folder / name).write_bytes(raw)
    return folder


def put(at: int, value, dtype: str):
    part = np.array(value, dtype).tobytes()
    return lambda raw: raw[:at] + part + raw[at + len(part) :]


@pytest.mark.parametrize(
    "name, change, said",
    [
        (LOGITS, lambda raw: raw[:-3], "expected logits of 4 bytes each"),
        (LOGITS, lambda raw: b"", "expected logits of 4 bytes each, found 0 bytes"),
        (LOGITS, lambda raw: raw[:-4], "shape [1, 34], expected [1, 35]"),
        (LOGITS, put(20, np.nan, "<f4"), "logits: NaN or infinity at [0, 5]"),
        (TOKENS, lambda raw: None, "llamacpp-tiny-tokens.bin is missing beside it"),
        (TOKENS, lambda raw: raw[:-4], "token ids, but llamacpp-tiny-prompt.txt says"),
        (TOKENS, put(4, 7, "<i4"), "the token ids are not those of llamacpp-tiny-prompt.txt"),
        (TOKENS, put(4, -7, "<i4"), "expected token ids, found -7"),
        (PROMPT, lambda raw: raw.replace(b"n_tokens: 40", b"n_tokens: " + 5000 * b"4"), "prompt.txt says 44444444"),
        (PROMPT, lambda raw: raw.replace(b", ", b" ").replace(b": 1 ", b": 2 "), "the token ids are not those of"),
        (PROMPT, lambda raw: raw.replace(b": 1, ", b": " + 5000 * b"1" + b", "), "the token ids are not those of"),
        ("base.kld", lambda raw: raw[:-1], "llama-perplexity was stopped before its end"),
        ("base.kld", lambda raw: raw[:11], "cut off: 11 bytes"),
        ("base.kld", lambda raw: raw + b"12", "it is damaged"),
        ("base.kld", put(0, b"_logitz_", "S8"), "no dump: expected a directory"),
        ("base.kld", put(8, [2, VOCAB, CHUNKS], "<i4"), "n_ctx 2, a vocabulary of 35 and 3 chunks"),
        ("base.kld", put(12, VOCAB + 1, "<i4"), "shape [15, 36], expected [15, 35]"),
        ("base.kld", put(28, VOCAB, "<i4"), "token id 35 is not in its own vocabulary of 35"),
        ("base.kld", put(ROWS, np.nan, "<f4"), "text 0: a step or a least log-probability is NaN"),
        (
            "base.kld",
            put(ROWS, -1.0, "<f4"),
            "text 0: a step or a least log-probability is NaN, infinite, too large or",
        ),
        (
            "base.kld",
            put(ROWS, 1e30, "<f4"),
            "text 0: a step or a least log-probability is NaN, infinite, too large or",
        ),
        ("base.kld", put(ROWS, 0.0, "<f4"), "text 0: the probabilities of row 0 make"),
        ("base.kld", put(ROWS + 4, -1e38, "<f4"), "text 0: the probabilities of row 0 make 0 together, not 1"),
    ],
)
def test_bad_files_are_one_line(path, tmp_path, capsys, name, change, said):
    folder = damaged(tmp_path, name, change)
    file = folder / (name if name == "base.kld" else LOGITS)
    assert main(["compare", "--model", str(path), str(file)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1, error


def test_files_that_are_not_the_one(model, tmp_path):
    folder = damaged(tmp_path, LOGITS, lambda raw: raw)
    with pytest.raises(RequestError, match="the token ids; give the logits' file: llamacpp-tiny.bin"):
        opened(folder / TOKENS, model)
    shutil.copy(folder / LOGITS, folder / "model.bin")
    with pytest.raises(RequestError, match="model.bin: no dump: expected .*; a model is compared by --candidate-model"):
        opened(folder / "model.bin", model)
    shutil.copy(folder / LOGITS, folder / "llamacpp-tiny-embeddings.bin")
    shutil.copy(folder / TOKENS, folder / "llamacpp-tiny-embeddings-tokens.bin")
    with pytest.raises(RequestError, match="embeddings, not logits"):
        opened(folder / "llamacpp-tiny-embeddings.bin", model)
    assert opened(folder, model)[0].path == str(folder / LOGITS)
    shutil.copy(folder / LOGITS, folder / "llamacpp-other.bin")
    with pytest.raises(RequestError, match="several files of logits: llamacpp-other.bin, llamacpp-tiny.bin"):
        opened(folder, model)
    with pytest.raises(RequestError, match="texts: expected an integer from 1 to 3"):
        llmjax.compare(model, BASE, texts=4)
    for file in (folder / LOGITS, BASE):
        with pytest.raises(RequestError, match="is compared with a model: llmjax compare --model M"):
            llmjax.compare(file, BASE)
    known = llmjax.trace(model, opened(BASE, model)[0].token_ids.tolist())
    with pytest.raises(RequestError, match="3 texts; a model is compared with them"):
        llmjax.compare(known, BASE, model=model)


def test_without_a_tokenizer_the_first_text_alone_is_known(model):
    found = opened(BASE, dataclasses.replace(model, tokenizer=None))
    assert len(found) == 1 and "it is not known how the other 2 texts begin" in found[0].kind
