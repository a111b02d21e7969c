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

A run starts one process of this program, which forks all of its simulators: see `serve_run`.

Started by hand, on any machine, it adds players to a run that listens:

    simulator.py --connect tcp://HOST:PORT --key FILE --env Breakout-v0 --simulator-proc 32
"""

import argparse
import contextlib
import fcntl
import gc
import itertools
import math
import mmap
import os
import resource
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgpack
import numpy as np
import zmq

from common import (
    FRAME_HISTORY,
    FRAME_SHAPE,
    Player,
    UserError,
    count_cores,
    make_env,
)

FRAME_BYTES = int(np.prod(FRAME_SHAPE))
HIGH_WATER_MARK = 4  # messages per peer: a simulator has one under way at most
END_SECONDS = 2.0  # how long simulators have to end by themselves
HANG_SECONDS = 60.0  # a simulator that is silent for so long, though it was answered, is replaced
START_SECONDS = 300.0  # and one that has not said anything yet: hundreds start at once
ATTEMPTS, ATTEMPT_SECONDS = 3, 60.0  # so many failures end the run if none has lived so long
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PREFIX, IPC = "batch-a3c-", "ipc://"
REMOTE_SIMULATORS = 256  # most that may join a run that listens
REJOIN_SECONDS = 3.0
REAP_SECONDS = 0.1  # until one that has ended is noticed
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


def simulate(a: argparse.Namespace, envs: list, identity: str, address: str, shared=None) -> None:
    """Play until standard input is closed, or until a run on another machine is lost.

    shared: memory (players, 84, 84, 3) for the frames, None where they have to travel.
    """
    threading.Thread(target=end_with_parent, args=(os._exit, 0), daemon=True).start()
    num_players, monitor = a.players, None
    players = [Player(env) for env in envs]
    seeds = np.random.SeedSequence((a.seed, *identity.encode())).generate_state(num_players)
    np.random.seed(seeds)  # noqa: NPY002 - a game may use it, and forks have the same
    socket = zmq.Context().socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, identity.encode())
    socket.set_hwm(HIGH_WATER_MARK)
    socket.setsockopt(zmq.LINGER, 0)
    if a.key:
        monitor = join(socket, read_key(a.key))
    socket.connect(address)

    frames = np.empty((num_players, *FRAME_SHAPE), np.uint8) if shared is None else shared
    frames[:] = [p.reset(seed=int(s)) for p, s in zip(players, seeds, strict=True)]
    rewards, is_over, finished = [0.0] * num_players, [False] * num_players, []
    while True:
        header = msgpack.packb([rewards, is_over, finished])
        socket.send_multipart([header, frames] if shared is None else [header])
        finished = []
        while monitor and not socket.poll(1000):
            if monitor.poll(0):
                raise UserError(f"{address} ended the connection, or does not know the key")
        actions = msgpack.unpackb(socket.recv())
        if actions is None:
            reason = f"is it another game than {a.env}, or does it need other --players?"
            raise UserError(f"{address} has no place for this simulator: {reason}")
        for i, action in enumerate(actions):
            player = players[i]
            frames[i], rewards[i], is_over[i] = player.step(action)
            if is_over[i]:
                finished.append([player.score, player.length])
                frames[i] = player.reset()


class Nursery:
    """Forks simulators from a process that has loaded all they need: they start at once.

    They end with it, however it ends: their standard input is a pipe that it holds open.
    """

    def __init__(self, a: argparse.Namespace):
        self.a, self.life = a, os.pipe()
        self.envs = [make_env(a.env) for _ in range(a.players)]
        self.frames = None if a.memory is None else share_frames(a.memory, a.players)
        self.children: dict[int, str] = {}  # identities by process
        gc.freeze()  # what is there stays shared memory

    def fork(self, identity: str, address: str, index: int = 0, log: str | None = None) -> int:
        """Start a simulator, which writes to `log`; returns its process."""
        shared = None if self.frames is None else self.frames[index]
        pid = os.fork()
        if pid:
            self.children[pid] = identity
            return pid
        try:
            for signum in SIGNALS:  # what reaches a terminal is for its parent
                signal.signal(
                    signum, signal.SIG_DFL if signum == signal.SIGTERM else signal.SIG_IGN
                )
            os.dup2(self.life[0], 0)
            os.close(self.life[1])
            if log is not None:
                with contextlib.suppress(OSError):  # on a full disk: into that of this process
                    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                    os.dup2(output, 1)
                    os.dup2(output, 2)
            code = run(self.a, lambda: simulate(self.a, self.envs, identity, address, shared))
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        os._exit(code)

    def reap(self) -> Iterator[tuple[str, int, int]]:
        """Identity, process and exit code of those that have ended."""
        while self.children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            if identity := self.children.pop(pid, None):
                yield identity, pid, os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        """End all of them."""
        for pid in self.children:
            kill(pid)
        for pid in self.children:
            os.waitpid(pid, 0)


def serve_run(a: argparse.Namespace) -> None:
    """Start a simulator for each line `identity master index` of standard input, until it closes.

    Standard output says `identity process` of each that starts and `identity process code` of each
    that ends. A window belongs to the process that opens it: this one.
    """
    report = os.dup(1)
    os.dup2(2, 1)  # whatever a game prints goes to the log
    if a.window:
        identity, master, _ = sys.stdin.readline().split()
        shared = None if a.memory is None else share_frames(a.memory, 1)[0]
        envs = [make_env(a.env, window=True)]
        return simulate(a, envs, identity, f"{a.connect}/{master}", shared)
    nursery, lines = Nursery(a), b""
    with contextlib.closing(nursery), contextlib.suppress(BrokenPipeError):
        while True:
            if select.select([0], [], [], REAP_SECONDS)[0]:
                if not (data := os.read(0, 65536)):
                    break
                *whole, lines = (lines + data).split(b"\n")
                for line in whole:
                    identity, master, index = line.decode().split()
                    address, log = f"{a.connect}/{master}", f"{a.connect[len(IPC) :]}/{index}.log"
                    pid = nursery.fork(identity, address, int(index), log)
                    os.write(report, f"{identity} {pid}\n".encode())
            for identity, pid, code in nursery.reap():
                os.write(report, f"{identity} {pid} {code}\n".encode())


def join_run(a: argparse.Namespace) -> None:
    """Keep `simulator_proc` simulators in a run elsewhere, and start those anew that lost it."""
    on_signals(lambda signum, frame: sys.exit(128 + signum), SIGNALS[1:])
    if a.key is None:
        raise UserError("--key FILE is needed to join a run", 2)
    read_key(a.key)
    if min(a.players, a.simulator_proc) < 1:
        raise UserError("--players and --simulator-proc are counts from 1", 2)
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(a.connect)  # is it an address?
    with contextlib.closing(Nursery(a)) as nursery:
        while True:
            list(nursery.reap())
            while len(nursery.children) < a.simulator_proc:
                identity = f"{a.env} {secrets.token_hex(16)}"  # which nobody else calls itself
                nursery.fork(identity, a.connect)
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
        self.places: dict[bytes, int] = {}
        self.num_places, self.num_players = simulators, simulators * players
        self.connected: set[bytes] = set()
        self.joined = 0  # simulators that an open master has given a place
        self.answered: dict[bytes, float] = {}  # since when each has had to play; none: it sent
        self.drained = 0.0  # when the socket was last seen to be empty
        self.clock, self.looked = 0.0, time.monotonic()  # stands still while this process does
        self.dropped = 0  # messages that no simulator of this master can have sent
        self.arrived: list[Message] = []  # and not been handed out
        self.socket = context.socket(zmq.ROUTER)
        self.socket.set_hwm(HIGH_WATER_MARK)  # before bind: later it would do nothing
        self.socket.setsockopt(zmq.MAXMSGSIZE, players * FRAME_BYTES + 65536)
        if key:
            self.socket.curve_server = True
            self.socket.curve_publickey, self.socket.curve_secretkey = key
            self.socket.setsockopt(zmq.HEARTBEAT_IVL, 5000)
        try:
            self.socket.bind(address)
        except zmq.ZMQError as error:  # of a long TMPDIR, for example
            raise UserError(f"cannot listen on {address}: {error}") from error

    def admit(self, identity: bytes, place: int) -> None:
        """From now on `identity` has this place, and nobody else."""
        self.connected.discard(identity)
        self.answered[identity] = self.clock
        self.places = {i: p for i, p in self.places.items() if p != place} | {identity: place}

    def silence(self, identity: bytes) -> float:
        """Seconds that a simulator has had to play without sending anything."""
        return self.drained - self.answered.get(identity, math.inf)

    def find_place(self, identity: bytes) -> int | None:
        """The place of a simulator; of one that is new to an open master, a vacant one."""
        place = self.places.get(identity)
        if place is None and self.is_open:
            lost = [p for i, p in self.places.items() if self.silence(i) > HANG_SECONDS]
            vacant = set(range(self.num_places)) - set(self.places.values())
            place = next(iter([*lost, *vacant]), None)
            if place is not None:
                self.admit(identity, place)
                self.joined += 1
        return place

    def receive(self, most: int, timeout_ms: int) -> list[Message]:
        """What has arrived, up to `most` players (one message at least); waits for the first."""
        if not self.arrived:
            self.socket.poll(timeout_ms)
        now = time.monotonic()
        self.clock, self.looked = self.clock + min(1.0, now - self.looked), now
        for _ in range(MOST_MESSAGES):
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                self.drained = self.clock
                break
            message = self.parse(parts)
            if message is not None:
                self.arrived.append(message)
                continue
            if parts[0] not in self.connected:  # otherwise a late one, of one that was replaced
                self.dropped += 1
            if self.is_open and parts[0] not in self.places:
                self.socket.send_multipart([parts[0], msgpack.packb(None)])
        # What a simulator has sent whose place another one has taken is of no use.
        self.arrived = [m for m in self.arrived if self.places.get(m.identity) == m.place]
        count = max(1, most // self.players)
        messages, self.arrived = self.arrived[:count], self.arrived[count:]
        return messages

    def parse(self, parts: list[bytes]) -> Message | None:
        """The message in these parts, or None if they are not one of a known simulator."""
        k = self.players
        if len(parts) < 2 or not (self.is_open or parts[0] in self.places):
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
        if not fits or not math.isfinite(sum(rewards)):
            return None
        place = self.find_place(identity)
        if place is None or self.answered.pop(identity, None) is None:  # it has not been answered
            return None
        is_first = identity not in self.connected
        self.connected.add(identity)
        if self.frames is None:
            frames = np.frombuffer(pixels[0], np.uint8).reshape(k, *FRAME_SHAPE)
        else:
            frames = self.frames[place]
        return Message(identity, is_first, place, frames, rewards, is_over, finished)

    def reply(self, message: Message, actions: list[int]) -> None:
        """Send the actions (k,) of the players of `message`."""
        if message.identity in self.places:
            self.answered[message.identity] = self.clock
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


class Fleet:
    """Simulator processes, in groups with a master each, and their private socket directory.

    Simulator i belongs to group i % groups; each has `players` players. options: further ones of
    the simulator program. `check` replaces those that end or hang.
    """

    attempts = ATTEMPTS

    def __init__(
        self, env_id: str, simulators: int, players: int, groups: int, seed: int, *options
    ):
        sweep()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        need = 4 * simulators + 200  # its socket, with some to spare
        if hard != resource.RLIM_INFINITY and need > hard:
            limit = f"ulimit -Hn is {hard}"
            raise UserError(f"{simulators} simulators need {need} open files; {limit}", 2)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, need), hard))
        self.directory = tempfile.mkdtemp(prefix=PREFIX)  # mode 0700: nobody else connects
        self.lock = os.open(self.directory, os.O_RDONLY)
        self.masters: list[Master] = []
        self.identities = [""] * simulators
        self.lives: dict[str, list[int]] = {}  # process, and exit code if it has ended
        self.born = [0.0] * simulators  # when the present ones were started
        self.failures = [0] * simulators  # since one has lived long
        self.context = zmq.Context()
        self.command = [sys.executable, os.path.abspath(__file__), "--env", env_id, *options]
        self.command += ["--players", str(players), "--seed", str(seed)]
        self.command += ["--connect", IPC + self.directory]
        self.memory, frames = None, None
        if hasattr(os, "memfd_create"):  # on Linux; it has no name that could be left behind
            self.memory = os.memfd_create(PREFIX + "frames")
            os.ftruncate(self.memory, simulators * players * FRAME_BYTES)
            self.command += ["--memory", str(self.memory)]
            frames = share_frames(self.memory, players)
        self.births = itertools.count()
        self.nursery: subprocess.Popen | None = None
        self.exit_code: int | None = None  # of the process behind the simulators, if it has ended
        try:
            with contextlib.suppress(OSError):  # a file system without locks: nobody sweeps there
                fcntl.flock(self.lock, fcntl.LOCK_EX)
            for group in range(groups):
                address = f"{IPC}{self.directory}/{group}"
                size = len(range(group, simulators, groups))
                of_group = None if frames is None else frames[group::groups]
                master = Master(self.context, address, size, players, frames=of_group)
                self.masters.append(master)
            self.start_all()
        except BaseException:
            self.close()
            raise

    def start_all(self) -> None:
        """Start the simulators, and the process that forks them."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        if self.memory is not None:
            pipes["pass_fds"] = [self.memory]
        with open(f"{self.directory}/log", "wb") as log:
            # A session of its own: Ctrl-C is for the training process.
            self.nursery = subprocess.Popen(
                self.command, env=environment, stderr=log, start_new_session=True, **pipes
            )
        os.set_blocking(self.nursery.stdout.fileno(), False)
        self.heard = b""
        for index in range(len(self.identities)):
            self.start(index)

    def seat(self, index: int) -> tuple[Master, int]:
        """Master and place of a simulator."""
        return self.masters[index % len(self.masters)], index // len(self.masters)

    def start(self, index: int) -> None:
        """Start a simulator; those that replace it will call themselves otherwise."""
        master, place = self.seat(index)
        self.lives.pop(self.identities[index], None)
        self.identities[index] = identity = f"simulator-{index}.{next(self.births)}"
        self.born[index] = time.monotonic()
        master.admit(identity.encode(), place)
        line = f"{identity} {index % len(self.masters)} {index}\n"
        with contextlib.suppress(BrokenPipeError):  # check will see it
            self.nursery.stdin.write(line.encode())
            self.nursery.stdin.flush()

    def is_connected(self, index: int) -> bool:
        """Whether a simulator has sent something."""
        return self.identities[index].encode() in self.seat(index)[0].connected

    @property
    def connected(self) -> int:
        """How many simulators have sent something."""
        return sum(map(self.is_connected, range(len(self.identities))))

    def hear(self) -> None:
        """Take in what is said of the lives of simulators."""
        data = self.nursery.stdout.read() or b""
        *lines, self.heard = (self.heard + data).split(b"\n")
        for line in lines:
            identity, *numbers = line.decode().split()
            if identity in self.identities:
                self.lives[identity] = [int(number) for number in numbers]

    def check(self) -> list[str]:
        """Replace simulators that have ended or hang; returns a sentence for each.

        UserError with its last words for one that fails again and again. One that played and was
        killed from outside has not failed.
        """
        self.hear()
        if (code := self.nursery.poll()) is not None:
            how = f"the process behind the simulators {self.last_words('log', code)}"
            self.exit_code = code
            if code not in KILLED:
                raise UserError(how)
            self.end()
            self.start_all()
            return [how]
        events = []
        for index, identity in enumerate(self.identities):
            master, _ = self.seat(index)
            pid, code = (*self.lives.get(identity, []), None, None)[:2]
            patience = HANG_SECONDS if self.is_connected(index) else START_SECONDS
            silence = master.silence(identity.encode())
            if code is None and silence <= patience:
                continue
            if code is None:
                how = f"was silent for {silence:.0f} seconds"
                if pid is not None:
                    kill(pid)
            else:
                how = self.last_words(f"{index}.log", code)
            how = f"simulator {index} {how}"
            lived = time.monotonic() - self.born[index]
            if self.is_connected(index) and lived >= ATTEMPT_SECONDS:
                self.failures[index] = 0
            if code not in KILLED or not self.is_connected(index):
                self.failures[index] += 1
                if self.failures[index] >= self.attempts:
                    raise UserError(how)
            self.start(index)
            events.append(how)
        return events

    def last_words(self, log: str, code: int) -> str:
        """How a process ended, and what it said."""
        words = []
        with (
            contextlib.suppress(OSError),
            open(f"{self.directory}/{log}", errors="replace") as file,
        ):
            words = [line.strip() for line in file if line.strip()]
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"{how}: {words[-1] if words else 'no message'}"

    def end(self) -> None:
        """End all simulators."""
        end([self.nursery], END_SECONDS)
        self.hear()
        for pid, *code in self.lives.values():
            if self.nursery.returncode and not code:  # it was killed, and could not end them
                kill(pid)
        self.nursery.stdout.close()
        self.nursery = None

    def close(self) -> None:
        """End all simulators and remove the sockets; no thread may use the masters any more."""
        with undisturbed():
            if self.nursery is not None:
                self.end()
            self.context.destroy(linger=0)
            shutil.rmtree(self.directory, ignore_errors=True)
            os.close(self.lock)
            if self.memory is not None:
                os.close(self.memory)


class VectorPlayers(Fleet):
    """`num_players` players in processes on all cores that step together.

    No process is replaced: an episode that was played in part cannot be scored.
    """

    attempts = 1

    def __init__(self, env_id: str, num_players: int, seed: int, check: Callable, *options):
        of_each = -(-num_players // count_cores())
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
        while len(self.waiting) < len(self.identities):
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
    parser.add_argument("--connect", required=True, help="address of a run that listens")
    parser.add_argument("--env", required=True, help="gymnasium id of the game")
    parser.add_argument("--players", type=int, default=1, help="players a simulator steps together")
    parser.add_argument("--seed", type=int, default=0, help="of the run")
    parser.add_argument("--key", metavar="FILE", help="of the run that listens")
    parser.add_argument("--simulator-proc", type=int, default=1, help="simulators that join a run")
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)  # of the parent
    parser.add_argument("--window", action="store_true", help="show the game, at its speed")
    a = parser.parse_args()
    return run(a, lambda: serve_run(a) if a.connect.startswith(IPC) else join_run(a))


if __name__ == "__main__":
    sys.exit(main())
