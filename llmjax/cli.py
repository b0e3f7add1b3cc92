"""The ``llmjax`` command: each verb calls one library function.

Data goes to stdout or the named file, progress and logs to stderr.  Exit codes: 0 fine, 1 the work failed in part, 2
wrong usage or bad input, 130 interrupted.
"""

import argparse
import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from llmjax.errors import LlmjaxError, RequestError

if TYPE_CHECKING:  # the verbs import what they need: `llmjax --help` must not wait for JAX
    from llmjax.llm import LLM
    from llmjax.lora.adapter import LoraSource
    from llmjax.model import Model
    from llmjax.runtime.params import SamplingParams


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"llmjax: warning: {message}", file=sys.stderr)
            _compile_cache(args)
            return args.run(args)
    except LlmjaxError as error:
        print(f"llmjax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("llmjax: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left: not an error, and nothing more can be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmjax", description="On-device LLM inference in pure JAX.", allow_abbrev=False
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, run: Any, text: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text, parents=parents, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    model, sampling = _model_flags(), _sampling_flags()
    generate = verb("generate", _generate, "Continue a prompt; the text streams to stdout.", model, sampling)
    generate.add_argument("--prompt", required=True, help="the text, or - for stdin")
    generate.add_argument(
        "--show-prompt", action="store_true", help="print the text and the token ids as fed, to stderr"
    )
    generate.add_argument(
        "--chat", action="store_true", help="render the prompt as a user message with the chat template"
    )
    generate.add_argument("--system", help="system message for --chat")

    chat = verb("chat", _chat, "Talk with a model, a line at a time.", model, sampling)
    chat.add_argument("--system", help="system message")

    batch = verb(
        "batch", _batch, "Run a JSONL of prompts into a JSONL of answers; run again, it goes on.", model, sampling
    )
    batch.add_argument("--input", required=True, help="JSONL file, *.gz or not, or - for stdin")
    batch.add_argument("--output", required=True, help="JSONL file, *.gz or not, or - for stdout")
    batch.add_argument("--ordered", action="store_true", help="leave the answers in the order of the rows")
    batch.add_argument("--shard", metavar="I/N", help="do part I of N of the rows, chosen by their ids")
    batch.add_argument(
        "--lora-modules",
        type=_named,
        nargs="+",
        metavar="NAME=PATH",
        help="LoRA adapters that rows may ask for by name (lora)",
    )
    batch.add_argument("--force", action="store_true", help="start over, whatever the output holds")
    batch.add_argument("--retry-errors", action="store_true", help="run rows again that failed when they ran")
    batch.add_argument(
        "--dry-run", action="store_true", help="check and count the rows, estimate the time, write nothing"
    )
    batch.add_argument(
        "--progress-seconds", type=float, default=10.0, metavar="S", help="between lines of progress; 0 for none"
    )

    score = verb("score", _score, "Log-probabilities, NLL and perplexity of given texts.", model)
    score.add_argument("--input", required=True, help='JSONL of {"text": ...} or {"token_ids": [...]}, or - for stdin')
    score.add_argument("--output", required=True, help="JSONL file, or - for stdout")

    # Flags of its own: a default set on shared ones would be every verb's.
    trace = verb("trace", _trace, "Write a model's named activations for one prompt.", _model_flags("reference"))
    what = trace.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="the text, or - for stdin")
    what.add_argument("--ids", type=_id_list, metavar="ID,ID", help="token ids, taken as they are")
    trace.add_argument("--output", required=True, metavar="DIR", help="a new directory")
    trace.add_argument("--taps", action="append", metavar="GLOB", help="names to keep, * by default; may be repeated")

    inspect = verb("inspect", _inspect, "Say what a checkpoint is and whether llmjax runs it, from its headers alone.")
    inspect.add_argument("path", metavar="PATH")
    inspect.add_argument("--against", metavar="SRC", help="the checkpoint it was made from: report each weight's error")
    inspect.add_argument("--json", action="store_true")

    lora = verbs.add_parser("lora", help="Check a LoRA adapter, or merge it into a checkpoint.", allow_abbrev=False)
    lora_verbs = lora.add_subparsers(required=True, metavar="VERB")
    for name, run, text in (
        ("check", _lora_check, "Say what an adapter is, whether it fits, and what it changes."),
        ("merge", _lora_merge, "Write the checkpoint with the adapter in its weights, in its own format and dtype."),
    ):
        sub = lora_verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.add_argument("--model", required=True, help="the base checkpoint's path")
        sub.add_argument("--lora", required=True, metavar="PATH", help="a PEFT directory, or its weights alone")
        sub.add_argument("--alpha", type=float, help="for weights without adapter_config.json: scale = alpha / rank")
        sub.add_argument("--rank", type=int, help="for the same: what is expected")
        sub.set_defaults(run=run)
        if name == "check":
            sub.add_argument("--prompt", help="text to compare logits on (default: a few token ids)")
            sub.add_argument("--json", action="store_true", help="machine-readable, to stdout")
        else:
            sub.add_argument("--output", required=True, metavar="DIR", help="a new directory, or an empty one")

    # As with trace; the time to compile is to be measured, so nothing compiled is kept.
    bench = verb("bench", _bench, "Measure speed beside what the machine can do.", _load_flags())
    bench.add_argument("--max-batch", type=int, default=1, metavar="N", help="decode slots (default 1)")
    bench.add_argument("--in-use", type=_id_list, default=[1], metavar="N,N", help="slots that decode (default 1)")
    bench.add_argument(
        "--prompt-lengths", type=_id_list, default=[128, 512], metavar="N,N", help="tokens (default 128,512)"
    )
    bench.add_argument("--output-length", type=int, default=32, metavar="N", help="tokens to decode (default 32)")
    bench.add_argument(
        "--context", type=_id_list, metavar="N,N", help="tokens in the cache before decoding (default: the prompts')"
    )
    bench.add_argument("--cache", type=_id_list, metavar="N,N", help="cache positions (default: the fewest that do)")
    bench.add_argument("--repeat", type=int, default=5, metavar="N", help="measurements of each setting (default 5)")
    bench.add_argument("--json", action="store_true")

    convert = verb("convert", _convert, "Write a checkpoint in another form, quantized or expanded.")
    convert.add_argument("source", metavar="SRC", help="a checkpoint's path, or smollm2")
    convert.add_argument("destination", metavar="DST", help="a new directory, or a new file for mediapipe")
    convert.add_argument(
        "--to", required=True, help="llmjax (packed weights), hf (floats, for transformers) or mediapipe (a *.bin file)"
    )
    convert.add_argument("--bits", type=int, choices=(4, 8), help="the same as --quantize int4 or int8")
    convert.add_argument("--group-size", type=int, metavar="N", help="with --bits: a scale for every N inputs")
    convert.add_argument("--check-finite", action="store_true", help="refuse weights that are NaN or infinite")
    _weight_flags(convert)
    bin_file = convert.add_argument_group("with --to mediapipe")
    bin_file.add_argument("--model-type", metavar="TYPE", help="GEMMA_2B, PHI_2, ... (default: by the architecture)")
    bin_file.add_argument("--backend", choices=("cpu", "gpu"))
    for role in _BITS:
        bin_file.add_argument(f"--{role.replace('_', '-')}-bits", type=int, choices=(4, 8), help="default 8")
    bin_file.add_argument("--asymmetric", action="store_true", help="use zero points (gpu)")
    bin_file.add_argument("--vocab", metavar="PATH", help="a SentencePiece model, or a directory with tokenizer.json")
    _bundle_flags(verb("bundle", _bundle, "Pack a TFLite graph and its vocabulary into a MediaPipe .task file."))
    return parser


