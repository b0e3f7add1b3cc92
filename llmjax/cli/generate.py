"""``llmjax generate`` and ``llmjax chat``."""

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING, Any

from llmjax.cli import loading
from llmjax.cli.flags import Verbs, add_verb, engine_flags, prompt_text, sampling_flags, sampling_params
from llmjax.errors import RequestError

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


def _generate(args: argparse.Namespace) -> int:
    params = sampling_params(args)
    if args.date and not (args.chat or args.system):
        raise RequestError("date: only a chat template takes one; give --chat, too")
    prompt = prompt_text(args.prompt)
    llm, _ = loading.load_llm(args)
    if args.chat or args.system:
        request = llm.chat_request(_messages(args.system, prompt), params, date=args.date)
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
    if request.truncated:
        left = len(request.ids)
        print(
            f"llmjax: warning: the prompt's first {request.truncated:,} tokens were dropped, {left:,} are left; the "
            f"answer has at most {request.params.max_tokens:,}",
            file=sys.stderr,
        )
    for update in llm.run([request], burst=1):
        text += update.piece
        print(update.piece, end="", flush=True)
    print()
    return text


def _chat(args: argparse.Namespace) -> int:
    from llmjax.text.dates import settled

    params = sampling_params(args)
    date = settled(args.date)
    llm, _ = loading.load_llm(args)
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
                    answer = _print_stream(llm, llm.chat_request(messages, params, date=date))
                    messages.append({"role": "assistant", "content": answer})
                continue
        return 0
