"""Models and engines as the flags of ``cli.flags`` describe them."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmjax.errors import RequestError
from llmjax.outside.paths import checked_path

if TYPE_CHECKING:
    from llmjax.llm import LLM
    from llmjax.lora.adapter import LoraSource
    from llmjax.model import Model


def keep_compiled(args: argparse.Namespace) -> None:
    """Keeps compiled programs between runs; only the command line does this, importing llmjax changes nothing
    global."""
    if getattr(args, "no_compile_cache", True):
        return
    import jax

    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home, as in many a container
        return
    jax.config.update("jax_compilation_cache_dir", str(base / "llmjax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def adapter_of(args: argparse.Namespace) -> "LoraSource | None":
    """What ``--lora`` and ``--lora-alpha`` name.

    Raises:
      RequestError: the latter without the former.
    """
    from llmjax.lora.adapter import LoraSource

    if args.lora is None and args.lora_alpha is not None:
        raise RequestError("--lora-alpha: goes with --lora")
    return None if args.lora is None else LoraSource(args.lora, args.lora_alpha)


def load_model(args: argparse.Namespace) -> "Model":
    """See ``llmjax.load``."""
    from llmjax.checkpoint.loading import load

    return load(
        args.model,
        dtype=args.dtype,
        quantize=args.quantize,
        numerics=args.numerics,
        lora=adapter_of(args),
        check_finite=args.check_finite,
        random_weights=args.random_weights,
        config=args.config,
        context_length=args.context_length,
        mesh=args.mesh,
    )


def load_llm(args: argparse.Namespace, slots: Callable[["Model"], int] = lambda model: 1) -> "tuple[LLM, float]":
    """The model and the seconds it took to load.

    Args:
      args: the flags.
      slots: for a model, how many slots to decode with where the flags do not say.
    """
    from llmjax.llm import LLM

    began = time.monotonic()
    model = load_model(args)
    given = getattr(args, "max_batch", None)
    llm = LLM(
        model,
        max_batch=slots(model) if given is None else given,
        loras=dict(getattr(args, "lora_modules", None) or ()),
        seed=getattr(args, "seed", None) or 0,
        truncate_prompt=getattr(args, "truncate_prompt", False),
        memory=args.memory,
        generation_config=getattr(args, "generation_config", "auto"),
        chat_template=_template(getattr(args, "chat_template", None)),
        chat_template_kwargs=getattr(args, "chat_template_kwargs", None),
        fold_system=getattr(args, "fold_system", False),
    )
    return llm, time.monotonic() - began


def tell_defaults(llm: "LLM", given: Mapping[str, Any]) -> None:
    """Says what the checkpoint would have where no flag says otherwise."""
    from llmjax.runtime.generation import told

    if line := told(llm.generation, given, llm.model.generation_file):
        print(f"llmjax: {line}", file=sys.stderr)


def _template(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return checked_path("--chat-template", path, RequestError).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RequestError(f"--chat-template: {path}: cannot read the file: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"--chat-template: {path}: expected UTF-8 text: {error}") from None
