#!/usr/bin/env python3
"""The simulator program, how it talks to the training process, and the books kept of each player.

A simulator steps its players together. For every step it sends one message with their new frames
and waits for one with their actions:

    simulator -> master: [rewards, is_over, finished] in msgpack | frames (players, 84, 84, 3) uint8
    master -> simulator: [action, ...] in msgpack; nil: there is no place for it

Where both are on one machine the frames do not travel in the message: they lie in memory that the
two share, and that the simulator leaves alone until it is answered.

The rewards belong to the actions of the message before. Where is_over, the frame is already the
first of the next episode, and `finished` holds [score, length] of the one that ended. A simulator
ends when its standard input closes, which happens however its parent ends. It never imports torch.

A run starts one process of this program for each of its simulators: see `Pool`.

Started by hand, on any machine, it adds players to a run that listens:

    simulator.py --connect tcp://HOST:PORT --key FILE --env Breakout-v0 --simulator-proc 32
"""

import argparse
import contextlib
import ctypes
import dataclasses
import fcntl
import itertools
import math
import mmap
import os
import re
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
from collections import deque
from collections.abc import Callable, Iterator
from socket import AF_INET6, create_connection
from typing import NamedTuple

import msgpack
import numpy as np
import zmq

from common import (
    FRAME_HISTORY,
    FRAME_SHAPE,
    UNMENDABLE,
    Player,
    Stopped,
    UserError,
    close_env,
    count,
    count_cores,
    describe,
    make_env,
    seed_games,
    whole,
)

FRAME_BYTES = int(np.prod(FRAME_SHAPE))
HIGH_WATER_MARK = 4  # messages per peer: a simulator has one under way at most
END_SECONDS = 2.0  # how long simulators have to end by themselves
END_ALARM = 2  # seconds until the kernel ends a simulator that should have ended
HANG_SECONDS = 60.0  # a simulator whose game takes so long for one step or reset is replaced
START_SECONDS = 300.0  # and one that starts
STARTS_PER_CORE = 2  # simulators that start at the same time
ATTEMPTS, ATTEMPT_SECONDS = 3, 60.0  # so many failures end the run if none has lived so long
SHORT_LIVES, SHORT_LIFE = 20, 5.0  # and so many in a row that were killed so soon after they began
LIKELY_CAUSE = (
    "is there too little memory? Fewer --simulator-proc or --players-per-simulator need less"
)
LOOK_SECONDS, LOG_LOOK_SECONDS = 0.1, 1.0  # from one look at simulators, or logs, to the next
LOG_BYTES, TAIL_BYTES = 2**20, 2**14  # of what a simulator prints, and of its end that is kept
PR_SET_PDEATHSIG = 1  # of prctl(2): which signal follows the end of the parent
REACH_SECONDS = 5.0  # until a host that does not answer is out of reach
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PREFIX, IPC = "batch-a3c-", "ipc://"
REMOTE_SIMULATORS = 256  # most that may join a run that listens
REJOIN_SECONDS = 3.0
MOST_MESSAGES = 1000  # that are looked at before some are answered
KILLED = (-signal.SIGKILL, -signal.SIGTERM)  # exit codes of what was ended from outside


def on_signals(handler: Callable, signals=SIGNALS) -> None:
    """Let signals call `handler`, but for SIGHUP where it is ignored: under nohup.

    Python allows that in the main thread alone; elsewhere signals are its caller's.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for signum in signals:
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, handler)


def stop(signum: int, frame) -> None:
    """Handle a signal that ends this program."""
    raise Stopped(128 + signum)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Let Ctrl-C and its like wait for the end of a clean-up (in the main thread)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals, caught = [s for s in SIGNALS if signal.getsignal(s) != signal.SIG_IGN], []
    handlers = [signal.signal(s, lambda signum, frame: caught.append(signum)) for s in signals]
    try:
        yield
    finally:
        for signum, handler in zip(signals, handlers, strict=True):
            signal.signal(signum, handler)
        for signum in caught[:1]:
            signal.raise_signal(signum)


def end_with_parent(way: Callable, *args) -> None:
    """Wait until standard input is closed, and end this process by `way(*args)`."""
    while os.read(0, 1024):
        pass
    way(*args)


def end(processes: list[subprocess.Popen], seconds: float) -> None:
    """Close the pipes that these lives hang on, and kill whatever has not ended in time."""
    for process in processes:
        with contextlib.suppress(BrokenPipeError):  # it has ended
            process.stdin.close()
    deadline = time.monotonic() + seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.wait()


def kill(pid: int) -> None:
    """Kill a process, if it is there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def read_key(path: str) -> list[bytes]:
    """Public and secret key, for ZeroMQ's CURVE, in a file that only those who may join have."""
    try:
        with open(path, "rb") as file:
            public, secret = file.read().split()
        if zmq.curve_public(secret) != public:
            raise ValueError
        return [public, secret]
    except OSError as error:
        raise UserError(f"cannot read the key {path}: {error.strerror}", 2) from error
    except (ValueError, zmq.ZMQError) as error:
        raise UserError(f"{path} holds no key", 2) from error


