"""How the command leaves: with its exit code, and without what libraries print while the interpreter is taken down."""

from __future__ import annotations

import subprocess
import sys

import pytest

# the last thing that the interpreter calls aborts, as Triton's library prints its page there
ABORTING = """
import ctypes, sys, types
library = ctypes.CDLL(None)
ctypes.pythonapi.Py_AtExit(ctypes.cast(library.abort, ctypes.c_void_p))
if {triton}:
    sys.modules["triton"] = types.ModuleType("triton")
import atexit
atexit.register(print, "bye")
from mmwudao.__main__ import leave
print("said")
leave({code})
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the C library has another name")
@pytest.mark.parametrize("code", [0, 2])
def test_nothing_is_printed_after_the_orderly_end(code):
    command = [sys.executable, "-c", ABORTING.format(triton=True, code=code)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "said\nbye\n", "")
    plain = subprocess.run([sys.executable, "-c", ABORTING.format(triton=False, code=code)], capture_output=True)
    assert plain.returncode < 0, "the interpreter no longer calls what is registered: the test shows nothing"


# each on the platform's null device from then on, so that no file of a command gets its number
CLOSED = """
import os, sys
for number in {numbers}:
    os.close(number)
os.execv(sys.executable, [sys.executable, "-m", "mmwudao", *sys.argv[1:]])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no exec that keeps what is closed")
@pytest.mark.parametrize(
    ("numbers", "argument", "code"), [((1,), "--version", 0), ((0, 1, 2), "--version", 0), ((1, 2), "no-command", 2)]
)
def test_closed_streams_are_no_error(numbers, argument, code):
    command = [sys.executable, "-c", CLOSED.format(numbers=numbers), argument]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")
