"""Flags that several verbs share, and what their values mean."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields
from difflib import get_close_matches
from itertools import takewhile
from typing import Any, NoReturn

from converters.readers.jsonfile import parse_json
from llmjax.errors import RequestError

# What ``add_subparsers`` returns; argparse has no public name for it.
Verbs = Any


class Parser(argparse.ArgumentParser):
    """Refuses a flag of one value that is given twice, of which argparse would take the last, and a flag's beginning
    for its name.  What is wrong is said in one line, by the verb that has the flags."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})
        for name in (None, "store"):
            self.register("action", name, _Once)

    # What argparse says of an unknown flag is the first parser's, and comes after what it says of one that is missing,
    # which a slip of the keyboard made unknown.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words, flags = sys.argv[1:] if args is None else list(args), self._option_string_actions
        before = None  # the flag of which a word should be the value: of these argparse says what it expects
        for word in takewhile(self._ours, words):
            flag = word.partition("=")[0]
            if flag.startswith("--") and " " not in word and flag not in flags and before is None:
                near = get_close_matches(flag, flags, 1)
                self.error(f"unrecognized arguments: {word}" + "".join(f"; did you mean {name}?" for name in near))
            before = flags[word] if word in flags and flags[word].nargs is None else None
        known, more = super().parse_known_args(words, namespace)
        if more:
            self.error(f"unrecognized arguments: {' '.join(more)}")
        return known, more

    def _ours(self, word: str) -> bool:
        """Whether a word is no verb's, nor behind the end of flags."""
        return word != "--" and (self._subparsers is None or word.startswith("-"))

    def error(self, message: str) -> NoReturn:
        if message.endswith("expected one argument"):
            message += ", which if it begins with - follows a =, as in --prompt=-1"
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help)\n")


class _Once(argparse.Action):
    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        once(self, namespace)
        setattr(namespace, self.dest, values)


class Either(argparse.BooleanOptionalAction):
    """``--x`` or ``--no-x``."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        once(self, namespace)
        super().__call__(parser, namespace, values, option)


def once(flag: argparse.Action, namespace: argparse.Namespace) -> None:
    """Notes that a flag was given.

    Raises:
      argparse.ArgumentError: it was before.
    """
    given = vars(namespace).setdefault("_given", set())
    if flag.option_strings and flag.dest in given:
        raise argparse.ArgumentError(flag, "given twice, expected once")
    given.add(flag.dest)


def add_verb(
    verbs: Verbs,
    name: str,
    run: Callable[[argparse.Namespace], int],
    text: str,
    *parents: argparse.ArgumentParser,
) -> argparse.ArgumentParser:
    """A verb's parser; ``run`` gets what it parsed and returns the exit code."""
    parser = verbs.add_parser(name, help=text, description=text, parents=parents)
    parser.set_defaults(run=run)
    return parser


def answer(args: argparse.Namespace, code: int, text: str) -> int:
    """Prints what a verb found, and returns its exit code, which stays where the reader of stdout has left."""
    args.code = code
    print(text)
    return code


def weight_flags(group: Any) -> None:
    """How weights are stored, and under which configuration."""
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="how weights are stored (default: as they are); with --quantize the others, and what fast computes in",
    )
    group.add_argument(
        "--quantize", metavar="SCHEME", help="int8, int4, int4-g32, ... or a recipe: its name or a *.toml file"
    )
    group.add_argument(
        "--config", metavar="FILE", help="keys that win over the checkpoint's config.json: a JSON file or config:NAME"
    )


def load_flags(numerics: str | None = "fast", required: bool = True) -> argparse.ArgumentParser:
    """What ``cli.loading.load_model`` reads; no ``numerics`` leaves the profile to ``llmjax.load``."""
    flags = Parser(add_help=False)
    group = flags.add_argument_group("model")
    group.add_argument(
        "--model", required=required, help="a checkpoint's path, or smollm2 for the installed demo model"
    )
    weight_flags(group)
    group.add_argument(
        "--context-length", type=int, metavar="N", help="most tokens of a text (default: as its configuration says)"
    )
    group.add_argument(
        "--numerics",
        default=numerics,
        help=f"reference, hf, fast, dynamic_int8, mediapipe_gpu or mediapipe_cpu (default {numerics or 'reference'}); "
        "of op graphs litert or reference (default litert)",
    )
    group.add_argument(
        "--lora",
        metavar="PATH",
        help="a LoRA adapter that changes the model (PEFT directory, MediaPipe file)",
    )
    group.add_argument(
        "--lora-alpha", type=float, metavar="A", help="scale = A / rank, for an adapter whose files do not say"
    )
    group.add_argument("--mesh", type=int, metavar="N", help="devices to spread weights and cache over (default: one)")
    group.add_argument("--check-finite", action="store_true", help="refuse weights that are NaN or infinite")
    group.add_argument("--random-weights", action="store_true", help="with --model config:NAME, which has none")
    return flags


