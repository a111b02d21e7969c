"""The program itself, which tells its progress twenty times as often: tests wait for its lines."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)

import train_atari  # noqa: E402

train_atari.LOG_SECONDS = 0.5
train_atari.__file__ = __file__  # its ranks do so too

if __name__ == "__main__":
    train_atari.run_program()
