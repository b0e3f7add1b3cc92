"""``llmjax inspect``, ``llmjax diff``, ``llmjax convert`` and ``llmjax bundle``."""

import argparse
import json
import sys
from dataclasses import fields
from typing import Any

from llmjax.cli.flags import Either, Verbs, add_verb, answer, id_list, weight_flags
from llmjax.cli.loading import adapter_of
from llmjax.cli.progress import report_tensors
from llmjax.errors import ConfigError, RequestError

# Roles with bits of their own; the head has the embedding's.
_BITS = ("attention", "feed_forward", "embedding")
_RECIPE = (*(f"{role}_bits" for role in _BITS), "asymmetric")
_GRAPHS = ("litertlm", "task", "tflite")
# Options that go with some forms alone.
_FORMS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*_RECIPE, "model_type", "backend"), ("mediapipe",)),
    "vocab": ("mediapipe", "task"),
    **dict.fromkeys(("activations", "context", "prefill_lengths", "verify"), _GRAPHS),
    "chat_template": ("litertlm", "task"),
}


def add(verbs: Verbs) -> None:
    """Registers the verbs."""
    text = "Say what a checkpoint is and whether llmjax runs it, from its headers alone."
    inspect = add_verb(verbs, "inspect", _inspect, text)
    inspect.add_argument("path", metavar="PATH", help="a checkpoint's file or directory, or smollm2")
    inspect.add_argument(
        "--against", metavar="SRC", help="what it was made from: report each weight's error; 1 where more differs"
    )
    inspect.add_argument("--json", action="store_true", help="machine-readable, to stdout")
    text = "Say where two checkpoints differ: settings, tokenizers, weights; 0 the same, 1 different."
    diff = add_verb(verbs, "diff", _diff, text)
    diff.set_defaults(verdict=True)
    for name in ("a", "b"):
        diff.add_argument(name, metavar=name.upper(), help="anything that inspect reads")
    diff.add_argument("--tokenizer", action="store_true", help="the tokenizers alone; directories need no weights")
    diff.add_argument("--json", action="store_true", help="machine-readable, to stdout")
    text = "Write a checkpoint in another form, quantized or expanded."
    convert = add_verb(verbs, "convert", _convert, text)
    convert.add_argument("source", metavar="SRC", help="a checkpoint's path, or smollm2")
    convert.add_argument("destination", metavar="DST", help="a new directory (llmjax, hf), or a new file")
    convert.add_argument(
        "--to",
        required=True,
        help="llmjax (packed weights), hf (floats, for transformers), mediapipe (a *.bin file), or what LiteRT-LM "
        "runs: litertlm, task, tflite",
    )
    convert.add_argument("--bits", type=int, choices=(4, 8), help="the same as --quantize int4 or int8")
    convert.add_argument("--group-size", type=int, metavar="N", help="with --bits: a scale for every N inputs")
    convert.add_argument("--check-finite", action="store_true", help="refuse weights that are NaN or infinite")
    weight_flags(convert)
    convert.add_argument("--lora", metavar="PATH", help="a LoRA adapter to merge into the weights")
    convert.add_argument("--lora-alpha", type=float, metavar="A", help="scale = A / rank, where its files do not say")
    bin_file = convert.add_argument_group("with --to mediapipe")
    bin_file.add_argument("--model-type", metavar="TYPE", help="GEMMA_2B, PHI_2, ... (default: by the architecture)")
    bin_file.add_argument("--backend", choices=("cpu", "gpu"), help="which of MediaPipe's runtimes is to read the file")
    for role in _BITS:
        bin_file.add_argument(f"--{role.replace('_', '-')}-bits", type=int, choices=(4, 8), help="default 8")
    bin_file.add_argument("--asymmetric", action="store_true", default=None, help="use zero points (gpu)")
    text = "a SentencePiece model, or a directory with tokenizer.json (task, too)"
    bin_file.add_argument("--vocab", metavar="PATH", help=text)
    _graph_flags(convert.add_argument_group("with --to litertlm, task or tflite"))
    text = "Pack a TFLite graph and its vocabulary into a MediaPipe .task file."
    _bundle_flags(add_verb(verbs, "bundle", _bundle, text))


def _inspect(args: argparse.Namespace) -> int:
    from llmjax.checkpoint.inspection import inspect

    report, same = inspect(args.path), True
    values, text = report.to_dict(), report.to_text()
    if args.against is not None and report.supported:
        from llmjax.checkpoint import against
        from llmjax.checkpoint import weight_error as error
        from llmjax.checkpoint.opened import held

        with held(args.path) as a, held(args.against) as b:
            found, other = error.errors(a, b), against.differences(a, b)
        values |= {"error": error.to_dict(found), "differences": against.to_dict(other)}
        text, same = f"{text}\n\n{error.to_text(found)}\n\n{against.to_text(other)}", not other
    return answer(args, 0 if report.supported and same else 1, json.dumps(values, indent=2) if args.json else text)


