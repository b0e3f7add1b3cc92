"""Names from files and rows: what a terminal would obey is never printed, and no message is too long to read."""

import json
import pickle
import warnings

import numpy as np
import pytest
from safetensors.numpy import save_file

from converters.readers.safetensors import SafetensorsFile
from llmjax.checkpoint.inspection import CheckpointReport
from llmjax.cli.main import main
from llmjax.errors import CheckpointError, ConfigError, LlmjaxError, TooLongError, named, printable, shown
from llmjax.models.registry import read_config
from tests.tiny import CONFIG

# Clears the screen, sets the title, hides what follows, moves back, reorders a line, and other newlines.
TRICKS = "\x1b[2J\x1b]0;owned\x07\x9b31m\r\b\u202eabc\u2028\ud800"


def is_safe(text):
    return all(line.isprintable() for line in text.split("\n"))


def test_every_error_can_be_printed():
    for kind in (LlmjaxError, ConfigError, TooLongError):
        error = kind(f"file: naïve 模型 {TRICKS}\n  tensor x")
        assert is_safe(str(error)) and str(error).startswith(
            "file: naïve 模型 \\x1b[2J\\x1b]0;owned\\x07\\x9b31m\\r\\x08"
        )
        assert str(error).endswith("\n  tensor x")
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_no_error_is_too_long_to_read():
    error = str(CheckpointError("\n".join(["x" * 10_000] * 300)))
    assert error.endswith("xx\n  ... and 200 lines more") and len(error) < 210_000


def test_names_and_values():
    assert named("a\nb" + TRICKS[:4]) == "a\\nb\\x1b[2J" and named("模" * 101) == "模" * 100 + "..."
    assert printable("a\n\tb\x1b") == "a\n\\tb\\x1b"
    assert shown("x" * 10**7) == "'" + "x" * 76 + "..." and len(shown([[1] * 50] * 10**5)) == 80
    assert shown(np.arange(3)) == "[0, 1, 2]" and shown(np.float32(2)) == "2.0" and is_safe(shown(TRICKS))


@pytest.fixture
def hostile(tmp_path):
    """A checkpoint whose names and keys are tricks."""
    folder = tmp_path / "model"
    folder.mkdir()
    name = TRICKS.rstrip("\ud800") + "\nsupported: yes"
    save_file({name: np.zeros(2, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps(CONFIG | {name: name, "hidden_act": name, "rope_scaling": {name: 1}})
    )
    return folder


def test_what_is_told_of_a_checkpoint(hostile, capfd):
    assert main(["inspect", str(hostile)]) == 1
    out, err = capfd.readouterr()
    assert is_safe(out) and is_safe(err) and "\\x1b[2J" in out
    assert [line for line in out.splitlines() if line.startswith("supported")] == ["supported: no"]
    assert main(["inspect", str(hostile), "--json"]) == 1
    out, _ = capfd.readouterr()
    assert is_safe(out.rstrip("\n")) and json.loads(out)["tensors"][0]["name"].startswith("\x1b[2J")
    assert main(["generate", "--model", str(hostile), "--prompt", "a"]) == 2
    out, err = capfd.readouterr()
    assert not out and is_safe(err) and err.count("\\x1b[2J") >= 3


def test_warnings_and_the_log(tmp_path, capfd, monkeypatch):
    import logging

    def run(args):
        warnings.showwarning(TRICKS, UserWarning, "file", 1)
        logging.getLogger("llmjax.x").warning(TRICKS)
        raise OSError(1, TRICKS)

    # pytest's own handler would keep the text as it is, and cannot send it from one process to another.
    monkeypatch.setattr(logging.getLogger("llmjax"), "propagate", False)
    monkeypatch.setattr("llmjax.cli.generate._generate", run)
    monkeypatch.setattr("llmjax.cli.main._drop_stdout", lambda: None)
    assert main(["generate", "--model", "x", "--prompt", "a"]) == 1
    err = capfd.readouterr().err
    assert is_safe(err) and err.count("\\x1b[2J") == 3


def test_a_table_is_safe_whatever_is_in_it():
    tensors = [{"name": TRICKS, "shape": [1], "dtype": "F32", "nbytes": 4, "fills": [], "use": TRICKS, "kept": ""}]
    report = CheckpointReport(TRICKS, "gguf", TRICKS, False, [TRICKS], {"x": TRICKS}, 1, tensors, {"kind": TRICKS})
    assert is_safe(report.to_text())


def test_a_config_is_quoted_by_its_beginning():
    with pytest.raises(ConfigError) as caught:
        read_config(CONFIG | {"k" * 10**6: "v" * 10**6, "hidden_act": ["w" * 10**6], "rope_scaling": "r" * 10**6}, "c")
    assert len(str(caught.value)) < 1000
    with pytest.raises(ConfigError, match=r"model_type \['llama'\]"):
        read_config({"model_type": ["llama"], "architectures": ["a\x1b"]}, "c")


def test_a_damaged_header_is_quoted_by_its_beginning(tmp_path):
    for entry in ({"dtype": TRICKS}, {"dtype": "F32", "shape": [-1] * 10**5}, {"data_offsets": ["\x1b"] * 10**5}):
        header = json.dumps({f"t{TRICKS[:4]}": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]} | entry}).encode()
        (tmp_path / "f").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        with pytest.raises(CheckpointError) as caught:
            SafetensorsFile(tmp_path / "f")
        assert is_safe(str(caught.value)) and len(str(caught.value)) < 1000
