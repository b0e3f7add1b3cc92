"""Bundles (.task) against one of MediaPipe's own bundler, 0.10.21."""

import dataclasses
import zipfile

import pytest

from converters import BundleConfig, create_bundle
from converters.mediapipe import bundle
from converters.readers.mediapipe import parameters
from llmjax.cli.main import main
from llmjax.errors import LlmjaxError
from tests.mediapipe_files import DATA

TASK = DATA / "tiny_bundle_0.10.21.task"


def options(folder, **changes):
    """Those of the real bundle, its parts unpacked into a folder."""
    with zipfile.ZipFile(TASK) as archive:
        for name in (bundle.MODEL, bundle.TOKENIZER):
            archive.extract(name, folder)
    return {
        "tflite_model": str(folder / bundle.MODEL),
        "tokenizer_model": str(folder / bundle.TOKENIZER),
        "start_token": "<bos>",
        "stop_tokens": ["<eos>", "<end_of_turn>"],
        "output_filename": str(folder / "out"),
    } | changes


PROMPTS = {
    "enable_bytes_to_unicode_mapping": True,
    "system_prompt": "SYS",
    "prompt_prefix": "<start_of_turn>user\n",
    "prompt_suffix": "<end_of_turn>\n<start_of_turn>model\n",
}


def _at_our_time(data):
    """The real bundle's bytes, its times (of local headers and of the directory) replaced by ours."""
    data = bytearray(data)
    for mark, at in ((b"PK\x03\x04", 10), (b"PK\x01\x02", 12)):
        found = data.find(mark)
        while found >= 0:
            data[found + at : found + at + 4] = b"\0\0\x21\0"
            found = data.find(mark, found + 4)
    return bytes(data)


def test_equal_to_the_real_bundlers(tmp_path):
    path = create_bundle(BundleConfig(**options(tmp_path, **PROMPTS)))
    assert path == tmp_path / "out.task"
    assert path.read_bytes() == _at_our_time(TASK.read_bytes())
    assert sorted(p.name for p in tmp_path.iterdir()) == [bundle.MODEL, bundle.TOKENIZER, "out.task"]


def test_options_are_mediapipes(tmp_path):
    names = [field.name for field in dataclasses.fields(BundleConfig)]
    assert names[:9] == [*options(tmp_path), *PROMPTS]
    config = BundleConfig("m", "t", "<bos>", ["<eos>"], "o")
    assert not config.enable_bytes_to_unicode_mapping and config.system_prompt is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.start_token = "x"


# LlmParameters by MpLlmBundlerGenerateMetadata of MediaPipe 0.10.35, whose start token is <bos>, stop token <eos>.
LATER = [
    (
        {
            **{f"prompt_prefix_{role}": f"{role[0].upper()}<" for role in ("user", "model", "system")},
            **{f"prompt_suffix_{role}": f">{role[0].upper()}" for role in ("user", "model", "system")},
            **{f"{role}_role_token": role[0] for role in ("user", "system", "model", "end")},
        },
        "2a053c656f733e32053c626f733e420a1202553c1a043e554d3c5a01756201736a016d7201658a011e0a081202553c1a023e55120812024d"
        "3c1a023e4d1a081202533c1a023e53",
    ),
    (
        {"system_prompt": "sys", "prompt_prefix_user": "U<", "prompt_prefix_model": "M<"},
        "2a053c656f733e32053c626f733e42090a037379731202553c8a010c0a041202553c120412024d3c",
    ),
    (
        {"prompt_suffix_user": ">U", "enable_bytes_to_unicode_mapping": True},
        "2a053c656f733e32053c626f733e3a010142041a023e558a01060a041a023e55",
    ),
    ({"prompt_prefix_user": ""}, "2a053c656f733e32053c626f733e"),
    ({"prompt_suffix_model": "x"}, "2a053c656f733e32053c626f733e8a010512031a0178"),
]


@pytest.mark.parametrize("changes, expected", LATER)
def test_metadata_of_later_versions(changes, expected):
    assert bundle.metadata(BundleConfig("m", "t", "<bos>", ["<eos>"], "o", **changes)).hex() == expected