# Roles with bits of their own; the head has the embedding's.
_BITS = ("attention", "feed_forward", "embedding")


def _bundle_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("--tflite-model", required=True, metavar="FILE", help="with signatures to prefill and decode")
    flags.add_argument("--tokenizer-model", required=True, metavar="FILE", help="a SentencePiece model")
    flags.add_argument("--start-token", required=True, metavar="TEXT")
    flags.add_argument("--stop-token", required=True, action="append", dest="stop_tokens", metavar="TEXT")
    flags.add_argument("--output", required=True, dest="output_filename", metavar="FILE", help=".task is added")
    flags.add_argument("--bytes-to-unicode", action="store_true", dest="enable_bytes_to_unicode_mapping")
    flags.add_argument("--system-prompt", metavar="TEXT")
    for role in ("user", "model", "system"):
        flags.add_argument(f"--prompt-prefix-{role}", metavar="TEXT", help=f"text before the turn of {role}")
        flags.add_argument(f"--prompt-suffix-{role}", metavar="TEXT")
    flags.add_argument(
        "--no-strict", action="store_false", dest="strict", help="take tokens and graphs unchecked, as MediaPipe does"
    )


def _weight_flags(group: Any) -> None:
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="how weights are stored (default: as they are)"
    )
    group.add_argument(
        "--quantize", metavar="SCHEME", help="int8, int4, int4-g32, ... or a recipe: its name or a *.toml file"
    )
    group.add_argument(
        "--config", metavar="FILE", help="keys that win over the checkpoint's config.json: a JSON file or config:NAME"
    )


