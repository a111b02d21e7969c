"""The books against the original's, messages, and simulator processes."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import msgpack
import numpy as np
import pytest
import zmq

import simulator
from common import UserError
from simulator import FRAME_BYTES, Books, Fleet, Master, Message, VectorPlayers, undisturbed

NSTEP = json.loads((Path(__file__).parent / "golden" / "nstep.json").read_text())


def message(frame, reward=0.0, is_over=False):
    frames = np.full((1, 84, 84, 3), frame, np.uint8)
    return Message(b"", False, 0, frames, [reward], [is_over], [])


def test_books_replay_the_originals_master():
    """Every event of a scripted run: what it emits, in which order, with which return."""
    books = [Books(1, NSTEP["local_time_max"], NSTEP["gamma"]) for _ in range(2)]
    emitted = 0
    for number, event in enumerate(NSTEP["events"]):
        player, state = int(event["client"][-1]), str(event["state"])
        arrived = message(event["state"], event["reward"], event["isOver"])
        done = []
        for frames, *columns in books[player].settle(arrived):
            # The versions given below: number of the event in which the state arrived.
            ages = [NSTEP["events"][version]["state"] for version in columns[-1]]
            states = [int(frame[5, 5, 1]) for frame in frames[:2:-1]]
            assert ages == states and len(frames) == len(states) + 3
            done += zip(states, *columns[:3], strict=True)
        expected = [(e["state"], e["action"], e["prob"], e["R"]) for e in event["emitted"]]
        assert len(done) == len(expected)
        if expected:
            np.testing.assert_allclose(done, expected, rtol=1e-6, atol=1e-9)
        emitted += len(expected)
        books[player].observe(arrived)
        action, policy = NSTEP["action"][state], NSTEP["policy"][state]
        books[player].decide([action], [policy[action]], [NSTEP["value"][state]], version=number)
        assert books[player].counts == [event["memory_len_after"]]
    assert emitted == len(NSTEP["emitted_all"]) > 30


def test_books_stack_frames_of_one_episode_only():
    books = Books(1, 5, 0.99)

    def observe(frame, is_over=False):
        arrived = message(frame, is_over=is_over)
        list(books.settle(arrived))
        state = books.observe(arrived)[0, :, 40, 40, 2].tolist()
        books.decide([0], [1.0], [0.0], 0)
        return state

    assert observe(1, is_over=True) == [0, 0, 0, 1]  # is_over of a first message is ignored
    assert [observe(frame) for frame in (2, 3)] == [[0, 0, 1, 2], [0, 1, 2, 3]]
    assert [observe(frame) for frame in (4, 5)] == [[1, 2, 3, 4], [2, 3, 4, 5]]
    assert observe(6, is_over=True) == [0, 0, 0, 6]
    assert observe(7) == [0, 0, 6, 7]
    for frame in range(8, 100):  # around the memory of frames several times
        assert observe(frame)[-3:] == [frame - 2, frame - 1, frame]


@pytest.fixture
def master(tmp_path):
    context = zmq.Context()
    master = Master(context, f"ipc://{tmp_path}/0", simulators=2, players=2)
    master.admit(b"simulator-0", 0)
    master.admit(b"simulator-3", 1)
    yield master
    master.socket.close()
    context.term()


def header(rewards=(0.0, 1.0), is_over=(False, True), finished=((3.0, 10),)):
    return msgpack.packb([rewards, is_over, finished])


def test_a_good_message(master):
    frames = np.random.default_rng(0).integers(256, size=(2, 84, 84, 3), dtype=np.uint8)
    parsed = master.parse([b"simulator-0", header(), frames.tobytes()])
    assert parsed.place == 0 and parsed.finished == [(3.0, 10)]
    assert parsed.rewards == [0, 1] and parsed.is_over == [False, True]
    np.testing.assert_array_equal(parsed.frames, frames)
    other = master.parse([b"simulator-3", header(), frames.tobytes()])
    assert other.place == 1


PIXELS = bytes(2 * FRAME_BYTES)


def test_frames_in_shared_memory(tmp_path):
    """Each place has its own; a message that brings pixels along is none of this master's."""
    context, shared = zmq.Context(), np.zeros((2, 2, 84, 84, 3), np.uint8)
    master = Master(context, f"ipc://{tmp_path}/1", 2, 2, frames=shared)
    master.admit(b"simulator-1", 1)
    shared[1] = [[[[7]]], [[[9]]]]
    assert master.parse([b"simulator-1", header(), PIXELS]) is None
    parsed = master.parse([b"simulator-1", header()])
    assert parsed.frames[:, 83, 83, 2].tolist() == [7, 9]
    master.socket.close()
    context.term()


