#!/usr/bin/env python3
"""The simulator program, how it talks to the training process, and the books kept of each player.

    simulator.py --connect ipc:///tmp/batch-a3c-x/0 --env Breakout-v0 --identity a --players 8

A simulator steps its players together. For every step it sends one message with their new frames
and waits for one with their actions:

    simulator -> master: [rewards, is_over, finished] in msgpack | frames (players, 84, 84, 3) uint8
    master -> simulator: [action, ...] in msgpack

The rewards belong to the actions of the message before. Where is_over, the frame is already the
first of the next episode, and `finished` holds [score, length] of the one that ended. A simulator
ends when its standard input closes, which happens however its parent ends. It never imports torch.

Started by hand, on any machine, it adds players to a run that listens:

    simulator.py --connect tcp://HOST:PORT --key FILE --env Breakout-v0 --simulator-proc 32
"""

import argparse
import contextlib
import dataclasses
import fcntl
import glob
import math
import os
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgpack
import numpy as np
import zmq

from common import (
    FRAME_SHAPE,
    STATE_SHAPE,
    Player,
    UserError,
    count_cores,
    make_env,
    stack_frames,
)

FRAME_BYTES = int(np.prod(FRAME_SHAPE))
HIGH_WATER_MARK = 4  # messages per peer: a simulator has one under way at most
END_SECONDS = 2.0  # how long simulators have to end by themselves
HANG_SECONDS = 60.0  # a simulator that is silent for so long, though it was answered, is replaced
START_SECONDS = 300.0  # and one that has not said anything yet: hundreds start at once
ATTEMPTS, ATTEMPT_SECONDS = 3, 60.0  # so many failures end the run if none has lived so long
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PREFIX = "batch-a3c-"
REMOTE_SIMULATORS = 256  # most that may join a run that listens
REJOIN_SECONDS = 3.0


