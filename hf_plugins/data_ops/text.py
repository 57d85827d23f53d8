"""What operators measure and change in a text: tokens, n-grams, repetition, markup, personal data.

Pure functions of strings; nothing here knows of data sets.
"""

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

# Han with its extensions and compatibility forms, kana, bopomofo, Hangul: scripts written without spaces,
# where one character does a word's work (Hangul counts: its spaces separate phrases).
CJK = (
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3031-\u303b\u3040-\u30ff\u3100-\u312f\u31a0-\u31bf\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\uff66-\uff9f\U00020000-\U000323af"
)
_WORD = re.compile(rf"[{CJK}]|[^\W_{CJK}]+(?:['\u2019-][^\W_{CJK}]+)*")
_CJK_CHARACTER = re.compile(rf"[{CJK}]")
TOKENIZATIONS = ("character", "space", "punctuation", "words")


def tokens(text: str, tokenization: str = "words") -> list[str]:
    """Tokens of a text.

    Args:
        text: Any text.
        tokenization: ``character`` (all characters but white space), ``space`` (between blanks),
            ``punctuation`` (runs of word characters), or ``words``: a word in scripts with spaces, one
            character in Chinese, Japanese and Korean.

    Returns:
        Tokens in order.

    Raises:
        ValueError: If there is no such tokenization.
    """
    if tokenization == "words":
        return _WORD.findall(text)
    if tokenization == "space":
        return text.split()
    if tokenization == "character":
        return [character for character in text if not character.isspace()]
    if tokenization == "punctuation":
        return re.findall(r"\w+", text)
    raise ValueError(f"tokenization must be one of {', '.join(TOKENIZATIONS)}; got {tokenization!r}.")


def has_cjk(text: str) -> bool:
    """Whether a text holds at least one Chinese, Japanese or Korean character."""
    return bool(_CJK_CHARACTER.search(text))


def ngrams(items: Sequence[Any], length: int) -> list[tuple[Any, ...]]:
    """All runs of ``length`` items; none if there are fewer items."""
    return list(zip(*(items[start:] for start in range(length)), strict=False))


def repetition_ratio(items: Sequence[Any], length: int) -> float:
    """Share of n-grams that occur more than once.

    ``R_n = sum of counts of n-grams with count > 1 / number of n-grams``; 0 without an n-gram.

    Args:
        items: Characters (a string will do) or words.
        length: n.

    Returns:
        A share in [0, 1].
    """
    if isinstance(items, str):
        grams: Iterable[Any] = (items[i : i + length] for i in range(len(items) - length + 1))
    else:
        grams = ngrams(items, length)
    counts = Counter(grams)
    total = counts.total()
    return sum(count for count in counts.values() if count > 1) / total if total else 0.0


def special_characters_ratio(text: str) -> float:
    """Share of characters that are neither letters nor marks: digits, blanks, punctuation, symbols, emoji."""
    if not text:
        return 0.0
    counts = Counter(text)
    letters = sum(count for character, count in counts.items() if unicodedata.category(character)[0] in "LM")
    return 1.0 - letters / len(text)


_TAGS = (
    "a abbr article aside audio b big blockquote body br button canvas center code dd div dl dt em "
    "figcaption figure font footer form h1 h2 h3 h4 h5 h6 head header hr html i iframe img input label li "
    "link main meta nav noscript o:p ol option p path pre s script section select small source span strike "
    "strong style sub sup svg table tbody td textarea tfoot th thead title tr tt u ul video"
).split()
_BLOCKS = (
    "article aside blockquote br dd div dl dt figure footer form h1 h2 h3 h4 h5 h6 header hr li main nav "
    "ol p pre section table tr ul"
).split()
_names = "|".join(sorted(_TAGS, key=len, reverse=True))
# Only names that HTML knows are tags: "BP <140 and >90" is text. [^<>] keeps the match linear.
_TAG = re.compile(rf"</?({_names})(?:\s[^<>]*)?/?>|<!doctype[^<>]*>", re.I)
_HIDDEN = re.compile(r"<(script|style)\b[^<>]*>.*?</\1\s*>|<!--.*?-->", re.I | re.S)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#x[0-9a-f]{1,6}|[a-z][a-z0-9]{1,31});", re.I)


