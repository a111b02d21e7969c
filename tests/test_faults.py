"""Kills, crashes, full disks, hostile input: a run goes on correctly or ends with one sentence."""

import contextlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
import zmq

import simulator
from model import Network, WeightFileError, load, weights_file
from predictor import Master
from simulator import FRAME_BYTES
from tests.helpers import (
    CATCH,
    FINE,
    GAME,
    ROOT,
    TINY,
    check_transitions,
    command,
    drain,
    gone,
    make_feed,
    pid_of,
    processes,
    run,
    simulators,
    training,
    watch,
    worth_a_quarter,
)


def test_sigkill_leaves_no_process_and_the_next_start_no_directory(tmp_path):
    with training(tmp_path, "--seed", 1) as (process, _):
        pids = processes(tmp_path / "t")
        assert len(pids) == len(simulators(tmp_path / "t")) == 2
        process.kill()
        assert gone(pids)
    (left,) = (tmp_path / "t").glob("batch-a3c-*")
    os.utime(left, (0, 0))
    args = (*CATCH, *TINY, "--max-epoch", 1, "--output", tmp_path / "2")
    done = run(*args, TMPDIR=tmp_path / "t")
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "t").glob("batch-a3c-*"))


def test_a_closed_terminal_ends_the_run_like_ctrl_c(tmp_path):
    with training(tmp_path) as (process, _):
        pids = processes(tmp_path / "t")
        process.send_signal(signal.SIGHUP)
        assert process.wait(30) == 129
        assert gone(pids, 0) and not list((tmp_path / "t").glob("batch-a3c-*"))
    assert load(str(tmp_path / "run" / "checkpoint.pt"))[1]["at"]["global_step"] > 0


def test_under_nohup_a_closed_terminal_ends_nothing(tmp_path):
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with training(tmp_path) as (process, until):
            process.send_signal(signal.SIGHUP)
            until(r"epoch 1 \d+/6000")
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 143
    finally:
        signal.signal(signal.SIGHUP, handler)


def test_ctrl_c_where_nobody_reads_what_is_printed(tmp_path):
    """As in `train_atari.py ... | tee log`, where it ends tee first."""
    with training(tmp_path) as (process, _):
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read().splitlines()[1:] == []
    assert load(str(tmp_path / "run" / "checkpoint.pt"))[1]["at"]["global_step"] > 0


def test_it_runs_without_output_and_errors(tmp_path):
    path = tmp_path / "run"
    args = " ".join(command(*CATCH, *TINY, "--max-epoch", 1, "--output", path))
    assert subprocess.run(f"{args} >&- 2>&-", shell=True, cwd=ROOT).returncode == 0
    assert "epoch 1 is done" in (path / "log.log").read_text()