def _load_flags(numerics: str = "fast") -> argparse.ArgumentParser:
    """What ``_model`` reads."""
    flags = argparse.ArgumentParser(add_help=False)
    group = flags.add_argument_group("model")
    group.add_argument("--model", required=True, help="a checkpoint's path, or smollm2 for the installed demo model")
    _weight_flags(group)
    group.add_argument(
        "--numerics",
        default=numerics,
        help=f"reference, hf, fast, dynamic_int8, mediapipe_gpu or mediapipe_cpu (default {numerics})",
    )
    group.add_argument("--lora", metavar="PATH", help="a LoRA adapter (PEFT directory) that changes the model")
    group.add_argument("--check-finite", action="store_true", help="refuse weights that are NaN or infinite")
    group.add_argument("--random-weights", action="store_true", help="with --model config:NAME, which has none")
    return flags


def _model_flags(numerics: str = "fast") -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False, parents=[_load_flags(numerics)])
    group = flags.add_argument_group("engine")
    group.add_argument("--max-batch", type=int, metavar="N", help="decode slots (default 1; batch: up to 32)")
    group.add_argument("--truncate-prompt", action="store_true", help="drop the beginning of a prompt that is too long")
    group.add_argument("--no-compile-cache", action="store_true", help="compile anew, keep nothing")
    return flags


def _sampling_flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    group = flags.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, metavar="N", help="most tokens to generate (default 256)")
    group.add_argument("--min-tokens", type=int, metavar="N")
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default 1)")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--min-p", type=float, metavar="P")
    group.add_argument("--seed", type=int, metavar="S", help="the job's seed (default 0)")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end the text here; may be repeated")
    group.add_argument("--stop-token-ids", type=_id_list, metavar="ID,ID")
    group.add_argument("--ignore-eos", action="store_true", default=None)
    group.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1: repeat the text's tokens less")
    group.add_argument("--presence-penalty", type=float, metavar="P", help="off the logit of generated tokens, -2 to 2")
    group.add_argument("--frequency-penalty", type=float, metavar="P", help="the same for each time, -2 to 2")
    group.add_argument("--logit-bias", type=_bias, metavar="ID:BIAS,ID:BIAS", help="added to logits, -100 to 100")
    group.add_argument("--allowed-token-ids", type=_id_list, metavar="ID,ID", help="draw no others")
    group.add_argument("--bad-words", action="append", metavar="TEXT", help="never generate this; may be repeated")
    group.add_argument("--n", type=int, metavar="N", help="batch: samples of each prompt (default 1)")
    group.add_argument("--logprobs", type=int, metavar="K", help="batch: report the K most likely tokens")
    group.add_argument("--prompt-logprobs", type=int, metavar="K", help="batch: the same for the prompt's tokens")
    return flags


