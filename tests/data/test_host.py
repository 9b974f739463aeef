"""What all sources on disk share; what they read is tested with each of them."""

import ctypes
import platform
import resource

import numpy as np
import pytest

from ssl_jax.data import host

keep_freed_memory = host.keep_freed_memory.__wrapped__
GLIBC = platform.libc_ver()[0] == "glibc"


@pytest.fixture
def undecided(monkeypatch):
    for name in list(host.os.environ):
        if name.startswith(("MALLOC_", "GLIBC_TUNABLES")):
            monkeypatch.delenv(name)


@pytest.mark.skipif(not GLIBC, reason="it is glibc's allocator that is told")
def test_memory_that_is_freed_is_used_again(undecided):
    assert keep_freed_memory()

    def faults():
        """Pages that the system has to hand out for some megabytes, ten times over."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            [np.ones(5 * 2**20, np.uint8) for _ in range(6)]
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    pages = 10 * 6 * 5 * 2**20 // resource.getpagesize()
    assert faults() < pages / 10


def test_the_users_decision_stands(undecided, monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert not keep_freed_memory()


def test_other_c_libraries_are_left_alone(undecided, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not keep_freed_memory()
