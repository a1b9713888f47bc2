"""Signals: the first one asks, the second one kills, also while the main thread is elsewhere."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from r1re_jax.train.signals import STOP_SIGNALS, Stopped, StopSignals

ROOT = pathlib.Path(__file__).resolve().parents[2]


def _wait_for(signals: StopSignals) -> None:
    for _ in range(500):
        if signals.requested is not None:
            return
        time.sleep(0.01)
    raise AssertionError("the signal was not noticed")


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_raised_at_the_next_poll(number: int) -> None:
    before = signal.getsignal(number)
    with StopSignals() as signals:
        signals.poll()
        os.kill(os.getpid(), number)
        _wait_for(signals)
        with pytest.raises(Stopped) as error:
            signals.poll()
    assert error.value.exit_code == 128 + number
    assert str(error.value) == signal.Signals(number).name
    assert signal.getsignal(number) is before


def test_other_signals_are_let_be() -> None:
    heard = []
    old = signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.1)
            assert heard and signals.requested is None
    finally:
        signal.signal(signal.SIGUSR1, old)


def test_a_second_signal_ends_the_process_at_once() -> None:
    # A regular expression that backtracks for ages holds the main thread in C code without
    # releasing the interpreter, so a sleep in C stands for a long device program instead.
    program = """
import ctypes, os, sys
from r1re_jax.train.signals import StopSignals
sleep = ctypes.CDLL(None).sleep
with StopSignals() as signals:
    print("ready", flush=True)
    for _ in range(60):
        sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(1)
        assert process.poll() is None, "the first signal only asks"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