def on_signals(handler: Callable, signals=SIGNALS) -> None:
    """Let signals call `handler`, but for SIGHUP where it is ignored: under nohup."""
    for signum in signals:
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, handler)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Let Ctrl-C and its like wait for the end of a clean-up (in the main thread)."""
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
        process.stdin.close()
    deadline = time.monotonic() + seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.wait()


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


def simulate(a: argparse.Namespace) -> None:
    """Play until standard input is closed, or until a run on another machine is lost."""
    threading.Thread(target=end_with_parent, args=(os._exit, 0), daemon=True).start()
    num_players, monitor = a.players, None
    players = [Player(make_env(a.env, a.window)) for _ in range(num_players)]
    seeds = np.random.SeedSequence((a.seed, *a.identity.encode())).generate_state(num_players)
    socket = zmq.Context().socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, a.identity.encode())
    socket.set_hwm(HIGH_WATER_MARK)
    socket.setsockopt(zmq.LINGER, 0)
    if a.key:
        monitor = join(socket, read_key(a.key))
    socket.connect(a.connect)

    frames = np.stack([p.reset(seed=int(s)) for p, s in zip(players, seeds, strict=True)])
    rewards, is_over, finished = [0.0] * num_players, [False] * num_players, []
    while True:
        socket.send(msgpack.packb([rewards, is_over, finished]), zmq.SNDMORE)
        socket.send(frames)
        finished = []
        while monitor and not socket.poll(1000):
            if monitor.poll(0):
                raise UserError(f"{a.connect} ended the connection, or does not know the key")
        for i, action in enumerate(msgpack.unpackb(socket.recv())):
            player = players[i]
            frames[i], rewards[i], is_over[i] = player.step(action)
            if is_over[i]:
                finished.append([player.score, player.length])
                frames[i] = player.reset()


class Message(NamedTuple):
    """One step of all players of a simulator."""

    identity: bytes
    is_first: bool  # of this simulator
    place: int  # of the simulator among those of its master
    frames: np.ndarray  # (k, 84, 84, 3) uint8
    rewards: list[float]  # (k,), as the game counts them
    is_over: list[bool]  # (k,)
    finished: list  # [score, length] of every episode that ended


class Master:
    """The end of the line of a group of simulators: one ROUTER socket, used by one thread.

    A simulator has a place among those of its master, and an identity of its own: one that takes
    the place of another has another identity. With a key the master is open: whoever has the key
    gets a place, and keeps it until it is silent for HANG_SECONDS and another one needs it.
    """

    def __init__(self, context: zmq.Context, address: str, simulators: int, players: int, key=None):
        self.address, self.players, self.is_open = address, players, key is not None
        self.places: dict[bytes, int] = {}
        self.num_players = simulators * players
        self.connected: set[bytes] = set()
        self.answered = [math.inf] * simulators  # since when each has had to play; inf: it sent
        self.drained = 0.0  # when the socket was last seen to be empty
        self.dropped = 0  # messages that no simulator of this master can have sent
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
        self.answered[place] = time.monotonic()
        self.places = {i: p for i, p in self.places.items() if p != place} | {identity: place}

    def find_place(self, identity: bytes) -> int | None:
        """The place of a simulator; of one that is new to an open master, a vacant one."""
        place = self.places.get(identity)
        if place is None and self.is_open:
            taken = set(self.places.values())
            lost = [self.drained - answered > HANG_SECONDS for answered in self.answered]
            vacant = [p for p, is_lost in enumerate(lost) if p not in taken or is_lost]
            place = min(vacant, key=lambda p: p in taken, default=None)
            if place is not None:
                self.admit(identity, place)
        return place

    def receive(self, most: int, timeout_ms: int) -> list[Message]:
        """What has arrived, up to `most` players (one message at least); waits for the first."""
        messages: list[Message] = []
        if not self.socket.poll(0):
            self.drained = time.monotonic()
            self.socket.poll(timeout_ms)
        for _ in range(max(1, most // self.players)):
            try:
                message = self.parse(self.socket.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                self.drained = time.monotonic()
                break
            if message is None:
                self.dropped += 1
            else:
                messages.append(message)
        return messages

    def parse(self, parts: list[bytes]) -> Message | None:
        """The message in these parts, or None if they are not one of a known simulator."""
        k = self.players
        if len(parts) != 3 or not (self.is_open or parts[0] in self.places):
            return None
        identity, header, pixels = parts
        try:
            rewards, is_over, finished = msgpack.unpackb(header)
            rewards, is_over = [float(r) for r in rewards], [bool(over) for over in is_over]
            finished = [(float(score), int(length)) for score, length in finished]
        except (ValueError, TypeError, OverflowError, msgpack.UnpackException):
            return None
        fits = len(rewards) == len(is_over) == k and len(finished) == sum(is_over)
        if not fits or len(pixels) != k * FRAME_BYTES or not math.isfinite(sum(rewards)):
            return None
        place = self.find_place(identity)
        if place is None:
            return None
        is_first = identity not in self.connected
        self.connected.add(identity)
        self.answered[place] = math.inf
        frames = np.frombuffer(pixels, np.uint8).reshape(k, *FRAME_SHAPE)
        return Message(identity, is_first, place, frames, rewards, is_over, finished)

    def reply(self, message: Message, actions: list[int]) -> None:
        """Send the actions (k,) of the players of `message`."""
        self.answered[message.place] = time.monotonic()
        self.socket.send_multipart([message.identity, msgpack.packb(actions)])


class Experience(NamedTuple):
    """A state to train on, with the n-step return of what was done in it."""

    state: np.ndarray  # a view of the books, valid until the player's next state but one
    action: int
    action_prob: float
    future_reward: float
    version: int  # of the weights that chose the action


@dataclasses.dataclass(slots=True)
class Step:
    """A state whose return is not known yet."""

    state: np.ndarray
    action: int
    action_prob: float
    value: float
    version: int
    reward: float = 0.0


class Books:
    """What is remembered of the players of a master until their n-step returns are known.

    Mnih et al. 2016, algorithm S3: R = r + gamma * R, from 0 at the end of an episode, otherwise
    from the value that was predicted for the newest state. Rewards are clipped to [-1, 1].
    """

    def __init__(self, simulators: int, players: int, local_time_max: int, gamma: float):
        self.players, self.local_time_max, self.gamma = players, local_time_max, gamma
        self.steps: list[list[Step]] = [[] for _ in range(simulators * players)]
        # A ring per simulator: the remembered states (local_time_max + 1) and the newest.
        shape = (simulators, local_time_max + 2, players, *STATE_SHAPE)
        self.states = np.zeros(shape, np.uint8)
        self.newest = [0] * simulators  # places in the rings

    def observe(self, message: Message) -> list[list[Experience]]:
        """Enter rewards where they belong, and the new states; returns finished segments.

        Of a player's first message reward and is_over belong to nothing and are ignored; what is
        remembered of a simulator that was here before is dropped.
        """
        first, segments, fresh = message.place * self.players, [], []
        if message.is_first:
            self.steps[first : first + self.players] = [[] for _ in range(self.players)]
        for player, reward in enumerate(message.rewards, first):
            steps, is_over = self.steps[player], message.is_over[player - first]
            fresh.append(is_over or not steps)
            if steps:
                steps[-1].reward = min(max(reward, -1.0), 1.0)
            if steps and is_over:
                segments.append(self.segment(steps, 0.0))
                self.steps[player] = []
            elif len(steps) > self.local_time_max:
                newest = steps.pop()
                segments.append(self.segment(steps, newest.value))
                self.steps[player] = [newest]
        ring, previous = self.states[message.place], self.newest[message.place]
        following = self.newest[message.place] = (previous + 1) % len(ring)
        stack_frames(ring[previous], message.frames, fresh, ring[following])
        return segments

    def segment(self, steps: list[Step], future_reward: float) -> list[Experience]:
        """These steps with their returns, newest first; future_reward: what follows the newest."""
        segment = []
        for s in reversed(steps):
            future_reward = s.reward + self.gamma * future_reward
            done = Experience(s.state, s.action, s.action_prob, future_reward, s.version)
            segment.append(done)
        return segment

    def newest_states(self, place: int) -> np.ndarray:
        """The states (k, 84, 84, 12) of a simulator's players that wait for an action."""
        return self.states[place, self.newest[place]]

    def decide(self, place: int, actions, action_probs, values, version: int) -> None:
        """Remember what was chosen and predicted in the newest states, (k,) each."""
        rows = zip(self.newest_states(place), actions, action_probs, values, strict=True)
        for player, row in enumerate(rows, place * self.players):
            self.steps[player].append(Step(*row, version))