def test_one_message_at_a_time(master):
    parts = [b"simulator-0", header(), PIXELS]
    assert master.parse(parts) is not None
    assert master.parse(parts) is None  # it was not answered
    other = [b"simulator-3", header(), PIXELS]
    message = master.parse(other)
    master.reply(message, [0, 0])
    assert master.parse(other) is not None


def test_what_a_simulator_sent_that_was_replaced_since_is_dropped(master):
    master.arrived.append(master.parse([b"simulator-0", header(), PIXELS]))
    master.admit(b"simulator-9", 0)
    master.arrived.append(master.parse([b"simulator-9", header(), PIXELS]))
    assert [m.identity for m in master.receive(10, 0)] == [b"simulator-9"]
    assert master.parse([b"simulator-0", header(), PIXELS]) is None


def test_who_comes_back_to_a_run_that_listens_is_new(tmp_path, monkeypatch):
    monkeypatch.setattr("simulator.HANG_SECONDS", 3.0)
    context = zmq.Context()
    master = Master(context, f"ipc://{tmp_path}/0", 1, 2, [*zmq.curve_keypair()])
    seen = []
    for identity in (b"a", b"b", b"a"):
        message = master.parse([identity, header(), PIXELS])
        seen.append(message.is_first)
        master.reply(message, [0, 0])
        assert master.parse([b"c", header(), PIXELS]) is None  # no place
        assert master.parse([b"", header(), PIXELS]) is None  # none that plays its game
        master.peers[identity].since -= 4.0  # and the one there is silent
    assert seen == [True, True, True] and master.joined == 3
    master.socket.close()
    context.term()


@pytest.mark.parametrize(
    "parts",
    [
        [b"simulator-0"],
        [b"simulator-0", header()],
        [b"simulator-0", header(), PIXELS, b""],
        [b"simulator-1", header(), PIXELS],
        [b"", header(), PIXELS],
        [b"simulator-0", b"", PIXELS],
        [b"simulator-0", b"\xc1garbage", PIXELS],
        [b"simulator-0", header() + b"x", PIXELS],
        [b"simulator-0", msgpack.packb(None), PIXELS],
        [b"simulator-0", msgpack.packb([1, 2, 3]), PIXELS],
        [b"simulator-0", msgpack.packb({"a": 1, "b": 2, "c": 3}), PIXELS],
        [b"simulator-0", header(rewards=[0.0]), PIXELS],
        [b"simulator-0", header(rewards=[0.0, "x"]), PIXELS],
        [b"simulator-0", header(rewards=[0.0, float("nan")]), PIXELS],
        [b"simulator-0", header(rewards=[[0.0], [0.0, 1.0]]), PIXELS],
        [b"simulator-0", header(finished=[]), PIXELS],
        [b"simulator-0", header(finished=[[1.0]]), PIXELS],
        [b"simulator-0", header(finished=[[float("nan"), 10]]), PIXELS],
        [b"simulator-0", header(finished=[[float("inf"), 10]]), PIXELS],
        [b"simulator-0", header(), PIXELS[1:]],
        [b"simulator-0", header(), PIXELS + b"x"],
    ],
)
def test_bad_messages_are_dropped(master, parts):
    assert master.parse(parts) is None
    assert not any(peer.was_heard for peer in master.peers.values())


def test_bad_messages_on_the_socket_are_counted_and_change_nothing(master, tmp_path):
    context = zmq.Context()
    sockets = []
    for identity in (b"simulator-0", b"intruder"):
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, identity)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(f"ipc://{tmp_path}/0")
        sockets.append(socket)
    sockets[1].send(b"garbage")
    sockets[1].send_multipart([header(), PIXELS])
    sockets[0].send_multipart([b"garbage", PIXELS])
    sockets[0].send_multipart([header(), PIXELS])
    received = []
    deadline = time.monotonic() + 10
    while (not received or master.dropped < 3) and time.monotonic() < deadline:
        received += master.receive(most=100, timeout_ms=100)
    assert [message.identity for message in received] == [b"simulator-0"]
    assert master.dropped == 3
    master.reply(received[0], [1, 3])
    assert msgpack.unpackb(sockets[0].recv()) == [1, 3]
    for socket in sockets:
        socket.close()
    context.term()


