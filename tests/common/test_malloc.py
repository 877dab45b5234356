"""Test that a process keeps freed memory for its next allocations."""

import subprocess
import sys
from pathlib import Path

import pytest

PAGES_OF_A_BLOCK = 96 * 1024 * 1024 // 4096
# If all pages are huge, a block has too few pages to count.
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

FAULTS = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
from semiscale.common import malloc

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def block():
    return len(b"x" * (96 * 1024 * 1024))

if sys.argv[1] == "keep":
    malloc.retain_freed_memory()
with ThreadPoolExecutor(1) as pool:
    run = block if sys.argv[2] == "here" else lambda: pool.submit(block).result()
    run()
    before = faults()
    for _ in range(5):
        run()
    print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of the GNU C library is needed")
@pytest.mark.skipif(HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text(), reason="all pages are huge here")
@pytest.mark.parametrize("where", ["here", "in another thread"])
def test_freed_memory_is_not_requested_from_the_system_again(where: str) -> None:
    def faults(mode: str) -> int:
        process = subprocess.run(
            [sys.executable, "-c", FAULTS, mode, where], capture_output=True, text=True, check=True
        )
        return int(process.stdout)

    assert faults("give back") > 2 * PAGES_OF_A_BLOCK
    assert faults("keep") < PAGES_OF_A_BLOCK / 10
