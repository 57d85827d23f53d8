"""The contract of the control plane: no message to the agent holds 12 characters in a row of any data row.

The prompts' fixed text and the names of steps are public: they were written before any data was seen, so a
row that happens to hold the same words loses nothing by them.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from hf_plugins.autodp.features import window_hashes

WINDOW = 12
# Bits of the filter a window may take; its answers are checked against the rows, so it may err upwards.
_BITS_PER_WINDOW = 16
_MAX_BITS = 1 << 30


class PrivacyError(RuntimeError):
    """A message to the agent would have carried a piece of a row; it was not sent."""


class PrivacyGuard:
    """Refuses messages that share a window of 12 characters with any row.

    Memory is 2 bytes a character of the rows at most (128 MiB at most); a check costs the length of the
    message.

    Args:
        rows: Gives an iterator over the texts of all rows, every cell on its own, each time it is called.
        public: Fixed texts that may be said whatever the rows hold.
    """

    def __init__(self, rows: Callable[[], Iterable[str]], public: Sequence[str] = ()) -> None:
        self._rows = rows
        count = sum(max(len(text) - WINDOW + 1, 0) for text in rows())
        bits = 1 << max(16, min(_MAX_BITS, max(count, 1) * _BITS_PER_WINDOW).bit_length() - 1)
        self._mask = np.uint64(bits - 1)
        self._filter = np.zeros(bits // 8, np.uint8)
        for text in rows():
            slots = window_hashes(text, WINDOW) & self._mask
            np.bitwise_or.at(self._filter, slots >> np.uint64(3), _bit(slots))
        self._public = {window for text in public for window in _windows(text)}

    def leaks(self, message: str) -> list[str]:
        """Windows of the message that stand in a row and are not public."""
        slots = window_hashes(message, WINDOW) & self._mask
        hits = np.flatnonzero(self._filter[slots >> np.uint64(3)] & _bit(slots))
        suspects = {message[index : index + WINDOW] for index in hits} - self._public
        if not suspects:
            return []
        found: set[str] = set()
        for text in self._rows():
            found |= {window for window in suspects - found if window in text}
        return sorted(found)

    def check(self, messages: Sequence[dict[str, str]]) -> None:
        """Pass messages that are clean.

        Raises:
            PrivacyError: If one is not; the text names how many pieces and in which message, never the piece.
        """
        for index, message in enumerate(messages):
            if leaks := self.leaks(message["content"]):
                raise PrivacyError(
                    f"message {index} to the agent ({message['role']}) holds {len(leaks)} pieces of {WINDOW} "
                    "characters that stand in the data; it was not sent. Keep texts of rows out of names of "
                    "steps, parameter values and prompts."
                )


def _bit(slots: np.ndarray) -> np.ndarray:
    return np.left_shift(1, (slots & np.uint64(7)).astype(np.uint8)).astype(np.uint8)


def _windows(text: str) -> Iterable[str]:
    return (text[index : index + WINDOW] for index in range(len(text) - WINDOW + 1))
