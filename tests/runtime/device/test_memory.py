"""Peak memory, of this process and of one that grows."""

import subprocess
import sys

import pytest

from elastic_runtime.device import peak_bytes


def test_peak_memory_is_told_where_the_system_tells_it() -> None:
    told = peak_bytes()
    if sys.platform in ("linux", "darwin"):
        assert told is not None
        assert 10_000_000 < told < 1 << 40
    elif sys.platform == "win32":
        assert told is None


def test_peak_memory_grows_with_what_a_process_holds() -> None:
    """In a process of its own: this one may have held more before."""
    program = (
        "from elastic_runtime.device import peak_bytes; before = peak_bytes(); held = bytearray(2**28); "
        "held[::2**12] = b'x' * len(held[::2**12]); print(before, peak_bytes())"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    if told == ["None", "None"]:
        pytest.skip("this system does not tell")
    before, after = map(int, told)
    assert after - before > 2**27
