"""How torch's threads wait and how torch asks for memory; to be said before it is imported."""

from __future__ import annotations

import os

# turns of the waiting loop before a thread sleeps: longer than the gaps between a small step's
# operators; GNU OpenMP's default is 300,000 and more
SPINS = "20000"


def sleep_soon() -> None:
    """Let idle OpenMP threads sleep soon, unless the environment says otherwise.

    On a machine that also does other work, a spinning thread takes the core that the thread it
    waits for needs. A thread that sleeps at once has to be woken for every operator, of which a
    step on a few hundred tokens has many and short ones.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def ask_for_large_pages() -> None:
    """Let torch ask Linux for pages of 2 MiB, unless the environment says otherwise.

    Large tensors come from fresh memory every time, which the system clears page by page when it is
    first touched; in a training step the word embedding's gradient alone is thousands of pages of
    4 KiB.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
