"""``llmjax generate`` and ``llmjax chat``."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llmjax.cli import loading
from llmjax.cli.flags import Verbs, add_verb, decoded, engine_flags, prompt_text, sampling_flags, sampling_given
from llmjax.errors import RequestError, amount

if TYPE_CHECKING:
    from llmjax.llm import LLM


def add(verbs: Verbs) -> None:
    """Registers the verbs."""
    parents = engine_flags(), sampling_flags()
    generate = add_verb(verbs, "generate", _generate, "Continue a prompt; the text streams to stdout.", *parents)
    generate.add_argument("--prompt", required=True, help="the text, or - for stdin")
    generate.add_argument(
        "--show-prompt", action="store_true", help="print the text and the token ids as fed, to stderr"
    )
    generate.add_argument(
        "--chat", action="store_true", help="render the prompt as a user message with the chat template"
    )
    generate.add_argument("--system", help="system message for --chat")
    chat = add_verb(verbs, "chat", _chat, "Talk with a model, a line at a time.", *parents)
    chat.add_argument("--system", help="system message")
    for verb in (generate, chat):
        verb.add_argument("--verbose", action="store_true", help="tell speed and memory after an answer, to stderr")


def _generate(args: argparse.Namespace) -> int:
    given = sampling_given(args)
    chat = args.chat or args.system is not None  # an empty one, a script's unset variable say, does not turn it off
    if not chat:
        for name in ("date", "chat_template", "chat_template_kwargs", "fold_system"):
            if getattr(args, name) not in (None, False):
                raise RequestError(f"{name}: only a chat template takes one; give --chat, too")
    prompt = prompt_text(args.prompt)
    llm, seconds = loading.load_llm(args)
    loading.tell_defaults(llm, given)
    if chat:
        request = llm.chat_request(_messages(args.system, prompt), given, date=args.date)
    else:
        request = llm.request(prompt, given)
    if args.show_prompt:
        print(f"prompt: {request.prompt!r}\nids: {request.ids}", file=sys.stderr)
        if llm.model.tokenizer and llm.model.tokenizer.always_prefix:
            start = list(llm.model.tokenizer.prefix_ids)
            print(f"the file's start token, {start}, stands before every prompt, whoever wrote it", file=sys.stderr)
    with _measured(llm, args.verbose, f"load {seconds:.1f} s"):
        for _ in _printed(llm, request):
            pass
    return 0


def _messages(system: str | None, user: str) -> list[dict[str, str]]:
    return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": user}]


def _printed(llm: "LLM", request: Any) -> Iterator[str]:
    """The answer's pieces as they come, printed."""
    if request.truncated:
        left = len(request.ids)
        print(
            f"llmjax: warning: the prompt's first {request.truncated:,} tokens were dropped, {left:,} are left; the "
            f"answer has at most {request.params.max_tokens:,}",
            file=sys.stderr,
        )
    with contextlib.closing(llm.run([request], burst=1)) as updates:
        for update in updates:
            print(update.piece, end="", flush=True)
            yield update.piece
    print(flush=True)


@contextlib.contextmanager
def _measured(llm: "LLM", wanted: bool, *more: str) -> Iterator[None]:
    """Tells on stderr what was done meanwhile, and how fast."""
    import resource  # not on Windows

    from llmjax.batch.progress import Meter, rate

    meter = Meter(llm.engine)
    yield
    if wanted:
        run = meter.read()
        reused = f" and {run['reused_tokens']:,} kept from before" if run["reused_tokens"] else ""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        told = (
            *more,
            f"compile {run['compile_seconds']:.1f} s",
            f"prompt {amount(run['prefill_tokens'], 'token')}{reused}, {rate(run, 'prefill'):,.1f} tok/s",
            f"answer {amount(run['decode_tokens'], 'token')}, {rate(run, 'decode'):,.1f} tok/s",
            f"memory: {llm.engine.store.memory.describe()}",
            f"most of the process so far {peak / 1e9:,.2f} GB",
        )
        print(f"llmjax: {'; '.join(told)}", file=sys.stderr)


def _chat(args: argparse.Namespace) -> int:
    from llmjax.text.dates import settled

    given = sampling_given(args)
    date = settled(args.date)
    llm, seconds = loading.load_llm(args)
    loading.tell_defaults(llm, given)
    begin = [{"role": "system", "content": args.system}] if args.system else []
    messages, failed, more = list(begin), False, [f"load {seconds:.1f} s"]
    interactive = sys.stdin is not None and sys.stdin.isatty()
    if interactive:
        print("end with Ctrl-D; /reset forgets the conversation, /undo what was said last", file=sys.stderr)
    while (line := _line(interactive)) is not None:
        if line == "/reset":
            messages = list(begin)
        elif line == "/undo":
            del messages[max(len(begin), len(messages) - 2) :]
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            pieces: list[str] = []
            more, told = [], more
            try:
                decoded(line, "stdin")
                request = llm.chat_request(asked, given, date=date)
                with _measured(llm, args.verbose, *told):
                    pieces.extend(_printed(llm, request))
            except RequestError as error:
                hint = " (/undo takes back what was said last, /reset all of it)" if messages[len(begin) :] else ""
                print(f"llmjax: {error}; the conversation is as it was before{hint}", file=sys.stderr)
                failed = True
                continue
            except KeyboardInterrupt as heard:
                print(flush=True)
                if heard.args not in ((), (signal.SIGINT,)):
                    raise  # the system's request to end, or the terminal is gone: not this answer's end alone
                print("llmjax: interrupted; the conversation goes on from what there is", file=sys.stderr)
                if not pieces:
                    continue
            messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]
    return 1 if failed else 0


def _line(interactive: bool) -> str | None:
    """What is said next; None at the end."""
    if sys.stdin is None:
        return None
    with contextlib.suppress(EOFError):
        line = input("> ") if interactive else sys.stdin.readline()
        if line or interactive:
            return line.removeprefix("\ufeff").strip()
    return None
