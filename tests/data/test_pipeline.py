"""The thread that reads ahead: what it raises is raised, and a silence is told."""

import time

import numpy as np
import pytest
from tiny import random_source

from ssl_jax.data.index import Index
from ssl_jax.data.pipeline import Prefetcher
from ssl_jax.errors import UserError


class Stalled:
    """A source whose storage no longer answers after some batches."""

    def __init__(self, after, error=None):
        self.source, self.after, self.error = random_source(), after, error

    def batches(self, steps):
        for number, batch in enumerate(self.source.batches(steps)):
            if number == self.after:
                if self.error:
                    raise self.error
                time.sleep(1.5)
            yield batch


def reading(source, stall_s):
    return Prefetcher(
        source, Index(64, 8, 0), np.arange(8), lambda batch: batch, 0, 6, stall_s=stall_s
    )


def test_a_storage_that_no_longer_answers_stops_the_run_in_one_sentence():
    with reading(Stalled(2), stall_s=0.3) as batches:
        batches.next(), batches.next()
        with pytest.raises(UserError, match=r"No images have come for 0.3 seconds .*stall_s"):
            batches.next()


def test_without_a_limit_it_is_waited_for():
    with reading(Stalled(2), stall_s=0) as batches:
        ids = [batches.next()["id"] for _ in range(4)]
    assert len(ids) == 4 and batches.wait_seconds > 1


def test_what_the_reading_raises_is_raised_where_batches_are_taken():
    with reading(Stalled(1, OSError(5, "Input/output error")), stall_s=10) as batches:
        batches.next()
        with pytest.raises(OSError, match="Input/output error"):
            batches.next()