def _diff(args: argparse.Namespace) -> int:
    from llmjax.checkpoint import against
    from llmjax.checkpoint import weight_error as error
    from llmjax.checkpoint.opened import held

    values: dict[str, Any] = {}
    if args.tokenizer:
        other = against.tokenizer_differences(args.a, args.b)
        text, same = against.to_text(other, "tokenizer"), not other
    else:
        with held(args.a) as a, held(args.b) as b:
            other = against.differences(a, b, either=True)
            text = against.to_text(other)
            try:
                found = error.errors(a, b)
            except ConfigError as unlike:
                if not other:
                    raise
                text, same = f"{text}\n\nweights: {unlike}", False
            else:
                values["error"] = error.to_dict(found)
                text, same = f"{text}\n\n{error.to_text(found)}", not other and not any(e.squares for e in found)
    values |= {"same": same, "differences": against.to_dict(other)}
    return answer(args, 0 if same else 1, json.dumps(values, indent=2) if args.json else text)


def _convert(args: argparse.Namespace) -> int:
    from llmjax.writing import convert

    quantize, options = args.quantize, _options(args)
    given = ["--quantize"] * (quantize is not None)
    if args.bits is not None:
        given.append("--bits")
        quantize = f"int{args.bits}" + ("" if args.group_size is None else f"-g{args.group_size}")
    elif args.group_size is not None:
        raise RequestError("--group-size goes with --bits")
    by_role = {role: getattr(args, f"{role}_bits") for role in _BITS}
    if args.asymmetric or any(by_role.values()):
        given.append("--attention-bits and the like")
        kind = "-asym" if args.asymmetric else ""
        quantize = {role: f"int{bits or 8}{kind}" for role, bits in by_role.items()}
    if len(given) > 1:
        raise RequestError(f"{' and '.join(given)} say the same; give one of them")
    destination = convert(
        args.source,
        args.destination,
        to=args.to,
        quantize=quantize,
        dtype=args.dtype,
        check_finite=args.check_finite,
        config=args.config,
        lora=adapter_of(args),
        report=report_tensors,
        **options,
    )
    if args.to == "mediapipe":
        from llmjax.checkpoint import weight_error as error

        print(error.roles_to_text(error.errors(destination, args.source, args.config)), file=sys.stderr)
    files = destination.iterdir() if destination.is_dir() else [destination]
    print(f"{destination}: {sum(f.stat().st_size for f in files) / 1e6:.1f} MB", file=sys.stderr)
    return 0


def _bundle(args: argparse.Namespace) -> int:
    from converters import BundleConfig, create_bundle

    names = {field.name for field in fields(BundleConfig)}
    path = create_bundle(BundleConfig(**{name: value for name, value in vars(args).items() if name in names}))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB", file=sys.stderr)
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Those of the form that is written."""
    given = {name: value for name in _FORMS if (value := getattr(args, name)) is not None}
    for forms in dict.fromkeys(_FORMS.values()):
        wrong = [f"--{name.replace('_', '-')}" for name in given if _FORMS[name] == forms and args.to not in forms]
        if wrong:
            raise RequestError(f"{', '.join(wrong)}: only with --to {' or '.join(forms)}")
    if args.to == "mediapipe" and args.backend is None:
        raise RequestError("--to mediapipe: needs --backend cpu or --backend gpu")
    if args.to in ("mediapipe", *_GRAPHS):
        given["announce"] = lambda plan: print(plan, file=sys.stderr)
    return {name: value for name, value in given.items() if name not in _RECIPE}


def _graph_flags(group: Any) -> None:
    group.add_argument(
        "--activations",
        choices=("dynamic-int8", "float"),
        help="with quantized weights: rounded when it runs, fast (default), or not",
    )
    text = "tokens that the caches hold (default 1280, or as many as the model has)"
    group.add_argument("--context", type=int, metavar="N", help=text)
    text = "tokens that go in at once (default 8,128,512, as far as they are below the context)"
    group.add_argument("--prefill-lengths", type=id_list, metavar="N,N", help=text)
    text = "a Jinja file instead of the checkpoint's own template, or none"
    group.add_argument("--chat-template", metavar="FILE", help=text)
    group.add_argument(
        "--verify",
        action=Either,
        help="run the file against the checkpoint before it gets its name (default: models below 1 GB as float32)",
    )


def _bundle_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("--tflite-model", required=True, metavar="FILE", help="with signatures to prefill and decode")
    flags.add_argument("--tokenizer-model", required=True, metavar="FILE", help="a SentencePiece model")
    flags.add_argument("--start-token", required=True, metavar="TEXT", help="put before every text")
    text = "a token that ends an answer; may be repeated"
    flags.add_argument("--stop-token", required=True, action="append", dest="stop_tokens", metavar="TEXT", help=text)
    flags.add_argument(
        "--output",
        required=True,
        dest="output_filename",
        metavar="FILE",
        help=".task is added; it replaces what is there",
    )
    text = "the vocabulary's pieces are written in GPT-2's characters for bytes"
    flags.add_argument("--bytes-to-unicode", action="store_true", dest="enable_bytes_to_unicode_mapping", help=text)
    flags.add_argument("--system-prompt", metavar="TEXT", help="text before every conversation")
    for role in ("user", "model", "system"):
        flags.add_argument(f"--prompt-prefix-{role}", metavar="TEXT", help=f"text before the turn of {role}")
        flags.add_argument(f"--prompt-suffix-{role}", metavar="TEXT", help="text behind it")
    flags.add_argument(
        "--no-strict", action="store_false", dest="strict", help="take tokens and graphs unchecked, as MediaPipe does"
    )
