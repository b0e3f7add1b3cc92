"""Paths that no file can have: one clear line from every door that takes one, and nothing left behind."""

import errno
import os
import resource
from pathlib import Path

import numpy as np
import pytest

import llmjax
from converters import BundleConfig, ConversionConfig, create_bundle
from llmjax.batch.files import claimed
from llmjax.batch.reading import open_lines
from llmjax.cli.main import main
from llmjax.errors import CheckpointError, LlmjaxError, OutputError
from llmjax.lora.adapter import LoraSource
from llmjax.oracle.comparison import Comparison
from llmjax.oracle.dump import from_arrays
from llmjax.oracle.names import _rules
from llmjax.oracle.trace import Trace
from llmjax.outside.paths import path_problem
from llmjax.outside.whole import whole_files
from llmjax.training.lines import read_rows
from tests import tiny

BAD = {
    "long": ("x" * 300, "File name too long"),
    "longer": ("y" * 9000, "File name too long"),
    "deep": ("a/" * 3000, "File name too long"),
    "nul": ("a\0b", "null (byte|character)"),
    "surrogate": ("\ud800", "surrogates not allowed"),
    "empty": ("", "expected a path, found ''"),
    "circle": ("circle/x", "Too many levels of symbolic links"),
    "bytes": (b"abc", "expected a path, found b'abc'"),
    "number": (5, "expected a path, found 5"),
}
# Doors that are tried with what is no text, too.
ANY = ("load", "lora", "config", "inspect", "convert from", "convert to", "trace", "output_dir")
COVERAGE = {"taps": 0, "of": 0, "tokens": 0, "missing": []}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("paths") / "model")


def options(folder: Path, **changes) -> ConversionConfig:
    values = {"input_ckpt": str(folder), "ckpt_format": "safetensors", "model_type": "GEMMA_2B", "backend": "cpu"}
    return ConversionConfig(**values | {"output_dir": str(folder / "none")} | changes)


def bundle(folder: Path, path: str) -> Path:
    file = str(folder / "config.json")
    return create_bundle(BundleConfig(file, file, "<bos>", ["<eos>"], path))


def through(stack):
    with stack:
        pass


DOORS = {
    "load": lambda folder, path: llmjax.load(path),
    "lora": lambda folder, path: llmjax.load(folder, lora=LoraSource(path, 1.0)),
    "config": lambda folder, path: llmjax.load(folder, config=path),
    "quantize": lambda folder, path: llmjax.load(folder, quantize=f"{path}.toml" if path else ".toml/\0.toml"),
    "inspect": lambda folder, path: llmjax.inspect(path),
    "convert from": lambda folder, path: llmjax.convert(path, folder / "none"),
    "convert to": lambda folder, path: llmjax.convert(folder, path or "."),
    "mediapipe to": lambda folder, path: llmjax.convert(folder, path, to="mediapipe", backend="cpu"),
    "input_ckpt": lambda folder, path: options(folder, input_ckpt=path or "\0"),
    "output_dir": lambda folder, path: options(folder, output_dir=path),
    "vocab_model_file": lambda folder, path: options(folder, vocab_model_file=path or "\0"),
    "bundle": bundle,
    "trace": lambda folder, path: Trace({"embed": np.ones(1)}, {"token_ids": [1]}).save(path or "."),
    "compare": lambda folder, path: llmjax.compare(path, folder),
    "names": lambda folder, path: _rules(from_arrays("d", {}, np.ones(1), {}), path),
    "html": lambda folder, path: Comparison("identical", None, "", COVERAGE).to_html(path),
    "input": lambda folder, path: through(open_lines(path)),
    "output": lambda folder, path: through(claimed(path, "-")),
    "training rows": lambda folder, path: read_rows(path),
    "files": lambda folder, path: through(whole_files(Path(path or "\0"))),
}


@pytest.mark.parametrize(
    ("door", "kind"), [(d, k) for d in DOORS for k in BAD if isinstance(BAD[k][0], str) or d in ANY]
)
def test_a_path_that_no_file_can_have(folder, tmp_path, monkeypatch, door, kind):
    path, _ = BAD[kind]
    monkeypatch.chdir(tmp_path)
    os.symlink("circle", "circle")
    with pytest.raises(LlmjaxError) as error:
        DOORS[door](folder, path)
    assert len(str(error.value)) < 2600 and "Errno" not in str(error.value)
    assert os.listdir(tmp_path) == ["circle"] and not (folder / "none").exists()


@pytest.mark.parametrize("kind", BAD)
def test_what_is_wrong_with_it_is_said(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    os.symlink("circle", "circle")
    path, reason = BAD[kind]
    with pytest.raises(CheckpointError, match=rf"^model: .*{reason}"):
        llmjax.inspect(path)


@pytest.mark.parametrize(
    "flags",
    [
        ["inspect", "@"],
        ["convert", "@", "x", "--to", "hf"],
        ["compare", "@", "@"],
        ["compare", "a", "b", "--names", "@"],
    ],
)
def test_the_command_line_says_it_in_one_line(capsys, flags):
    assert main([flag.replace("@", "x" * 5000) for flag in flags]) == 2
    told = capsys.readouterr().err
    assert told.startswith("llmjax: ") and told.count("\n") == 1 and len(told) < 2600


@pytest.mark.parametrize(
    "flags",
    [
        ["inspect", "@"],
        ["generate", "--prompt", "x", "--model", "@"],
        ["diff", "@", "@"],
        ["compare", "@", "@"],
        ["compare", "a", "b", "--html", "@"],
        ["lora", "train", "--model", "m", "--data", "d", "--output", "@"],
        ["batch", "--model", "m", "--input", "@", "--output", "o"],
    ],
)
def test_a_folder_that_may_not_be_entered(capsys, monkeypatch, tmp_path, flags):
    hidden, stat = str(tmp_path / "x"), os.stat

    def denied(path, **options):
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(hidden):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", denied)
    assert main([flag.replace("@", hidden) for flag in flags]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "Permission denied" in told and "Errno" not in told


def test_a_folder_that_may_be_seen_and_not_entered(capsys, monkeypatch, tmp_path):
    hidden, stat = str(tmp_path), os.stat

    def denied(path, **options):
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(f"{hidden}/"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", denied)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert path_problem(hidden) == f"'{hidden}' cannot be looked at: Permission denied"
    assert main(["compare", hidden, hidden]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "Permission denied" in told and "Errno" not in told


def test_a_user_without_a_home(capsys, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert main(["generate", "--model", "none", "--prompt", "x"]) == 2
    assert capsys.readouterr().err.startswith("llmjax: none: no such file")


def test_a_disk_without_room_for_a_trace(tmp_path):
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, whole[1]))
    try:
        with pytest.raises(OutputError, match=f"^{tmp_path}/t: cannot write it: .*File too large.*nothing is left"):
            Trace({"embed": np.ones(5000)}, {"token_ids": [1]}).save(tmp_path / "t")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, whole)
    assert not os.listdir(tmp_path)


def test_a_line_that_is_too_long_keeps_its_end():
    error = LlmjaxError(f"{'x' * 5000}: cannot be read")
    assert str(error).endswith("x: cannot be read") and len(str(error)) < 2100
