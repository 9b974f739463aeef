"""Reading in daemon threads: timeouts, errors, order, and the end of a process."""

import os
import subprocess
import sys
import threading
import time

import pytest

from ssl_jax.data import reader
from ssl_jax.data.reader import Reader, in_parallel, read_all
from ssl_jax.errors import UserError


def test_items_come_in_order_and_are_read_ahead_but_not_placed():
    read, placed = threading.Semaphore(0), []

    def items():
        for number in range(3):
            read.release()
            yield number

    with Reader(items(), place=lambda x: placed.append(x) or -x) as r:
        assert all(read.acquire(timeout=60) for _ in range(2)) and placed == []
        assert [r.next() for _ in range(3)] == [0, -1, -2] and placed == [0, 1, 2]
        with pytest.raises(RuntimeError, match="ended early"):
            r.next()
    assert read_all(iter("abc")) == ["a", "b", "c"] and read_all(iter([])) == []


def test_errors_of_the_thread_are_raised():
    def items():
        yield 1
        raise UserError("Cannot read x.")

    with Reader(items()) as r:
        assert r.next() == 1
        with pytest.raises(UserError, match="Cannot read x"):
            r.next()
    with pytest.raises(UserError, match="Cannot read x"):
        read_all(items())


def test_late_item_is_warned_of_once_before_the_timeout(monkeypatch, caplog):
    monkeypatch.setattr(reader, "_SLOW_S", 0.05)
    answers = threading.Event()

    def items():
        for number in range(3):
            time.sleep(0.1)
            yield number
        assert answers.wait(60)

    with Reader(items(), timeout_s=60) as r:
        assert [r.next() for _ in range(3)] == [0, 1, 2]
        r._timeout_s = 0.1
        with pytest.raises(UserError, match=r"timed out: no batch for 0.1 s .*timeout_s"):
            r.next()
        answers.set()
    assert caplog.messages == [
        "warning: no images for 0.05 s. Still waiting; check the file system, or whether the "
        "machine is busy."
    ]


@pytest.mark.parametrize("threads", [1, 3, 99])
def test_in_parallel_keeps_the_order_and_raises_errors(threads):
    assert in_parallel(lambda x: x * x, range(10), threads) == [x * x for x in range(10)]
    assert in_parallel(str, [], threads) == []
    with pytest.raises(ZeroDivisionError):
        in_parallel(lambda x: 1 // x, [1, 0, 2], threads)


STALLED = """
import sys
from ssl_jax.data.reader import Reader, in_parallel

stalled = (in_parallel(open, [pipe], 2) for pipe in sys.argv[1:])
Reader(stalled, timeout_s=0.1).next()
"""


def test_process_ends_while_its_reading_threads_wait(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # opening it waits for a writer
    line = [sys.executable, "-c", STALLED, str(pipe)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "timed out: no batch for 0.1 s" in done.stderr
