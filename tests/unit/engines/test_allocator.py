import platform
import subprocess
import sys

import pytest

from sparsetrain.engines import allocator

# malloc, touch and free 32 MiB again and again; print how many pages the last rounds had to map anew.
PROGRAM = """
import ctypes, resource, runpy, sys
module = runpy.run_path(sys.argv[1])
taken = module["keep_freed_memory"]() if sys.argv[2] == "keep" else True
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
size = 32 * 2**20
def round():
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
round()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    round()
print(taken, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages_mapped_again(mode: str) -> int:
    command = [sys.executable, "-c", PROGRAM, allocator.__file__, mode]
    taken, pages = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert taken == "True"
    return int(pages)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_blocks_are_used_again_instead_of_mapped_again():
    assert pages_mapped_again("keep") < 100
    assert pages_mapped_again("default") > 1000  # else this test shows nothing


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert allocator.keep_freed_memory() is False
