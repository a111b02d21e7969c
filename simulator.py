#!/usr/bin/env python3
"""The simulator program, its messages, and the pool that starts and replaces simulators.

A simulator is a process that plays several games side by side; each of them is a player. For every
step it sends one message with the new frames of all its players, and waits for their actions:

    simulator -> master: [rewards, ends, finished] in msgpack | frames (players, 84, 84, 3) uint8
    master -> simulator: [action, ...] in msgpack; nil: there is no place for this simulator

The master is a socket of a predictor thread, see predictor.py. On Linux the frames of a simulator
that the run has started itself do not travel in the message: they lie in memory that the two share,
and the simulator leaves them alone until it is answered.

The rewards belong to the actions of the message before. `ends` says of each player whether its
episode goes on (0), is over (1), or goes on after a lost life (2). Where it is over, the frame is
already the first of the next episode, and `finished` holds [score, length] of the one that ended.

A simulator ends when its standard input closes, which happens however its parent ends. The kernel
ends it if a game does not return. It never imports torch.

A training run starts one process of this program for each of its simulators, see `SimulatorPool`.
Started by hand, on any machine, the program adds simulators to a run that listens:

    simulator.py --connect tcp://HOST:PORT --key FILE --env Breakout-v0 --simulator-proc 32
"""

import argparse
import contextlib
import ctypes
import dataclasses
import itertools
import math
import mmap
import os
import re
import resource
import secrets
import signal
import subprocess
import sys
import threading
import time
import traceback
import urllib.parse
from collections.abc import Callable, Iterator
from socket import AF_INET6, create_connection

import msgpack
import numpy as np
import zmq

import common
from common import FRAME_SHAPE, Player, UserError, count, end_with_parent, on_signals, whole

GOES_ON, IS_OVER, LIFE_LOST = range(3)  # how a step ended for a player
FRAME_BYTES = math.prod(FRAME_SHAPE)
HIGH_WATER_MARK = 4  # messages per peer: a simulator has one under way at most
END_SECONDS = 2.0  # how long simulators have to close their games and end
HANG_SECONDS = 60.0  # a simulator whose game takes so long for one step or reset is replaced
START_SECONDS = 300.0  # the same for making a game and its first reset
STARTS_PER_CORE = 2  # simulators that start at the same time
# A run ends after so many failures of a simulator; a life of so many seconds clears the count.
MAX_FAILURES, FAILURE_WINDOW_SECONDS = 3, 60.0
# It also ends after so many kills in a row, each before or soon after the first message.
MAX_EARLY_KILLS, EARLY_KILL_SECONDS = 20, 5.0
LOOK_SECONDS, LOG_LOOK_SECONDS = 0.1, 1.0  # from one look at processes, or at logs, to the next
LOG_BYTES, TAIL_BYTES = 2**20, 2**14  # of what a simulator prints, and of its end, that are kept
NICENESS = 3  # of simulators: the process that predicts and learns goes first, for all wait for it
PR_SET_PDEATHSIG = 1  # of prctl(2): which signal follows the end of the parent
KILLED = (-signal.SIGKILL, -signal.SIGTERM)  # exit codes of what was ended from outside
LIKELY_CAUSE = "is there too little memory? Fewer --simulator-proc or --players-per-simulator help"
REACH_SECONDS = 5.0  # until a host that does not answer is out of reach
REJOIN_SECONDS = 3.0  # from one attempt to join a run to the next
SETTLED_SECONDS = 10.0  # a remote simulator that lives so long has joined its run


# The program


