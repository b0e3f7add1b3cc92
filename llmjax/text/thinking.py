"""What a model thinks before it answers, and how a text shows which is which.

Some models think between two tokens of their own, then answer: Gemma 4 between ``<|channel>`` and ``<channel|>`` under
the heading ``thought``, others between ``<think>`` and ``</think>``.  A text keeps these marks, whatever special tokens
it leaves out: without them nobody could tell a thought from the answer, not even the chat template that takes earlier
thoughts out of a conversation.
"""

from collections.abc import Iterable

# Begin, end, and what the model writes in front of every thought.
Kind = tuple[str, str, str]
KINDS: tuple[Kind, ...] = (("<|channel>", "<channel|>", "thought\n"), ("<think>", "</think>", ""))
MARKS = frozenset(mark for begin, end, _ in KINDS for mark in (begin, end))


def parted(text: str, prompt: str = "", kinds: Iterable[Kind] = KINDS) -> tuple[str | None, str]:
    """Thoughts and answer of a text; None and all of it where it has no thought.

    A text that ends in the middle of a thought has no answer.

    Args:
      text: what a model wrote.
      prompt: what it continued: some templates open the thought themselves.
      kinds: whose marks are tokens of the model.
    """
    for begin, end, heading in kinds:
        # Without its beginning it was opened by a prompt that is not at hand.
        if prompt.rstrip().endswith((begin, begin + heading.rstrip())) or (begin not in text and end in text):
            text = begin + text
        if begin in text:
            answer, *parts = text.split(begin)
            thoughts = []
            for part in parts:
                thought, _, rest = part.partition(end)
                thoughts.append(thought.removeprefix(heading).strip())
                answer += rest
            return "\n".join(thoughts), answer.strip()
    return None, text
