"""Words of English captions as the Penn Treebank splits them: what published caption figures are computed on.

Published figures take the tokens of Stanford's PTBTokenizer, which needs Java: lower case, contractions and possessives
split ("it's": it 's), hyphenated words kept whole, abbreviations and initials with their dot, and then most punctuation
dropped. The same is done here in Python, for what occurs in captions.
"""

from __future__ import annotations

import functools
import re

# With their dot they are one word. What is a word of its own as well ("no", "in") is not here.
ABBREVIATIONS = (
    *("mr", "mrs", "ms", "dr", "prof", "rev", "gen", "sgt", "capt", "lt", "col", "sen", "gov", "jr", "sr"),
    *("st", "rd", "ave", "blvd", "mt", "ft", "ct", "inc", "corp", "co", "ltd", "etc", "vs", "dept", "penn"),
    *("jan", "feb", "aug", "sept", "oct", "nov", "dec", "calif", "mass", "fla", "ariz", "colo", "conn"),
)
DROPPED = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
_PLAIN = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "--", "\u2014": "--", "\u2026": "..."}
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_JOINED = re.compile(r"\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b|\b(gim|lem)(me)\b")
_LETTER = r"[^\W\d_]"
_WORD = r"[^\W_]+"
_TOKEN = re.compile(
    rf"""
    (?:https?://|www\.)\S*[\w/]                         # addresses
  | \b\d+:\d+(?=[ap]m\b)                                # 10:30am
  | \d+(?:[.,:/]\d+)*(?![\w.,:/-]*\w)                   # numbers: 3,000 1/2 10:30
  | (?:{_LETTER}\.){{2,}}(?!\w) | {_LETTER}\.(?=\s+\S)      # initials: t.v. or s. in "s. pellegrino"
  | (?:{"|".join(ABBREVIATIONS)})\.(?!\w)
  | {_WORD}(?=n't\b) | n't\b                            # do n't
  | '(?:s|m|d|ll|re|ve)\b                               # it 's
  | {_LETTER}'(?!(?:s|m|d|ll|re|ve)\b){_WORD}(?:-{_WORD})*  # o'clock
  | {_WORD}(?:[-&/.]{_WORD})*                           # words, with what joins their parts
  | '\d0s\b                                             # '50s
  | \.\.+ | --+ | [!?]+ | ''|`` | \S
    """,
    re.VERBOSE,
)


@functools.lru_cache(maxsize=2**16)
def ptb_tokens(text: str) -> tuple[str, ...]:
    """The words of a caption, in lower case.

    Args:
        text: English; other scripts are split at blanks and punctuation.
    """
    text = _JOINED.sub(lambda found: " ".join(filter(None, found.groups())), text.lower().translate(_PLAIN))
    tokens = [_BRACKETS.get(token, token) for token in map(str, _TOKEN.findall(text))]
    return tuple(token for token in tokens if token not in DROPPED and token != '"' and token.strip(".-"))