def end_when_told(signum: int, frame) -> None:
    """Handle SIGTERM: leave the game, so that it is closed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    set_alarm(END_SECONDS)
    common.raise_stopped(signum, frame)


def end_this_simulator() -> None:
    """Let this simulator end, from any of its threads."""
    set_alarm(END_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def set_alarm(seconds: float) -> None:
    """Let the kernel end this process after so long, whatever it does then; 0: never.

    This replaces the alarm that was set before.
    """
    signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM has no handler


def connect(a: argparse.Namespace) -> tuple[zmq.Socket, zmq.Socket | None]:
    """The socket to the master, and one that tells when a run on another machine is lost."""
    socket, monitor = zmq.Context().socket(zmq.DEALER), None
    socket.setsockopt(zmq.IDENTITY, a.identity.encode())
    socket.set_hwm(HIGH_WATER_MARK)  # before connect: later it would do nothing
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IPV6, a.ipv6)
    if a.key:
        socket.curve_serverkey = read_key(a.key)[0]
        socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
        socket.setsockopt(zmq.HEARTBEAT_IVL, 5000)
        failures = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | failures)
    socket.connect(a.connect)
    return socket, monitor


def make_players(a: argparse.Namespace) -> Iterator[Player]:
    """Make the players of this simulator, one by one."""
    for number in range(a.players):
        set_alarm(a.start_seconds)
        try:
            yield Player(common.make_env(a.env, a.window))
        except UserError as error:
            if number == 0:
                raise
            alone = "--players-per-simulator 1 (--players 1 of simulator.py)"
            sentence = f"a process can hold {number} of {a.env}, not {a.players} ({error}): {alone}"
            raise UserError(sentence, 2) from error


def share_frames(frames_fd: int, players: int) -> np.ndarray:
    """Frames (simulators, players, 84, 84, 3) uint8 in the shared memory of a file descriptor."""
    return np.frombuffer(mmap.mmap(frames_fd, 0), np.uint8).reshape(-1, players, *FRAME_SHAPE)


def receive_actions(a: argparse.Namespace, socket: zmq.Socket, monitor) -> list[int]:
    """Wait for the actions of all players; UserError if there will be none."""
    while monitor and not socket.poll(1000):
        if monitor.poll(0):
            raise UserError(f"{a.connect} ended the connection, or does not know the key")
    actions = msgpack.unpackb(socket.recv())
    if actions is None:
        reason = f"is it another game than {a.env}, or does it need other --players?"
        raise UserError(f"{a.connect} has no place for this simulator: {reason}")
    return actions


def simulate(a: argparse.Namespace, players: list[Player]) -> None:
    """Fill `players`, and play with them until this process is told to end.

    Raises UserError if the master has no place for this simulator, or is lost.
    """
    seeds = np.random.SeedSequence((a.seed, *a.identity.encode())).generate_state(a.players + 1)
    common.seed_games(int(seeds[-1]))
    socket, monitor = connect(a)
    players.extend(make_players(a))
    if a.frames_fd is None:
        frames = np.empty((a.players, *FRAME_SHAPE), np.uint8)
    else:
        frames = share_frames(a.frames_fd, a.players)[a.index]
    for i, player in enumerate(players):
        set_alarm(a.start_seconds)
        frames[i], _ = player.reset(seed=int(seeds[i]))
    rewards, ends, finished = [0.0] * a.players, [GOES_ON] * a.players, []
    while True:
        set_alarm(0)  # waiting for actions may take any time
        header = msgpack.packb([rewards, ends, finished])
        socket.send_multipart([header, frames] if a.frames_fd is None else [header])
        actions = receive_actions(a, socket, monitor)
        finished = []
        for i, player in enumerate(players):
            set_alarm(a.hang_seconds)
            frames[i], rewards[i], terminated, truncated, _ = player.step(actions[i])
            ends[i] = LIFE_LOST if player.life_lost else GOES_ON
            if terminated or truncated:
                ends[i] = IS_OVER
                finished.append([player.score, player.length])
                set_alarm(a.hang_seconds)
                frames[i], _ = player.reset()


def run_simulator(a: argparse.Namespace) -> None:
    """Be a simulator of a pool; does not return.

    The games are closed however this ends, for some have processes of their own.
    """
    if sys.platform == "linux":  # if the pool ends while this process is stopped, it continues
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGCONT)
    os.nice(NICENESS)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the pool
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    players: list[Player] = []
    try:
        signal.signal(signal.SIGTERM, end_when_told)
        threading.Thread(target=end_with_parent, args=(end_this_simulator,), daemon=True).start()
        sys.stdout.reconfigure(line_buffering=True)
        code = exit_code_of(lambda: simulate(a, players))
    except common.Stopped:
        code = None  # it ends by the signal that it was sent
    except BaseException:
        traceback.print_exc()
        code = 1
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    set_alarm(END_SECONDS)  # a game may hang when it is closed
    for player in players:
        common.close_env(player)
    if os.getpgrp() == os.getpid():  # what games have started and not ended
        os.killpg(0, signal.SIGTERM)
    sys.stdout.flush()
    sys.stderr.flush()
    if code is None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
    os._exit(code)  # without waiting for threads that a game has started


# The pool


class SimulatorError(UserError):
    """A simulator has failed; exit_code: of its process."""

    def __init__(self, sentence: str, exit_code: int):
        super().__init__(sentence)
        self.exit_code = exit_code


@dataclasses.dataclass
class Slot:
    """What a pool knows of its simulator number i, which is another process after each start."""

    process: subprocess.Popen | None = None  # None: a simulator is to be started
    identity: str = ""
    started: float = 0.0  # time.monotonic()
    failures: int = 0  # since one has lived long
    early_kills: int = 0  # in a row


def open_log(path: str) -> int:
    """A new file for what a simulator prints; on a full disk that is not kept."""
    with contextlib.suppress(OSError):
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    return os.open(os.devnull, os.O_WRONLY)


def tail(path: str) -> bytes:
    """The end of a file, at most TAIL_BYTES; nothing if it cannot be read."""
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


class SimulatorPool:
    """Simulator processes and their private directory.

    `start_missing` starts simulators, `collect_ended` reports those that have ended: to call both
    in turn replaces them. What a simulator prints goes to a file in the directory. Each leads a
    process group of its own, but no session: Linux shares the cores out among sessions first.
    """

    max_failures: float = MAX_FAILURES

    def __init__(self, env_id: str, simulators: int, players: int, seed: int, *options: str):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        need = 4 * simulators + 200  # its socket, with some to spare
        if hard != resource.RLIM_INFINITY and need > hard:
            limit = f"ulimit -Hn is {hard}"
            raise UserError(f"{simulators} simulators need {need} open files; {limit}", 2)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, need), hard))
        self.directory = common.PrivateDirectory()  # nobody else connects to sockets in it
        self.command = [
            sys.executable,
            os.path.abspath(__file__),
            f"--env={env_id}",
            f"--players={players}",
            f"--seed={seed}",
            f"--hang-seconds={HANG_SECONDS}",
            f"--start-seconds={START_SECONDS}",
            *options,
        ]
        self.slots = [Slot() for _ in range(simulators)]
        self.starts = itertools.count()  # numbers for identities
        self.shared_fds: list[int] = []  # open files that simulators inherit
        self.looked = self.looked_at_logs = time.monotonic()
        self.most_starting = STARTS_PER_CORE * common.count_cores()

    def register(self, index: int) -> str:
        """The identity of the next simulator `index`, which none has had before."""
        return f"simulator-{index}.{next(self.starts)}"

    def options(self, index: int) -> list[str]:
        """What simulator `index` is started with beside what all are."""
        raise NotImplementedError

    def first_message_at(self, index: int) -> float | None:
        """The time.monotonic() of the first message of a simulator; None if it has sent none."""
        raise NotImplementedError

    def log_path(self, index: int) -> str:
        """Where the output of a simulator goes."""
        return f"{self.directory.path}/{index}.log"

    def start(self, index: int) -> None:
        """Start simulator `index`."""
        slot = self.slots[index]
        slot.identity, slot.started = self.register(index), time.monotonic()
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        log = open_log(self.log_path(index))
        try:
            slot.process = subprocess.Popen(
                [
                    *self.command,
                    f"--identity={slot.identity}",
                    f"--index={index}",
                    *self.options(index),
                ],
                env=common.child_environment() | threads,
                stdin=subprocess.PIPE,  # it closes when this process ends
                stdout=log,
                stderr=log,
                process_group=0,  # Ctrl-C is for this process; a game's own processes can be ended
                pass_fds=self.shared_fds,
            )
        except OSError as error:  # there are too many processes, or there is no memory for one
            sentence = f"cannot start simulator {index}: {error.strerror}; {LIKELY_CAUSE}"
            raise UserError(sentence) from error
        finally:
            os.close(log)

    def start_missing(self) -> None:
        """Start simulators that are not there, not more at once than the cores can start."""
        starting = sum(slot.process is not None for slot in self.slots) - self.connected
        for index, slot in enumerate(self.slots):
            if slot.process is None and starting < self.most_starting:
                self.start(index)
                starting += 1

    @property
    def connected(self) -> int:
        """How many simulators play."""
        started = (index for index, slot in enumerate(self.slots) if slot.process is not None)
        return sum(self.first_message_at(index) is not None for index in started)

    def collect_ended(self) -> list[str]:
        """Free the slots of simulators that have ended; returns a sentence for each.

        Raises SimulatorError for one that fails again and again, with the last line it printed.
        """
        now = time.monotonic()
        if now - self.looked < LOOK_SECONDS:
            return []
        self.looked = now
        events = []
        for index, slot in enumerate(self.slots):
            if slot.process is None or (code := slot.process.poll()) is None:
                continue
            sentence = f"simulator {index} {self.describe_end(index, code)}"
            self.clean_up(slot)
            self.count_failure(index, code, sentence)
            events.append(sentence)
        if now - self.looked_at_logs > LOG_LOOK_SECONDS:
            self.looked_at_logs = now
            for index in range(len(self.slots)):
                shorten(self.log_path(index))
        return events

    def count_failure(self, index: int, code: int, sentence: str) -> None:
        """Raise SimulatorError if another start of a simulator cannot help.

        One that was killed from outside has not failed, unless that happens again and again before
        or soon after its first message.
        """
        slot, first_message_at = self.slots[index], self.first_message_at(index)
        life = 0.0 if first_message_at is None else time.monotonic() - first_message_at
        if code == -signal.SIGALRM:
            life -= HANG_SECONDS
        if code in KILLED:
            slot.early_kills = slot.early_kills + 1 if life < EARLY_KILL_SECONDS else 0
            if slot.early_kills >= MAX_EARLY_KILLS:
                when = f"within {EARLY_KILL_SECONDS:g} seconds of play"
                again = f"{MAX_EARLY_KILLS} times in a row, {when}"
                raise SimulatorError(f"{sentence}; {again}: {LIKELY_CAUSE}", code)
            return
        slot.failures = slot.failures + 1 if life < FAILURE_WINDOW_SECONDS else 1
        if code == common.PERMANENT_FAILURE or slot.failures >= self.max_failures:
            raise SimulatorError(sentence, code)

    def describe_end(self, index: int, code: int) -> str:
        """How a simulator ended, and the last line that it printed."""
        lines = tail(self.log_path(index)).decode(errors="replace").splitlines()
        printed = [line.strip() for line in lines if line.strip()] or ["it printed nothing"]
        end = f"ended with code {code}" if code >= 0 else f"was killed by signal {-code}"
        if code == -signal.SIGALRM:
            seconds = START_SECONDS if self.first_message_at(index) is None else HANG_SECONDS
            end = f"was silent for {seconds:.0f} seconds, or its game did not close"
        return f"{end}: {printed[-1]}"

    def clean_up(self, slot: Slot) -> None:
        """Free the slot of a simulator, and kill what its games have started and not ended."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(slot.process.pid, signal.SIGKILL)
        slot.process.wait()
        slot.process.stdin.close()
        slot.process = None

    @common.signals_deferred()
    def close(self) -> None:
        """End all simulators, which have a moment to close their games; remove the directory."""
        slots = [slot for slot in self.slots if slot.process is not None]
        common.end_processes([slot.process for slot in slots], END_SECONDS)
        for slot in slots:
            self.clean_up(slot)
        self.directory.close()


