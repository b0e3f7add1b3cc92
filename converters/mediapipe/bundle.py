"""MediaPipe's bundler as Python had it until MediaPipe 1.0: ``BundleConfig``, ``create_bundle``.

A ``.task`` file is a zip of stored entries: a TFLite graph, a SentencePiece model, and how texts start and stop.  The
data of each begins at a multiple of 4 bytes, so that a runtime can map it: zeros stand before each entry's header, four
of them before the first.

Names, order and defaults of the options are those of 0.10.21, then those of 0.10.30 and later.  What differs, on
purpose: tokens must be in the vocabulary and graphs must be TFLite files (``strict=False`` takes anything, as MediaPipe
does); times in the zip are fixed, so that the same input gives the same bytes; the file appears under its name when it
is whole; a mistake is a ``ConfigError``.
"""

import dataclasses
import shutil
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from converters.readers.litert import tflite
from converters.readers.mediapipe.package import METADATA, MODEL, OPTIONAL, TOKENIZER
from converters.readers.mediapipe.parameters import LlmParameters
from llmjax.errors import ConfigError, LlmjaxError, named, shown
from llmjax.outside.paths import checked_path
from llmjax.outside.values import FLAG, STRING, TEXT, Rule, each
from llmjax.outside.whole import whole_file
from llmjax.text import sentencepiece

_ALIGNMENT = 4
_HEADER_BYTES = 30  # of an entry, before its name
_ROLES = ("user", "model", "system")
_OPTIONAL = Rule("a string or None", lambda v: v is None or isinstance(v, str))
_RULES: dict[str, Rule] = {
    **dict.fromkeys(("enable_bytes_to_unicode_mapping", "strict"), FLAG),
    "stop_tokens": each(STRING, "a list of at least one string", least=1, kinds=(list,)),
}
_REQUIRED = ("tflite_model", "tokenizer_model", "start_token", "output_filename")


@dataclasses.dataclass(frozen=True)
class BundleConfig:
    """MediaPipe's options.

    Attributes:
      tflite_model: a TFLite graph with signatures to prefill and to decode.
      tokenizer_model: a SentencePiece model.
      start_token: a piece of it, put before every text.
      stop_tokens: pieces that end a text.
      output_filename: of the bundle; ``.task`` is added where it is missing.
      enable_bytes_to_unicode_mapping: pieces are written in GPT-2's characters for bytes.
      system_prompt: text before every conversation.
      prompt_prefix: text before each prompt.
      prompt_suffix: text behind each prompt.
      prompt_prefix_user: text before what the user says; in place of ``prompt_prefix``, and so on for ``model`` and
        ``system``.
      prompt_suffix_user: text behind it.
      user_role_token: stands for the user's turn; and so on.
      end_role_token: ends a turn.
      tflite_embedder: a further graph; and so on.
      strict: refuse tokens that are not in the vocabulary, and graphs that are not TFLite files.
    """

    tflite_model: str
    tokenizer_model: str
    start_token: str
    stop_tokens: list[str]
    output_filename: str
    enable_bytes_to_unicode_mapping: bool = False
    system_prompt: str | None = None
    prompt_prefix: str | None = None
    prompt_suffix: str | None = None
    _: dataclasses.KW_ONLY
    prompt_prefix_user: str | None = None
    prompt_suffix_user: str | None = None
    prompt_prefix_model: str | None = None
    prompt_suffix_model: str | None = None
    prompt_prefix_system: str | None = None
    prompt_suffix_system: str | None = None
    user_role_token: str | None = None
    system_role_token: str | None = None
    model_role_token: str | None = None
    end_role_token: str | None = None
    tflite_embedder: str | None = None
    tflite_per_layer_embedder: str | None = None
    tflite_vision_encoder: str | None = None
    tflite_vision_adapter: str | None = None
    strict: bool = True


def create_bundle(config: BundleConfig) -> Path:
    """Writes a ``.task`` file and returns its path; one that exists is replaced.

    Raises:
      ConfigError: options are wrong, or contradict each other, or do not fit the files.
      TokenizerError: the vocabulary is no SentencePiece model.
      CheckpointError: the file cannot be written.
    """
    if not isinstance(config, BundleConfig):
        raise ConfigError(f"config: expected a BundleConfig, found {shown(config)}")
    problems = list(_problems(config))
    if problems:
        raise ConfigError("BundleConfig: " + "\n  ".join(problems))
    output = checked_path("output_filename", config.output_filename, ConfigError)
    if not output.name:
        raise ConfigError(f"output_filename: {output}: expected a file, found a directory")
    if not output.name.endswith(".task"):
        output = output.with_name(output.name + ".task")
    files = {"tflite_model": MODEL, "tokenizer_model": TOKENIZER}
    files |= {option: entry for option, entry in OPTIONAL.items() if getattr(config, option)}
    _check_files(config, list(files), output)
    with whole_file(output) as partial:
        write(partial, config, Path(config.tokenizer_model).read_bytes())
    return output


