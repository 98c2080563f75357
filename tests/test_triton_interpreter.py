"""The Triton kernels' tests once more in Triton's own interpreter, which needs a process for itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = ("test_triton_ops.py", "test_triton_linear.py", "test_triton_attention.py", "test_triton_gradients.py")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is that process")
@pytest.mark.parametrize("file", FILES if os.environ.get("TILEWRIGHT_TRITON_SWEEP") == "1" else FILES[:2])
def test_in_the_interpreter(file: str) -> None:
    pytest.importorskip("triton", reason="NO TRITON: Triton kernels are not compiled and not run")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-W", "ignore", "-p", "no:cacheprovider", file]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
