"""Calls that share a device: one at a time, fairly, each with an honest clock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from varaccel.app.turns import Stopped, Turn, Turns, out_of_time
from varaccel.app.visits import Visits


def spend(seconds: float) -> None:
    """Use up time without sleeping, as a pass does."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def together(*bodies: Callable[[], None]) -> None:
    threads = [threading.Thread(target=body) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()


def test_one_computes_at_a_time_and_both_get_as_much() -> None:
    turns, log, busy = Turns(quantum=0.002), [], threading.Lock()

    def call(name: str) -> Callable[[], None]:
        def body() -> None:
            with turns.join() as turn:
                for _ in range(40):
                    assert busy.acquire(blocking=False), "two at a time"
                    spend(0.003)
                    log.append((name, turn.seconds))
                    busy.release()
                    turn.offer()

        return body

    together(call("a"), call("b"))
    first = [name for name, _ in log[:40]]
    assert abs(first.count("a") - first.count("b")) <= 10, "they take turns from the start"


def test_waits_and_asides_are_on_nobodys_clock() -> None:
    turns, ended = Turns(quantum=0.001), {}

    def body(name: str) -> Callable[[], None]:
        def run() -> None:
            with turns.join() as turn:
                begun = time.perf_counter()
                for _ in range(10):
                    spend(0.004)
                    with turn.aside():
                        spend(0.004)
                    turn.offer()
                whole = time.perf_counter() - begun
            ended[name] = turn, whole

        return run

    together(body("a"), body("b"))
    for turn, whole in ended.values():
        assert isinstance(turn, Turn)
        assert turn.seconds >= 0.04
        assert turn.paused >= 0.04, "at least its own asides"
        assert turn.seconds + turn.paused == pytest.approx(whole, abs=0.02)


def test_who_had_less_goes_first() -> None:
    turns, log = Turns(quantum=0.0), []
    with turns.join() as long:
        spend(0.05)
        waiting = threading.Event()

        def newcomer() -> None:
            waiting.set()
            with turns.join():
                log.append("newcomer")

        thread = threading.Thread(target=newcomer)
        thread.start()
        waiting.wait(5)
        time.sleep(0.05)
        long.offer()
        log.append("long")
    thread.join(5)
    assert log == ["newcomer", "long"]


def test_a_call_that_fails_gives_its_turn_back() -> None:
    turns = Turns()
    with pytest.raises(ZeroDivisionError), turns.join():
        raise ZeroDivisionError
    with turns.join():
        assert turns.holder is not None
    assert turns.holder is None


def test_alone_nobody_is_waited_for() -> None:
    turns, waits = Turns(lambda: waits.append(1), quantum=0.0), []
    with turns.join() as turn:
        for _ in range(100):
            turn.offer()
        assert turn.paused < 0.05
    assert waits, "a device is waited for before its time is counted"


def test_visitors_stop_their_own_calls() -> None:
    visits, stopped = Visits(), []
    with visits.running("a", lambda: stopped.append("a")), visits.running("b", lambda: stopped.append("b")):
        visits.stop("a")
        assert stopped == ["a"]
        visits.stop(None)
        assert stopped == ["a"]
    visits.stop("a")
    assert stopped == ["a"], "what has ended is not stopped"


def test_what_waits_in_the_queue_is_stopped_too() -> None:
    visits = Visits()
    before = time.monotonic()
    assert not visits.was_stopped("a", before)
    visits.stop("a")
    assert visits.was_stopped("a", before)
    assert not visits.was_stopped("b", before)
    time.sleep(0.01)
    assert not visits.was_stopped("a", time.monotonic()), "what is asked for afterwards runs"
    visits.leave("a")
    assert not visits.was_stopped("a", before)


def test_reasons() -> None:
    assert Stopped().reason == ""
    assert "300 seconds" in out_of_time(300)
