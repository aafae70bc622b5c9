"""Work in a thread that is over: results, errors and scopes are the caller's, and only the engine's thread is left."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest
import torch

import zinit
from tests.contract.cases import causal_lm
from tests.serve.world import folders
from zinit.serve import served
from zinit.serve.apart import apart
from zinit.serve.served import Models


def test_results_and_errors_come_back() -> None:
    @apart
    def divided(a: int, *, by: int) -> float:
        assert threading.current_thread() is not threading.main_thread()
        return a / by

    assert divided(6, by=4) == 1.5
    with pytest.raises(ZeroDivisionError):
        divided(1, by=0)


def test_ctrl_c_does_not_wait_for_the_work() -> None:
    """A base may load for minutes."""
    loading, end, ended = threading.Event(), threading.Event(), threading.Event()

    @apart
    def load() -> None:
        loading.set()
        end.wait(30)
        ended.set()

    def interrupt() -> None:
        assert loading.wait(30)
        os.kill(os.getpid(), signal.SIGINT)  # of the process, as a terminal sends it: the main thread sees it

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job has not
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            load()
        assert not ended.is_set()
    finally:
        signal.signal(signal.SIGINT, before)
        end.set()


def test_scopes_of_the_caller_hold() -> None:
    model = causal_lm("Llama")
    handle = zinit.attach(model, zinit.PrefixConfig(length=2, gate_init=1.0))
    ids = torch.tensor([[3, 1, 2]])
    logits = apart(lambda: model(input_ids=ids).logits)
    on = logits()
    with handle.disabled():
        off = logits()
    assert not torch.equal(on, off)
    with handle.disabled():
        assert torch.equal(off, model(input_ids=ids).logits)


def test_a_base_and_its_adapters_leave_no_thread_that_has_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[threading.Thread]] = {}

    def watched(name: str) -> None:
        own: Any = getattr(served, name)

        def called(*args: Any, **settings: Any) -> Any:
            seen.setdefault(name, []).append(threading.current_thread())
            return own(*args, **settings)

        monkeypatch.setattr(served, name, called)

    for name in ("load_base", "check_batches", "load", "is_routable"):
        watched(name)
    made = Models.of({"anna": str(folders()["anna"]), "bert": str(folders()["bert"])})
    assert list(made.by_name) == ["base", "anna", "bert"]
    assert {name: len(threads) for name, threads in seen.items()} == {
        "load_base": 1,
        "check_batches": 1,
        "load": 2,
        "is_routable": 2,
    }
    threads = [thread for found in seen.values() for thread in found]
    assert threading.main_thread() not in threads
    assert not any(thread.is_alive() for thread in threads)