def engine_flags() -> argparse.ArgumentParser:
    """What ``cli.loading.load_llm`` reads."""
    flags = Parser(add_help=False, parents=[load_flags(), cache_flags()])
    group = flags.add_argument_group("engine")
    group.add_argument("--max-batch", type=int, metavar="N", help="decode slots (default 1; batch: up to 32)")
    group.add_argument("--truncate-prompt", action="store_true", help="drop the beginning of a prompt that is too long")
    memory_flag(group)
    group.add_argument(
        "--generation-config",
        choices=("auto", "none"),
        default="auto",
        help="auto heeds what the checkpoint's generation_config.json says of sampling, where no flag does; none does "
        "not",
    )
    group = flags.add_argument_group("chat templates")
    text = "the date that they are told, 2026-01-31 or 2026-01-31T09:30 (default: now; a job keeps its first)"
    group.add_argument("--date", metavar="DATE", help=text)
    group.add_argument("--chat-template", metavar="FILE", help="a Jinja file instead of the checkpoint's own template")
    group.add_argument(
        "--chat-template-kwargs",
        type=_json_object,
        metavar="JSON",
        help="further names the template may use, such as '{\"enable_thinking\": false}'",
    )
    group.add_argument(
        "--fold-system", action="store_true", help="put system messages into the user's first, where they are refused"
    )
    return flags


def memory_flag(group: Any) -> None:
    """What an engine may take."""
    group.add_argument(
        "--memory",
        metavar="SIZE",
        help="what weights and cache may take, of --mesh on each device, such as 6GB (default: the weights, and three "
        "quarters of what is free beside them)",
    )


def cache_flags() -> argparse.ArgumentParser:
    """What ``cli.loading.keep_compiled`` reads."""
    flags = Parser(add_help=False)
    flags.add_argument("--no-compile-cache", action="store_true", help="compile anew, keep nothing")
    return flags


def sampling_flags() -> argparse.ArgumentParser:
    """What ``sampling_given`` reads."""
    flags = Parser(add_help=False)
    group = flags.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, metavar="N", help="most tokens to generate (default 256)")
    group.add_argument("--min-tokens", type=int, metavar="N", help="end nothing before as many (default 0)")
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default 1)")
    group.add_argument("--top-k", type=int, metavar="K", help="draw from the K best tokens (default 0: all)")
    group.add_argument("--top-p", type=float, metavar="P", help="from the best that reach P together (default 1)")
    group.add_argument("--min-p", type=float, metavar="P", help="from those P times as likely as the best (default 0)")
    group.add_argument("--seed", type=int, metavar="S", help="the job's seed (default 0)")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end the text here; may be repeated")
    group.add_argument("--stop-token-ids", type=id_list, metavar="ID,ID", help="end at these, too")
    group.add_argument("--ignore-eos", action="store_true", default=None, help="go on after the model's end")
    group.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1: repeat the text's tokens less")
    group.add_argument("--presence-penalty", type=float, metavar="P", help="off the logit of generated tokens, -2 to 2")
    group.add_argument("--frequency-penalty", type=float, metavar="P", help="the same for each time, -2 to 2")
    group.add_argument("--logit-bias", type=_bias, metavar="ID:BIAS,ID:BIAS", help="added to logits, -100 to 100")
    group.add_argument("--allowed-token-ids", type=id_list, metavar="ID,ID", help="draw no others")
    group.add_argument("--bad-words", action="append", metavar="TEXT", help="never generate this; may be repeated")
    return flags


def sampling_given(args: argparse.Namespace) -> dict[str, Any]:
    """Sampling parameters that flags name; ``--seed`` is the job's, so rows differ.

    Raises:
      RequestError: one is out of range.
    """
    from llmjax.runtime.params import SamplingParams

    names = [f.name for f in fields(SamplingParams) if f.name != "seed"]
    given = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    SamplingParams(**given, seed=args.seed)
    return given


def id_list(text: str) -> list[int]:
    """Integers from ``1,2,3``."""
    try:
        return [int(i) for i in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers with commas between, found {text!r}") from None


def _bias(text: str) -> dict[int, float]:
    pairs = [pair.split(":") for pair in text.split(",")]
    try:
        found = {int(token): float(value) for token, value in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected ID:BIAS with commas between, found {text!r}") from None
    if len(found) < len(pairs):
        raise argparse.ArgumentTypeError(f"a token is there twice in {text!r}")
    return found


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, found {text!r}")
    return found


def prompt_text(text: str) -> str:
    """The prompt as given, or all of stdin for ``-``.

    Raises:
      RequestError: it is empty, or not text in the encoding that is expected.
    """
    where, prompt = "prompt", text
    if text == "-":
        if sys.stdin is None:
            raise RequestError("prompt: stdin is closed")
        where, prompt = "stdin", sys.stdin.read().removeprefix("\ufeff")
    if not prompt:
        raise RequestError("prompt: empty, expected some text")
    return decoded(prompt, where)


def decoded(text: str, where: str) -> str:
    """The text itself.

    Raises:
      RequestError: bytes of it were none of the encoding that is expected; they pass as lone surrogates.
    """
    at = next((i for i, char in enumerate(text) if "\udc80" <= char <= "\udcff"), None)
    if at is not None:
        encoding = getattr(sys.stdin, "encoding", None) or "UTF-8"
        raise RequestError(
            f"{where}: expected {encoding.upper()} text, found byte {ord(text[at]) - 0xDC00:#04x} after {at} characters"
        )
    return text