def _compile_cache(args: argparse.Namespace) -> None:
    """Keeps compiled programs between runs; only the command line does this, importing llmjax changes nothing
    global."""
    if getattr(args, "no_compile_cache", True):
        return
    import jax

    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(base / "llmjax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _model(args: argparse.Namespace) -> "Model":
    from llmjax.loading import load

    return load(
        args.model,
        dtype=args.dtype,
        quantize=args.quantize,
        numerics=args.numerics,
        lora=args.lora,
        check_finite=args.check_finite,
        random_weights=args.random_weights,
        config=args.config,
    )


def _llm(args: argparse.Namespace) -> "tuple[LLM, float]":
    """The model and the seconds it took to load."""
    from llmjax.llm import LLM

    began = time.monotonic()
    model = _model(args)
    slots = args.max_batch
    if slots is None:
        slots = _job_slots(model) if args.run is _batch else 1
    llm = LLM(
        model,
        max_batch=slots,
        loras=dict(getattr(args, "lora_modules", None) or ()),
        seed=getattr(args, "seed", None) or 0,
        truncate_prompt=args.truncate_prompt,
    )
    return llm, time.monotonic() - began


def _job_slots(model: "Model") -> int:
    from llmjax.batch.job import RESERVE
    from llmjax.runtime.cache import job_slots

    return job_slots(model.config, model.numerics, RESERVE)


def _params(args: argparse.Namespace) -> "SamplingParams":
    """Sampling parameters from flags; ``--seed`` is the job's, so rows differ."""
    from llmjax.runtime.params import SamplingParams

    given = {f.name: getattr(args, f.name) for f in fields(SamplingParams) if f.name != "seed"}
    if args.seed is not None:
        SamplingParams(seed=args.seed)
    return SamplingParams(**{k: v for k, v in given.items() if v is not None})


def _generate(args: argparse.Namespace) -> int:
    params = _params(args)
    prompt = _prompt(args.prompt)
    llm, _ = _llm(args)
    if args.chat or args.system:
        request = llm.chat_request(_messages(args.system, prompt), params)
    else:
        request = llm.request(prompt, params)
    if args.show_prompt:
        print(f"prompt: {request.prompt!r}\nids: {request.ids}", file=sys.stderr)
    _print_stream(llm, request)
    return 0


def _messages(system: str | None, user: str) -> list[dict[str, str]]:
    return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": user}]


def _print_stream(llm: "LLM", request: Any) -> str:
    text = ""
    for update in llm.run([request], burst=1):
        text += update.piece
        print(update.piece, end="", flush=True)
    print()
    return text


def _chat(args: argparse.Namespace) -> int:
    params = _params(args)
    llm, _ = _llm(args)
    messages = [{"role": "system", "content": args.system}] if args.system else []
    interactive = sys.stdin.isatty()
    if interactive:
        print("end with Ctrl-D; /reset forgets the conversation", file=sys.stderr)
    while True:
        with contextlib.suppress(EOFError):
            line = input("> ") if interactive else next(sys.stdin, None)
            if line is not None:
                line = line.strip()
                if line == "/reset":
                    messages = messages[:1] if args.system else []
                elif line:
                    messages.append({"role": "user", "content": line})
                    answer = _print_stream(llm, llm.chat_request(messages, params))
                    messages.append({"role": "assistant", "content": answer})
                continue
        return 0


def _batch(args: argparse.Namespace) -> int:
    from llmjax.batch import dryrun, job
    from llmjax.batch.rows import WHOLE, Shard

    params = _params(args)
    shard = Shard.parse(args.shard) if args.shard else WHOLE
    if args.dry_run:
        report = dryrun.run(lambda: _llm(args)[0], args.input, args.output, params, shard)
        print(report.describe())
        return 1 if report.bad else 0
    options = job.Options(args.ordered, shard, args.retry_errors, args.force, args.progress_seconds)
    about = {"model": args.model, "input": args.input, "ordered": args.ordered, "truncate_prompt": args.truncate_prompt}
    summary = job.run(lambda: _llm(args)[0], args.input, args.output, params, options, about)
    if summary.problem:
        print(f"llmjax: {summary.problem}; {_how_to_go_on(args)}", file=sys.stderr)
    print(summary.describe(), file=sys.stderr)
    if summary.removed:
        print(f"llmjax: rows no longer in the input were removed; they are in {args.output}.previous", file=sys.stderr)
    if summary.status == "interrupted":
        print(f"llmjax: interrupted; {_how_to_go_on(args)}", file=sys.stderr)
        return 130
    return 1 if summary.problem or summary.totals.failed else 0


def _how_to_go_on(args: argparse.Namespace) -> str:
    if not Path(args.output).is_file() and not args.output.endswith(".gz"):
        return "to go on later, a job needs a file for its output"
    same = "the same command" + (", without --force," if args.force else "")
    return f"{same} goes on from the rows that are done"


def _score(args: argparse.Namespace) -> int:
    from llmjax.batch.files import open_lines
    from llmjax.batch.scoring import run

    with open_lines(args.input) as lines, _output(args.output, args.input) as begin:
        llm, _ = _llm(args)
        summary = run(llm, lines, begin())
    print(summary.describe(), file=sys.stderr)
    return 1 if summary.failed else 0


def _trace(args: argparse.Namespace) -> int:
    from llmjax.oracle.trace import trace

    model = _model(args)
    ids = args.ids
    if ids is None:
        if model.tokenizer is None:
            raise RequestError(f"{args.model}: no tokenizer files, so give --ids instead of --prompt")
        ids = model.tokenizer.encode(_prompt(args.prompt))
    result = trace(model, ids, args.taps or ["*"])
    result.save(args.output)
    print(f"{len(result.activations)} activations of {len(ids)} tokens in {args.output}", file=sys.stderr)
    return 0


def _id_list(text: str) -> list[int]:
    return [int(i) for i in text.split(",")]


def _bias(text: str) -> dict[int, float]:
    return {int(i): float(value) for i, value in (pair.split(":") for pair in text.split(","))}


def _named(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"expected NAME=PATH, found {text!r}")
    return name, path


def _prompt(text: str) -> str:
    """The prompt as given, or all of stdin for ``-``."""
    prompt = sys.stdin.read() if text == "-" else text
    if not prompt:
        raise RequestError("prompt: empty, expected some text")
    return prompt


def _inspect(args: argparse.Namespace) -> int:
    from llmjax.inspection import inspect

    report = inspect(args.path)
    values, text = report.to_dict(), report.to_text()
    if args.against is not None and report.supported:
        from llmjax.quant import error

        found = error.errors(args.path, args.against)
        values, text = values | {"error": error.to_dict(found)}, f"{text}\n\n{error.to_text(found)}"
    print(json.dumps(values, indent=2, ensure_ascii=False) if args.json else text)
    return 0 if report.supported else 1


def _adapter(args: argparse.Namespace) -> "LoraSource":
    from llmjax.lora.adapter import LoraSource

    return LoraSource(args.lora, args.alpha, args.rank)


def _lora_check(args: argparse.Namespace) -> int:
    from llmjax.lora.check import check

    report = check(args.model, _adapter(args), prompt=args.prompt)
    print(json.dumps(report.to_dict()) if args.json else report.describe())
    return 0


def _lora_merge(args: argparse.Namespace) -> int:
    from llmjax.lora.check import merge

    destination = merge(args.model, _adapter(args), args.output, report=_report_tensors)
    print(f"{destination}: written", file=sys.stderr)
    return 0


def _bench(args: argparse.Namespace) -> int:
    from llmjax.bench import measure
    from llmjax.bench.report import to_text

    options = measure.Options(
        slots=args.max_batch,
        in_use=args.in_use,
        prompt_lengths=args.prompt_lengths,
        output_length=args.output_length,
        contexts=args.context,
        caches=args.cache,
        repeat=args.repeat,
    )
    report = measure.run(lambda: _model(args), options, _report_line)
    print(json.dumps(report.to_dict(), indent=2) if args.json else to_text(report))
    return 0


def _convert(args: argparse.Namespace) -> int:
    from llmjax.conversion import convert

    quantize, options = args.quantize, _mediapipe_options(args)
    given = ["--quantize"] * (quantize is not None)
    if args.bits is not None:
        given.append("--bits")
        quantize = f"int{args.bits}" + (f"-g{args.group_size}" if args.group_size else "")
    elif args.group_size:
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
        report=_report_tensors,
        **options,
    )
    if args.to == "mediapipe":
        from llmjax.quant import error

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


