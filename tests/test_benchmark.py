"""The benchmark still runs; its figures are looked at by people."""

import re
import subprocess
import sys

import pytest

from tests.helpers import ROOT

TINY = ("--network", "a3c", "--batch-size", "16", "--simulator-proc", "1")


@pytest.mark.parametrize(
    "what, rows",
    [
        ("pipeline", ("states/s", "share of players alone", "core-us transport and rollouts")),
        ("train --simulate-gpu 1 2", ("states/s", "lag mean", "core-us train")),
        ("ranks", ("states/s of 1", "states/s of 2", "ratio")),
    ],
)
def test_benchmark_runs(what, rows):
    program = [
        sys.executable,
        str(ROOT / "tests" / "benchmark.py"),
        *what.split(),
        "--seconds",
        "0.5",
    ]
    program += ["--repeat", "1", *TINY, "--players-per-simulator", "2"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for row in rows:
        (figure, *_) = re.findall(rf"^{re.escape(row)} +([\d,.]+)$", done.stdout, re.MULTILINE)
        assert float(figure.replace(",", "")) > 0