def run_with(place, fault, tmp_path):
    """Train a little with a function replaced, in this process; nothing may be left of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, fault)
        args = (*CATCH, *TINY, "--max-epoch", 1, "--output", tmp_path / "run")
        try:
            return run(*args, TMPDIR=tmp_path)
        finally:
            assert not processes(tmp_path) and not list(tmp_path.glob("batch-a3c-*"))


def test_an_evaluation_without_room_for_its_players_is_given_up(tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    done = run_with("predictor.VectorPlayers", full, tmp_path)
    assert done.returncode == 0 and "given up: [Errno 28]" in done.stdout


def test_an_evaluation_that_was_interrupted_is_played_again(tmp_path):
    path = tmp_path / "run"
    limits = ("--max-epoch", 1, "--eval-episode", 2)
    args = command(*CATCH, *FINE, "--steps-per-epoch", 300, *limits, "--output", path)
    process = subprocess.Popen(args, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert any("episodes in" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    finally:
        process.kill()
        process.communicate()
    assert not (path / "model-best.npz").exists()
    for words in ("evaluation: mean", "the run is done"):
        done = run(*GAME, "--load", path / "checkpoint.pt")
        assert done.returncode == 0 and words in done.stdout + done.stderr
        (epoch,) = json.loads((path / "stats.json").read_text())
        assert epoch["global_step"] == 300 and (path / "model-best.npz").exists()


def test_ctrl_c_twice_in_a_moment_is_one(tmp_path):
    """`timeout` signals a program, and then its group."""
    with training(tmp_path) as (process, _):
        pids = processes(tmp_path / "t")
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert gone(pids) and not list((tmp_path / "t").glob("batch-a3c-*"))
    assert load(str(tmp_path / "run" / "checkpoint.pt"))[1]["at"]["global_step"] > 0


@contextlib.contextmanager
def hanging(tmp_path, module, place, function):
    """A run in which `place` became `function`, which says that there is no way out, and hangs.

    It has to end with 130, and to leave nothing.
    """
    code = f"import ctypes, sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
    code += f"import {module}, train_atari\n"
    code += f"def hang(*_, **__):\n    print('no way out', flush=True)\n    {function}\n"
    code += f"{module}.{place} = hang\ntrain_atari.run_program()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *CATCH, *TINY, "--output", str(tmp_path / "run")],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert any("no way out" in line for line in process.stdout)
        yield process
        assert process.wait(30) == 130
        assert not processes(tmp_path) and not list(tmp_path.glob("batch-a3c-*"))
    finally:
        process.kill()
        process.communicate()


def test_a_second_ctrl_c_does_not_wait_for_the_iteration(tmp_path):
    with hanging(tmp_path, "model", "Learner.update", "time.sleep(100)") as process:
        process.send_signal(signal.SIGINT)
        time.sleep(2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130


@pytest.mark.parametrize(
    "module, place, signals",
    [("predictor", "Replica.predict", 1), ("model", "loss_terms", 2)],  # the second one in a pool
)
def test_what_hangs_in_native_code_does_not_keep_a_run_alive(tmp_path, module, place, signals):
    """A predictor that hangs does not even need a second Ctrl-C; an update may come to its end."""
    hang = "[ctypes.CDLL(None).sleep(1000) for _ in range(9)]"  # a signal may end one sleep
    with hanging(tmp_path, module, place, hang) as process:
        for _ in range(signals):
            time.sleep(0.6)  # two in one moment are one
            process.send_signal(signal.SIGINT)


@pytest.mark.parametrize(
    "place",
    [
        "predictor.sample_actions",  # in a predictor thread
        "predictor.Rollouts.finish_steps",
        "predictor.Master.parse",
        "model.Learner.update",
        "predictor.play_episodes",
    ],
)
def test_an_exception_ends_everything(tmp_path, place):
    """It is a defect, so that its traceback is wanted."""
    with pytest.raises(ZeroDivisionError):
        run_with(place, lambda *_, **__: 1 / 0, tmp_path)


def test_an_exception_ends_the_program(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import model, train_atari\n"
    code += "model.Learner.update = lambda *a, **k: 1 / 0\ntrain_atari.run_program()"
    program = [sys.executable, "-c", code, *CATCH, *TINY, "--output", str(tmp_path / "run")]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr.splitlines()[-1]
    assert not processes(tmp_path) and not list(tmp_path.glob("batch-a3c-*"))


@pytest.mark.parametrize("error", ["OutOfMemoryError", "AcceleratorError"])
@pytest.mark.parametrize("place", ["model.Learner.update", "predictor.Replica.predict"])
def test_what_a_gpu_fails_at_gets_a_sentence(tmp_path, place, error):
    """As far as that can be seen without one."""

    def fail(*_, **__):
        raise getattr(torch, error)("CUDA error: no more.\nand much more")

    done = run_with(place, fail, tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("CUDA error: no more.")
    assert "Traceback" not in done.stderr and "much" not in done.stderr


def test_a_killed_simulator_is_replaced(tmp_path):
    with training(tmp_path) as (process, until):
        # More often than one may fail.
        for signum in (signal.SIGKILL, signal.SIGTERM, signal.SIGTERM, signal.SIGTERM):
            old = simulators(tmp_path / "t")
            os.kill(old[0], signum)
            line = until(rf"simulator \d was killed by signal {signum:d}")
            assert "training continues" in line
            deadline = time.monotonic() + 5
            while len(set(simulators(tmp_path / "t")) - {old[0]}) < 2:
                assert time.monotonic() < deadline
            assert old[1] in simulators(tmp_path / "t")
            until(r"epoch 1 \d+/6000")  # and it goes on with training
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143


def test_a_simulator_that_cannot_start_ends_the_run(tmp_path):
    args = ("--env", "tests.games:NoStart-v0", "--network", "a3c", *FINE)
    done = run(*args, "--output", tmp_path / "run")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert re.search(r"simulator \d ended with code 2: tests.games:NoStart-v0 .*no ROM", line)


def test_players_that_wait_for_the_trainer_are_not_taken_for_ones_that_hang(monkeypatch):
    monkeypatch.setattr(simulator, "HANG_SECONDS", 1.0)
    feed = make_feed(worth_a_quarter())
    try:
        while feed.pool.connected < 4:
            drain(feed, 32)
        time.sleep(2.5)  # nobody takes a batch
        assert feed.replace_ended() == []
        drain(feed, 200)
    finally:
        feed.close()


def test_a_simulator_that_always_hangs_at_its_start_ends_the_run(monkeypatch):
    monkeypatch.setattr(simulator, "HANG_SECONDS", 0.1)  # this is not for its start
    monkeypatch.setattr(simulator, "START_SECONDS", 1.0)
    begin, events = time.monotonic(), []
    feed = make_feed(worth_a_quarter(), "tests.games:Stuck-v0")
    try:
        with pytest.raises(simulator.UserError, match=r"simulator \d was silent for \d seconds"):
            while time.monotonic() < begin + 30:
                events += feed.replace_ended()
                time.sleep(0.05)
    finally:
        feed.close()
    assert len(events) >= 2 and time.monotonic() > begin + 3


def test_churn():
    """Random simulators are killed, at times one every second; every transition stays whole.

    Throughput falls by no more than the killed share.
    """
    torch.manual_seed(0)
    rng = random.Random(0)
    feed = make_feed(worth_a_quarter())
    segments = watch(feed)
    kills, events = 0, []

    def train(seconds=math.inf, states=math.inf):
        """Train on so many states, or for so long; returns the number of states."""
        begin, count = time.monotonic(), 0
        while time.monotonic() < begin + seconds and count < states:
            count += feed.queue.batch_size * (feed.queue.get(timeout=0.05) is not None)
            events.extend(feed.replace_ended())
        return count

    def kill():
        """Kill one of them when all have played; returns the states trained on meanwhile."""
        nonlocal kills
        states = 0
        while feed.pool.connected < 4:
            states += train(states=1)
        os.kill(pid_of(feed.pool, rng.randrange(4)), signal.SIGKILL)
        kills += 1
        return states

    def measure(churns):
        """States per second."""
        while feed.pool.connected < 4:
            train(states=1)
        begin, states = time.monotonic(), 0
        while time.monotonic() < begin + 2:
            states += kill() if churns else 0
            states += train(seconds=1.0)
        return states / (time.monotonic() - begin)

    try:
        ratios = []
        for _ in range(5):
            left_alone, churned = measure(churns=False), measure(churns=True)
            ratios.append(churned / left_alone)
        for _ in range(15):
            kill()
            train(states=500)
        while len(events) < kills or feed.pool.connected < 4:
            train(states=1)
    finally:
        feed.close()
    checked, episodes_of = check_transitions(segments)
    assert kills >= 20 and len(events) == kills
    assert all("killed by signal 9" in event for event in events)
    # Every simulator, the replacing ones too, brought players with games of their own.
    assert len(episodes_of) > 12 and checked > 6000
    # Each second one of four is killed. Beside other tests, which do not use the cores evenly, more
    # may be missing.
    lost = 0.4 if "PYTEST_XDIST_WORKER" in os.environ else 1 / 4
    assert statistics.median(ratios) >= 1 - lost


def test_what_is_not_finite_ends_the_run_and_spares_the_checkpoint(tmp_path):
    path = tmp_path / "run"
    done = run(*CATCH, *TINY, "--max-epoch", 1, "--output", path)
    assert done.returncode == 0, done.stderr
    before = {p.name: p.read_bytes() for p in path.glob("[cm]*")}
    args = (*GAME, "--load", path / "checkpoint.pt", "--learning-rate", "1e30", "--max-epoch", 9)
    done = run(*args)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "not finite" in line or re.search(r"\w+ is (nan|-?inf) in iteration \d+", line)
    after = {p.name: p.read_bytes() for p in path.glob("[cm]*")}
    assert {k: v for k, v in after.items() if k != "config.json"} == {
        k: v for k, v in before.items() if k != "config.json"
    }


def test_resume_after_sigkill_goes_on(tmp_path):
    path = tmp_path / "run"
    done = run(*CATCH, *TINY, "--max-epoch", 2, "--output", path)
    assert done.returncode == 0, done.stderr
    args = command(*GAME, "--load", path / "checkpoint.pt", "--max-epoch", 1000)
    process = subprocess.Popen(args, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while "epoch 5 is done" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(random.Random(time.time()).random())  # also while it writes
    process.kill()
    process.communicate()
    saved = load(str(path / "checkpoint.pt"))[1]
    assert saved["at"]["global_step"] >= 50 and saved["learner"]["updates"] >= 50
    epoch = saved["at"]["epoch"] + 1
    done = run(*GAME, "--load", path / "checkpoint.pt", "--max-epoch", epoch)
    assert done.returncode == 0, done.stderr
    stats = json.loads((path / "stats.json").read_text())
    assert [e["epoch_num"] for e in stats] == list(range(1, epoch + 1))
    assert stats[-1]["cost"] < 10 * max(1, abs(stats[0]["cost"]))


def test_a_full_disk_stops_nothing_and_damages_nothing(tmp_path):
    path = tmp_path / "run"
    done = run(*CATCH, *TINY, "--max-epoch", 1, "--output", path)
    assert done.returncode == 0, done.stderr
    before = (path / "checkpoint.pt").read_bytes(), (path / "model-latest.npz").read_bytes()
    limit = ["bash", "-c", 'ulimit -f 1000; trap "" XFSZ; exec "$@"', "-"]
    args = command(*GAME, "--load", path / "checkpoint.pt", "--max-epoch", 3)
    done = subprocess.run(limit + args, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "epoch 3 is done" in done.stdout
    assert "warning: cannot write" in done.stdout and "training continues" in done.stdout
    (line,) = done.stderr.splitlines()
    assert re.search(r"cannot write .*run/\S+: File too large", line)
    after = (path / "checkpoint.pt").read_bytes(), (path / "model-latest.npz").read_bytes()
    assert before == after and not list(path.glob(".*"))


def test_a_directory_that_vanishes_stops_nothing(tmp_path):
    with training(tmp_path) as (process, until):
        (tmp_path / "run").rename(tmp_path / "gone")
        shutil.rmtree(tmp_path / "gone")
        until(r"epoch 1 \d+/6000")
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
        assert process.returncode == 130
        assert "warning: cannot write" in output and errors.count("\n") == 1
        assert "stopped by SIGINT" in errors
        assert "not written: stats.json, checkpoint.pt, model-latest.npz" in errors


def test_foreign_messages_change_nothing():
    feed = make_feed(worth_a_quarter())
    segments = watch(feed)
    context, sockets = zmq.Context(), []
    try:
        drain(feed, 100)
        for number in range(20):
            socket = context.socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(feed.pool.masters[number % 2].address)
            sockets.append(socket)
        rng = random.Random(0)
        for _ in range(500):  # a flood
            for socket in sockets:
                parts = [rng.randbytes(rng.randrange(2000)) for _ in range(rng.randrange(1, 4))]
                with contextlib.suppress(zmq.Again):
                    socket.send_multipart(parts, zmq.NOBLOCK)
            if feed.queue.get(timeout=0.0) is None:
                time.sleep(0.001)
        drain(feed, 1000)
        events = feed.replace_ended() + feed.replace_ended()
        assert sum(master.dropped for master in feed.pool.masters) > 100
        assert len(events) <= 1  # drain has asked before, and it is said once
    finally:
        feed.close()
        context.destroy(linger=0)
    checked, episodes_of = check_transitions(segments)
    assert checked >= 1000 and len(episodes_of) == 12


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, insert, repeat."""
    data = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        place = rng.choice([rng.randrange(len(data) + 1), rng.randrange(min(200, len(data) + 1))])
        kind = rng.randrange(4)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[place : place + rng.randrange(1, 100)]
        elif kind == 2:
            data[place:place] = rng.randbytes(rng.randrange(1, 20))
        elif kind == 3:
            data = data[:place] if rng.random() < 0.2 else data
    return bytes(data)