def make_key(path: str) -> list[bytes]:
    """The key in a file, which is made if it is not there."""
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(b"\n".join(zmq.curve_keypair()))
    except FileExistsError:
        pass
    except OSError as error:
        raise UserError(f"cannot write the key {path}: {error.strerror}", 2) from error
    return read_key(path)


def join(socket: zmq.Socket, key: list[bytes]) -> zmq.Socket:
    """Make a socket one that may join over a network; returns what tells when it has lost that."""
    socket.curve_serverkey = key[0]
    socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
    socket.setsockopt(zmq.HEARTBEAT_IVL, 5000)
    failures = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    return socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | failures)


def share_frames(memory: int, players: int) -> np.ndarray:
    """Frames (simulators, players, 84, 84, 3) uint8 in the shared memory of a file descriptor."""
    return np.frombuffer(mmap.mmap(memory, 0), np.uint8).reshape(-1, players, *FRAME_SHAPE)


class Progress:
    """What a pool knows of the work of its simulators: three counters of each, in a shared file.

    A simulator counts what its games do, so that the pool can tell one that hangs from one that
    works on a long message, and both from one that waits for its actions.
    """

    # Games made, reset or stepped; messages sent; answers received.
    STEPS, SENT, RECEIVED = range(3)

    def __init__(self, path: str, simulators: int | None = None):
        if simulators is not None:
            with open(path, "wb") as file:  # written, not only made longer: there is room on disk
                file.write(bytes(24 * simulators))
        with open(path, "r+b") as file:
            self.counters = np.frombuffer(mmap.mmap(file.fileno(), 0), np.int64).reshape(-1, 3)

    def clear(self, index: int) -> None:
        """Let simulator `index` begin."""
        self.counters[index] = 0


class Ended(BaseException):
    """This simulator should end: it was told to, or its parent is gone."""


def end_when_told(signum: int, frame) -> None:
    """Handle SIGTERM: leave the game, so that it is closed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.alarm(END_ALARM)  # the kernel ends this process if the game does not let go
    raise Ended


def end_this_simulator() -> None:
    """Let this simulator end, from any of its threads."""
    signal.alarm(END_ALARM)
    os.kill(os.getpid(), signal.SIGTERM)


def connect(a: argparse.Namespace) -> tuple[zmq.Socket, zmq.Socket | None]:
    """The socket to the master, and what tells that a run on another machine is lost."""
    socket, monitor = zmq.Context().socket(zmq.DEALER), None
    socket.setsockopt(zmq.IDENTITY, a.identity.encode())
    socket.set_hwm(HIGH_WATER_MARK)  # before connect: later it would do nothing
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IPV6, a.ipv6)
    if a.key:
        monitor = join(socket, read_key(a.key))
    socket.connect(a.connect)
    return socket, monitor


def start_players(a: argparse.Namespace, progress: memoryview) -> Iterator[Player]:
    """Make the players of this simulator, one by one."""
    for number in range(a.players):
        try:
            player = Player(make_env(a.env, a.window))
        except UserError as error:
            if number == 0:
                raise
            alone = "--players-per-simulator 1 (--players 1 of simulator.py)"
            sentence = f"a process can hold {number} of {a.env}, not {a.players} ({error}): {alone}"
            raise UserError(sentence, 2) from error
        progress[Progress.STEPS] += 1
        yield player


def simulate(a: argparse.Namespace, players: list[Player]) -> None:
    """Fill `players`, and play with them until this process is told to end.

    Raises UserError where the master has no place for them, or is lost.
    """
    progress = memoryview(Progress(a.progress).counters[a.index])  # quicker than numpy
    seeds = np.random.SeedSequence((a.seed, *a.identity.encode())).generate_state(a.players + 1)
    seed_games(int(seeds[-1]))
    socket, monitor = connect(a)
    players.extend(start_players(a, progress))
    if a.memory is None:
        frames = np.empty((a.players, *FRAME_SHAPE), np.uint8)
    else:
        frames = share_frames(a.memory, a.players)[a.index]
    for i, player in enumerate(players):
        frames[i] = player.reset(seed=int(seeds[i]))
        progress[Progress.STEPS] += 1
    rewards, is_over, finished = [0.0] * a.players, [False] * a.players, []
    while True:
        header = msgpack.packb([rewards, is_over, finished])
        progress[Progress.SENT] += 1
        socket.send_multipart([header, frames] if a.memory is None else [header])
        actions = receive_actions(a, socket, monitor)
        progress[Progress.RECEIVED] += 1
        finished = []
        for i, player in enumerate(players):
            frames[i], rewards[i], is_over[i] = player.step(actions[i])
            progress[Progress.STEPS] += 1
            if is_over[i]:
                finished.append([player.score, player.length])
                frames[i] = player.reset()
                progress[Progress.STEPS] += 1


def receive_actions(a: argparse.Namespace, socket: zmq.Socket, monitor) -> list[int]:
    """Wait for the actions of all players; UserError where there will be none."""
    while monitor and not socket.poll(1000):
        if monitor.poll(0):
            raise UserError(f"{a.connect} ended the connection, or does not know the key")
    actions = msgpack.unpackb(socket.recv())
    if actions is None:
        reason = f"is it another game than {a.env}, or does it need other --players?"
        raise UserError(f"{a.connect} has no place for this simulator: {reason}")
    return actions


def run_simulator(a: argparse.Namespace) -> None:
    """Be a simulator of a pool; does not return.

    Games are closed however this ends, for some have processes of their own.
    """
    if sys.platform == "linux":  # if the pool ends while this process is stopped, it goes on
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGCONT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what reaches a terminal is for the pool
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    players: list[Player] = []
    was_told = False
    try:
        signal.signal(signal.SIGTERM, end_when_told)
        how = {"target": end_with_parent, "args": (end_this_simulator,), "daemon": True}
        threading.Thread(**how).start()
        sys.stdout.reconfigure(line_buffering=True)
        code = run(a, lambda: simulate(a, players))
    except Ended:
        was_told = True
    except BaseException:
        traceback.print_exc()
        code = 1
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for player in players:
        close_env(player.env)
    if os.getpgrp() == os.getpid():  # what games have started and not ended
        os.killpg(0, signal.SIGTERM)
    sys.stdout.flush()
    sys.stderr.flush()
    if was_told:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
    os._exit(code)  # without waiting for threads that a game has started


def split_address(address: str) -> tuple[str, int]:
    """Host and port of tcp://HOST:PORT; UserError where it is not of that form."""
    try:
        parts = urllib.parse.urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port or parts.scheme != "tcp":
        raise UserError(f"{address} is no address: give tcp://HOST:PORT", 2)
    return host, port


