"""Memory settings of host sources; their reading is tested per source."""

import ctypes
import platform
import resource

import numpy as np
import pytest
from tiny import tiny_config

from ssl_jax.data import host
from ssl_jax.errors import UserError

keep_freed_memory = host.keep_freed_memory.__wrapped__
GLIBC = platform.libc_ver()[0] == "glibc"


@pytest.fixture
def undecided(monkeypatch):
    for name in list(host.os.environ):
        if name.startswith(("MALLOC_", "GLIBC_TUNABLES")):
            monkeypatch.delenv(name)


def test_more_images_than_32_bit_ids_are_refused():
    pytest.importorskip("tensorflow")
    with pytest.raises(UserError, match="my images has 2147483648 images: use fewer"):
        host.HostSource(tiny_config(), "my images", 2**31, "")


@pytest.mark.skipif(not GLIBC, reason="the options are glibc's")
def test_freed_memory_is_reused_without_page_faults(undecided):
    assert keep_freed_memory()

    def faults():
        """Page faults while allocating 30 MiB ten times."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            [np.ones(5 * 2**20, np.uint8) for _ in range(6)]
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    pages = 10 * 6 * 5 * 2**20 // resource.getpagesize()
    assert faults() < pages / 10


def test_users_malloc_variables_are_respected(undecided, monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert not keep_freed_memory()


def test_other_c_libraries_are_left_unchanged(undecided, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not keep_freed_memory()