def test_fields_of_later_versions(tmp_path):
    changes = {
        "prompt_prefix_user": "<u>",
        "prompt_suffix_user": "</u>",
        "prompt_prefix_model": "<m>",
        "prompt_suffix_model": "</m>",
        "prompt_prefix_system": "<s>",
        "end_role_token": "</>",
        "user_role_token": "U",
    }
    more = tmp_path / "more.tflite"
    more.write_bytes((DATA / "GEMMA_2B_gpu_int8_mp0.10.21.bin").read_bytes())
    config = BundleConfig(**options(tmp_path, **changes, tflite_vision_encoder=str(more)))
    with zipfile.ZipFile(create_bundle(config)) as archive:
        assert archive.testzip() is None
        entries = archive.infolist()
        assert [e.filename for e in entries] == [*_NAMES, "TF_LITE_VISION_ENCODER"]
        assert all((e.header_offset + 30 + len(e.filename)) % 4 == 0 for e in entries)
        assert archive.read("TF_LITE_VISION_ENCODER") == more.read_bytes()
        message = parameters.read(archive.read(bundle.METADATA), "x")
    # As the wire has it: template 8 for runtimes that know one, 17 for the others.
    assert (message.prompt_template.prompt_prefix, message.prompt_template.prompt_suffix) == ("<u>", "</u><m>")
    templates = message.prompt_templates
    assert (templates.user_template.prompt_prefix, templates.user_template.prompt_suffix) == ("<u>", "</u>")
    assert (templates.model_template.prompt_prefix, templates.model_template.prompt_suffix) == ("<m>", "</m>")
    assert (templates.system_template.prompt_prefix, templates.system_template.prompt_suffix) == ("<s>", "")
    assert message.SerializeToString().endswith(b"\x12\x03<u>\x1a\x07</u><m>\x5a\x01U\x72\x03</>" + _TEMPLATES)


_NAMES = [bundle.MODEL, bundle.TOKENIZER, bundle.METADATA]
_TEMPLATES = b"\x8a\x01!\x0a\x0b\x12\x03<u>\x1a\x04</u>\x12\x0b\x12\x03<m>\x1a\x04</m>\x1a\x05\x12\x03<s>"

WRONG = {
    "stop_tokens: expected a list of at least one string, found []": {"stop_tokens": []},
    "found '<eos>'": {"stop_tokens": "<eos>"},
    "found ['<eos>', 1]": {"stop_tokens": ["<eos>", 1]},
    "start_token: '<s>' is not in the vocabulary": {"start_token": "<s>"},
    "its control pieces are <pad>, <eos>, <bos>": {"start_token": "<s>"},
    "stop_tokens: '</s>' is not in": {"stop_tokens": ["<eos>", "</s>"]},
    "start_token: expected a non-empty string": {"start_token": ""},
    "system_prompt: expected text": {"system_prompt": "\ud800"},
    "strict: expected true or false, found 1": {"strict": 1},
    "expected the one or the others": {"system_prompt": "S", "prompt_suffix_system": "x"},
    "say the same as": {"prompt_prefix": "a", "prompt_prefix_user": "b"},
    "tflite_model: no_such_file: cannot read it": {"tflite_model": "no_such_file"},
    "is the tokenizer_model": {"output_filename": "TOKENIZER.task", "tokenizer_model": "TOKENIZER.task"},
    "not a SentencePiece model": {"tokenizer_model": str(TASK)},
    "not a TFLite file: expected b'TFL3' at byte 4": {"tflite_model": str(TASK)},
    "a TFLite file that is truncated or damaged": {"tflite_model": "cut.tflite"},
    "cannot write it": {"output_filename": "TF_LITE_PREFILL_DECODE/x"},
}


@pytest.mark.parametrize("message", WRONG)
def test_mistakes(message, tmp_path, monkeypatch):
    given = options(tmp_path, **WRONG[message])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "TOKENIZER.task").write_bytes((tmp_path / bundle.TOKENIZER).read_bytes())
    (tmp_path / "cut.tflite").write_bytes((tmp_path / bundle.MODEL).read_bytes()[:-5000])
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(LlmjaxError) as error:
        create_bundle(BundleConfig(**given))
    assert message in str(error.value)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_lax_as_mediapipe(tmp_path):
    (tmp_path / "x").write_bytes(b"no graph")
    changes = {"tflite_model": str(tmp_path / "x"), "start_token": "nowhere", "stop_tokens": ["nothing"]}
    with zipfile.ZipFile(create_bundle(BundleConfig(**options(tmp_path, **changes, strict=False)))) as archive:
        assert archive.read(bundle.MODEL) == b"no graph"


def test_on_the_command_line(tmp_path, capsys):
    given = options(tmp_path)
    flags = ["--tflite-model", given["tflite_model"], "--tokenizer-model", given["tokenizer_model"]]
    flags += ["--start-token", "<bos>", "--stop-token", "<eos>", "--stop-token", "<end_of_turn>"]
    out = str(tmp_path / "cli.task")
    assert main(["bundle", *flags, "--output", out, "--prompt-prefix-user", "U:"]) == 0
    config = BundleConfig(**options(tmp_path, prompt_prefix_user="U:"))
    assert (tmp_path / "cli.task").read_bytes() == create_bundle(config).read_bytes()
    capsys.readouterr()
    flags[5] = "<s>"
    assert main(["bundle", *flags, "--output", out + "2"]) == 2
    assert "llmjax: BundleConfig: start_token: '<s>' is not in the vocabulary" in capsys.readouterr().err
    assert main(["bundle", *flags, "--output", out + "2", "--no-strict"]) == 0
