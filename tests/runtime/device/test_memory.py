"""Peak memory, of this process and of one that grows."""

import subprocess
import sys

import pytest

from elastic_runtime.device import peak_bytes, resident_bytes
from elastic_runtime.device.memory import give_back


def test_peak_memory_is_told_where_the_system_tells_it() -> None:
    peak = peak_bytes()
    if sys.platform in ("linux", "darwin", "win32"):
        assert peak is not None
        assert 10_000_000 < peak < 1 << 40
    now = resident_bytes()
    if sys.platform in ("linux", "win32"):
        assert now is not None
        assert peak is not None
        assert 10_000_000 < now <= peak


def test_peak_memory_grows_with_what_a_process_holds() -> None:
    """In a process of its own: this one may have held more before."""
    program = (
        "from elastic_runtime.device import peak_bytes; before = peak_bytes(); held = bytearray(2**28); "
        "held[::2**12] = b'x' * len(held[::2**12]); print(before, peak_bytes())"
    )
    peaks = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    if peaks == ["None", "None"]:
        pytest.skip("this system does not tell")
    before, after = map(int, peaks)
    assert after - before > 2**27


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_memory_that_was_freed_is_given_back() -> None:
    """Every second piece of a heap that grew: its end stays in use, so that the C library gives nothing back by itself."""
    program = (
        "import re; from pathlib import Path; from elastic_runtime.device.memory import give_back\n"
        "def held(): return int(re.search(r'VmRSS:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "pieces = [bytearray(100_000) for _ in range(2000)]; del pieces[:-1:2], pieces[:-1]\n"
        "before = held(); give_back(); print(before - held())"
    )
    given = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert int(given) > 100_000, "kB of 200 MB"
    give_back()  # and here it does no harm
