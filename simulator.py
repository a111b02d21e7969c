#!/usr/bin/env python3
"""The simulator program, how it talks to the training process, and the books kept of each player.

    simulator.py --connect ipc:///tmp/batch-a3c-x/0 --env Breakout-v0 --index 0 --players 8

A simulator steps its players together. For every step it sends one message with their new frames
and waits for one with their actions:

    simulator -> master: [rewards, is_over, finished] in msgpack | frames (players, 84, 84, 3) uint8
    master -> simulator: [action, ...] in msgpack

The rewards belong to the actions of the message before. Where is_over, the frame is already the
first of the next episode, and `finished` holds [score, length] of the one that ended. A simulator
ends when its standard input closes, which happens however its parent ends. It never imports torch.
"""

import argparse
import contextlib
import os
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

from common import FRAME_SHAPE, STATE_SHAPE, Player, UserError, make_env, stack_frame

FRAME_BYTES = int(np.prod(FRAME_SHAPE))
HIGH_WATER_MARK = 4  # messages per peer: a simulator has one under way at most
END_SECONDS = 2.0  # how long simulators have to end by themselves


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Let Ctrl-C and its like wait for the end of a clean-up (in the main thread)."""
    signals, caught = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP), []
    handlers = [signal.signal(s, lambda signum, frame: caught.append(signum)) for s in signals]
    try:
        yield
    finally:
        for signum, handler in zip(signals, handlers, strict=True):
            signal.signal(signum, handler)
        for signum in caught[:1]:
            signal.raise_signal(signum)


def end_with_parent() -> None:
    """Wait until standard input is closed, and end this process, whatever it is doing."""
    while os.read(0, 1024):
        pass
    os._exit(0)


def simulate(address: str, env_id: str, index: int, num_players: int, seed: int) -> None:
    """Play until standard input is closed."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    players = [Player(make_env(env_id)) for _ in range(num_players)]
    seeds = np.random.SeedSequence((seed, index)).generate_state(num_players)
    socket = zmq.Context().socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, b"simulator-%d" % index)
    socket.set_hwm(HIGH_WATER_MARK)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(address)

    frames = np.stack([p.reset(seed=int(s)) for p, s in zip(players, seeds, strict=True)])
    rewards, is_over, finished = [0.0] * num_players, [False] * num_players, []
    while True:
        socket.send(msgpack.packb([rewards, is_over, finished]), zmq.SNDMORE)
        socket.send(frames)
        finished = []
        for i, action in enumerate(msgpack.unpackb(socket.recv())):
            player = players[i]
            frames[i], rewards[i], is_over[i] = player.step(action)
            if is_over[i]:
                finished.append([player.score, player.length])
                frames[i] = player.reset()


class Message(NamedTuple):
    """One step of all players of a simulator."""

    identity: bytes
    players: slice  # their places among the players of this master
    frames: np.ndarray  # (k, 84, 84, 3) uint8
    rewards: np.ndarray  # (k,) float64, as the game counts them
    is_over: np.ndarray  # (k,) bool
    finished: list  # [score, length] of every episode that ended


