"""The rollouts against the original's, messages, and simulator processes."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import simulator
from common import UserError, signals_deferred
from predictor import LocalPool, VectorPlayers
from simulator import SimulatorPool
from tests.helpers import pids_of, running


def test_simulators_never_import_torch():
    code = "import simulator, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_pool_is_private_and_leaves_nothing():
    pool = LocalPool("tests.games:Catch-v0", 3, players=2, groups=2, seed=0)
    directory = Path(pool.directory.path)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    try:
        deadline = time.monotonic() + 20
        messages = []
        while len(messages) < 3 and time.monotonic() < deadline:
            for master in pool.masters:
                messages += master.receive(10, timeout_ms=50)
        assert sorted(m.identity for m in messages) == [
            b"simulator-%d.%d" % (i, i) for i in range(3)
        ]
        assert {len(m.frames) for m in messages} == {2}
        # Only new frames cross the process boundary.
        assert all(m.frames.nbytes == len(m.rewards) * 84 * 84 * 3 for m in messages)
        # Each is where its simulator leaves it: no two are the same memory.
        assert len({m.frames.__array_interface__["data"][0] for m in messages}) == 3
        assert pool.connected == 3
        assert pool.replace_ended() == []
        pids = pids_of(pool)
        assert len(pids) == 3
        names = [Path(f"/proc/{pid}/maps").read_text() for pid in pids]
        assert not any("torch" in maps for maps in names)
    finally:
        pool.close()
    assert not directory.exists()
    assert not any(running(pid) for pid in pids)


def test_a_simulator_tells_of_lost_lives():
    pool, ends = LocalPool("tests.games:Lives-v0", 1, players=2, groups=1, seed=0), []
    (master,) = pool.masters
    try:
        deadline = time.monotonic() + 20
        while len(ends) < 26 and time.monotonic() < deadline:
            for message in master.receive(10, timeout_ms=50):
                ends.append((message.life_lost, message.is_over))
                master.reply(message, [0, 0])
    finally:
        pool.close()
    lost = [number for number, (life_lost, _) in enumerate(ends) if life_lost == [True, True]]
    over = [number for number, (_, is_over) in enumerate(ends) if is_over == [True, True]]
    assert lost[:4] == [4, 8, 16, 20] and over[:2] == [12, 24]
    assert sum(any(life_lost) for life_lost, _ in ends) == len(lost)


def test_what_a_game_prints_disturbs_nobody():
    pool = LocalPool("tests.games:Chatty-v0", 2, players=1, groups=1, seed=0)
    try:
        deadline = time.monotonic() + 20
        while pool.connected < 2:
            assert time.monotonic() < deadline
            pool.masters[0].receive(10, timeout_ms=50)
            assert pool.replace_ended() == []
        assert "hello there" in Path(pool.directory.path, "0.log").read_text()
    finally:
        pool.close()


def test_a_signal_in_a_clean_up_waits_for_its_end():
    steps = []
    with pytest.raises(KeyboardInterrupt), signals_deferred(), signals_deferred():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        steps.append("cleaned up")
    assert steps == ["cleaned up"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_simulators_end_when_their_parent_is_killed():
    code = "import predictor, time; f = predictor.LocalPool('tests.games:Catch-v0', 2, 1, 1, 0)\n"
    code += "while f.connected < 2: f.masters[0].receive(1, 100)\n"
    code += "print(f.directory.path, *[s.process.pid for s in f.slots], flush=True); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    directory, *pids = parent.stdout.readline().split()
    assert len(pids) == 2 and all(os.path.exists(f"/proc/{pid}") for pid in pids)
    os.kill(int(pids[1]), signal.SIGSTOP)  # also one that could not notice
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 3
    while any(running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(running(pid) for pid in pids)
    os.utime(directory, (0, 0))  # not one that starts just now
    LocalPool("tests.games:Catch-v0", 1, 1, 1, 0).close()
    assert not os.path.exists(directory)


def test_a_simulator_that_breaks_says_why():
    players = VectorPlayers("tests.games:Crash-v0", 1, seed=0, check=lambda: None)
    try:
        with pytest.raises(UserError, match=r"simulator 0 ended with code 1.*the game broke"):
            for actions in (None, *[np.array([1])] * 100):
                players.step(actions)
    finally:
        players.close()


def make_pool(life):
    """A pool of one simulator that has played for so long; None: it has sent nothing."""
    pool = SimulatorPool.__new__(SimulatorPool)
    pool.slots = [simulator.Slot()]
    pool.first_message_at = lambda index: None if life is None else time.monotonic() - life
    return pool


def ends_after(pool, code, most=100):
    """After how many ends with this code the run ends; None if it does not."""
    for number in range(1, most):
        try:
            pool.count_failure(0, code, "it ended")
        except simulator.SimulatorError:
            return number
    return None


@pytest.mark.parametrize(
    "life, code, number",
    [
        (None, 1, 3),  # it failed at its start
        (1.0, 1, 3),
        (100.0, 1, None),  # not again and again
        (100.0, 2, 1),  # another start cannot help
        (61.0, -signal.SIGALRM, 3),  # it hung in one of its first steps, which took 60 seconds
        (None, -signal.SIGALRM, 3),
        (200.0, -signal.SIGALRM, None),
        (None, -signal.SIGKILL, 20),  # too little memory, say
        (1.0, -signal.SIGKILL, 20),
        (10.0, -signal.SIGKILL, None),
        (10.0, -signal.SIGTERM, None),
    ],
)
def test_what_ends_a_run_and_what_does_not(life, code, number):
    assert ends_after(make_pool(life), code) == number
