"""Work that only one thread should be left of: the engine's."""

from __future__ import annotations

import contextvars
import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def apart(function: Callable[P, T]) -> Callable[P, T]:
    """The function, called in a thread that is over when it returns.

    OpenMP keeps helpers for every thread that has computed something. Where these and the first thread come to more
    than there are cores, all of them sleep between two operations instead of waiting for the next, and the engine's
    thread is slow for as long as the main thread lives that has loaded a model. Helpers of a thread that is over are
    gone. Scopes of adapters, the accelerator's index and errors are the caller's; torch's own scopes (``no_grad``) are
    not.
    """

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        future: Future[T] = Future()
        context = contextvars.copy_context()
        index = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None

        def work() -> None:
            try:
                if index is not None:
                    torch.accelerator.set_device_index(index)
                future.set_result(context.run(function, *args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        thread = threading.Thread(target=work, name="zinit-apart", daemon=True)
        thread.start()
        thread.join()
        return future.result()

    return called
