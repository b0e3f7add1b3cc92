"""Whether two tokenizers give the same ids, and where they part: asked of texts that conversions are known to spoil."""

import dataclasses
from collections.abc import Iterator

from llmjax.text.tokenizer import Tokenizer

# Tokens whose texts are asked at once: a quick call, and little memory.
_CHUNK = 4096

_DIGITS = "7 42 365 2026 10000 1234567 3.14159 1,000,000.50 -273.15 1e-05 ½ ² ٣٤ １２ 0x7F 12:30 2026-02-29"
_CODE = "def f(x_1, *args):\n    return {'a': x_1[-1]} # no-op\n\n\n\tif (a!=b && c->d) { i++; }\r\n</s><a href=\"x\">"
# What is written in plain letters: spaces, marks, digits, code.
PLAIN = (
    "",
    " ",
    "a",
    " a",
    "  a",
    "a ",
    "a  ",
    "\n",
    "\na\n\nb\n\n\nc",
    "\r\na\r\nb",
    "\t\ta\t b \t c",
    *(" " * n + "x" for n in (3, 4, 7, 8)),
    *("x" + "\n" * n for n in (3, 4, 8)),
    "The quick brown fox jumps over the lazy dog.",
    "I'm, you're, it's, we'll, they've, he'd, I'M, YOU'RE, don't 'tis ’s ‘quoted’ “so”",
    "camelCaseWord snake_case_word SHOUTED iPhone15Pro e-mail@example.org https://example.org/a?b=c&d=%20#e",
    "!!! ... --- === *** ??? ;;; ,,, ((())) [[]] $$$ @@@ a.b,c;d:e!f?g",
    _DIGITS,
    "".join(_DIGITS.split()),
    _CODE,
    *(" " * n + "x" for n in (16, 31, 40)),
)
# Other letters, and what looks like them.
SCRIPTS = (
    "Ünïcödé naïve café façade Straße Œuvre Łódź İstanbul ǅ",
    "cafe\u0301 a\u030a o\u0308\u0304 n\u0303",  # combining marks: what normalizes composes them
    "ﬁne ofﬁce Ⅳ ℌ ㎞ ｆｕｌｌ ①",  # compatibility forms: what folds them changes them
    "a\u00a0b\u2003c\u3000d\u200be\ufefff\u2028g\u00adh",  # spaces that are none, and the other way round
    "中文字符，日本語のテキスト。한국어 문장 ภาษาไทย हिन्दी देवनागरी",
    "مرحبا بالعالم שלום עולם Привет, мир Γειά σου Κόσμε",
    "\u1112\u1161\u11ab가각 ㄱㄴ",
    "👍 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ☺️ ✔ a😀b",
    "𝔘𝔫𝔦 𐍈 \U000e0001 \ue000",
    "\x01\x07\x1b[0m\x7f\x85",
    "x\x00y",
    "a▁b Ġ Ċ <0x0A> [INST] <|im_start|>user <start_of_turn>",
    "a" * 40 + " Donaudampfschifffahrtsgesellschaftskapitän antidisestablishmentarianism",
)
TEXTS = PLAIN + SCRIPTS


@dataclasses.dataclass(frozen=True)
class Disagreement:
    """A text that two tokenizers cut into other tokens, or write back as another text.

    Attributes:
      of: ``encode``; ``decode`` where the ids are the same and the texts they give are not.
      text: the shortest part of what was asked on which they part.
      here: what the one makes of it: tokens as (id, piece), or for ``decode`` a text.
      there: what the other does.
    """

    of: str
    text: str
    here: tuple[tuple[int, str], ...] | str
    there: tuple[tuple[int, str], ...] | str


def disagreement(here: Tokenizer, there: Tokenizer) -> Disagreement | None:
    """The first text on which two tokenizers part; None if they agree on all that are asked.

    Asked are texts of every kind that tokenizers part on (spaces, digits, scripts, marks, code), the special tokens of
    both, and each token of the vocabularies as a text of its own.  What stands before and behind a text by the
    checkpoint's policy (``prefix_ids``, ``suffix_ids``) does not count here.
    """
    for text in _texts(here, there):
        if _parting(text, here, there):
            end = next(n for n in range(len(text) + 1) if _parting(text[:n], here, there))
            start = next(n for n in range(end, -1, -1) if _parting(text[n:end], here, there))
            return _parting(text[start:end], here, there)
    return None


def _parting(text: str, here: Tokenizer, there: Tokenizer) -> Disagreement | None:
    ours, theirs = (t.encode(text, add_bos=False) for t in (here, there))
    if ours != theirs:
        a, b = (tuple((i, t.piece(i)) for i in ids) for t, ids in ((here, ours), (there, theirs)))
        return Disagreement("encode", text, a, b)
    # Special tokens by name: whether a text is shown without them depends on the form of the file.
    written, other = (t.decode(ids, skip_special_tokens=False) for t, ids in ((here, ours), (there, theirs)))
    return None if written == other else Disagreement("decode", text, written, other)


def _texts(here: Tokenizer, there: Tokenizer) -> Iterator[str]:
    """One after the other, so that the first on which they part is the last that is made; tokens of both once."""
    yield from TEXTS
    for tokenizer in (here, there):
        known = tokenizer.special_tokens.keys() - {tokenizer.special.get("unk_token")}  # whose name nobody writes
        yield from (form for token in sorted(known) for form in (f"a{token}b", f" {token} x"))
    asked: set[str] = set()
    for tokenizer in (here, there):
        for start in range(0, tokenizer.vocab_size, _CHUNK):
            some = [[i] for i in range(start, min(start + _CHUNK, tokenizer.vocab_size))]
            found = set(tokenizer.backend.decode_batch(some, skip_special_tokens=False)) - asked
            asked |= found
            texts = sorted(found)
            texts += [text + text for text in texts]  # one that is a token may be taken whole, whatever is joined
            ours, theirs = (t.backend.encode_batch(texts, add_special_tokens=False) for t in (here, there))
            yield from (text for text, a, b in zip(texts, ours, theirs, strict=True) if a.ids != b.ids)
