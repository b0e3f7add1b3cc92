"""The command line: what it prints where, exit codes, and one clear line for every user's mistake."""

import errno
import io
import json
import os
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import safetensors

import llmjax
from llmjax.cli import loading
from llmjax.cli.main import main
from llmjax.errors import RequestError
from llmjax.outside import whole
from tests.tiny import checkpoint, roomy


@pytest.fixture(scope="module")
def llm(short_smollm2):
    return roomy(llmjax.LLM(short_smollm2, max_batch=2), 500)


@pytest.fixture
def shared(llm, monkeypatch):
    """The verbs run in this process, on a model that is loaded and compiled once."""
    monkeypatch.setattr(loading, "load_llm", lambda args, slots=None: (llm, 0.0))


def failing(capsys, *args):
    """Runs a command that must fail; returns its exit code and the one line (or list) it prints."""
    code = main(list(args))
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert err.startswith("llmjax: ")
    return code, err


def test_generate_streams_to_stdout(smollm2_path):
    """In a process of its own, as a user runs it."""
    command = [sys.executable, "-m", "llmjax", "generate", "--model", "smollm2", "--prompt", "-"]
    flags = ["--temperature", "0", "--max-tokens", "12"]
    done = subprocess.run(
        command + flags, input="The capital of France is", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(" Paris.")
    assert done.stderr == ""


def test_show_prompt(shared, capsys):
    assert main(["generate", "--model", "x", "--chat", "--prompt", "hi", "--max-tokens", "1", "--show-prompt"]) == 0
    err = capsys.readouterr().err
    assert "<|im_start|>user\\nhi<|im_end|>" in err
    assert "ids: [1, 9690," in err


def test_batch_rows_in_order_bad_ones_reported(shared, capsys, tmp_path):
    lines = [
        '{"id": "a", "prompt": "One, two,", "max_tokens": 4}',
        '{"id": "b", "prompt": "x", "temperature": -1}',
        "{not json",
        "",
        '{"id": "a", "prompt": "again"}',
        '{"messages": [{"role": "user", "content": "Say yes."}], "max_tokens": 3}',
        '{"id": "e", "prompt": ""}',
        '{"id": "f", "prompt_token_ids": [504, 3575], "max_tokens": 2, "logprobs": 2}',
        '{"id": "g", "prompt": "x", "promt": "y"}',
        '{"id": "h", "prompt": "x", "prompt_token_ids": [1]}',
        "[1]",
        '{"id": "i", "messages": []}',
        '{"id": "j", "prompt_token_ids": [1, "a"]}',
        '{"id": "k", "prompt_token_ids": [99999]}',
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines += ['{"id": "l", "prompt": "\udcff"}', '{"id": "\\ud800", "prompt": 3}']
    source.write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")
    args = ["batch", "--model", "x", "--input", str(source), "--output", str(target), "--temperature", "0"]
    assert main([*args, "--ordered"]) == 1
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [r["id"] for r in rows] == [
        "a",
        "b",
        None,
        "a",
        "6",
        "e",
        "f",
        "g",
        "h",
        None,
        "i",
        "j",
        "k",
        None,
        "\ud800",
    ]
    errors = {r["line"]: r["error"] for r in rows if "error" in r}
    assert sorted(errors) == [2, 3, 5, 7, 9, 10, 11, 12, 13, 14, 15, 16]
    assert errors[2] == "line 2: temperature: expected a number from 0 (greedy) to 100, found -1"
    assert "not valid JSON" in errors[3]
    assert "was used by an earlier row" in errors[5]
    assert "unknown key promt" in errors[9]
    assert "found prompt, prompt_token_ids" in errors[10]
    assert "messages: expected a non-empty list" in errors[12]
    assert "outside the vocabulary" in errors[14]
    assert errors[15] == "line 15: not valid UTF-8"
    good = {r["id"]: r for r in rows if "error" not in r}
    assert good["a"]["usage"]["completion_tokens"] == 4
    assert len(good["f"]["logprobs"]) == 2 <= len(good["f"]["logprobs"][0])
    assert "3 rows answered, 12 failed" in capsys.readouterr().err


def test_score(shared, capsys, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "The capital of France is Paris."}\n{"token_ids": [504, 3575, 282]}\n{"text": 5}\n')
    assert main(["score", "--model", "x", "--input", str(source), "--output", "-"]) == 1
    out, err = capsys.readouterr()
    first, second, third = map(json.loads, out.splitlines())
    assert first["logprobs"][0] is None and len(first["logprobs"]) == len(first["token_ids"]) == 7
    assert first["nll"] == pytest.approx(-sum(first["logprobs"][1:]) / 6)
    assert first["logprobs"][1:3] == pytest.approx(second["logprobs"][1:], abs=1e-5)
    assert "line 3: text: expected a string, found 5" in third["error"]
    assert "8 tokens, NLL" in err


def test_chat_keeps_the_conversation(shared, llm, capsys, monkeypatch):
    asked, told = [], []

    def recorded(messages, params, *, date):
        asked.append([m["content"] for m in messages])
        told.append(str(date))
        return request(messages, params, date=date)

    request = llm.chat_request
    monkeypatch.setattr(llm, "chat_request", recorded)
    monkeypatch.setattr(sys, "stdin", io.StringIO("My name is Bob.\nWhat is my name?\n/reset\nHello.\n"))
    flags = ["--max-tokens", "6", "--temperature", "0", "--date", "2026-01-31"]
    assert main(["chat", "--model", "x", "--system", "Be kind.", *flags]) == 0
    answers = capsys.readouterr().out.splitlines()
    assert asked[0] == ["Be kind.", "My name is Bob."]
    assert asked[1] == ["Be kind.", "My name is Bob.", answers[0], "What is my name?"]
    assert asked[2] == ["Be kind.", "Hello."]
    assert told == ["2026-01-31 00:00:00"] * 3


def test_trace(capsys, tmp_path):
    model = str(checkpoint(tmp_path / "model"))
    args = ["trace", "--model", model, "--ids", "50,35,28", "--taps", "layers.1.*", "--taps", "logits"]
    assert main([*args, "--output", str(tmp_path / "t")]) == 0
    assert "17 activations of 3 tokens" in capsys.readouterr().err
    manifest = json.loads((tmp_path / "t/manifest.json").read_text())
    assert manifest["token_ids"] == [50, 35, 28] and manifest["numerics"] == "reference"
    with safetensors.safe_open(tmp_path / "t/activations.safetensors", "numpy") as file:
        assert file.get_tensor("logits").shape == (3, 600)
        assert file.get_tensor("layers.1.attn.probs").shape == (6, 3, 3)
    for extra, message in (([], "exists; expected a new directory"), (["--taps", "no.such"], "matches no activation")):
        code, err = failing(capsys, *args[:5], *extra, "--output", str(tmp_path / ("u" if extra else "t")))
        assert code == 2 and message in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "t"]


def test_inspect(capsys, smollm2_path):
    assert main(["inspect", "smollm2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["supported"] and report["parameters"] == 134_515_008
    assert report["config"]["num_hidden_layers"] == 30
    assert {t["dtype"] for t in report["tensors"]} == {"Q4_1", "Q8_0", "F32"}
    assert all(t["fills"] for t in report["tensors"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "temperature: expected a number from 0"),
        (["--top-p", "0"], "top_p: expected a number above 0"),
        (["--top-k", "3000000000"], "top_k: expected an integer from 0 (all) to 2**31 - 1"),
        (["--date", "2026-01-31"], "date: only a chat template takes one; give --chat, too"),
        (["--chat", "--date", "now"], "date: expected a day such as 2026-01-31"),
        (["--max-tokens", "0"], "max_tokens: expected a positive integer"),
        (["--seed", "-1"], "seed: expected an integer from 0"),
        (["--prompt", ""], "prompt: empty"),
        (["--prompt", "x " * 9000], "tokens, longer than the model's context of 8192"),
        (["--stop-token-ids", "49152"], "stop_token_ids: 49152 is outside the vocabulary"),
    ],
)
def test_bad_requests(shared, capsys, flags, message):
    prompt = [] if "--prompt" in flags else ["--prompt", "hi"]
    code, err = failing(capsys, "generate", "--model", "x", *prompt, *flags)
    assert code == 2 and message in err and err.count("\n") == 1


def test_scores_that_cannot_be_written(shared, capsys, tmp_path):
    """The work failed: that is no wrong usage."""
    (tmp_path / "in.jsonl").write_text('{"text": "One, two"}\n')
    code, err = failing(capsys, "score", "--model", "x", "--input", str(tmp_path / "in.jsonl"), "--output", "/dev/full")
    assert code == 1 and "/dev/full: writing the output failed: No space left" in err


def test_compiled_programs_are_kept_unless_told_otherwise(shared, capsys, monkeypatch):
    kept = []
    monkeypatch.setattr(jax.config, "update", lambda name, value: kept.append(name))
    flags = ["generate", "--model", "x", "--prompt", "hi", "--max-tokens", "1"]
    assert main([*flags, "--no-compile-cache"]) == 0 and not kept
    assert main(flags) == 0 and "jax_compilation_cache_dir" in kept


def test_what_the_environment_forbids(capsys, monkeypatch):
    def load(args, slots=None):
        raise RuntimeError(said)

    monkeypatch.setattr(loading, "load_llm", load)
    # As JAX does under JAX_PLATFORMS=nonsense.
    said = "Unable to initialize backend 'nonsense': Backend 'nonsense' is not in the list of known backends: ['cpu']."
    assert failing(capsys, "generate", "--model", "x", "--prompt", "hi") == (2, f"llmjax: {said}\n")
    said = "INVALID_ARGUMENT: Disallowed host-to-device transfer: aval=ShapedArray(int32[]), dst_sharding=..."
    told = "llmjax: JAX_TRANSFER_GUARD: Disallowed host-to-device transfer; a model cannot do without, so unset it\n"
    assert failing(capsys, "generate", "--model", "x", "--prompt", "hi") == (2, told)


def test_bad_settings(capsys, smollm2_path):
    for flags, message in (
        (["--numerics", "exact"], "numerics: unknown profile 'exact'"),
        (["--max-batch", "0"], "max_batch: expected a positive integer"),
    ):
        code, err = failing(capsys, "generate", "--model", "smollm2", "--prompt", "hi", *flags)
        assert code == 2 and message in err and err.count("\n") == 1


def test_an_empty_flag_is_a_flag(capsys, monkeypatch, tmp_path):
    """What a script's unset variable makes of one is told, or means what the flag does, but is not left out."""
    (tmp_path / "in.jsonl").write_text('{"prompt": "hi"}')
    job = ("batch", "--model", "x", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "y"))
    for words, message in (
        ((*job, "--shard", ""), "shard: expected i/n"),
        ((*job, "--ray", ""), "--ray"),
        (("generate", "--model", "x", "--prompt", "hi", "--date", ""), "date: only a chat template takes one"),
        (("generate", "--model", "x", "--prompt", "hi", "--chat-template-kwargs", "{}"), "only a chat template"),
        (("convert", "smollm2", "y", "--to", "llmjax", "--group-size", "0"), "--group-size goes with --bits"),
        (
            ("convert", "smollm2", "y", "--to", "llmjax", "--bits", "4", "--group-size", "0"),
            "expected a group of 32, 64 or 128, found 0",
        ),
    ):
        code, err = failing(capsys, *words)
        assert code == 2 and message in err, words
    asked = []

    class Llm:
        def chat_request(self, messages, *_, **__):
            asked.append(messages)
            raise RequestError("enough")

    monkeypatch.setattr(loading, "load_llm", lambda args: (Llm(), 0.0))
    monkeypatch.setattr(loading, "tell_defaults", lambda *_: None)
    failing(capsys, "generate", "--model", "x", "--prompt", "hi", "--system", "")
    assert asked == [[{"role": "user", "content": "hi"}]]


def test_an_output_that_cannot_be_is_told_before_long_work(capsys, monkeypatch, tmp_path):
    def load(*_, **__):
        raise AssertionError("nothing is to be loaded")

    monkeypatch.setattr(loading, "load_model", load)
    (tmp_path / "there").mkdir()
    (tmp_path / "there/x").write_text("mine")
    there = str(tmp_path / "there")
    for words, message in (
        (("trace", "--ids", "1", "--output", there), "exists; expected a new directory"),
        (("vectors", "--output", there), "exists; expected a new directory"),
        (("lora", "train", "--data", "d", "--output", f"{there}/x"), "there/x: expected a directory, found a file"),
        (("compare", "d", "--html", there), "expected a file to write to, found a directory"),
        (("compare", "d", "--junit", there), "expected a file to write to, found a directory"),
        (("compare", "d", "--junit", "x", "--html", "x"), "--html, --junit: expected two files, found x for both"),
    ):
        code, err = failing(capsys, *words, "--model", "x")
        assert code == 2 and message in err, words


def test_bad_models(capsys, tmp_path, smollm2_path):
    data = smollm2_path.read_bytes()
    empty, directory, cut, table, foreign, type_ = (
        tmp_path / n for n in ("empty.gguf", "d", "cut.gguf", "t.gguf", "f.gguf", "y.gguf")
    )
    empty.write_bytes(b"")
    directory.mkdir()
    cut.write_bytes(data[: len(data) // 2])
    table.write_bytes(data[:1_000_000])
    foreign.write_bytes(data.replace(b"llama", b"mamba"))
    name = b"token_embd.weight"
    at = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4 + 16
    type_.write_bytes(data[:at] + struct.pack("<I", 199) + data[at + 4 :])
    expected = {
        tmp_path / "none": "no such file or directory",
        directory: "config.json",
        empty: "the file is empty",
        cut: "truncated or damaged GGUF",
        table: "truncated",
        foreign: "general.architecture 'mamba' is not supported",
        type_: "tensor token_embd.weight: type 199 is not known",
    }
    for path, message in expected.items():
        code, err = failing(capsys, "generate", "--model", str(path), "--prompt", "hi")
        assert code == 2 and message in err and str(path) in err, (path, err)


def test_unwritable_output_is_found_before_the_model_is_loaded(capsys, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "x"}\n')
    for target, message in (
        (source / "out.jsonl", "cannot write the output: Not a directory"),
        (tmp_path, "cannot write the output: Is a directory"),
        (source, "the output is the input file"),
    ):
        code, err = failing(capsys, "batch", "--model", "nowhere", "--input", str(source), "--output", str(target))
        assert code == 2 and message in err
    assert source.read_text() == '{"prompt": "x"}\n'
    code, err = failing(capsys, "batch", "--model", "x", "--input", str(tmp_path / "none"), "--output", "-")
    assert code == 2 and "cannot read the input: No such file" in err


def test_an_earlier_result_outlives_a_model_that_does_not_load(capsys, tmp_path):
    source, old, new = tmp_path / "in.jsonl", tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    source.write_text('{"prompt": "x"}\n')
    old.write_text("precious\n")
    for target in (old, new):
        args = ["--input", str(source), "--output", str(target), "--force"]
        code, _ = failing(capsys, "batch", "--model", "nowhere", *args)
        assert code == 2
    assert old.read_text() == "precious\n" and not new.exists()


def test_streams_of_text_alone(shared, monkeypatch):
    """As a caller of ``main`` may put in place of stdin and stdout."""
    rows = '{"id": "é", "prompt": "One, two,", "max_tokens": 2}\n{"id": "b"}\n'
    for order in ((), ("--ordered",)):
        monkeypatch.setattr(sys, "stdin", io.StringIO(rows))
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        assert main(["batch", "--model", "x", "--input", "-", "--output", "-", *order]) == 1
        found = {row["id"]: row for row in map(json.loads, sys.stdout.getvalue().splitlines())}
        assert found["é"]["usage"]["completion_tokens"] == 2 and "expected exactly one of" in found["b"]["error"]


def test_a_folder_for_the_output_is_made(llm, capsys, monkeypatch, tmp_path):
    """As by every verb; but none is left where nothing came into it."""
    source, target = tmp_path / "in.jsonl", tmp_path / "new/one/out.jsonl"
    source.write_text('{"text": "One, two,"}\n')
    files = ["--input", str(source), "--output", str(target)]
    code, err = failing(capsys, "score", "--model", str(tmp_path / "none"), *files)
    assert code == 2 and not (tmp_path / "new").exists()
    monkeypatch.setattr(loading, "load_llm", lambda args, slots=None: (llm, 0.0))
    assert main(["score", "--model", "x", *files]) == 0
    assert len(json.loads(target.read_text())["tokens"]) == 4


def test_an_output_that_a_full_disk_cuts_short(capsys, monkeypatch, tmp_path):
    """It is work that failed: 1, which of ``compare`` and ``diff`` alone says that something differs."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    model = str(checkpoint(tmp_path / "model"))
    trace = ["trace", "--model", model, "--ids", "50,35", "--taps", "logits", "--output"]
    assert main([*trace, str(tmp_path / "t")]) == 0
    monkeypatch.setattr(whole.os, "fsync", full)
    for words in (
        [*trace, str(tmp_path / "new")],
        ["convert", model, str(tmp_path / "new"), "--to", "hf"],
        ["compare", str(tmp_path / "t"), str(tmp_path / "t"), "--html", str(tmp_path / "new")],
    ):
        capsys.readouterr()
        code, err = main(words), capsys.readouterr().err
        assert code == (2 if words[0] == "compare" else 1), words
        assert f"new: cannot write it: {os.strerror(errno.ENOSPC)}; nothing is left behind" in err.splitlines()[-1]
    assert sorted(os.listdir(tmp_path)) == ["model", "t"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk(shared, capsys, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "x", "max_tokens": 2}\n')
    code, err = failing(capsys, "batch", "--model", "x", "--input", str(source), "--output", "/dev/full")
    assert code == 1
    assert "/dev/full: writing the output failed: No space left" in err


@pytest.mark.parametrize(
    ("flags", "named"),
    [("--quantize int8 --lora-alpha 2", "--quantize, --lora-alpha"), ("--numerics hf", "--numerics"),
     ("--check-finite --context-length 5", "--context-length, --check-finite")],
)  # fmt: skip
def test_two_dumps_need_no_model(capsys, flags, named):
    """Of no model, what was asked was passed over in silence."""
    code, err = failing(capsys, "compare", "a", "b", *flags.split())
    assert (code, err) == (2, f"llmjax: {named}: about the model that --model names; give that, too\n")


@pytest.mark.parametrize("flag", ["--ray", "--actors", "--actor-gpus"])
def test_a_dry_run_has_no_workers(capsys, flag):
    code, err = failing(capsys, "batch", "--model", "x", "--input", "i", "--output", "o", "--dry-run", flag, "1")
    assert code == 2 and "leave --ray, --actors and the like out" in err


@pytest.mark.parametrize("args", [[], ["dance"], ["generate", "--model", "x"], ["generate", "--prompt", "x"]])
def test_wrong_usage(args):
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    "words, code, out, err",
    [
        ("--version >&-", 1, "", "llmjax: writing to stdout or a file failed: Bad file descriptor\n"),
        ("inspect {} 2>&-", 2, "", ""),  # a message must not go among the data
    ],
)
def test_closed_streams(tmp_path, words, code, out, err):
    command = f"{shlex.quote(sys.executable)} -m llmjax {words.format(shlex.quote(str(tmp_path / 'nowhere')))}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


class _Gone(io.StringIO):
    """A pipe whose reader has left."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize(("other", "code"), [("granite", 0), ("smollm3", 1)])
def test_a_verdict_is_the_exit_code_whoever_reads(monkeypatch, other, code):
    """It was 2, as of what failed, where the output was longer than what a pipe takes unread."""
    cases = Path(__file__).parents[1] / "data" / "cases"
    monkeypatch.setattr(sys, "stdout", _Gone())
    assert main(["diff", str(cases / "granite"), str(cases / other), "--json"]) == code


def test_so_is_what_a_dry_run_found(monkeypatch, tmp_path):
    """It was 0, as if every row were right."""
    (tmp_path / "in.jsonl").write_text('{"id": "a"}\n')
    model = str(checkpoint(tmp_path / "model"))
    files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    monkeypatch.setattr(sys, "stdout", _Gone())
    assert main(["batch", "--model", model, *files, "--dry-run"]) == 1


def test_importing_llmjax_loads_no_jax():
    code = "import sys, llmjax; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
