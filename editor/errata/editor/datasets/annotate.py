"""Constraints of questions that have none marked (Basu et al. 2024, §3), by patterns of words.

Visual: "this country", "the bridge in the picture". Textual: what is in quotes, else proper nouns. What a pattern
proposes is to be looked at before it is measured; how often it is right is measured in tests.
"""

import re
from collections.abc import Iterator

from errata.editor.datasets.records import Kind, Span, starts

_PICTURE = r"(?:image|picture|photo(?:graph)?|drawing|painting)"

# "the old bridge shown in this image", "the man on the left in the photo": the noun phrase nearest to the picture, and
# no other "the" in it.
_IN_PICTURE = re.compile(
    rf"\b(?:the|a|an|this|these)\s+(?:(?!(?:the|a|an|is|are|was|were|of)\b)[\w'’-]+\s+){{1,5}}?"
    rf"(?:(?:on|at|to|in)\s+the\s+(?:left|right|top|bottom|front|back|middle|cent(?:er|re))\s+)?"
    rf"(?:in|on|from|of)\s+(?:this|the)\s+{_PICTURE}\b",
    re.IGNORECASE,
)

# What stands between "this" and its noun. A closed list: whether "this X Y" is a noun phrase is not for patterns.
_ADJECTIVES = """ancient beautiful big black blue brown cultural famous fictional former gray great green grey historic
historical large little medieval military modern musical national natural new notable old orange pink political popular
public purple red religious small tall white wooden yellow young"""

# After which "this" stands alone: "What is this called?"
_NO_NOUN = """a about an and are as at be been being belong belongs born build built by called can could did do does
for found from had has have in is it known like located look looks made may might named of on or owned shown should
situated taken than that the these this to was were when where which who will with would"""

# A capital after "this" begins a name: "Is this Big Ben?"
_THIS = re.compile(
    rf"\b(?i:this|these)\b(?:\s+(?:(?:{'|'.join(_ADJECTIVES.split())})\s+)*"
    rf"(?!(?:{'|'.join(_NO_NOUN.split())})\b)(?:[a-z][\w-]*))?"
)

_THE_PICTURE = re.compile(rf"\bthe\s+{_PICTURE}\b", re.IGNORECASE)

_QUOTED = re.compile(r"“([^“”]+)”|\"([^\"]+)\"|«\s*([^«»]+?)\s*»|‘([^‘’]+)’(?!\w)|(?<!\w)'([^']+)'(?!\w)")

_WORD = r"(?:[a-z]?[A-Z][\w.&-]*(?:['’](?!s\b)\w+)*)"
_PROPER = re.compile(
    rf"(?<![\w.'’])(?:\d{{4}}\s+)?{_WORD}"
    rf"(?:\s+(?:(?:of|the|and|de|da|del|di|du|la|le|van|von|for|in|on|to|&)\s+){{0,2}}(?:{_WORD}|\d+(?:\.\d+)*\b))*"
)

# Words that start a question in capitals and name nothing.
_OPENING = """a after an are at before by can could did do does during for from give has have how in is name of on
please tell that the these this through to was were what when where which who whom whose why will with"""


def annotate(text: str, *, pictured: bool = True) -> tuple[Span, ...]:
    """The constraints of a question, the visual one first; none where no pattern fits.

    `pictured` is whether the question has an image: without one nothing in it is a visual constraint. Of several
    visual spans the first is taken. Spans never overlap.
    """
    visual = next(_visual(text), None) if pictured else None
    spans = [visual] if visual else []
    for found in list(_quoted(text)) or list(_proper(text)):
        if not any(found[0] < end and start < found[1] for start, end in spans):
            spans.append(found)
    return tuple(
        _span(text, start, end, Kind.VISUAL if (start, end) == visual else Kind.TEXTUAL) for start, end in spans
    )


def _span(text: str, start: int, end: int, kind: Kind) -> Span:
    found = starts(text[start:end], text)
    return Span(text=text[start:end], kind=kind, occurrence=found.index(start) if len(found) > 1 else None)


def _visual(text: str) -> Iterator[tuple[int, int]]:
    for pattern in (_IN_PICTURE, _THIS, _THE_PICTURE):
        yield from (match.span() for match in pattern.finditer(text))


def _quoted(text: str) -> Iterator[tuple[int, int]]:
    return (match.span(match.lastindex or 0) for match in _QUOTED.finditer(text))


def _proper(text: str) -> Iterator[tuple[int, int]]:
    for match in _PROPER.finditer(text):
        start, end = match.span()
        # "Which Golden Globe": the question's word goes, the name stays.
        while (first := re.match(r"(\w+)\s*", text[start:end])) and first[1].casefold() in _OPENING.split():
            start += first.end()
        named = text[start:end].rstrip(" .’'&-")
        if any(letter.isupper() for letter in named):
            yield start, start + len(named)
