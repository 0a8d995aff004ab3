"""How torch's worker threads wait; to be said before torch is imported."""

from __future__ import annotations

import os

# turns of the waiting loop before a thread sleeps; GNU OpenMP's default is 300,000 and more
SPINS = "1000"


def sleep_soon() -> None:
    """Let idle OpenMP threads sleep instead of spinning, unless the environment says otherwise.

    On a machine that also does other work, a spinning thread takes the core that the thread it
    waits for needs: with two busy neighbours on two cores a training step took seven times as
    long. On an idle machine there is no difference to measure.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
