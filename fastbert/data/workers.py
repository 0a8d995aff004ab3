"""Processes that work for this one, and end when it does, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import Any


def worker_pool(count: int, prepare: Callable[..., None], *arguments: Any) -> ProcessPoolExecutor:
    """So many processes; each calls `prepare(*arguments)` once."""
    return ProcessPoolExecutor(
        count,
        # a fork would copy the locks of threads that do not exist in the child
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(prepare, arguments),
    )


def _start(prepare: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    # one process a core already
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
