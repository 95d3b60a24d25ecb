"""Writers of several processes take turns."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import logkv
from tests.proof import waiting

RunInChild = Callable[[Callable[[], None]], int]


@pytest.mark.parametrize("turns", [1, 10])
def test_processes_that_open_write_and_close_in_turn(quick_dir: Path, turns: int) -> None:
    report = waiting.run(str(quick_dir / "prices.db"), processes=12, keys=100, turns=turns, timeout=60)
    assert not report.violations and report.found == 1200


def hold(path: str, held: int, release: int) -> None:
    with logkv.open(path):
        os.write(held, b"+")
        os.read(release, 1)


def test_who_waits_is_told_who_writes(path: str, in_child: RunInChild) -> None:
    with logkv.open(path) as db:

        def wait() -> None:
            began = time.monotonic()
            with pytest.raises(logkv.LockedError, match=r"pid \d+ \(waited for 0.05 s\)") as caught:
                logkv.open(path, timeout=0.05)
            assert caught.value.pid == os.getppid() and time.monotonic() - began >= 0.05

        assert in_child(wait) == 0
        db["a"] = "1"


def test_first_come_first_served(path: str) -> None:
    """Those who wait get the lock in the order in which they began to wait, and nobody who comes later before them."""
    order, say = os.pipe()
    children = []
    with logkv.open(path):
        for number in range(4):
            waits, waiting_now = os.pipe()
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    os.write(waiting_now, b"+")
                    with logkv.open(path, timeout=60):
                        os.write(say, b"%d" % number)
                        time.sleep(0.02)            # so that a wrong order is seen
                    status = 0
                finally:
                    os._exit(status)
            children.append(pid)
            os.read(waits, 1)
            while waiters(path) <= number:
                time.sleep(0.001)
            os.close(waits)
            os.close(waiting_now)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 4
    assert os.read(order, 10) == b"0123"
    os.close(order)
    os.close(say)


def waiters(path: str) -> int:
    """How many locks the system lists for the store's LOCK file beside the writer's own."""
    inode = os.stat(os.path.join(path, "LOCK")).st_ino
    lines = Path("/proc/locks").read_text().splitlines()
    return sum(f":{inode} " in line for line in lines) - 1


def test_a_dead_waiter_is_in_nobodys_way(path: str, in_child: RunInChild) -> None:
    with logkv.open(path):
        pid = os.fork()
        if pid == 0:
            try:
                logkv.open(path, timeout=60)
            finally:
                os._exit(0)
        while waiters(path) < 1:
            time.sleep(0.001)
        os.kill(pid, 9)
        os.waitpid(pid, 0)

    def follow() -> None:
        logkv.open(path, timeout=60).close()

    assert in_child(follow) == 0


def test_readers_take_a_waiter_for_no_writer(path: str, in_child: RunInChild) -> None:
    """A waiting process holds a lock of its own in the LOCK file: that of a writer is another one."""
    with logkv.open(path) as db:
        db["a"] = "1"
        waiter = threading.Thread(target=lambda: in_child(lambda: logkv.open(path, timeout=60).close()))
        waiter.start()
        while waiters(path) < 1:
            time.sleep(0.001)
        with logkv.Reader(path) as reader:
            assert reader["a"] == b"1"
    waiter.join()


def test_a_child_that_is_forked_while_a_thread_waits_keeps_no_lock(path: str) -> None:
    """The thread gets the lock after the fork; its process dies; the child lives on: the lock must be free."""
    held = logkv.open(path)
    release, released = os.pipe()
    ready, say = os.pipe()
    parent = os.fork()
    if parent == 0:
        thread = threading.Thread(target=lambda: (logkv.open(path, timeout=60), os.write(say, b"+")), daemon=True)
        thread.start()
        while waiters(path) < 1:
            time.sleep(0.001)
        if os.fork() == 0:
            os.read(release, 1)
            os._exit(0)
        os.write(say, b"-")
        time.sleep(60)
        os._exit(1)
    assert os.read(ready, 1) == b"-"
    held.close()
    assert os.read(ready, 1) == b"+"
    os.kill(parent, 9)
    os.waitpid(parent, 0)
    try:
        logkv.open(path, timeout=5).close()
    finally:
        os.write(released, b"!")
        for fd in (release, released, ready, say):
            os.close(fd)


def test_a_thread_does_not_wait_longer_than_it_wants_to_for_another_thread(path: str) -> None:
    with_lock, release = hold_in_child(path)
    waiting_now = threading.Thread(target=lambda: logkv.open(path, timeout=60).close())
    waiting_now.start()
    wait_for_waiters(path)
    with pytest.raises(logkv.LockedError, match="in this process"):
        logkv.open(path, timeout=0.01)
    assert waiting_now.is_alive()
    os.write(release, b"!")
    os.waitpid(with_lock, 0)
    waiting_now.join()
    os.close(release)


def test_a_signal_handler_that_opens_what_its_thread_is_opening_is_refused(path: str) -> None:
    with_lock, release = hold_in_child(path)
    caught: list[BaseException] = []

    def handler(number: int, frame: object) -> None:
        try:
            logkv.open(path, timeout=60)
        except logkv.LockedError as problem:
            caught.append(problem)
        os.write(release, b"!")

    old = signal.signal(signal.SIGUSR1, handler)
    try:
        main = threading.main_thread().ident
        assert main is not None
        threading.Thread(target=lambda: (wait_for_waiters(path), signal.pthread_kill(main, signal.SIGUSR1))).start()
        logkv.open(path, timeout=60).close()
    finally:
        signal.signal(signal.SIGUSR1, old)
        os.waitpid(with_lock, 0)
        os.close(release)
    assert "in this process" in str(caught[0])


def test_a_stopped_waiter_is_passed_over(path: str) -> None:
    with_lock, release = hold_in_child(path)
    stopped = os.fork()
    if stopped == 0:
        try:
            logkv.open(path, timeout=60).close()
        finally:
            os._exit(0)
    wait_for_waiters(path)
    os.kill(stopped, signal.SIGSTOP)
    os.write(release, b"!")
    os.waitpid(with_lock, 0)
    logkv.open(path, timeout=60).close()
    os.kill(stopped, signal.SIGCONT)
    assert os.waitpid(stopped, 0)[1] == 0
    os.close(release)


def wait_for_waiters(path: str) -> None:
    while waiters(path) < 1:
        time.sleep(0.001)


def hold_in_child(path: str) -> tuple[int, int]:
    """A child that has the store open until it is told; its pid and where to tell it."""
    held, say = os.pipe()
    told, release = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            hold(path, say, told)
        finally:
            os._exit(0)
    os.read(held, 1)
    for fd in (held, say, told):
        os.close(fd)
    return pid, release
