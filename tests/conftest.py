"""Settings of all tests."""

import os
import signal

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