def find_run(host: str, port: int) -> int:
    """Whether the run is reached over IPv6, as 0 or 1; OSError where it is not reached."""
    with create_connection((host, port), timeout=REACH_SECONDS) as connection:
        return int(connection.family == AF_INET6)


def join_run(a: argparse.Namespace) -> None:
    """Keep `simulator_proc` simulators in a run elsewhere, and start those anew that lost it."""
    on_signals(stop, SIGNALS[1:])
    if a.key is None:
        raise UserError("--key FILE is needed to join a run", 2)
    read_key(a.key)
    host, port = split_address(a.connect)
    a.env = describe(a.env).env_id
    said: set[str] = set()

    def say(sentence: str) -> None:
        if sentence not in said:  # once, until the run is there again
            said.add(sentence)
            print(sentence, file=sys.stderr, flush=True)

    pool = RemotePool(a)
    with contextlib.closing(pool):
        while True:
            for event in pool.check():
                say(re.sub(r"simulator \d+ ", "a simulator ", event) + "; it tries again")
            if pool.connected == len(pool.workers):
                said.clear()
            if None in pool.workers:
                try:
                    a.ipv6 = find_run(host, port)
                    pool.start_missing()
                except OSError as error:
                    say(f"cannot reach {a.connect} ({error.strerror or error}); trying again")
            time.sleep(REJOIN_SECONDS)


class Message(NamedTuple):
    """One step of all players of a simulator."""

    identity: bytes
    is_first: bool  # of this simulator
    place: int  # of the simulator among those of its master
    frames: np.ndarray  # (k, 84, 84, 3) uint8; they may change when it is answered
    rewards: list[float]  # (k,), as the game counts them
    is_over: list[bool]  # (k,)
    finished: list  # [score, length] of every episode that ended


@dataclasses.dataclass
class Peer:
    """A simulator as its master sees it."""

    place: int
    was_heard: bool = False  # it has sent something
    answers: int = 0  # that were sent to it
    must_play: bool = True  # it is its turn: it begins, or has been answered
    since: float = dataclasses.field(default_factory=time.monotonic)  # when its turn began


