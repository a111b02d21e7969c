"""What several tests need: the program as a process or as a call, runs, feeds, and their checks."""

import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model import Learner, Network
from predictor import Feed
from tests.games import Count
from train_atari import main

ROOT = Path(__file__).parent.parent


GAME = ("--env", "tests.games:Catch-v0")


CATCH = (*GAME, "--network", "a3c")


TINY = ("--batch-size", "16", "--steps-per-epoch", "10", "--eval-episode", "1")
TINY += ("--simulator-proc", "2", "--players-per-simulator", "4")


def command(*args):
    return [sys.executable, str(ROOT / "train_atari.py"), *map(str, args)]


def talking(*args):
    """A command that tells its progress often."""
    return [sys.executable, str(ROOT / "tests" / "often.py"), *map(str, args)]


def run_apart(*args, cwd=ROOT, **kwargs):
    """What the program makes of these arguments, as a process: returncode, stdout, stderr."""
    how = {"cwd": cwd, "capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    done = subprocess.run(command(*args), **how, **kwargs)
    assert "Traceback" not in done.stdout + done.stderr
    return done


def run(*args, cwd=ROOT, **environment):
    """As run_apart, but in this process: to start Python with torch takes two seconds.

    environment: variables that are different; None: not there.
    """
    output, errors = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        for name, value in environment.items():
            if value is None:
                patch.delenv(name, raising=False)
            else:
                patch.setenv(name, str(value))
        if "TMPDIR" in environment:
            patch.setattr(tempfile, "tempdir", str(environment["TMPDIR"]))
        code = main(args)
        assert os.path.samefile(".", cwd)  # whatever a game has done
    return subprocess.CompletedProcess(args, code, output.getvalue(), errors.getvalue())


def command_line(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def processes(directory):
    """Processes whose command line names something in `directory`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(directory).encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def simulators(directory):
    """Those of them that are simulators."""
    return [pid for pid in processes(directory) if b"--identity=" in command_line(pid)]


FINE = ("--batch-size", "16", "--simulator-proc", "2", "--players-per-simulator", "2")


@contextlib.contextmanager
def training(tmp_path, *args, **kwargs):
    """A run on Catch that has done some iterations: (process, function that reads lines until)."""
    sockets = tmp_path / "t"
    sockets.mkdir(exist_ok=True)
    process = subprocess.Popen(
        talking(*CATCH, *FINE, "--output", tmp_path / "run", *args),
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(sockets)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )

    def until(pattern):
        while not re.search(pattern, line := process.stdout.readline()):
            assert line, process.stderr.read()
        return line

    try:
        until(r"epoch 1 \d+/6000")
        yield process, until
    finally:
        process.kill()
        process.communicate()


def pid_of(pool, index):
    return pool.slots[index].process.pid


def gone(pids, seconds=3.0):
    deadline = time.monotonic() + seconds
    while any(map(running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(running, pids))


def pids_of(pool):
    return [slot.process.pid for slot in pool.slots if slot.process]


def running(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def options(**changes):
    values = {"batch_size": 32, "queue_size": 32, "local_time_max": 5, "gamma": 0.5}
    values |= {"simulator_proc": 4, "players_per_simulator": 3, "predict_batch_size": 8}
    values |= {"predictor_thread_per_gpu": 2, "bfloat16": 0, "listen": None, "key": None}
    values |= {"lambda": 1.0, "life_loss": 0}
    return SimpleNamespace(**(values | changes))


def make_feed(network, env_id="tests.games:Count-v0", **changes):
    learner = Learner(network, torch.device("cpu"), adam_epsilon=1e-3, threads=1)
    seeds = np.random.SeedSequence(1)
    return Feed(env_id, options(**changes), learner, seeds)


def watch(feed):
    """Record the segments that go into the queue; of their frames what Count writes there."""
    segments, put = [], feed.queue.put

    def record(segment):
        segments.append(segment._replace(frames=segment.frames[:, :3, 0].copy()))
        return put(segment)

    feed.queue.put = record
    return segments


def drain(feed, states):
    deadline, got = time.monotonic() + 60, 0
    while got < states and time.monotonic() < deadline:
        feed.replace_ended()
        got += feed.queue.batch_size if feed.queue.get(timeout=0.2) is not None else 0
    assert got >= states


def worth_a_quarter():
    """A network for which every state is worth 1/4, so that every return is known."""
    network = Network("a3c", 4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.fc_v.bias.fill_(0.25)
    return network


def stamp(rows):
    """(game, episode), (step, last action, steps of the episode) of a frame of Count."""
    number = int.from_bytes(rows[2]), int.from_bytes(rows[1])
    return number, tuple(map(int, rows[0]))


def check_transitions(segments):
    """Every transition on its own, and that none is lost or comes twice.

    Of each game the last episode may be there in part: it was cut by the end, or by a kill. Returns
    how many transitions there were, and the numbers of the episodes of each game.
    """
    steps_of: dict[tuple, list[int]] = {}  # by game and episode
    lengths = {}
    for frames, *columns in segments:
        following = later = None
        steps = list(zip(*columns, strict=True))
        for i, (action, prob, future_reward, _) in reversed(list(enumerate(steps))):
            stack = frames[i : i + 4]
            number, (step, last, length) = stamp(stack[3])
            # The stack: frames of this very episode, zeros before its start.
            for back in (1, 2, 3):
                if step >= back:
                    past_number, (past_step, *_) = stamp(stack[3 - back])
                    assert (past_number, past_step) == (number, step - back)
                else:
                    assert not stack[3 - back].any()
            reward = Count.reward(step, int(action))
            if following is None:  # the newest: after it the episode is over, or worth 1/4
                bootstrap = 0.0 if step == length - 1 else 0.25
                expected = reward + 0.5 * bootstrap
            else:
                # The next frame carries the action that led to it, and it is the action trained on.
                assert following == (number, step + 1, int(action))
                expected = reward + 0.5 * later
            assert future_reward == pytest.approx(expected, abs=1e-6)
            assert prob == pytest.approx(0.25)
            following, later = (number, step, last), future_reward
            steps_of.setdefault(number, []).append(step)
            lengths[number] = length
    episodes_of: dict[int, set[int]] = {}
    for game, episode in steps_of:
        episodes_of.setdefault(game, set()).add(episode)
    for game, episodes in episodes_of.items():
        assert sorted(episodes) == list(range(1, len(episodes) + 1))
        for episode in episodes:
            steps = sorted(steps_of[game, episode])
            assert steps == list(range(len(steps)))
            assert len(steps) == lengths[game, episode] or episode == len(episodes)
    return sum(map(len, steps_of.values())), episodes_of
