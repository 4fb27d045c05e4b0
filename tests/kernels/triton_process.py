"""Run a file of cases in a process of its own: Triton decides when it is imported whether it interprets."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path


def run_cases(path: Path, folder: Path, *, interpret: bool, only: str = "", first: str = "") -> dict[str, str]:
    """Each case of the pytest file `path` and what it complains of (nothing if it passed).

    `folder`: scratch. `only`: pytest's expression for a selection. `first`: Python to run before, to break something.
    """
    report = folder / "report.xml"
    code = f"import pytest, sys\n{first}\nsys.exit(pytest.main(sys.argv[1:]))"
    options = ["-q", "-p", "no:cacheprovider", "-k", only, f"--junitxml={report}"]
    environment = os.environ | {"TRITON_INTERPRET": "1" if interpret else "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(path), *options],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert report.exists(), done.stdout + done.stderr
    cases = ET.parse(report).getroot().iter("testcase")
    return {case.attrib["name"]: "".join(part.attrib["message"] for part in case) for case in cases}