class Master:
    """The end of the line of a group of simulators: one ROUTER socket, used by one thread.

    A simulator has a place among those of its master, and an identity of its own: one that takes
    the place of another has another identity. With a key the master is open: whoever has the key
    gets a place, and keeps it until it is silent for HANG_SECONDS and another one needs it. Its
    identity begins with the game that it plays, which must be `game`.

    frames: where simulators leave theirs, (simulators, players, 84, 84, 3); None: they send them.
    """

    def __init__(
        self, context, address: str, simulators: int, players: int, key=None, game="", frames=None
    ):
        self.address, self.players, self.is_open = address, players, key is not None
        self.game, self.frames = game.encode(), frames
        self.sizes = [players * FRAME_BYTES] if frames is None else []  # of what follows a header
        self.num_places, self.num_players = simulators, simulators * players
        self.peers: dict[bytes, Peer] = {}  # by identity
        self.replaced: set[bytes] = set()  # identities that were among them before
        self.drained = 0.0  # when the socket was last seen to be empty
        self.joined = 0  # simulators that an open master has given a place
        self.dropped = 0  # messages that no simulator of this master can have sent
        self.arrived: list[Message] = []  # and not been handed out
        self.socket = context.socket(zmq.ROUTER)
        self.socket.set_hwm(HIGH_WATER_MARK)  # before bind: later it would do nothing
        self.socket.setsockopt(zmq.MAXMSGSIZE, players * FRAME_BYTES + 65536)
        self.socket.setsockopt(zmq.IPV6, int("[" in address))
        if key:
            self.socket.curve_server = True
            self.socket.curve_publickey, self.socket.curve_secretkey = key
            self.socket.setsockopt(zmq.HEARTBEAT_IVL, 5000)
        try:
            self.socket.bind(address)
        except zmq.ZMQError as error:  # of a long TMPDIR, for example
            raise UserError(f"cannot listen on {address}: {error}") from error

    def admit(self, identity: bytes, place: int) -> Peer:
        """From now on `identity` has this place, and nobody else."""
        for other, peer in list(self.peers.items()):
            if peer.place == place:
                self.replaced.add(other)
                del self.peers[other]
        peer = self.peers[identity] = Peer(place)
        return peer

    def find_place(self) -> int | None:
        """A place for a simulator that is new to an open master; None where there is none."""
        taken = {peer.place for peer in self.peers.values()}
        vacant = (place for place in range(self.num_places) if place not in taken)
        now = time.monotonic()
        lost = (
            peer.place
            for peer in self.peers.values()
            if peer.must_play and now - peer.since > HANG_SECONDS
        )
        return next(itertools.chain(vacant, lost), None)

    def receive(self, most: int, timeout_ms: int) -> list[Message]:
        """What has arrived, up to `most` players (one message at least); waits for the first."""
        if not self.arrived:
            self.socket.poll(timeout_ms)
        for _ in range(MOST_MESSAGES):
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                self.drained = time.monotonic()
                break
            message = self.parse(parts)
            if message is not None:
                self.arrived.append(message)
                continue
            identity = parts[0]
            if not self.is_late(identity):
                self.dropped += 1
            if self.is_open and identity not in self.peers:
                self.socket.send_multipart([identity, msgpack.packb(None)])
        # What a simulator has sent whose place another one has taken is of no use.
        self.arrived = [m for m in self.arrived if m.identity in self.peers]
        count = max(1, most // self.players)
        messages, self.arrived = self.arrived[:count], self.arrived[count:]
        return messages

    def is_late(self, identity: bytes) -> bool:
        """Whether it is known, so that what cannot be used of it came too late, or twice."""
        peer = self.peers.get(identity)
        return identity in self.replaced or (peer is not None and peer.was_heard)

    def parse(self, parts: list[bytes]) -> Message | None:
        """The message in these parts, or None if they are not one of a known simulator."""
        k = self.players
        if len(parts) < 2 or not (self.is_open or parts[0] in self.peers):
            return None
        identity, header, *pixels = parts
        try:
            rewards, is_over, finished = msgpack.unpackb(header)
            rewards, is_over = [float(r) for r in rewards], [bool(over) for over in is_over]
            finished = [(float(score), int(length)) for score, length in finished]
        except (ValueError, TypeError, OverflowError, msgpack.UnpackException):
            return None
        fits = len(rewards) == len(is_over) == k and len(finished) == sum(is_over)
        fits = fits and [len(part) for part in pixels] == self.sizes
        fits = fits and identity.startswith(self.game)
        if not fits or not all(map(math.isfinite, [*rewards, *(score for score, _ in finished)])):
            return None
        peer = self.peers.get(identity)  # another thread may replace it meanwhile
        if peer is None and self.is_open and (place := self.find_place()) is not None:
            peer = self.admit(identity, place)
            self.joined += 1
        if peer is None or not peer.must_play:  # it has no place, or has not been answered
            return None
        is_first = not peer.was_heard
        peer.was_heard, peer.must_play = True, False
        if self.frames is None:
            frames = np.frombuffer(pixels[0], np.uint8).reshape(k, *FRAME_SHAPE)
        else:
            frames = self.frames[peer.place]
        return Message(identity, is_first, peer.place, frames, rewards, is_over, finished)

    def reply(self, message: Message, actions: list[int]) -> None:
        """Send the actions (k,) of the players of `message`."""
        if peer := self.peers.get(message.identity):
            peer.must_play, peer.since = True, time.monotonic()
            peer.answers += 1
        self.socket.send(message.identity, zmq.SNDMORE)
        self.socket.send(msgpack.packb(actions))


class Segment(NamedTuple):
    """Consecutive states of a player, newest first, and what was done in them."""

    frames: np.ndarray  # (m + 3, 84, 84, 3), oldest first, four for each state: a view of the books
    actions: list[int]  # (m,)
    action_probs: list[float]  # (m,)
    future_rewards: list[float]  # (m,), the n-step returns
    versions: list[int]  # (m,), of the weights that chose the actions


class Step(NamedTuple):
    """What was chosen and predicted for the players of a simulator, (k,) each."""

    actions: list[int]
    action_probs: list[float]
    values: list[float]
    version: int
    rewards: list[float]  # clipped; filled in when they are known


class Books:
    """What is remembered of the players of a simulator until their n-step returns are known.

    Mnih et al. 2016, algorithm S3: R = r + gamma * R, from 0 at the end of an episode, otherwise
    from the value that was predicted for the newest state. Rewards are clipped to [-1, 1].
    """

    def __init__(self, players: int, local_time_max: int, gamma: float):
        self.local_time_max, self.gamma = local_time_max, gamma
        self.steps: deque[Step] = deque(maxlen=local_time_max + 1)
        self.counts = [0] * players  # of the last steps, those that are remembered of each player
        self.needed = local_time_max + FRAME_HISTORY - 1  # frames before the next one
        self.frames = np.zeros((players, 3 * self.needed, *FRAME_SHAPE), np.uint8)
        self.end = FRAME_HISTORY - 1  # of the frames that are there

    def settle(self, message: Message) -> Iterator[Segment]:
        """Enter rewards where they belong; yields the segments that are finished by them.

        Of a first message reward and is_over belong to nothing and are ignored.
        """
        if self.steps:
            self.steps[-1].rewards.extend(min(max(r, -1.0), 1.0) for r in message.rewards)
        for player, is_over in enumerate(message.is_over):
            count = self.counts[player]
            if is_over and count:
                yield self.segment(player, count, 0, 0.0)
                self.counts[player] = 0
            elif count > self.local_time_max:
                value = self.steps[-1].values[player]
                yield self.segment(player, self.local_time_max, 1, value)
                self.counts[player] = 1

    def segment(self, player: int, count: int, skip: int, future_reward: float) -> Segment:
        """`count` steps and their returns; future_reward: what follows them; `skip` are newer."""
        columns = []
        for age in range(skip, skip + count):
            step = self.steps[-1 - age]
            future_reward = step.rewards[player] + self.gamma * future_reward
            row = (step.actions[player], step.action_probs[player], future_reward, step.version)
            columns.append(row)
        end = self.end - skip
        frames = self.frames[player, end - count - FRAME_HISTORY + 1 : end]
        return Segment(frames, *map(list, zip(*columns, strict=True)))

    def observe(self, message: Message) -> np.ndarray:
        """Enter the new frames; returns the states (k, 4, 84, 84, 3) that they complete, a view."""
        if self.end == self.frames.shape[1]:
            self.frames[:, : self.needed] = self.frames[:, -self.needed :]
            self.end = self.needed
        self.frames[:, self.end] = message.frames
        self.end += 1
        first = self.end - FRAME_HISTORY
        for player in np.flatnonzero(message.is_over):  # an episode starts
            self.frames[player, first : self.end - 1] = 0
        return self.frames[:, first : self.end]

    def decide(self, actions, action_probs, values, version: int) -> None:
        """Remember what was chosen and predicted in the newest states, (k,) each."""
        self.steps.append(Step(actions, action_probs, values, version, []))
        self.counts = [count + 1 for count in self.counts]


def make_private_directory() -> tuple[str, int]:
    """A directory that only its owner can enter, and an open file of it.

    Its lock keeps `sweep` away until it is closed, or this process is killed.
    """
    path = tempfile.mkdtemp(prefix=PREFIX)  # mode 0700
    lock = os.open(path, os.O_RDONLY)
    with contextlib.suppress(OSError):  # a file system without locks: nobody sweeps there
        fcntl.flock(lock, fcntl.LOCK_EX)
    return path, lock


def sweep() -> None:
    """Remove the socket directories of runs that were killed: nobody holds their lock.

    Whatever else has such a name stays: a link, a pipe (to open it would wait for its other end),
    and what belongs to another user.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK
    parent, names = tempfile.gettempdir(), []
    with contextlib.suppress(OSError):  # it may not be readable
        names = [name for name in os.listdir(parent) if name.startswith(PREFIX)]
    for name in names:
        path = os.path.join(parent, name)
        with contextlib.suppress(OSError):  # of others, or gone
            directory = os.open(path, flags)
            try:
                found = os.stat(directory)
                if found.st_uid != os.geteuid() or time.time() - found.st_mtime < 10:
                    continue  # it is not ours, or a run starts in it just now
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(directory)


def child_environment() -> dict[str, str]:
    """The environment of programs that find the same modules as this process."""
    paths = [path or os.getcwd() for path in sys.path]
    own = [path for path in paths if not path.startswith((sys.prefix, sys.base_prefix))]
    return os.environ | {"PYTHONPATH": os.pathsep.join(own)}


def open_log(path: str) -> int:
    """A new file for what a simulator prints; on a full disk it is not kept."""
    with contextlib.suppress(OSError):
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    return os.open(os.devnull, os.O_WRONLY)


def tail(path: str) -> bytes:
    """The end of a file, at most TAIL_BYTES; nothing where it cannot be read."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
        return file.read()
    return b""


def shorten(path: str) -> None:
    """Keep only the end of a log that has become too long; it may be written meanwhile."""
    with contextlib.suppress(OSError):
        if os.stat(path).st_size > LOG_BYTES:
            end_of_log = tail(path)
            with open(path, "ab") as file:
                file.truncate(0)
                file.write(end_of_log)


class SimulatorError(UserError):
    """A simulator has failed; exit_code: of its process, None where it was ended for hanging."""

    def __init__(self, sentence: str, exit_code: int | None = None):
        super().__init__(sentence)
        self.exit_code = exit_code


@dataclasses.dataclass
class Worker:
    """A simulator process as its pool sees it."""

    identity: str
    process: subprocess.Popen
    started: float  # time.monotonic()
    began: float | None = None  # to play: when its first message was noticed
    steps: int = 0  # its progress when it was looked at last
    stuck: float = 0.0  # seconds in which it was its turn, and it made no progress


class Pool:
    """Simulator processes and their private directory; `check` replaces those that end or hang.

    Each is a process of its own, whose life hangs on its standard input: it ends with this process,
    however that ends. What it prints goes to a file in the directory.
    """

    attempts: float = ATTEMPTS

    def __init__(self, env_id: str, simulators: int, players: int, seed: int, *options: str):
        sweep()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        need = 4 * simulators + 200  # its socket, with some to spare
        if hard != resource.RLIM_INFINITY and need > hard:
            limit = f"ulimit -Hn is {hard}"
            raise UserError(f"{simulators} simulators need {need} open files; {limit}", 2)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, need), hard))
        self.directory, self.lock = make_private_directory()  # nobody else connects
        self.command = [sys.executable, os.path.abspath(__file__), f"--env={env_id}", *options]
        self.command += [f"--players={players}", f"--seed={seed}"]
        self.workers: list[Worker | None] = [None] * simulators  # None: to be started
        self.failures = [0] * simulators  # since one has lived long
        self.short_lives = [0] * simulators  # that were ended from outside, one after the other
        self.births = itertools.count()
        self.looked_before = self.looked = self.looked_at_logs = time.monotonic()
        self.most_starting = STARTS_PER_CORE * count_cores()
        try:
            self.progress = Progress(f"{self.directory}/progress", simulators)
        except BaseException:
            self.close()
            raise

    def log_path(self, index: int) -> str:
        """Where the output of a simulator goes."""
        return f"{self.directory}/{index}.log"

    def name(self, index: int) -> str:
        """An identity for the next simulator `index`, which none has had before."""
        return f"simulator-{index}.{next(self.births)}"

    def options(self, index: int) -> list[str]:
        """What simulator `index` is started with beside what all are."""
        raise NotImplementedError

    def inherited_files(self) -> list[int]:
        """Descriptors that simulators share with this process."""
        return []

    def prepare(self, index: int, identity: str) -> None:
        """Do what is due before a simulator starts."""

    def start(self, index: int) -> None:
        """Start a simulator; those that replace it will call themselves otherwise."""
        identity = self.name(index)
        self.prepare(index, identity)
        command = [*self.command, *self.options(index), f"--identity={identity}"]
        command += [f"--index={index}", f"--progress={self.directory}/progress"]
        environment = child_environment() | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.progress.clear(index)
        log = open_log(self.log_path(index))
        try:
            # A session of its own: Ctrl-C is for this process, and what a game has started can be
            # ended with it.
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=self.inherited_files(),
            )
        finally:
            os.close(log)
        self.workers[index] = Worker(identity, process, time.monotonic())

    def start_missing(self) -> None:
        """Start simulators that are not there, not more at once than the cores can start."""
        starting = sum(not self.has_played(i) for i, w in enumerate(self.workers) if w)
        for index, worker in enumerate(self.workers):
            if worker is None and starting < self.most_starting:
                self.start(index)
                starting += 1

    def has_played(self, index: int) -> bool:
        """Whether a simulator has sent something since it was started."""
        return bool(self.progress.counters[index, Progress.SENT])

    def awaits_answer(self, index: int) -> bool:
        """Whether a simulator waits for its actions: what it sends is answered elsewhere."""
        _, sent, received = self.progress.counters[index].tolist()
        return sent > received

    @property
    def connected(self) -> int:
        """How many simulators have sent something."""
        return sum(self.has_played(i) for i, worker in enumerate(self.workers) if worker)

    def check(self) -> list[str]:
        """End simulators that hang, and forget those that ended; returns a sentence for each.

        UserError with its last words for one that fails again and again.
        """
        now = time.monotonic()
        if now - self.looked < LOOK_SECONDS:
            return []
        # A process that was stopped for a while does not know whether the simulators were too.
        elapsed = min(1.0, now - self.looked)
        self.looked_before, self.looked = self.looked, now
        events = []
        for index, worker in enumerate(self.workers):
            if worker is None:
                continue
            if worker.began is None and self.has_played(index):
                worker.began = now
            code = worker.process.poll()
            if code is None and not self.hangs(index, worker, elapsed):
                continue
            if code is None:
                how = f"was silent for {worker.stuck:.0f} seconds"
            else:
                how = self.last_words(index, code)
            how = f"simulator {index} {how}"
            self.end_worker(worker)
            self.workers[index] = None
            self.count_failure(index, worker, code, how)
            events.append(how)
        if now - self.looked_at_logs > LOG_LOOK_SECONDS:
            self.looked_at_logs = now
            for index in range(len(self.workers)):
                shorten(self.log_path(index))
        return events

    def hangs(self, index: int, worker: Worker, elapsed: float) -> bool:
        """Whether a simulator has made no progress for too long, though it is its turn."""
        steps = int(self.progress.counters[index, Progress.STEPS])
        if steps != worker.steps or self.awaits_answer(index):
            worker.stuck = 0.0
        else:
            worker.stuck += elapsed
        worker.steps = steps
        return worker.stuck > (HANG_SECONDS if self.has_played(index) else START_SECONDS)

    def count_failure(self, index: int, worker: Worker, code: int | None, how: str) -> None:
        """Raise SimulatorError where it is of no use to start a simulator anew.

        One that has played and was killed from outside has not failed, unless that happens again
        and again soon after it began to play, however long its start takes.
        """
        now, played = time.monotonic(), self.has_played(index)
        if played and now - worker.started >= ATTEMPT_SECONDS:
            self.failures[index] = 0
        if played and code in KILLED:
            is_short = worker.began is None or now - worker.began < SHORT_LIFE
            self.short_lives[index] = self.short_lives[index] + 1 if is_short else 0
            if self.short_lives[index] >= SHORT_LIVES:
                again = f"{SHORT_LIVES} times in a row, within {SHORT_LIFE:g} seconds of play"
                raise SimulatorError(f"{how}; {again}: {LIKELY_CAUSE}", code)
        else:
            self.failures[index] += 1
        if code == UNMENDABLE or self.failures[index] >= self.attempts:
            if code == -signal.SIGKILL:
                how += f"; {LIKELY_CAUSE}"
            raise SimulatorError(how, code)

    def last_words(self, index: int, code: int) -> str:
        """How a simulator ended, and what it said."""
        text = tail(self.log_path(index)).decode(errors="replace")
        lines = [line.strip() for line in text.splitlines()]
        said = next((line for line in reversed(lines) if line), "no message")
        if code < 0:
            return f"was killed by signal {-code}: {said}"
        return f"ended with code {code}: {said}"

    def end_worker(self, worker: Worker) -> None:
        """Kill a simulator and what its games have started, if that is still there."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
        with contextlib.suppress(BrokenPipeError):
            worker.process.stdin.close()

    def end_all(self) -> None:
        """End all simulators; they have a moment to close their games."""
        workers = [worker for worker in self.workers if worker is not None]
        end([worker.process for worker in workers], END_SECONDS)
        for worker in workers:
            self.end_worker(worker)
        self.workers = [None] * len(self.workers)

    def close(self) -> None:
        """End all simulators and remove the directory."""
        with undisturbed():
            self.end_all()
            shutil.rmtree(self.directory, ignore_errors=True)
            os.close(self.lock)


class RemotePool(Pool):
    """Simulators that join a run on another machine, and join it again when they lost it."""

    attempts = math.inf

    def __init__(self, a: argparse.Namespace):
        super().__init__(a.env, a.simulator_proc, a.players, a.seed)
        self.a = a

    def name(self, index: int) -> str:
        """Begins with the game, for the run to see that it is the same."""
        return f"{self.a.env} {secrets.token_hex(16)}"  # nobody else calls itself so

    def options(self, index: int) -> list[str]:
        """The address of the run."""
        ipv6 = ["--ipv6=1"] if self.a.ipv6 else []
        return [f"--connect={self.a.connect}", f"--key={os.path.abspath(self.a.key)}", *ipv6]


class Fleet(Pool):
    """The simulators of this process, in groups with a master each.

    Simulator i belongs to group i % groups; each has `players` players. options: further ones of
    the simulator program.
    """

    def __init__(
        self, env_id: str, simulators: int, players: int, groups: int, seed: int, *options: str
    ):
        self.masters: list[Master] = []
        self.context = zmq.Context()
        self.memory, frames = None, None
        super().__init__(env_id, simulators, players, seed, *options)
        try:
            if hasattr(os, "memfd_create"):  # on Linux; it has no name that could be left behind
                self.memory = os.memfd_create(PREFIX + "frames")
                os.ftruncate(self.memory, simulators * players * FRAME_BYTES)
                frames = share_frames(self.memory, players)
            for group in range(groups):
                address = f"{IPC}{self.directory}/{group}"
                size = len(range(group, simulators, groups))
                of_group = None if frames is None else frames[group::groups]
                master = Master(self.context, address, size, players, frames=of_group)
                self.masters.append(master)
            self.start_missing()
        except BaseException:
            self.close()
            raise

    def seat(self, index: int) -> tuple[Master, int]:
        """Master and place of a simulator."""
        return self.masters[index % len(self.masters)], index // len(self.masters)

    def options(self, index: int) -> list[str]:
        """The address of its master, and where its frames go."""
        memory = [] if self.memory is None else [f"--memory={self.memory}"]
        return [f"--connect={self.seat(index)[0].address}", *memory]

    def inherited_files(self) -> list[int]:
        """The memory of the frames."""
        return [] if self.memory is None else [self.memory]

    def prepare(self, index: int, identity: str) -> None:
        """Keep its place for a simulator."""
        master, place = self.seat(index)
        master.admit(identity.encode(), place)

    def awaits_answer(self, index: int) -> bool:
        """Whether a simulator waits for its actions, by what its master knows.

        A message that is still on its way is not lost unless the master has read all there is: a
        simulator can be stopped after it has counted a message, and before that has left.
        """
        master, _ = self.seat(index)
        peer = master.peers[self.workers[index].identity.encode()]
        if not peer.must_play:
            return True
        is_on_its_way = self.progress.counters[index, Progress.SENT] > peer.answers
        return bool(is_on_its_way) and master.drained < self.looked_before

    def check(self) -> list[str]:
        """As Pool.check; and start what is missing."""
        events = super().check()
        self.start_missing()
        return events

    def close(self, in_use: bool = False) -> None:
        """End all simulators and remove the sockets.

        in_use: a thread may still use a master, so that the sockets cannot be closed.
        """
        with undisturbed():
            self.end_all()
            if not in_use:
                self.context.destroy(linger=0)
            if self.memory is not None:
                os.close(self.memory)
            self.memory = None
            super().close()


class VectorPlayers(Fleet):
    """`num_players` players in processes on all cores that step together.

    No process is replaced: an episode that was played in part cannot be scored.
    """

    attempts = 1

    def __init__(self, env_id: str, num_players: int, seed: int, check: Callable, *options: str):
        of_each = 1 if describe(env_id).one_per_process else -(-num_players // count_cores())
        processes = -(-num_players // of_each)
        super().__init__(env_id, processes, of_each, 1, seed, *options)
        self.num_players, self.check_run = num_players, check
        self.unused = processes * of_each - num_players  # of the last process; nobody sees them
        self.waiting: list[Message] = []

    def step(self, actions: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Act, (n,), or start (None): frames (n, 84, 84, 3), rewards (n,), is_over (n,)."""
        master = self.masters[0]
        if self.waiting:
            actions = np.pad(actions, (0, self.unused))
        for message in self.waiting:
            first = message.place * master.players
            master.reply(message, actions[first : first + master.players].tolist())
        self.waiting = []
        while len(self.waiting) < len(self.workers):
            self.waiting += master.receive(master.num_players, timeout_ms=200)
            self.check_run()
            for event in self.check():
                raise UserError(event)
        self.waiting.sort(key=lambda message: message.place)
        columns = zip(*((m.frames, m.rewards, m.is_over) for m in self.waiting), strict=True)
        return tuple(np.concatenate(column)[: self.num_players] for column in columns)


def run(a: argparse.Namespace, work: Callable[[], None]) -> int:
    """Do it; what goes wrong is one sentence on standard error. Returns the exit code."""
    try:
        work()
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code
    except zmq.ZMQError as error:
        print(f"{a.connect}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def main() -> int:
    """Run simulators."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--connect", required=True, metavar="ADDRESS", help="of a run that listens: tcp://HOST:PORT"
    )
    add("--env", required=True, help="gymnasium id of the game")
    add("--players", type=count, default=1, metavar="N", help="players a simulator steps together")
    add("--seed", type=whole, default=0, metavar="N", help="of the games")
    add("--key", metavar="FILE", help="of the run that listens")
    add("--simulator-proc", type=count, default=1, metavar="N", help="simulators that join a run")
    # What a pool tells its simulators.
    add("--identity", help=argparse.SUPPRESS)
    add("--index", type=int, help=argparse.SUPPRESS)
    add("--progress", help=argparse.SUPPRESS)
    add("--memory", type=int, help=argparse.SUPPRESS)
    add("--ipv6", type=int, default=0, help=argparse.SUPPRESS)
    add("--window", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.identity is not None:
        run_simulator(a)
    return run(a, lambda: join_run(a))


if __name__ == "__main__":
    sys.exit(main())
