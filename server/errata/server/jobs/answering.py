"""Questions asked of versions through the inference engine, all in the same running batch. Greedy."""

import time
from collections import deque
from collections.abc import Callable, Sequence

from errata.editor.prompts import Prompt
from errata.server.engine import Engine, Generation, GenerationHandle
from errata.server.errors import BusyError

_IN_FLIGHT = 32
"""Questions of one caller at a time: others' must find room in the queue, too."""

_INTERVAL = 0.2
"""Seconds between two looks at whether to stop, or at a queue that is full."""


def answers(engine: Engine, asked: Sequence[tuple[int, Prompt]], check: Callable[[], None]) -> list[str]:
    """The answer of each version, by number, to its prompt, in order. Blocks.

    `check` raises where nobody waits any more; what is in flight is then given up. Raises what ends an answer.
    """
    flying: deque[tuple[int, GenerationHandle]] = deque()
    found = [""] * len(asked)
    waiting = deque(enumerate(asked))
    try:
        while waiting or flying:
            check()
            if waiting and len(flying) < _IN_FLIGHT and (handle := _begun(engine, *waiting[0][1])):
                flying.append((waiting.popleft()[0], handle))
            elif flying:
                i, handle = flying[0]
                try:
                    found[i] = handle.result(_INTERVAL).text
                    flying.popleft()
                except TimeoutError:
                    continue
            else:
                time.sleep(_INTERVAL)
    finally:
        for _, handle in flying:
            handle.cancel()
    return found


def _begun(engine: Engine, version: int, prompt: Prompt) -> GenerationHandle | None:
    """None while the queue is full."""
    try:
        return engine.generate(Generation(version=version, prompt=prompt))
    except BusyError:
        return None
