"""Tokens per second of reading and writing."""

import time
from collections.abc import Iterable, Iterator

import numpy as np

from mmx_jax.inference.inputs import TokenRows
from mmx_jax.inference.session import Session


class Speed:
    """Tokens and seconds of prefill and decoding, as they are measured around a session."""

    def __init__(self):
        self._prefill = self._decode = (0, 0.0)
        self._first = True

    def extend(self, session: Session, tokens: TokenRows, mask: TokenRows | None = None, *, reserve: int) -> None:
        """`session.extend`, timed."""
        begin = time.perf_counter()
        session.extend(tokens, mask, reserve=reserve)
        self._prefill = int(np.sum(mask)) if mask is not None else np.size(tokens), time.perf_counter() - begin

    def watch(self, pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The pieces, timed; the first one compiles, so it is left out of the rate."""
        first, count, seconds = True, 0, 0.0
        begin = time.perf_counter()
        for piece in pieces:
            if not first:
                count, seconds = count + int((piece >= 0).sum()), seconds + time.perf_counter() - begin
            first = False
            self._decode = count, seconds
            yield piece
            begin = time.perf_counter()

    def __str__(self):
        (read, read_seconds), (written, write_seconds) = self._prefill, self._decode
        compiled = " (compilation included)" if self._first else ""
        self._first = False
        text = f"prefill: {read} tokens, {read / max(read_seconds, 1e-9):.1f} tokens/s{compiled}"
        if written:
            text += f"; decode: {written} tokens after the first, {written / max(write_seconds, 1e-9):.1f} tokens/s"
        return text
