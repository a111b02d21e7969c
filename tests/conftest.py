"""Settings of all tests."""

import ctypes
import gc
import os
import signal
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the program does, before torch is loaded

import pytest
import torch

# A shell that starts the tests in the background, or nohup, has made them ignore these, and all
# that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

os.environ.pop("PYTHONUNBUFFERED", None)  # few users have it

# Programs that tests start do not see the GPUs of a machine, so that they are tested with the same
# options everywhere; this process does, and what test_gpu.py starts. Another process of pytest's,
# which tests in parallel, finds in GPUS_OF_TESTS what there was before.
GPUS = os.environ.setdefault("GPUS_OF_TESTS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
if GPUS == "all":
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
else:
    os.environ["CUDA_VISIBLE_DEVICES"] = GPUS
if torch.cuda.is_available():
    torch.cuda.init()
os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def memory_returned():
    """What a run in this process has left is freed, and goes back to the system.

    Its objects refer to each other, so that they wait for the garbage collector, which does not
    know how large they are.
    """
    start = time.monotonic()
    yield
    if time.monotonic() - start > 1:  # shorter tests run nothing, and collecting takes time too
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