# Simulators for a run on another machine


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


def split_address(address: str) -> tuple[str, int]:
    """Host and port of tcp://HOST:PORT; UserError if it is not of that form."""
    try:
        parts = urllib.parse.urlsplit(address)
        host, port = parts.hostname, parts.port
        (host or "").encode("idna")  # as a look-up does
    except ValueError:
        host = port = None
    more = host and (parts.path or parts.query or parts.fragment or "@" in parts.netloc)
    if not host or not port or more or parts.scheme != "tcp":
        raise UserError(f"{address} is no address: give tcp://HOST:PORT", 2)
    return host, port


class RemotePool(SimulatorPool):
    """Simulators that join a run on another machine, and join it again when they lost it."""

    max_failures = math.inf

    def __init__(self, a: argparse.Namespace):
        super().__init__(a.env, a.simulator_proc, a.players, a.seed)
        self.a = a

    def register(self, index: int) -> str:
        """Begins with the game, so that the run sees that it is the same."""
        return f"{self.a.env} {secrets.token_hex(16)}"

    def options(self, index: int) -> list[str]:
        """The address of the run."""
        return [f"--connect={self.a.connect}", f"--key={self.a.key}", f"--ipv6={self.a.ipv6}"]

    def first_message_at(self, index: int) -> float | None:
        """Assumed: a simulator that a run does not take ends within SETTLED_SECONDS."""
        settled = self.slots[index].started + SETTLED_SECONDS
        return settled if time.monotonic() >= settled else None


