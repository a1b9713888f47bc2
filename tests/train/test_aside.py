"""Work beside a run: in order, and nothing that fails is lost."""

import threading

import pytest

from r1re_jax.train.aside import Aside


def test_work_is_done_in_order_by_another_thread() -> None:
    aside, done, gate = Aside(), [], threading.Event()

    def work(number: int) -> None:
        gate.wait()
        done.append((number, threading.current_thread() is threading.main_thread()))

    for number in range(20):
        aside.do(work, number)
    assert not done, "the caller does not wait"
    gate.set()
    aside.settle()
    assert done == [(number, False) for number in range(20)]
    aside.close()


@pytest.mark.parametrize("how", ["do", "settle"])
def test_what_fails_is_raised_by_the_next_call(how: str) -> None:
    aside, given, ended = Aside(), threading.Event(), threading.Event()

    def fail() -> None:
        given.wait()
        raise OSError("no space left on device")

    aside.do(fail)
    aside.do(ended.set)
    given.set()
    assert ended.wait(10), "what comes behind it is done"
    with pytest.raises(OSError, match="no space left"):
        aside.settle() if how == "settle" else aside.do(ended.set)
    aside.settle()
    aside.close()


def test_closing_waits_and_raises_nothing() -> None:
    aside, done, given = Aside(), [], threading.Event()
    aside.do(lambda: given.wait() / 0)
    aside.do(done.append, 1)
    given.set()
    aside.close()
    assert done == [1]
