"""One line on stderr that says how far a long verb is, how fast, and how long it will take."""

from __future__ import annotations

import sys
import time


class Progress:
    """Counts on stderr, rewritten at most twice a second.

    Args:
        unit: What is counted.
        total: How many there will be; None where that is unknown.
        show: None shows it on a terminal only.
    """

    def __init__(self, unit: str, total: int | None = None, *, show: bool | None = None) -> None:
        self.unit, self.total = unit, total
        self.show = sys.stderr.isatty() if show is None else show
        self.done, self.started, self._last = 0, time.perf_counter(), 0.0

    def add(self, count: int) -> None:
        """Count further ones as done."""
        self.done += count
        now = time.perf_counter()
        if self.show and now - self._last > 0.5:
            self._last = now
            sys.stderr.write(f"\r{self.line()}\x1b[K")
            sys.stderr.flush()

    def skip(self, count: int) -> None:
        """Leave out some of the total: they are done already, or others do them."""
        if self.total is not None:
            self.total -= count

    def line(self) -> str:
        """What is shown: count, rate, and time left where the total is known."""
        rate = self.done / max(1e-9, time.perf_counter() - self.started)
        text = f"{self.done:,} {self.unit}, {rate:,.1f}/s"
        if self.total and rate:
            left = int((self.total - self.done) / rate)
            text += f", {100 * self.done / self.total:.0f} %, {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
        return text

    def close(self) -> None:
        """End the line."""
        if self.show:
            sys.stderr.write(f"\r{self.line()}\x1b[K\n")
