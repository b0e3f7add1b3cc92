"""A tokenizer as Hugging Face's files, for checkpoints that keep theirs elsewhere."""

import json
from pathlib import Path
from typing import Any

from tokenizers import processors

from llmjax.errors import TokenizerError
from llmjax.text.tokenizer import Tokenizer

# What a directory may hold of a tokenizer, and of how to generate.
FILES: tuple[str, ...] = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
    "generation_config.json",
)


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """What ``tokenizer.json`` holds.

    Raises:
      TokenizerError: it does something to a text that this file cannot say.
    """
    if tokenizer.dummy_prefix:
        raise TokenizerError(f"{tokenizer.where}: this tokenizer cannot be written as tokenizer.json")
    state: dict[str, Any] = json.loads(tokenizer.backend.to_str())
    around = {i: tokenizer.piece(i) for i in (*tokenizer.prefix_ids, *tokenizer.suffix_ids)}
    if around:
        template = [*(around[i] for i in tokenizer.prefix_ids), "$A", *(around[i] for i in tokenizer.suffix_ids)]
        processor = processors.TemplateProcessing(
            single=template, pair=[*template, "$B"], special_tokens=[(text, i) for i, text in around.items()]
        )
        state["post_processor"] = json.loads(processor.__getstate__())
    return state


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json``.

    Raises:
      TokenizerError: it does something to a text that these files cannot say.
    """
    state = tokenizer_json(tokenizer)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": tokenizer.add_bos,
        **tokenizer.special,
    }
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    if tokenizer.tools_template is not None:
        named = {"default": tokenizer.chat_template, "tool_use": tokenizer.tools_template}
        config["chat_template"] = [{"name": name, "template": text} for name, text in named.items() if text is not None]
    for name, value in (("tokenizer.json", state), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