def clean_html(text: str) -> str:
    """Text without HTML: scripts and comments go, blocks end a line, entities become characters.

    Applying it twice changes nothing: escaped markup (``&lt;b&gt;``) is unescaped and stripped as well.
    """
    while True:
        after = _HIDDEN.sub("", text) if "<" in text else text
        after = _TAG.sub(lambda tag: "\n" if (tag[1] or "").lower() in _BLOCKS else "", after)
        after = _ENTITY.sub(lambda entity: html.unescape(entity[0]), after)
        if after == text:
            return text
        text = after


_LINK = re.compile(
    r"(?:https?|ftp)://[^\s<>\"'\u3000-\u303f\uff00-\uffef\u4e00-\u9fff]+|www\.[\w-]+(?:\.[\w-]+)+[\w/?=&%.#-]*",
    re.I,
)
_EMAIL = re.compile(
    r"(?<![\w.+-])[a-z0-9_.+-]{1,64}@[a-z0-9-]{1,63}(?:\.[a-z0-9-]{1,63}){1,8}(?![\w-])", re.I | re.A
)
_IPV4 = re.compile(r"(?<![\d.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\d.])")
_MOBILE = re.compile(r"(?<![\d])(?:\+?86[- ]?)?1[3-9]\d[- ]?\d{4}[- ]?\d{4}(?!\d)")
_ID_CARD = re.compile(r"(?<![\dXx])\d{17}[\dXx](?![\dXx])")
_ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


def is_resident_id(text: str) -> bool:
    """Whether 18 characters are a Chinese resident ID: date of birth possible, check digit right (mod 11-2).

    The sum of digits times weights plus the check digit (X is 10) leaves 1 when divided by 11 (GB 11643).
    """
    if not re.fullmatch(r"\d{17}[\dXx]", text):
        return False
    month, day = int(text[10:12]), int(text[12:14])
    if not (1800 <= int(text[6:10]) <= 2199 and 1 <= month <= 12 and 1 <= day <= 31):
        return False
    check = 10 if text[17] in "Xx" else int(text[17])
    return (sum(int(d) * w for d, w in zip(text[:17], _ID_WEIGHTS, strict=True)) + check) % 11 == 1


def _replace(
    pattern: re.Pattern[str], test: Callable[[str], bool] | None = None
) -> Callable[[str, str], str]:
    def replace(text: str, replacement: str) -> str:
        return pattern.sub(lambda m: replacement if test is None or test(m[0]) else m[0], text)

    return replace


replace_links = _replace(_LINK)
replace_emails = _replace(_EMAIL)
replace_ips = _replace(_IPV4)
replace_phones = _replace(_MOBILE)
replace_resident_ids = _replace(_ID_CARD, is_resident_id)


def normalize_whitespace(text: str) -> str:
    """One blank for runs of blanks, one empty line at most, no blanks at line ends, none around the text."""
    text = re.sub(r"[^\S\n]+", " ", text.replace("\r\n", "\n").replace("\r", "\n"))
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" ?\n ?", "\n", text)).strip()


def plain_words(text: str) -> list[str]:
    """Words for comparing texts across editions: compatibility forms and case folded, punctuation gone."""
    return tokens(unicodedata.normalize("NFKC", text).casefold(), "words")


# A row's text may be a string, chat messages, or turns; operators must treat all of them alike.
_LABELS = frozenset({"role", "from", "name", "weight"})


def map_text(value: Any, change: Callable[[str], str]) -> Any:
    """Apply a change to every piece of text of a value: a string, a list of turns, chat messages.

    Labels (``role``, ``from``, ``name``) stay as they are, and so does everything that is no text.
    """
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: item if key in _LABELS else map_text(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_text(item, change) for item in value]
    return value


def join_text(value: Any) -> str:
    """All pieces of text of a value, one a line; empty for None."""
    pieces: list[str] = []

    def collect(piece: str) -> str:
        pieces.append(piece)
        return piece

    map_text(value, collect)
    return "\n".join(pieces)
