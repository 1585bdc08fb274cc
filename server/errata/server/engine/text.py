"""Tokens to text as they come: nothing is shown that a later token could take back.

Held back are characters whose bytes are not complete, what may become a stop string, and space at either end.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"
"""What a tokenizer puts for bytes that are no character, or not yet."""


class TextStream:
    """The text of one answer.

    Tokens are decoded when `advance` is called, after each one or after many: the work is the caller's to time.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._longest = max(map(len, stop), default=0)
        self._tokens: list[int] = []
        # Decoded again with each new token, since how a token reads depends on the one before it: tokens from
        # `_before` on, of which those up to `_decoded` are in `_raw`.
        self._before = self._decoded = 0
        self._raw = ""
        self._shown = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """All text so far, without space around it."""
        return self._raw.strip()

    def push(self, token: int) -> None:
        """Takes the next token."""
        self._tokens.append(token)

    def advance(self) -> str:
        """What can be shown now and was not before. Sets `stopped` where a stop string is complete."""
        self._decode(last=False)
        return self._show(self._safe())

    def end(self) -> str:
        """The rest, where no token will follow."""
        self._decode(last=True)
        return self._show(len(self._raw))

    def _decode(self, *, last: bool) -> None:
        if self.stopped or self._decoded == len(self._tokens):
            return
        known = self._read(self._tokens[self._before : self._decoded])
        text = self._read(self._tokens[self._before :])
        if len(text) <= len(known) or (text.endswith(_INCOMPLETE) and not last):
            return
        self._before, self._decoded = self._decoded, len(self._tokens)
        searched = max(0, len(self._raw) - self._longest + 1)
        self._raw += text[len(known) :]
        found = [at for at in (self._raw.find(s, searched) for s in self._stop) if at >= 0]
        if found:
            self.stopped = True
            self._raw = self._raw[: min(found)]

    def _read(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True)) if tokens else ""

    def _safe(self) -> int:
        """How much of the raw text no later token can make part of a stop string."""
        end = len(self._raw)
        if self.stopped:
            return end
        tails = range(min(self._longest - 1, end), 0, -1)
        return end - next((n for n in tails if any(s.startswith(self._raw[end - n :]) for s in self._stop)), 0)

    def _show(self, end: int) -> str:
        visible = self._raw[:end].rstrip()
        start = max(self._shown, len(self._raw) - len(self._raw.lstrip()))
        self._shown = max(self._shown, len(visible))
        return visible[start:]
