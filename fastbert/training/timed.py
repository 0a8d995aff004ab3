"""Batches, and how long the step has waited for them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Timed(Generic[Item]):
    """Takes items from an iterator by the clock.

    Attributes:
        waited_s: seconds that the last `take` took.
    """

    def __init__(self, items: Iterator[Item]) -> None:
        self._items = items
        self.waited_s = 0.0

    def take(self, count: int) -> list[Item]:
        """The next items, fewer where they end."""
        began = time.monotonic()
        found = list(islice(self._items, count))
        self.waited_s = time.monotonic() - began
        return found