def test_fuzz_messages(tmp_path):
    context = zmq.Context()
    master = Master(context, f"ipc://{tmp_path}/0", simulators=1, players=2)
    master.assign(b"a", 0)
    rng, good = random.Random(1), 0
    header = msgpack.packb([[0.5, -1.0], [False, True], [[3.0, 10]]])
    for _ in range(10_000):
        parts = [b"a", mutate(header, rng), bytes(2 * FRAME_BYTES)]
        message = master.parse(parts)
        if message is not None:
            good += 1
            assert len(message.rewards) == len(message.is_over) == 2
            assert np.isfinite(message.rewards).all()
            assert len(message.finished) == sum(message.is_over)
    assert 0 < good < 9000  # a flipped reward is a reward
    context.destroy(linger=0)


def outcome(path) -> str:
    """What a loader makes of a file; anything but a network or a sentence fails the test."""
    try:
        network, _ = load(str(path))
    except WeightFileError as error:
        assert "\n" not in str(error)
        return "refused"
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    return "loaded"


def test_fuzz_files(tmp_path):
    torch.manual_seed(0)
    weights = weights_file(Network("a3c", 3))
    done = run(*CATCH, *TINY, "--max-epoch", 1, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    checkpoint = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    for name, data, count in (("x.npz", weights, 400), ("x.pt", checkpoint, 400)):
        rng, seen = random.Random(2), set()
        path = tmp_path / name
        for number in range(count):
            # In one half of them only the directory of the archive and what is near it.
            tail = len(data) - 3000 if number % 2 else 0
            path.write_bytes(data[:tail] + mutate(data[tail:], rng))
            seen.add(outcome(path))
        assert "refused" in seen


class Payload:
    """What must never run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_files_that_carry_code_or_lie_about_their_size(tmp_path):
    trap = tmp_path / "it ran"
    np.savez(tmp_path / "a.npz", **{"fc-pi/b": np.array([Payload(trap)], object)})
    torch.save({"format": "batch-a3c 1", "learner": Payload(trap)}, tmp_path / "a.pt")
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        huge, {"descr": "<f4", "fortran_order": False, "shape": (2**40,)}
    )
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("fc-pi/b.npy", huge.getvalue())
    with zipfile.ZipFile(tmp_path / "c.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        zeros = io.BytesIO()
        np.save(zeros, np.zeros(2**26, np.float32))
        archive.writestr("fc-pi/b.npy", zeros.getvalue())
    state = {"kind": "a3c", "num_actions": 2**40, "network": {}}
    torch.save({"format": "batch-a3c 1", "learner": state}, tmp_path / "b.pt")
    for name in ("a.npz", "a.pt", "b.npz", "c.npz", "b.pt"):
        assert outcome(tmp_path / name) == "refused", name
    assert not trap.exists()


def test_limits_are_raised_or_named(tmp_path):
    limit = ["bash", "-c", 'ulimit -n 400; exec "$@"', "-"]
    args = command(*CATCH, "--simulator-proc", 240, "--output", tmp_path / "run")
    done = subprocess.run(limit + args, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "open files" in line and "400" in line


def test_an_interrupt_waits_until_torch_is_imported():
    """In its C++ code an exception would abort the program."""
    code = "import signal, sys, train_atari\n"
    code += "class Interrupts:\n"
    code += "    def find_spec(name, *_):\n"
    code += "        if name == 'torch.nn': signal.raise_signal(signal.SIGINT)\n"
    code += "sys.meta_path.insert(0, Interrupts)\n"
    code += "try: train_atari.import_torch()\n"
    code += "except KeyboardInterrupt: print(hasattr(sys.modules.get('torch'), 'nn'))\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