class Master:
    """The end of the line of a group of simulators: one ROUTER socket, used by one thread.

    simulators: their indices; each has `players` players, which this master numbers from 0.
    """

    def __init__(self, context: zmq.Context, address: str, simulators: list[int], players: int):
        self.places = {b"simulator-%d" % index: place for place, index in enumerate(simulators)}
        self.players = players
        self.num_players = len(simulators) * players
        self.connected: set[bytes] = set()
        self.dropped = 0  # messages that no simulator of this master can have sent
        self.socket = context.socket(zmq.ROUTER)
        self.socket.set_hwm(HIGH_WATER_MARK)  # before bind: later it would do nothing
        self.socket.setsockopt(zmq.MAXMSGSIZE, players * FRAME_BYTES + 65536)
        self.socket.bind(address)

    def receive(self, most: int, timeout_ms: int) -> list[Message]:
        """What has arrived, up to `most` players (one message at least); waits for the first."""
        messages: list[Message] = []
        if self.socket.poll(timeout_ms):
            for _ in range(max(1, most // self.players)):
                try:
                    message = self.parse(self.socket.recv_multipart(zmq.NOBLOCK))
                except zmq.Again:
                    break
                if message is None:
                    self.dropped += 1
                else:
                    messages.append(message)
        return messages

    def parse(self, parts: list[bytes]) -> Message | None:
        """The message in these parts, or None if they are not one of a known simulator."""
        if len(parts) != 3 or parts[0] not in self.places:
            return None
        identity, header, pixels = parts
        k, first = self.players, self.places[identity] * self.players
        try:
            rewards, is_over, finished = msgpack.unpackb(header)
            rewards, is_over = np.array(rewards, np.float64), np.array(is_over, bool)
            finished = [(float(score), int(length)) for score, length in finished]
        except (ValueError, TypeError, OverflowError, msgpack.UnpackException):
            return None
        fits = rewards.shape == is_over.shape == (k,) and np.isfinite(rewards).all()
        if not fits or len(finished) != is_over.sum() or len(pixels) != k * FRAME_BYTES:
            return None
        self.connected.add(identity)
        frames = np.frombuffer(pixels, np.uint8).reshape(k, *FRAME_SHAPE)
        players = slice(first, first + k)
        return Message(identity, players, frames, rewards, is_over, finished)

    def reply(self, message: Message, actions: np.ndarray) -> None:
        """Send the actions (k,) of the players of `message`."""
        self.socket.send_multipart([message.identity, msgpack.packb(actions.tolist())])


class Segment(NamedTuple):
    """Consecutive states of one player, newest first, with their n-step returns."""

    states: list[np.ndarray]  # views of the books, valid until the player's next state but one
    actions: np.ndarray
    action_probs: np.ndarray
    future_rewards: np.ndarray
    versions: np.ndarray


class Books:
    """What is remembered of each player until its n-step returns are known.

    Mnih et al. 2016, algorithm S3: R = r + gamma * R, from 0 at the end of an episode, otherwise
    from the value that was predicted for the newest state. Rewards are clipped to [-1, 1].
    """

    def __init__(self, num_players: int, local_time_max: int, gamma: float):
        self.local_time_max = local_time_max
        self.gamma = gamma
        # A ring per player: the remembered states (local_time_max + 1) and the one just arrived.
        self.ring = local_time_max + 2
        shape = (num_players, self.ring)
        self.states = np.zeros((*shape, *STATE_SHAPE), np.uint8)
        self.actions = np.zeros(shape, np.int64)
        self.action_probs = np.zeros(shape, np.float32)
        self.rewards = np.zeros(shape)
        self.values = np.zeros(shape)
        self.versions = np.zeros(shape, np.int64)
        self.newest = np.zeros(num_players, np.int64)  # place of the newest state in the ring
        self.count = np.zeros(num_players, np.int64)  # states remembered

    def observe(self, message: Message) -> list[Segment]:
        """Enter rewards where they belong, and the new states; returns what is finished.

        Of a player's first message reward and is_over belong to nothing and are ignored.
        """
        players = np.arange(message.players.start, message.players.stop)
        newest, count = self.newest[players], self.count[players]
        self.rewards[players, newest] = np.clip(message.rewards, -1, 1)
        is_over = message.is_over & (count > 0)
        finished = is_over | (count == self.local_time_max + 1)
        segments = [self.finish(p, is_over[i]) for i, p in enumerate(players) if finished[i]]

        following = (newest + 1) % self.ring
        fresh = is_over | (count == 0)
        for i, p in enumerate(players):
            previous = None if fresh[i] else self.states[p, newest[i]]
            stack_frame(previous, message.frames[i], self.states[p, following[i]])
        self.newest[players] = following
        self.count[players] += 1
        return segments

    def finish(self, player: int, is_over: bool) -> Segment:
        """Take the states out whose returns are known: all of them, or all but the newest."""
        ring = (self.newest[player] - np.arange(self.count[player])) % self.ring
        future_reward = 0.0
        if not is_over:
            future_reward = self.values[player, ring[0]]
            ring = ring[1:]
        self.count[player] -= len(ring)
        future_rewards = np.empty(len(ring))
        for i, reward in enumerate(self.rewards[player, ring].tolist()):
            future_rewards[i] = future_reward = reward + self.gamma * future_reward
        return Segment(
            [self.states[player, place] for place in ring],
            self.actions[player, ring],
            self.action_probs[player, ring],
            future_rewards,
            self.versions[player, ring],
        )

    def newest_states(self, players: slice) -> list[np.ndarray]:
        """Views (84, 84, 12) of the states that wait for an action."""
        places = self.newest[players].tolist()
        return [self.states[players.start + i, place] for i, place in enumerate(places)]

    def decide(self, players: slice, actions, action_probs, values, version: int) -> None:
        """Remember what was chosen and predicted in the newest states, (k,) each."""
        rows = np.arange(players.start, players.stop), self.newest[players]
        self.actions[rows] = actions
        self.action_probs[rows] = action_probs
        self.values[rows] = values
        self.versions[rows] = version


class Fleet:
    """Simulator processes, in groups with a master each, and their private socket directory.

    Group i has every `groups`-th simulator; each has `players` players.
    """

    def __init__(self, env_id: str, simulators: int, players: int, groups: int, seed: int):
        self.directory = tempfile.mkdtemp(prefix="batch-a3c-")  # mode 0700: nobody else connects
        self.processes: list[subprocess.Popen] = []
        self.context = zmq.Context()
        addresses = [f"ipc://{self.directory}/{group}" for group in range(groups)]
        common = ["--env", env_id, "--players", str(players), "--seed", str(seed)]
        try:
            self.masters = [
                Master(self.context, address, list(range(simulators))[group::groups], players)
                for group, address in enumerate(addresses)
            ]
            for index in range(simulators):
                self.start(["--connect", addresses[index % groups], "--index", str(index), *common])
        except BaseException as error:
            self.close()
            if isinstance(error, zmq.ZMQError):  # a long TMPDIR, for example
                raise UserError(f"no sockets in {self.directory}: {error}") from error
            raise

    def start(self, options: list[str]) -> None:
        """Start one simulator; its output goes to a file, its life hangs on a pipe."""
        command = [sys.executable, os.path.abspath(__file__), *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        with open(f"{self.directory}/{len(self.processes)}.log", "wb") as output:
            streams = {"stdin": subprocess.PIPE, "stdout": output, "stderr": output}
            # A session of its own: Ctrl-C is for the training process.
            process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
        self.processes.append(process)

    @property
    def connected(self) -> int:
        """How many simulators have sent something."""
        return sum(len(master.connected) for master in self.masters)

    def check(self) -> None:
        """Raise UserError if a simulator has ended, with its last words."""
        for index, process in enumerate(self.processes):
            code = process.poll()
            if code is not None:
                with open(f"{self.directory}/{index}.log", errors="replace") as file:
                    words = [line.strip() for line in file if line.strip()]
                how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
                raise UserError(f"simulator {index} {how}: {words[-1] if words else 'no message'}")

    def close(self) -> None:
        """End all simulators and remove the sockets; no thread may use the masters any more."""
        with undisturbed():
            for process in self.processes:
                process.stdin.close()
            deadline = time.monotonic() + END_SECONDS
            for process in self.processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
                process.kill()
                process.wait()
            self.context.destroy(linger=0)
            shutil.rmtree(self.directory, ignore_errors=True)


class VectorPlayers(Fleet):
    """At least `num_players` players in processes on all cores that step together."""

    def __init__(self, env_id: str, num_players: int, seed: int, check: Callable[[], None]):
        processes = min(num_players, os.cpu_count() or 1)
        super().__init__(env_id, processes, -(-num_players // processes), 1, seed)
        self.num_players, self.check_run = self.masters[0].num_players, check
        self.waiting: list[Message] = []

    def step(self, actions: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Act, (n,), or start (None): frames (n, 84, 84, 3), rewards (n,), is_over (n,)."""
        master = self.masters[0]
        for message in self.waiting:
            master.reply(message, actions[message.players])
        self.waiting = []
        while len(self.waiting) < len(self.processes):
            self.waiting += master.receive(self.num_players, timeout_ms=200)
            self.check_run()
            self.check()
        self.waiting.sort(key=lambda message: message.players.start)
        columns = zip(*((m.frames, m.rewards, m.is_over) for m in self.waiting), strict=True)
        return tuple(np.concatenate(column) for column in columns)


def main() -> int:
    """Run one simulator; what goes wrong is one sentence on standard error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--connect", required=True, help="address of the master")
    parser.add_argument("--env", required=True, help="gymnasium id of the game")
    parser.add_argument("--index", type=int, default=0, help="number of this simulator")
    parser.add_argument("--players", type=int, default=1, help="players it steps together")
    parser.add_argument("--seed", type=int, default=0, help="of the run")
    args = parser.parse_args()
    try:
        simulate(args.connect, args.env, args.index, args.players, args.seed)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