def test_simulators_never_import_torch():
    code = "import simulator, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_fleet_is_private_and_leaves_nothing():
    fleet = Fleet("tests.games:Catch-v0", 3, players=2, groups=2, seed=0)
    directory = Path(fleet.directory)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    try:
        deadline = time.monotonic() + 20
        messages = []
        while len(messages) < 3 and time.monotonic() < deadline:
            for master in fleet.masters:
                messages += master.receive(10, timeout_ms=50)
        assert sorted(m.identity for m in messages) == [
            b"simulator-%d.%d" % (i, i) for i in range(3)
        ]
        assert {len(m.frames) for m in messages} == {2}
        # Only new frames cross the process boundary.
        assert all(m.frames.nbytes == len(m.rewards) * 84 * 84 * 3 for m in messages)
        # Each is where its simulator leaves it: no two are the same memory.
        assert len({m.frames.__array_interface__["data"][0] for m in messages}) == 3
        assert fleet.connected == 3
        assert fleet.check() == []
        pids = pids_of(fleet)
        assert len(pids) == 3
        names = [Path(f"/proc/{pid}/maps").read_text() for pid in pids]
        assert not any("torch" in maps for maps in names)
    finally:
        fleet.close()
    assert not directory.exists()
    assert not any(running(pid) for pid in pids)


def test_what_a_game_prints_disturbs_nobody():
    fleet = Fleet("tests.games:Chatty-v0", 2, players=1, groups=1, seed=0)
    try:
        deadline = time.monotonic() + 20
        while fleet.connected < 2:
            assert time.monotonic() < deadline
            fleet.masters[0].receive(10, timeout_ms=50)
            assert fleet.check() == []
        assert "hello there" in Path(fleet.directory, "0.log").read_text()
    finally:
        fleet.close()


def test_a_signal_in_a_clean_up_waits_for_its_end():
    steps = []
    with pytest.raises(KeyboardInterrupt), undisturbed(), undisturbed():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        steps.append("cleaned up")
    assert steps == ["cleaned up"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_simulators_end_when_their_parent_is_killed():
    code = "import simulator, time; f = simulator.Fleet('tests.games:Catch-v0', 2, 1, 1, 0)\n"
    code += "while f.connected < 2: f.masters[0].receive(1, 100)\n"
    code += "print(f.directory, *[w.process.pid for w in f.workers], flush=True); time.sleep(60)"
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
    Fleet("tests.games:Catch-v0", 1, 1, 1, 0).close()
    assert not os.path.exists(directory)


def pids_of(fleet):
    return [worker.process.pid for worker in fleet.workers if worker]


def running(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_a_simulator_that_breaks_says_why():
    players = VectorPlayers("tests.games:Crash-v0", 1, seed=0, check=lambda: None)
    try:
        with pytest.raises(UserError, match=r"simulator 0 ended with code 1.*the game broke"):
            for actions in (None, *[np.array([1])] * 100):
                players.step(actions)
    finally:
        players.close()


@pytest.mark.parametrize("cores, processes", [(1, 1), (3, 3), (6, 4), (12, 7)])
def test_there_are_as_many_players_as_wanted_on_any_number_of_cores(monkeypatch, cores, processes):
    monkeypatch.setattr(simulator, "count_cores", lambda: cores)
    players = VectorPlayers("tests.games:Count-v0", 7, seed=5, check=lambda: None)
    try:
        assert players.num_players == 7 and len(players.workers) == processes
        for actions in (None, np.zeros(7, int), np.ones(7, int)):
            assert [len(column) for column in players.step(actions)] == [7, 7, 7]
    finally:
        players.close()


def test_players_that_step_together_repeat_themselves():
    def play():
        players = VectorPlayers("Breakout-v0", 4, seed=5, check=lambda: None)
        try:
            steps = [players.step(None)]
            rng = np.random.default_rng(1)
            steps += [players.step(rng.integers(4, size=4)) for _ in range(150)]
        finally:
            players.close()
        return [
            np.concatenate([np.ravel(part) for part in column])
            for column in zip(*steps, strict=True)
        ]

    first, second = play(), play()
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    frames = first[0].reshape(151, 4, -1)
    assert not np.array_equal(frames[:, 0], frames[:, 1])  # each player has a seed of its own