def _mediapipe_options(args: argparse.Namespace) -> dict[str, Any]:
    options = {"model_type": args.model_type, "backend": args.backend, "vocab": args.vocab}
    if args.to == "mediapipe":
        if args.backend is None:
            raise RequestError("--to mediapipe: needs --backend cpu or --backend gpu")
        return options | {"announce": lambda plan: print(plan, file=sys.stderr)}
    flags = {**options, "asymmetric": args.asymmetric, **{f"{r}_bits": getattr(args, f"{r}_bits") for r in _BITS}}
    wrong = [f"--{name.replace('_', '-')}" for name, value in flags.items() if value]
    if wrong:
        raise RequestError(f"{', '.join(wrong)}: only with --to mediapipe")
    return {}


def _report_tensors(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done} of {total} tensors", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _report_line(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _output(path: str, source: str) -> Iterator[Callable[[], IO[str]]]:
    """Opens the output at once, so that a wrong path costs nothing, and empties it only when the work begins: a model
    that does not load must not take an earlier result with it.

    Yields:
      a function that empties the file and returns it.
    """
    if path == "-":
        yield lambda: sys.stdout
        return
    if source != "-" and os.path.exists(path) and os.path.samefile(path, source):
        raise RequestError(f"{path}: the output is the input file")
    is_new, began = not os.path.exists(path), False
    try:
        # Lone surrogates in an id are written as the escapes JSON has for them.
        file = open(path, "a", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise RequestError(f"{path}: cannot write the output: {error.strerror}") from None

    def begin() -> IO[str]:
        nonlocal began
        began = True
        if os.path.isfile(path):
            file.truncate(0)
        return file

    try:
        with file:
            yield begin
    except OSError as error:
        raise RequestError(
            f"{path}: writing the output failed: {error.strerror}; rows written so far are whole"
        ) from None
    finally:
        if is_new and not began:
            os.unlink(path)


if __name__ == "__main__":
    sys.exit(main())