def sweep() -> None:
    """Remove the socket directories of runs that were killed: nobody holds their lock."""
    for path in glob.glob(f"{tempfile.gettempdir()}/{PREFIX}*"):
        with contextlib.suppress(OSError):  # of others, or gone
            directory = os.open(path, os.O_RDONLY)
            try:
                if time.time() - os.stat(directory).st_mtime > 10:  # not one that starts just now
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
        need = 4 * simulators + 200  # a pipe and a socket for each, and some to spare
        if hard != resource.RLIM_INFINITY and need > hard:
            limit = f"ulimit -Hn is {hard}"
            raise UserError(f"{simulators} simulators need {need} open files; {limit}", 2)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, need), hard))
        self.directory = tempfile.mkdtemp(prefix=PREFIX)  # mode 0700: nobody else connects
        self.lock = os.open(self.directory, os.O_RDONLY)
        self.processes: list[subprocess.Popen] = []
        self.masters: list[Master] = []
        self.births = [0] * simulators
        self.born = [0.0] * simulators  # when the present ones were started
        self.failures = [0] * simulators  # since one has lived long
        self.context = zmq.Context()
        self.options = ["--env", env_id, "--players", str(players), "--seed", str(seed), *options]
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX)
            for group in range(groups):
                address = f"ipc://{self.directory}/{group}"
                size = len(range(group, simulators, groups))
                self.masters.append(Master(self.context, address, size, players))
            for index in range(simulators):
                self.processes.append(self.start(index))
        except BaseException:
            self.close()
            raise

    def seat(self, index: int) -> tuple[Master, int]:
        """Master and place of a simulator."""
        return self.masters[index % len(self.masters)], index // len(self.masters)

    def identity(self, index: int) -> str:
        """What a simulator calls itself: those that replace it have other names."""
        return f"simulator-{index}.{self.births[index]}"

    def start(self, index: int) -> subprocess.Popen:
        """Start a simulator; its output goes to a file, its life hangs on a pipe."""
        master, place = self.seat(index)
        self.births[index] += 1
        self.born[index] = time.monotonic()
        identity = self.identity(index)
        master.admit(identity.encode(), place)
        command = [sys.executable, os.path.abspath(__file__), "--connect", master.address]
        command += ["--identity", identity, *self.options]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        with open(f"{self.directory}/{index}.log", "wb") as output:
            streams = {"stdin": subprocess.PIPE, "stdout": output, "stderr": output}
            # A session of its own: Ctrl-C is for the training process.
            return subprocess.Popen(command, env=environment, start_new_session=True, **streams)

    def is_connected(self, index: int) -> bool:
        """Whether a simulator has sent something."""
        return self.identity(index).encode() in self.seat(index)[0].connected

    @property
    def connected(self) -> int:
        """How many simulators have sent something."""
        return sum(map(self.is_connected, range(len(self.processes))))

    def check(self) -> list[str]:
        """Replace simulators that have ended or hang; returns a sentence for each.

        UserError with its last words for one that fails again and again. One that played and was
        killed from outside has not failed.
        """
        events = []
        for index, process in enumerate(self.processes):
            master, place = self.seat(index)
            patience = HANG_SECONDS if self.is_connected(index) else START_SECONDS
            silence = master.drained - master.answered[place]
            if process.poll() is None and silence <= patience:
                continue
            how = f"simulator {index} " + self.bury(index, process, silence)
            killed = process.returncode in (-signal.SIGKILL, -signal.SIGTERM)
            lived = time.monotonic() - self.born[index]
            if self.is_connected(index) and lived >= ATTEMPT_SECONDS:
                self.failures[index] = 0
            if not killed or not self.is_connected(index):
                self.failures[index] += 1
                if self.failures[index] >= self.attempts:
                    raise UserError(how)
            self.processes[index] = self.start(index)
            events.append(how)
        return events

    def bury(self, index: int, process: subprocess.Popen, silence: float) -> str:
        """End a simulator that hangs, if it has not ended yet; returns how it ended."""
        code = process.poll()
        end([process], 0.0)
        if code is None:
            return f"was silent for {silence:.0f} seconds"
        with open(f"{self.directory}/{index}.log", errors="replace") as file:
            words = [line.strip() for line in file if line.strip()]
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"{how}: {words[-1] if words else 'no message'}"

    def close(self) -> None:
        """End all simulators and remove the sockets; no thread may use the masters any more."""
        with undisturbed():
            end(self.processes, END_SECONDS)
            self.context.destroy(linger=0)
            shutil.rmtree(self.directory, ignore_errors=True)
            os.close(self.lock)


