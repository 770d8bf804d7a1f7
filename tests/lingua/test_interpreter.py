"""The Triton kernels in Triton's interpreter, which must be chosen before Triton is imported: so in another process.

To run one of its files alone: `TRITON_INTERPRET=1 pytest tests/lingua/interpreted_lookup_kernels.py`
"""

import os
import subprocess
import sys
from pathlib import Path


def test_kernels_in_the_interpreter():
    files = sorted(map(str, Path(__file__).parent.glob("interpreted_*.py")))
    assert len(files) >= 2
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
