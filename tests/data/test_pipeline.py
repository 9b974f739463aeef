"""The prefetcher: errors of its thread are raised, and timeouts are reported."""

import threading

import numpy as np
import pytest
from tiny import random_source

from ssl_jax.data.index import Index
from ssl_jax.data.pipeline import Prefetcher
from ssl_jax.errors import UserError


class Stalled:
    """A source that stops responding, or raises, after some batches."""

    def __init__(self, after, error=None):
        self.source, self.after, self.error = random_source(), after, error
        self.answers = threading.Event()

    def batches(self, steps):
        for number, batch in enumerate(self.source.batches(steps)):
            if number == self.after:
                if self.error:
                    raise self.error
                assert self.answers.wait(300)
            yield batch


def reading(source, timeout_s):
    return Prefetcher(
        source, Index(64, 8, 0), np.arange(8), lambda batch: batch, 0, 6, timeout_s=timeout_s
    )


def test_stalled_source_raises_user_error_after_the_timeout():
    source = Stalled(2)
    with reading(source, timeout_s=300) as batches:
        batches.next(), batches.next()
        batches._timeout_s = 0.3  # a busy machine may need longer for the first ones
        with pytest.raises(UserError, match=r"timed out: no batch for 0.3 s .*timeout_s"):
            batches.next()
        source.answers.set()


def test_zero_timeout_waits_for_a_stalled_source(monkeypatch):
    source = Stalled(2)
    with reading(source, timeout_s=0) as batches:
        batches.next(), batches.next()
        get, waited = batches._queue.get, batches.wait_seconds

        def asked(timeout):
            threading.Timer(0.3, source.answers.set).start()
            return get(timeout=timeout)

        monkeypatch.setattr(batches._queue, "get", asked)
        batches.next(), batches.next()
    assert batches.wait_seconds - waited > 0.29


def test_errors_of_the_reading_thread_are_raised_by_next():
    with reading(Stalled(1, OSError(5, "Input/output error")), timeout_s=10) as batches:
        batches.next()
        with pytest.raises(OSError, match="Input/output error"):
            batches.next()