def join_run(a: argparse.Namespace) -> None:
    """Keep `simulator_proc` simulators in a run elsewhere, and restart those that lost it."""
    on_signals(common.raise_stopped, common.SIGNALS[1:])
    if a.key is None:
        raise UserError("--key FILE is needed to join a run", 2)
    read_key(a.key)
    host, port = split_address(a.connect)
    a.env = common.describe(a.env).env_id
    said: set[str] = set()

    def say(sentence: str) -> None:
        if sentence not in said:  # once, until all have joined
            said.add(sentence)
            print(sentence, file=sys.stderr, flush=True)

    with contextlib.closing(RemotePool(a)) as pool:
        while True:
            for event in pool.collect_ended():
                say(re.sub(r"simulator \d+ ", "a simulator ", event) + "; it tries again")
            if pool.connected == len(pool.slots):
                said.clear()
            if any(slot.process is None for slot in pool.slots):
                try:
                    with create_connection((host, port), timeout=REACH_SECONDS) as connection:
                        a.ipv6 = int(connection.family == AF_INET6)
                    pool.start_missing()
                except OSError as error:
                    say(f"cannot reach {a.connect} ({error.strerror or error}); trying again")
            time.sleep(REJOIN_SECONDS)


# The command line


def exit_code_of(work: Callable[[], None]) -> int:
    """Do some work; what goes wrong is one sentence on standard error."""
    try:
        work()
    except UserError as error:
        print(error, file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return 130
    return 0


def main() -> int:
    """Run simulators."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--connect", required=True, metavar="ADDRESS", help="of the run: tcp://HOST:PORT")
    add("--env", required=True, help="gymnasium id of the game")
    add("--players", type=count, default=1, metavar="N", help="players a simulator steps together")
    add("--seed", type=whole, default=0, metavar="N", help="of the games")
    add("--key", metavar="FILE", help="of the run that listens")
    add("--simulator-proc", type=count, default=1, metavar="N", help="simulators that join a run")
    # What a pool tells its simulators.
    add("--identity", help=argparse.SUPPRESS)
    add("--index", type=int, help=argparse.SUPPRESS)
    add("--frames-fd", type=int, help=argparse.SUPPRESS)
    add("--ipv6", type=int, default=0, help=argparse.SUPPRESS)
    add("--hang-seconds", type=float, default=HANG_SECONDS, help=argparse.SUPPRESS)
    add("--start-seconds", type=float, default=START_SECONDS, help=argparse.SUPPRESS)
    add("--window", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.identity is not None:
        run_simulator(a)
    return exit_code_of(lambda: join_run(a))


if __name__ == "__main__":
    sys.exit(main())
