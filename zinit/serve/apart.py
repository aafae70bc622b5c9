"""Work that only one thread should be left of: the engine's."""

from __future__ import annotations

import contextvars
import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def apart(function: Callable[P, T]) -> Callable[P, T]:
    """The function, called in a thread that is over when it returns; scopes and errors are the caller's.

    OpenMP keeps helpers for every thread that has computed something. Where they come to more than there are cores, all
    of them sleep between two operations instead of waiting for the next: on two cores that makes the engine's thread
    1.6 times as slow once the main thread has loaded a model. Helpers of a thread that is over are gone.
    """

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        future: Future[T] = Future()
        context = contextvars.copy_context()

        def work() -> None:
            try:
                future.set_result(context.run(function, *args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        thread = threading.Thread(target=work, name="zinit-apart", daemon=True)
        thread.start()
        thread.join()
        return future.result()

    return called