def write(path: Path, config: BundleConfig, vocabulary: bytes) -> None:
    """Writes a bundle of files that are checked, whatever its options say of the file and of the tokenizer.

    Args:
      path: of a new file.
      config: the options; an empty start token for none.
      vocabulary: a SentencePiece model.

    Raises:
      ConfigError: tokens are not in the vocabulary.
      TokenizerError: it is no SentencePiece model.
      OSError: the file cannot be written.
    """
    _check_tokens(config, vocabulary)
    # The order of MediaPipe: metadata before what is optional.
    entries: list[tuple[str, str | bytes]] = [
        (MODEL, config.tflite_model),
        (TOKENIZER, vocabulary),
        (METADATA, metadata(config)),
        *((entry, given) for option, entry in OPTIONAL.items() if (given := getattr(config, option))),
    ]
    with open(path, "xb") as file:
        _write(file, entries)


def metadata(config: BundleConfig) -> bytes:
    """``LlmParameters``, serialized."""
    message = LlmParameters(start_token=config.start_token or None, stop_tokens=config.stop_tokens)
    if config.enable_bytes_to_unicode_mapping:
        message.input_output_normalizations.append(1)
    # Runtimes before 0.10.22 know one template, whose suffix opens the model's turn.
    old = {
        "session_prefix": config.system_prompt,
        "prompt_prefix": config.prompt_prefix or config.prompt_prefix_user,
        "prompt_suffix": config.prompt_suffix,
    }
    if config.prompt_suffix_user:
        old["prompt_suffix"] = config.prompt_suffix_user + (config.prompt_prefix_model or "")
    for name, text in old.items():
        if text:
            setattr(message.prompt_template, name, text)
    for role in _ROLES:
        for part in ("prompt_prefix", "prompt_suffix"):
            if text := getattr(config, f"{part}_{role}"):
                setattr(getattr(message.prompt_templates, f"{role}_template"), part, text)
    for name in (*(f"{role}_role_token" for role in _ROLES), "end_role_token"):
        if text := getattr(config, name):
            setattr(message, name, text)
    return message.SerializeToString()


def _problems(config: BundleConfig) -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        texts = value if isinstance(value, list) else [value]
        rule = _RULES.get(field.name, TEXT if field.name in _REQUIRED else _OPTIONAL)
        if not all(map(_is_text, texts)):
            yield f"{field.name}: expected text, found {shown(value)}"
        elif problem := rule.problem(value):
            yield f"{field.name}: {problem}"
    if config.system_prompt and (config.prompt_prefix_system or config.prompt_suffix_system):
        yield "system_prompt, prompt_prefix_system and prompt_suffix_system: expected the one or the others"
    if (config.prompt_prefix and config.prompt_prefix_user) or (config.prompt_suffix and config.prompt_suffix_user):
        yield "prompt_prefix and prompt_suffix: say the same as prompt_prefix_user and prompt_suffix_user; give these"


def _is_text(value: Any) -> bool:
    """Whether a string is valid Unicode without NUL; what is no string is left to others."""
    try:
        return not isinstance(value, str) or b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


def _check_files(config: BundleConfig, options: list[str], output: Path) -> None:
    for option in options:
        path = Path(getattr(config, option))
        try:
            with open(path, "rb") as file:
                file.read(1)
        except OSError as error:
            raise ConfigError(f"{option}: {path}: cannot read it: {error.strerror}") from None
        if output.exists() and output.samefile(path):
            raise ConfigError(f"output_filename: {output} is the {option}")
        if config.strict and option != "tokenizer_model":
            try:
                tflite.read_file(path)
            except LlmjaxError as error:
                raise ConfigError(f"{option}: {error} (strict=False, --no-strict, takes any file)") from None
    if output.is_dir():
        raise ConfigError(f"output_filename: {output}: expected a file, found a directory")


def _check_tokens(config: BundleConfig, vocabulary: bytes) -> None:
    processor = sentencepiece.processor_of(vocabulary, config.tokenizer_model)
    if not config.strict:
        return
    given = [("start_token", config.start_token)] * bool(config.start_token)
    given += [("stop_tokens", text) for text in config.stop_tokens]
    missing = [(option, text) for option, text in given if processor.id_to_piece(processor.piece_to_id(text)) != text]
    if missing:
        special = [processor.id_to_piece(i) for i in range(processor.get_piece_size()) if processor.is_control(i)]
        known = f"; its control pieces are {', '.join(map(named, special[:10]))}" if special else ""
        lines = [f"{option}: {text!r} is not in the vocabulary of {config.tokenizer_model}" for option, text in missing]
        known += " (strict=False, --no-strict, takes any text)"
        raise ConfigError("BundleConfig: " + "\n  ".join(lines) + known)


def _write(file: IO[bytes], entries: list[tuple[str, str | bytes]]) -> None:
    """The zip: entries of bytes, or of the file that is named."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries:
            info = zipfile.ZipInfo(name)
            info.create_system, info.external_attr = 3, 0o600 << 16
            info.file_size = len(content) if isinstance(content, bytes) else Path(content).stat().st_size
            # An entry above 2 GiB has 20 bytes more in its header, which changes nothing here.
            at = archive.start_dir
            padding = _ALIGNMENT - (at + _HEADER_BYTES + len(name)) % _ALIGNMENT
            file.seek(at)
            file.write(bytes(padding))
            archive.start_dir = file.tell()
            with (
                BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as source,
                archive.open(info, "w") as target,
            ):
                shutil.copyfileobj(source, target, 1 << 20)