class VectorPlayers(Fleet):
    """At least `num_players` players in processes on all cores that step together.

    None is replaced: an episode that was played in part cannot be scored.
    """

    attempts = 1

    def __init__(self, env_id: str, num_players: int, seed: int, check: Callable, *options):
        processes = min(num_players, count_cores())
        super().__init__(env_id, processes, -(-num_players // processes), 1, seed, *options)
        self.num_players, self.check_run = self.masters[0].num_players, check
        self.waiting: list[Message] = []

    def step(self, actions: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Act, (n,), or start (None): frames (n, 84, 84, 3), rewards (n,), is_over (n,)."""
        master = self.masters[0]
        for message in self.waiting:
            first = message.place * master.players
            master.reply(message, actions[first : first + master.players].tolist())
        self.waiting = []
        while len(self.waiting) < len(self.processes):
            self.waiting += master.receive(self.num_players, timeout_ms=200)
            self.check_run()
            for event in self.check():
                raise UserError(event)
        self.waiting.sort(key=lambda message: message.place)
        columns = zip(*((m.frames, m.rewards, m.is_over) for m in self.waiting), strict=True)
        return tuple(np.concatenate(column) for column in columns)


def add_players(a: argparse.Namespace) -> None:
    """Keep `simulator_proc` simulators in a run elsewhere, and start those anew that lost it."""
    on_signals(lambda signum, frame: sys.exit(128 + signum), SIGNALS[1:])
    if a.key is None:
        raise UserError("--key FILE is needed to join a run", 2)
    read_key(a.key)
    make_env(a.env).close()
    command = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], "--identity"]
    processes: list[subprocess.Popen] = []
    try:
        while True:
            processes = [process for process in processes if process.poll() is None]
            while len(processes) < a.simulator_proc:
                name = secrets.token_hex(16)  # which no other simulator of the run has
                processes.append(subprocess.Popen([*command, name], stdin=subprocess.PIPE))
            time.sleep(REJOIN_SECONDS)
    finally:
        end(processes, END_SECONDS)


def main() -> int:
    """Run simulators; what goes wrong is one sentence on standard error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--connect", required=True, help="address of the master")
    parser.add_argument("--env", required=True, help="gymnasium id of the game")
    parser.add_argument("--players", type=int, default=1, help="players a simulator steps together")
    parser.add_argument("--seed", type=int, default=0, help="of the run")
    parser.add_argument("--key", metavar="FILE", help="of the run that listens")
    parser.add_argument("--simulator-proc", type=int, default=1, help="simulators that join a run")
    parser.add_argument("--window", action="store_true", help="show the game, at its speed")
    parser.add_argument("--identity", help="what the master knows it by; for one that a run starts")
    a = parser.parse_args()
    try:
        simulate(a) if a.identity else add_players(a)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code
    except zmq.ZMQError as error:
        print(f"{a.connect}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
