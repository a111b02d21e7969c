#!/usr/bin/env python3
"""Batch-A3C on Atari games: train an agent, watch it, score it, submit it.

  train:         ./train_atari.py --env Breakout-v0 --gpu 0
  twice as fast: ./train_atari.py --env Breakout-v0 --gpu 0 --simulator-proc 16 \\
                     --players-per-simulator 4 --predict-batch-size 64 \\
                     --predictor-thread-per-gpu 1    (with 16 cores)
  on a CPU:      ./train_atari.py --env Breakout-v0 --network a3c
  go on:         ./train_atari.py --load train_log/train-atari-Breakout-v0/checkpoint.pt
  watch a model: ./train_atari.py --task play --env Breakout-v0 --load Breakout-v0.npz
  score a model: ./train_atari.py --task eval --env Breakout-v0 --load Breakout-v0.npz --episode 100
  submit it:     ./train_atari.py --task gen_submit --env Breakout-v0 --load Breakout-v0.npz \\
                     --output output_dir

play without a display: --output DIR writes videos instead.

A directory that already holds a run is refused, unless --load names its own checkpoint.pt: then
that run goes on there, with its options but for those given anew. A copy of a checkpoint begins a
run elsewhere.
Exit codes: 0 done, 1 failed, 2 wrong usage, 130 (Ctrl-C) and 143 (SIGTERM) stopped after saving.
Even with --seed a training run cannot be repeated to the bit: in which order players are served
depends on the load of the machine.
"""

# ruff: noqa: E402 - Ctrl-C is looked after before anything else
import os
import signal

INTERRUPTIBLE = signal.getsignal(signal.SIGINT) is signal.default_int_handler
if __name__ == "__main__" and INTERRUPTIBLE:  # while the imports below take their time
    signal.signal(signal.SIGINT, lambda signum, frame: os._exit(130))

import argparse
import contextlib
import datetime
import errno
import fcntl
import json
import math
import re
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import NamedTuple

import cv2
import numpy as np
from tabulate import tabulate
from tqdm import tqdm

import common
from common import (
    FRAME_SHAPE,
    STATE_SHAPE,
    Recorder,
    UserError,
    count,
    count_cores,
    describe,
    summary,
    whole,
    write_file,
)
from simulator import (
    SIGNALS,
    SimulatorError,
    VectorPlayers,
    child_environment,
    end,
    end_with_parent,
    make_private_directory,
    on_signals,
    stop,
    undisturbed,
)

# torch and the rooms that need it are imported where they are used: --help does not wait for them.

PROGRAM = os.path.basename(__file__)
EVAL_EPOCH = 3  # epochs from one evaluation to the next
CPU_PREDICTORS = 4  # at most, one per two cores: Python runs one thread at a time
CPU_BATCH = 24  # two messages of twelve players, on two cores
CPU_PLAYERS = 48  # in all: in two processes per core, so that one plays while the other waits
EVAL_SHARE = 0.2  # of the time of a run, at most, is spent in evaluation
CHECKPOINT_SECONDS = 300
SAME_SIGNAL_SECONDS = 0.5  # a second signal within this time is the first one once more
LOG_SECONDS = 10
FORCED_END_SECONDS = 5.0  # until threads that hang in native code are left behind
CHECK_STEPS = 100  # iterations after which several ranks compare their weights
JOIN_SECONDS = 300.0  # how long a rank waits for the others at its start
JOIN_LOG_SECONDS = 5.0  # after so long it says for which ones
# A collective waits for simulators of other ranks, which may need START_SECONDS three times.
COLLECTIVE_SECONDS = 1800.0
EVALUATION_SECONDS = 86400.0  # how long the other ranks wait while rank 0 evaluates
REASON_SECONDS = 1.0  # how long rank 0 waits for word of why another rank has ended
RANK_END_SECONDS = 5.0  # how long rank 0 has to save if all ranks are told to end
LAUNCH_END_SECONDS = 8.0  # how long ranks have to save and to end
SIMULATOR_BYTES, PLAYER_BYTES = 35e6, 1.5e6  # measured with Breakout, without what they share

EVALUATED = ("mean_score", "max_score", "eval_episodes")  # metrics of an evaluation
RUN_FILES = ("checkpoint.pt", "stats.json", "model-latest.npz", "model-best.npz")
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems that know none
GPU_ERRORS = ("OutOfMemoryError", "AcceleratorError")  # torch's, for what a program cannot help
PACKAGES = ("torch", "gymnasium", "ale-py", "numpy", "pyzmq", "msgpack")


def positive(text: str) -> float:
    """A finite number above zero."""
    if not 0 < float(text) < math.inf:
        raise ValueError
    return float(text)


def switch(text: str) -> int:
    """0 or 1."""
    return ("0", "1").index(text)


def in_environment(name: str, default: int) -> int:
    """A number that torchrun or `launch` has left for a rank: from 1 if the default is."""
    try:
        return (count if default else whole)(os.environ.get(name, str(default)))
    except ValueError as error:
        text = f"{name} is {os.environ[name]!r} in the environment, which is no such number"
        raise UserError(text, 2) from error


def scheduled(text: str, epoch: int) -> float:
    """The value of a schedule, `VALUE,EPOCH:VALUE,...`, in `epoch`, counted from 1."""
    steps = [step.split(":") for step in ("1:" + text).split(",")]
    values = sorted((count(first), float(value)) for first, value in steps)
    if not all(0 <= value < math.inf for _, value in values):
        raise ValueError
    return [value for first, value in values if epoch >= first][-1]


def name(text: str) -> str:
    """The name of a file or directory."""
    if not text or "\0" in text:
        raise ValueError
    return text


def schedule(text: str) -> str:
    """A schedule, as it is."""
    scheduled(text, 1)
    return text


PLAYING = ("play", "eval", "gen_submit")
ANY = ("train", *PLAYING)
OUTPUTS = (
    "of the run, default train_log/train-atari-ENV; of a submission, default output_dir; "
    "of the videos of play; of eval's results.json"
)
# Option, the tasks it is for, its type or the choices, what stands for it in the help, meaning.
OPTIONS = (
    ("env", ANY, str, "ENV", "gymnasium id of an Atari game, such as Breakout-v0 (required)"),
    ("task", ANY, ANY, None, "default: train"),
    ("gpu", ANY, str, "GPU", "GPUs, as 0,1,2; default: as before, or all, or the CPU"),
    ("load", ANY, str, "FILE", "weights.npz to start from, or checkpoint.pt to go on with"),
    ("output", ANY, name, "DIR", OUTPUTS),
    ("seed", ANY, whole, "N", "of players, sampling, initialization"),
    ("episode", PLAYING, count, "N", "episodes to play (default 100)"),
    ("network", ("train",), ("ba3c", "a3c"), None, "default: ba3c; a3c is small, for a CPU"),
    ("ranks", ("train",), count, "N", "so many processes that train as one, on a CPU"),
    ("listen", ("train",), str, "ADDRESS", "tcp://0.0.0.0:PORT, where simulators may join"),
    ("key", ("train",), name, "FILE", "which they need to join; is made if it is not there"),
)
# For training. Option, type, default, meaning: names and values are those of the original's
# constants.
LEARNING = (
    ("BATCH_SIZE", count, 128, "new states per iteration"),
    ("LOCAL_TIME_MAX", count, 5, "steps of an n-step return"),
    ("GAMMA", positive, 0.99, "discount per step"),
    ("LEARNING_RATE", schedule, "1e-3,20:3e-4,120:1e-4", "VALUE,EPOCH:VALUE,... from that epoch"),
    ("WARM_UP", whole, 0, "iterations in which the learning rate rises to its value"),
    ("ENTROPY_BETA", schedule, "0.01,80:0.005", "VALUE,EPOCH:VALUE,..."),
    ("ADAM_EPSILON", positive, 1e-3, "epsilon of Adam in TensorFlow's form"),
    ("CENTER_FILTERS", switch, 0, "1: convolutions see differences only, so that none dies"),
    ("STEPS_PER_EPOCH", count, 6000, "iterations per epoch"),
    ("MAX_EPOCH", count, 1000, "epochs until the run is done"),
    ("EVAL_EPISODE", count, 50, f"episodes of an evaluation, every {EVAL_EPOCH} epochs"),
)
SPEED = (
    ("SIMULATOR_PROC", count, 50, "simulator processes; on a CPU 2 per core"),
    ("PLAYERS_PER_SIMULATOR", count, 1, f"on a CPU so many that all are {CPU_PLAYERS}"),
    ("PREDICT_BATCH_SIZE", count, 15, f"most states in one prediction; on a CPU {CPU_BATCH}"),
    ("PREDICTOR_THREAD_PER_GPU", count, 3, f"on a CPU 1 per 2 cores, {CPU_PREDICTORS} at most"),
    ("QUEUE_SIZE", count, 128, "states that may wait for the trainer; default: a batch"),
    ("BFLOAT16", switch, 0, "1: the network computes in bfloat16, faster on CPUs with AMX"),
)
NOT_OF_A_RUN = ("task", "env", "load", "output")  # options that a checkpoint does not keep
# With the small network, whose gradients are far below the original's epsilon: see the README.
LEARNING_OF_A3C = {"adam_epsilon": 1e-5, "learning_rate": "7e-4", "center_filters": 1}


def flag(name: str) -> str:
    """`BATCH_SIZE` -> `--batch-size`."""
    return "--" + name.lower().replace("_", "-")


def make_parser() -> argparse.ArgumentParser:
    """The command line. Options that are not given are not in its result."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(task="train")
    groups = {
        ANY: parser,
        PLAYING: parser.add_argument_group(f"only for {listed(PLAYING)}"),
        ("train",): parser.add_argument_group("only for train"),
    }
    for option, tasks, kind, metavar, text in OPTIONS:
        how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind, "metavar": metavar}
        groups[tasks].add_argument(f"--{option}", help=text, **how)
    for title, options in (("what changes learning", LEARNING), ("what changes speed", SPEED)):
        group = parser.add_argument_group(f"only for train: {title}")
        for name, kind, default, text in options:
            of_a3c = LEARNING_OF_A3C.get(name.lower())
            text += f" (default {default}" + (f"; with a3c {of_a3c})" if of_a3c else ")")
            group.add_argument(flag(name), type=kind, metavar="X", help=text)
    return parser


def listed(names: tuple) -> str:
    """Names as a sentence lists them."""
    return " and ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]


def tasks_of(option: str) -> tuple:
    """The tasks that an option, by the name of its value, is for."""
    return {known: tasks for known, tasks, *_ in OPTIONS}.get(option, ("train",))


def read_options(arguments: list[str] | None) -> dict:
    """The options that are given on the command line, by name; SystemExit if they are wrong.

    UserError for an option that the task does not have.
    """
    parser = make_parser()
    given = vars(parser.parse_args(arguments))
    for option in given:
        if given["task"] not in tasks_of(option):
            tasks = f"--task {listed(tasks_of(option))}"
            raise UserError(f"{flag(option)} is for {tasks}, not for --task {given['task']}", 2)
    if "env" not in given and not given.get("load", "").endswith(".pt"):
        parser.error("--env is required")
    return given


def check_options(options: dict) -> None:
    """ValueError unless the command line could have given these options to a run.

    `listened` is none of them: it is where the run has listened before, and with which key.
    """
    listened = options.get("listened", ("", ""))
    is_pair = isinstance(listened, (tuple, list)) and len(listened) == 2
    if not is_pair or not all(isinstance(part, str) for part in listened):
        raise ValueError(f"it has listened at {listened!a}")
    options = {option: value for option, value in options.items() if option != "listened"}
    flags = [f"{flag(option)}={value}" for option, value in options.items()]
    parser = make_parser()
    parser.error = refuse_value
    parsed = vars(parser.parse_args(flags))
    del parsed["task"]
    for option, value in options.items():
        # It may be one that only looks like an option of that name, or like a value of its type.
        fits = option in parsed and type(parsed[option]) is type(value) and parsed[option] == value
        if not fits or option in NOT_OF_A_RUN or "train" not in tasks_of(option):
            raise ValueError(f"it has an option {option!a} with the value {value!a}")


def refuse_value(message: str) -> None:
    """What a parser does with a file's option that it does not take."""
    raise ValueError(f"its options are wrong: {message}")


def find_devices(gpus: str | None, ranks: int | None) -> list:
    """The torch devices of this machine that --gpu and --ranks name, one for each rank."""
    import torch

    # The driver may know GPUs for which it is too old: torch says so, and the CPU is there.
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus is None and (ranks or not available):
        return [torch.device("cpu")] * (ranks or 1)
    chosen = gpus.split(",") if gpus is not None else map(str, range(available))
    numbers = [int(gpu) if gpu.isdecimal() else available for gpu in chosen]
    if max(numbers) >= available or len(set(numbers)) < len(numbers) or ranks:
        cuda = f"CUDA devices 0 to {available - 1}" if available else "no CUDA device, only the CPU"
        raise UserError(f"--gpu {gpus}: there is {cuda}; --ranks is for the CPU alone", 2)
    return [torch.device("cuda", number) for number in numbers]


def describe_ranks(count: int, gpu: str | None) -> str:
    """`2 ranks on GPU 0,1`, `1 rank on the CPU`."""
    return f"{count} rank{'s' * (count > 1)} on {'the CPU' if gpu is None else f'GPU {gpu}'}"


def gpu_numbers(devices: list) -> str | None:
    """What --gpu is for these devices; None for the CPU."""
    import torch

    devices = [torch.device(device) for device in devices]
    numbers = dict.fromkeys(str(device.index) for device in devices if device.type == "cuda")
    return ",".join(numbers) or None


def ranks_of(options: dict) -> tuple[int | None, str | None]:
    """Number of ranks and --gpu of a run, in the options of its checkpoint; None: not known."""
    count, gpu = options.get("ranks"), options.get("gpu")
    is_count = type(count) is int and 0 < count < 2**16
    is_gpu = isinstance(gpu, str) and all(number.isdecimal() for number in gpu.split(","))
    return (count, gpu if is_gpu else None) if is_count else (None, None)


def resumed_devices(count: int, gpu: str | None) -> list:
    """A device for each rank of a resumed run: those that it had, if this machine has them."""
    import torch

    available = find_devices(None, None)
    if gpu is None or available[0].type == "cpu":
        return find_devices(None, count)
    devices = [torch.device("cuda", int(number)) for number in gpu.split(",")]
    if len(devices) == count and set(devices) <= set(available):
        return devices
    return available[:count]


def choose_devices(gpus: str | None, ranks: int | None, before: dict) -> tuple[list, list[str]]:
    """The devices of the ranks on this machine, and what a resumed run has otherwise than before.

    gpus, ranks: the options as given now; before: the options in the checkpoint of a resumed run.
    """
    count_before, gpu_before = ranks_of(before)
    started = "RANK" in os.environ and "BATCH_A3C_LAUNCHER" not in os.environ  # by torchrun
    world = in_environment("WORLD_SIZE", 1) if started else None
    if started and ranks not in (None, world):
        text = f"--ranks {ranks}: torchrun has started {world}; leave --ranks out"
        raise UserError(text, 2)
    if gpus is not None or ranks is not None or count_before is None:
        devices = find_devices(gpus, ranks)
    else:
        local = in_environment("LOCAL_WORLD_SIZE", 1) if started else count_before
        devices = resumed_devices(local, gpu_before)
    count, gpu = world or len(devices), gpu_numbers(devices)
    now = describe_ranks(count, gpu)
    if before and count_before is None and count > 1:
        return devices, [f"{now}, but the checkpoint does not say how many the run had before"]
    same = count == count_before and (gpu == gpu_before or (world and gpu and gpu_before))
    if count_before is None or same:
        return devices, []
    return devices, [f"{now} instead of {describe_ranks(count_before, gpu_before)}"]


def resumed_options(saved: dict, given: dict) -> tuple[dict, list[str]]:
    """The options of a run that a resumed one has too, and what it has otherwise than before.

    What belongs to a machine is not among them: the address where the run listened, and its key.
    They are remembered as `listened`, so that no later start makes another key unasked.
    """
    of_machine = ("listen", "key", "listened", "gpu", "ranks")
    options = {name: value for name, value in saved.items() if name not in of_machine}
    listened, key = saved.get("listened") or (saved.get("listen"), saved.get("key"))
    if not isinstance(listened, str) or not isinstance(key, str):
        return options, []
    if "listen" not in given:
        options["listened"] = (listened, key)
        way = f"--listen {listened} --key {key}"
        return options, [f"it does not listen; as before it would with {way}"]
    new_key = given.get("key", key)
    if new_key != key and os.path.exists(key) and not os.path.exists(new_key):
        text = f"there is no key {new_key}; the key of this run is {key}"
        raise UserError(text, 2)
    return options, []


def share_simulators(chosen: dict, given: dict, ranks: int) -> list[str]:
    """Make sure that so many ranks can share the simulators; returns what a resumed run changes."""
    total = chosen.get("simulator_proc", ranks)
    if total % ranks == 0:
        return []
    below = total - total % ranks
    fitting = [number for number in (below, below + ranks) if number]
    if "simulator_proc" in given:
        way = " or ".join(map(str, fitting))
        text = f"--simulator-proc {total}: {ranks} ranks cannot share them equally; take {way}"
        raise UserError(text, 2)
    chosen["simulator_proc"] = fitting[0]
    return [f"{fitting[0]} simulators instead of {total}, which {ranks} ranks cannot share equally"]


def is_sentence(error: BaseException | None) -> bool:
    """Whether the text of an error says all that the user needs."""
    sentences = (UserError, FloatingPointError, OSError)
    return isinstance(error, sentences) or type(error).__name__ in GPU_ERRORS


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return str(error).partition("\n")[0]


class Ranks:
    """The ranks that train as one, as one of them sees them. Without others it is rank 0 of 1.

    Ranks meet in a store, where each leaves what it is, and later why it ended: torchrun's, or a
    file in a private directory of `launch`. As a context it ends the connection, and this process
    with one sentence of all ranks: rank 0 says it.
    """

    def __init__(self, device, same: dict, seed: int):
        """Connect the ranks. same: options that all of them must have; seed: that of rank 0."""
        self.rank, self.count, self.store = in_environment("RANK", 0), 1, None
        self.device, self.devices, self.seed = device, [str(device)], seed
        self.waiting = False  # it has said that it waits
        if "RANK" not in os.environ:
            return
        from torch import distributed

        try:
            self.count = self.world_size()
            self.store = self.find_store()
            self.store.set_timeout(datetime.timedelta(seconds=JOIN_SECONDS))
            gpu = None if device.type == "cpu" else self.gpu_id()
            about = {"same": same, "device": str(device), "gpu": gpu, "seed": seed}
            of_all = self.meet(about)
            self.devices = [of_one["device"] for of_one in of_all]
            self.seed = of_all[0]["seed"]
            self.agree(of_all)
            if in_environment("LOCAL_WORLD_SIZE", 1) == self.count:
                stay_on_this_machine()
            distributed.init_process_group(
                "gloo" if device.type == "cpu" else "nccl",
                store=self.store,
                rank=self.rank,
                world_size=self.count,
                timeout=datetime.timedelta(seconds=COLLECTIVE_SECONDS),
            )
        except RuntimeError as error:  # of the store too
            raise self.cannot_join(first_line(error)) from error

    def cannot_join(self, reason: str) -> UserError:
        """The sentence of a rank that stays alone."""
        return UserError(f"rank {self.rank} cannot join the others: {reason}")

    def world_size(self) -> int:
        """The number of ranks, of which this must be one."""
        if "BATCH_A3C_LAUNCHER" not in os.environ:
            for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
                if name not in os.environ:
                    raise self.cannot_join(f"{name} is not set")
            in_environment("MASTER_PORT", 1)
        count = in_environment("WORLD_SIZE", 1)
        if self.rank >= count:
            raise UserError(f"RANK is {self.rank} in the environment, but WORLD_SIZE {count}", 2)
        return count

    def find_store(self):
        """The store of these ranks; rank 0 serves it where nobody else does."""
        from torch import distributed

        if directory := os.environ.get("BATCH_A3C_LAUNCHER"):
            return distributed.FileStore(f"{directory}/ranks", self.count)
        of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        address, port = os.environ["MASTER_ADDR"], in_environment("MASTER_PORT", 1)
        if self.rank == 0 and not of_torchrun:
            return distributed.TCPStore(address, port, self.count, True, wait_for_workers=False)
        begin, connected = time.monotonic(), False
        while not connected:  # torch would wait without a word, and deaf to Ctrl-C
            with contextlib.suppress(OSError):
                socket.create_connection((address, port), timeout=2).close()
                connected = True
            if not connected:
                self.say_waiting(begin, "rank 0")
                time.sleep(0.2)
        wait = datetime.timedelta(seconds=JOIN_SECONDS)
        return next(distributed.rendezvous("env://", timeout=wait))[0]

    def say_waiting(self, begin: float, whom: str) -> None:
        """Say once for whom this rank waits; UserError after JOIN_SECONDS."""
        waited = time.monotonic() - begin
        if waited > JOIN_LOG_SECONDS and not self.waiting and self.speaks:
            text = f"rank {self.rank} of {self.count} waits for {whom}"
            print(f"{text}, {JOIN_SECONDS:.0f} seconds at most", flush=True)
            self.waiting = True
        if waited > JOIN_SECONDS:
            raise self.cannot_join(f"waited {JOIN_SECONDS:.0f} seconds for {whom}")

    @property
    def speaks(self) -> bool:
        """Whether this rank tells the user what holds for all: one rank of each machine does."""
        return in_environment("LOCAL_RANK", 0) == 0

    def meet(self, about: dict) -> list[dict]:
        """What each rank says of itself, in their order."""
        self.store.set(f"about {self.rank}", json.dumps(about))
        self.wait_for_all("about")
        of_all = [json.loads(self.store.get(f"about {rank}")) for rank in range(self.count)]
        self.store.set(f"met {self.rank}", "")
        if self.rank == 0:  # the store may go with it, should it end now
            self.wait_for_all("met")
        return of_all

    def wait_for_all(self, word: str) -> None:
        """Wait until each rank has left this word in the store."""
        begin, ranks = time.monotonic(), range(self.count)
        while missing := [rank for rank in ranks if not self.store.check([f"{word} {rank}"])]:
            self.say_waiting(begin, ", ".join(f"rank {rank}" for rank in missing))
            time.sleep(0.05)

    def gpu_id(self) -> str:
        """What no other GPU has."""
        import torch

        return str(torch.cuda.get_device_properties(self.device).uuid)

    @staticmethod
    def agree(of_all: list[dict]) -> None:
        """UserError unless all ranks train the same, each on a GPU of its own or all on a CPU."""
        for rank, about in enumerate(of_all):
            for name, value in of_all[0]["same"].items():
                other = about["same"].get(name)
                if other != value:
                    text = f"rank 0 has {name} {value}, rank {rank} has {other}"
                    raise UserError(f"{text}: all ranks must train the same", 2)
        gpus: dict[str, int] = {}
        for rank, about in enumerate(of_all):
            if (about["gpu"] is None) != (of_all[0]["gpu"] is None):
                text = f"rank 0 is on {of_all[0]['device']}, rank {rank} on {about['device']}"
                raise UserError(f"{text}: all ranks need a GPU, or none", 2)
            if about["gpu"] in gpus:
                text = f"ranks {gpus[about['gpu']]} and {rank} have the same one"
                raise UserError(f"each rank needs a GPU of its own, but {text}", 2)
            if about["gpu"] is not None:
                gpus[about["gpu"]] = rank

    def wait_for_evaluation(self, number: int, check: Callable[[], None]) -> None:
        """Let the other ranks wait until rank 0 is here; a collective would not wait so long.

        number: of the iterations so far; check: what a waiting rank looks after.
        """
        if self.count == 1:
            return
        from model import RanksError, collective

        key, deadline = f"evaluated {number}", time.monotonic() + EVALUATION_SECONDS
        if self.rank == 0:
            with collective():
                self.store.set(key, "")
            return
        while time.monotonic() < deadline:
            with collective():
                if self.store.check([key]):
                    return
            check()
            time.sleep(0.1)
        raise RanksError(f"rank 0 was not there after {EVALUATION_SECONDS:.0f} seconds")

    def end_of_another(self) -> dict | None:
        """Why another rank has ended, if one has left word of that."""
        with contextlib.suppress(RuntimeError):  # the store went with rank 0
            for rank in range(self.count):
                key = f"end {rank}"
                if rank != self.rank and self.store.check([key]):
                    return {"rank": rank} | json.loads(self.store.get(key))
        return None

    def leave_word(self, error: BaseException) -> None:
        """Tell the other ranks why this one ends."""
        import model

        spoilt = isinstance(error, (FloatingPointError, model.DivergedError))
        text = first_line(error) if is_sentence(error) else f"{type(error).__name__}: {error}"
        about = {"text": text, "code": getattr(error, "code", 1), "spoilt": spoilt}
        with contextlib.suppress(RuntimeError):
            if not self.store.check([f"end {self.rank}"]):  # the first one is the reason
                self.store.set(f"end {self.rank}", json.dumps(about))

    def is_spoilt(self) -> bool:
        """Whether another rank has ended because the weights are not good any more."""
        other = self.end_of_another() if self.count > 1 else None
        return other is not None and other["spoilt"]

    @staticmethod
    def is_lost(error: BaseException) -> bool:
        """Whether this is what a rank gets when it has lost the others."""
        from torch import distributed

        import model

        return isinstance(error, (model.RanksError, distributed.DistError))

    def explain(self, error: Exception, signum: int | None = None) -> Exception:
        """What the run ends with: this error, or what lies behind it in another rank.

        signum: of the signal that this rank was sent, if it was.
        """
        import model

        if self.count == 1:
            return error
        lost, stopped = self.is_lost(error), getattr(error, "code", 1) > 128
        if not lost and not stopped:
            self.leave_word(error)
            diverged = isinstance(error, model.DivergedError)
            return UserError(f"{error}; nothing is saved") if diverged else error
        waits = self.speaks and not stopped and not signum
        deadline = time.monotonic() + (REASON_SECONDS if waits else 0)
        while (other := self.end_of_another()) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if other is not None:
            return UserError(f"rank {other['rank']}: {other['text']}", other["code"])
        if stopped:
            return error
        if signum:
            return UserError(f"stopped by {signal.Signals(signum).name}", 128 + signum)
        return UserError(f"rank {self.rank} lost the others: {error}")

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        if self.store is None:
            return
        from torch import distributed

        reason = self.explain(error) if isinstance(error, Exception) else error
        if error is None or self.device.type == "cpu":  # NCCL would wait for lost ranks
            distributed.destroy_process_group()  # otherwise gloo may abort this process at its end
        if not self.speaks and (is_sentence(reason) or isinstance(reason, KeyboardInterrupt)):
            sys.exit(getattr(reason, "code", 1 if is_sentence(reason) else 130))
        if reason is not error:
            raise reason from error


def join_ranks(devices: list, same: dict, seed: int) -> Ranks:
    """Connect this rank with the others, if there are any."""
    local = in_environment("LOCAL_RANK", 0)
    device = devices[local % len(devices)]
    if device.type == "cuda":
        import torch

        torch.cuda.set_device(device)
    if "BATCH_A3C_LAUNCHER" in os.environ:
        end_this = (os.kill, os.getpid(), signal.SIGTERM)
        threading.Thread(target=end_with_parent, args=end_this, daemon=True).start()
    try:
        return Ranks(device, same, seed)
    except UserError as error:
        if local and error.code == 2:  # all ranks have found it, and one of them says it
            sys.exit(error.code)
        raise


def interrupt_quietly() -> None:
    """Let Ctrl-C end this rank without a word, for another one of this machine says it."""
    if in_environment("LOCAL_RANK", 0) and INTERRUPTIBLE:
        signal.signal(signal.SIGINT, stop)


def stay_on_this_machine() -> None:
    """Let gloo and NCCL listen on the loopback interface alone."""
    names = {name for _, name in socket.if_nameindex()}
    for name in names & {"lo", "lo0"}:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = name


@contextlib.contextmanager
def private_directory() -> Iterator[str]:
    """A private directory, removed at the end; after a SIGKILL by the next start."""
    path, lock = make_private_directory()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def how_it_ended(code: int) -> str:
    """What an exit code says, as subprocess has it."""
    return f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"


def launch(ranks: int, arguments: list[str]) -> None:
    """Run this program with these arguments as so many ranks; end with the first that ends.

    Signals go to rank 0, which saves, and says what there is to say.
    """
    from torch import distributed

    processes: list[subprocess.Popen] = []
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until a rank can end in good order
    on_signals(lambda signum, frame: processes[0].send_signal(signum))
    with private_directory() as directory:
        world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        world["BATCH_A3C_LAUNCHER"] = directory
        failed = 0
        try:
            for rank in range(ranks):
                environment = (
                    child_environment() | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                )
                streams = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL if rank else None}
                process = subprocess.Popen(
                    [sys.executable, os.path.abspath(__file__), *arguments],
                    env=environment,
                    start_new_session=True,
                    **streams,
                )
                processes.append(process)
            store = distributed.FileStore(f"{directory}/ranks", ranks)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            while processes[0].poll() is None and not failed:
                time.sleep(0.1)
                failed = next((r for r, process in enumerate(processes) if process.poll()), 0)
            failed = failed if processes[0].poll() is None else 0
            if failed and not store.check([f"end {failed}"]):
                text = how_it_ended(processes[failed].returncode)
                about = {"text": f"it {text}", "code": 1, "spoilt": False}
                store.set(f"end {failed}", json.dumps(about))
            if failed:  # rank 0 will notice, unless it waits for simulators or evaluates
                with contextlib.suppress(subprocess.TimeoutExpired):
                    processes[0].wait(REASON_SECONDS + 1)
        finally:
            end(processes, LAUNCH_END_SECONDS)
    code = processes[0].returncode
    silent = code in (128 + signal.SIGTERM, -signal.SIGKILL)  # it was ended before it could speak
    last = failed if failed and silent else 0
    code = processes[last].returncode
    if code < 0:
        raise UserError(f"rank {last} {how_it_ended(code)}", 1 if last else 128 - code)
    sys.exit(code)


def complete(
    chosen: dict, on_cpu: bool, ranks: int = 1, one_per_process: bool = False
) -> argparse.Namespace:
    """All options of a rank: the chosen ones, and what fits them and its share of this machine."""
    cores = max(1, count_cores() // ranks)
    table = {name.lower(): default for name, _, default, _ in LEARNING + SPEED}
    if chosen.get("network") == "a3c":
        table |= LEARNING_OF_A3C
    most = CPU_PLAYERS // chosen.get("players_per_simulator", 1)
    default = ranks * max(1, min(2 * cores, most)) if on_cpu else table["simulator_proc"]
    simulators = max(1, chosen.get("simulator_proc", default) // ranks)
    chosen = chosen | {"simulator_proc": simulators}
    if on_cpu:
        players = 1 if one_per_process else CPU_PLAYERS // simulators
        table["players_per_simulator"] = max(1, players)
        table["predict_batch_size"] = CPU_BATCH
        table["predictor_thread_per_gpu"] = min(-(-cores // 2), CPU_PREDICTORS)
    o = argparse.Namespace(**({"listen": None, "key": None} | table | chosen))
    players = simulators * o.players_per_simulator
    o.predictor_thread_per_gpu = min(o.predictor_thread_per_gpu, simulators)
    o.predict_batch_size, o.queue_size = min(o.predict_batch_size, players), o.batch_size
    vars(o).update(chosen)  # what was asked for is refused below, not mended
    size, threads = o.predict_batch_size, o.predictor_thread_per_gpu
    frames = 3 * players * (o.local_time_max + 3)  # of the books; of the queue: four for a state
    frames += 4 * (o.queue_size + 3 * o.batch_size + size)
    need = frames * math.prod(FRAME_SHAPE) + simulators * SIMULATOR_BYTES + players * PLAYER_BYTES
    need *= ranks
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    waiting = f"a queue of {o.queue_size} states can never fill a batch of {o.batch_size}"
    for wrong, sentence in (
        (o.listen and not o.key, "--listen needs --key FILE, which simulators need to join"),
        (size > players, f"{players} players can never fill a predict batch of {size} states"),
        (threads > o.simulator_proc, f"{threads} predictor threads need as many simulators"),
        (o.queue_size < o.batch_size, waiting),
        (o.local_time_max >= o.batch_size, "--local-time-max must be below --batch-size"),
        (need > memory, f"this takes {need / 1e9:.0f} GB of {memory / 1e9:.0f} GB of memory"),
    ):
        if wrong:
            raise UserError(sentence, 2)
    return o


def check_run(saved: dict) -> None:
    """ValueError unless a checkpoint says all of its run that is needed to go on with it."""
    from model import item

    if not item(saved, "env", str).isprintable():
        raise ValueError("its env is no name")
    check_options(item(saved, "options", dict))
    at, stats = item(saved, "at", dict), item(saved, "stats", list)
    for counter in ("epoch", "global_step", "epoch_step", "starts"):
        if not 0 <= item(at, counter, int) < 2**53:
            raise ValueError(f"its {counter} is {at[counter]}")
    for seconds in ("elapsed_s", "evaluated_s"):
        if not 0 <= item(at, seconds, float) < math.inf:
            raise ValueError(f"its {seconds} is {at[seconds]}")
    # Before the first whole evaluation it is None.
    if at.get("best_score", "") is not None and not math.isfinite(item(at, "best_score", float)):
        raise ValueError(f"its best_score is {at['best_score']}")
    if "due" in at:
        item(at, "due", bool)
    if "run_id" in saved:
        item(saved, "run_id", str)
    for epoch in stats:
        for number in ("epoch_num", "global_step"):
            item(epoch, number, int)
        if not all(value is None or type(value) in (int, float) for value in epoch.values()):
            raise ValueError("its stats are no numbers")
    if [epoch["epoch_num"] for epoch in stats] != list(range(1, at["epoch"] + 1)):
        raise ValueError(f"its stats are not those of {at['epoch']} epochs")
    if at.get("due") and not stats:
        raise ValueError("an evaluation is due before the first epoch")


def read_json(path: str, kind: type):
    """What is in a file; ValueError where it does not hold such a thing."""
    try:
        with open(path, "rb") as file:
            content = json.load(file)
    except OSError as error:
        raise ValueError(f"it has no {os.path.basename(path)}") from error
    except ValueError as error:
        raise ValueError(f"its {os.path.basename(path)} is damaged") from error
    if not isinstance(content, kind):
        raise ValueError(f"its {os.path.basename(path)} is damaged")
    return content


def check_directory(path: str, saved: dict) -> None:
    """ValueError unless a directory holds the run of a checkpoint, not the checkpoint alone.

    The run is known by the name that it has given itself; one of an earlier version, which had
    none, by its game, seed and network. The epochs of stats.json may be more or less than those of
    the checkpoint: whoever stops a run may do so between two files, or go back to a copy.
    """
    if not os.path.isfile(os.path.join(path, "log.log")):
        raise ValueError("it has no log.log")
    config = read_json(os.path.join(path, "config.json"), dict)
    stats = read_json(os.path.join(path, "stats.json"), list)
    if "run_id" in config and "run_id" in saved:
        same = config["run_id"] == saved["run_id"]
    else:
        known = {"env": saved["env"], "network": saved["learner"]["kind"]}
        known["seed"] = saved["options"].get("seed")
        same = all(config.get(key) == value for key, value in known.items())
    if not same:
        raise ValueError("its config.json is of another run")
    for ours, theirs in zip(saved["stats"], stats, strict=False):
        steps = theirs.get("global_step") if isinstance(theirs, dict) else None
        if steps != ours["global_step"]:
            raise ValueError("its stats.json is of another run")


class Place(NamedTuple):
    """Where a run is."""

    path: str
    goes_on: bool  # there, as the run of a checkpoint
    sentence: str  # which says so
    reason: str = ""  # why the checkpoint's run does not go on where the checkpoint is


def place_run(env_id: str, output: str | None, saved: dict) -> Place:
    """The directory of a run that begins with a checkpoint, or with none ({}).

    A checkpoint's run goes on only in its own directory, and from checkpoint.pt itself: every other
    copy of it, wherever it lies, begins a run of its own.
    """
    path = os.path.abspath(output or os.path.join("train_log", f"train-atari-{file_name(env_id)}"))
    if not saved:
        return Place(path, False, f"a new run in {path}")
    directory, file = os.path.split(saved["file"])
    reason = None
    if file != "checkpoint.pt":
        reason = "a run goes on from its checkpoint.pt alone"
    elif output is not None and os.path.realpath(path) != os.path.realpath(directory):
        reason = "--output names another directory"
    else:
        try:
            check_directory(directory, saved)
        except ValueError as error:
            reason = f"{directory} is not the directory of that run: {error}"
    if reason is None:
        return Place(directory, True, f"the run goes on in {directory}")
    sentence = f"a new run in {path} begins with what {saved['file']} holds ({reason})"
    return Place(path, False, sentence, reason)


def open_run(path: str, goes_on: bool, way: str = ""):
    """Make the directory of a run ours; returns its log file, open and locked.

    UserError where that cannot be; `way`: what to do if it holds a run, if not to resume that.
    """
    present = [name for name in RUN_FILES if os.path.exists(os.path.join(path, name))]
    if present and not goes_on:
        if "checkpoint.pt" in present:
            checkpoint = os.path.join(path, "checkpoint.pt")
            way = way or f"go on with it by --load {checkpoint}, or name another --output"
        else:  # it was ended before its first checkpoint was whole
            way = "name another --output, or remove it: there is no checkpoint to go on from"
        raise UserError(f"{path} holds a run ({', '.join(present)}): {way}", 2)
    try:
        path.encode()
        os.makedirs(path, exist_ok=True)
        how = {"buffering": 1, "encoding": "utf-8", "errors": "backslashreplace"}
        log_file = open(os.path.join(path, "log.log"), "a", **how)  # noqa: SIM115
        try:
            fcntl.flock(log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        return log_file
    except BlockingIOError as error:
        raise UserError(f"another process is training in {path}", 2) from error
    except UnicodeEncodeError as error:
        raise UserError(f"{path!a}: TensorBoard needs a name in UTF-8", 2) from error
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}", 2) from error


class Training:
    """A run: the learner, what feeds it, and what it leaves in its directory.

    chosen: the options the user gave, now or before; options: all of them; saved: the checkpoint
    it begins with; log_file: of rank 0, what open_run made of the directory; changes: what a
    resumed run has otherwise than before.
    """

    def __init__(self, env_id, chosen, options, network, ranks, place, saved, log_file, changes):
        import torch

        import model

        device = ranks.device
        self.env_id, self.chosen, self.device, self.path = env_id, chosen, device, place.path
        self.options, self.log_file = options, log_file
        # By this name files know that they are of the same run.
        self.run_id = (saved.get("run_id") if place.goes_on else None) or secrets.token_hex(8)
        self.ranks, self.rank, local = ranks, ranks.rank, in_environment("LOCAL_WORLD_SIZE", 1)
        if self.rank:
            self.options.listen = None
        self.columns = (*model.METRICS, "policy_lag", "policy_lag_max", "queue_size")
        # Epochs and iterations done, iterations of this epoch done, starts of this program.
        self.at = {"epoch": 0, "global_step": 0, "epoch_step": 0, "starts": 0, "best_score": None}
        self.at |= {"elapsed_s": 0.0, "evaluated_s": 0.0}
        self.at["due"] = False  # an epoch's evaluation: its iterations are done
        self.stats: list[dict] = []  # of the epochs done
        self.unwritten: dict[str, OSError] = {}  # files of the run that are out of date, and why
        self.rows: list[np.ndarray] = []  # of this epoch's iterations: a value for each column
        self.unread: list = []  # iterations whose metrics are still on the device
        self.began = self.logged = self.saved = time.monotonic()
        self.shown, self.signal = 0, None
        self.is_whole = True  # not in the middle of an update
        self.is_checked = True  # the ranks have compared their weights after the last update
        threads = max(1, count_cores() // local)
        how = {"center_filters": options.center_filters, "bfloat16": options.bfloat16}
        self.learner = model.Learner(network, device, options.adam_epsilon, threads, **how)
        self.log(place.sentence)
        if saved:
            self.learner.load_state_dict(saved["learner"])
            torch.set_rng_state(saved["rng"])
            self.at, self.stats = self.at | saved["at"], saved["stats"]
            if not os.path.exists(os.path.join(self.path, "model-best.npz")):
                self.at["best_score"] = None
            done = "{global_step} iterations, {epoch} epochs, best score {best_score}"
            self.log(f"restored {saved['file']}: weights, optimizer, {done.format(**self.at)}")
        if changes:
            self.log("otherwise than before: " + "; ".join(changes))
        run = self.learner.share({"at": self.at, "stats": self.stats})
        self.at, self.stats = run["at"], run["stats"]
        self.began -= self.at["elapsed_s"]
        self.at["starts"] += 1
        packages = {name: version(name) for name in PACKAGES}
        packages |= {"opencv": cv2.__version__, "python": sys.version}
        simulators = {"simulator_proc": options.simulator_proc * local}
        simulators["simulator_proc_of_a_rank"] = options.simulator_proc
        self.config = {"env": env_id, "run_id": self.run_id} | vars(options) | simulators
        self.config |= {"devices": ranks.devices, "chosen": chosen, "versions": packages}
        self.write_json("config.json", self.config)
        self.announce()

    def announce(self) -> None:
        """Print what follows from the options."""
        o, network = self.options, self.learner.network
        players = o.simulator_proc * o.players_per_simulator
        states = o.steps_per_epoch * o.batch_size
        # A state waits until its segment is done, then in the queue, while others are trained on.
        lag = (players * (o.local_time_max + 3) / 2 + o.queue_size) / o.batch_size
        parameters = sum(p.numel() for p in network.parameters())
        cores, ranks = count_cores(), self.learner.ranks
        facts = {
            "run": f"{self.env_id} ({network.num_actions} actions) in {self.path}, seed {o.seed}",
            "network": f"{network.kind}, {parameters:,} parameters",
            "device": f"{self.device}, {cores} cores, predictors: {o.predictor_thread_per_gpu}",
            "players": f"{o.simulator_proc} processes x {o.players_per_simulator} = {players}",
            "epoch": f"{o.steps_per_epoch:,} iterations x {o.batch_size} = {states:,} states",
            "ranks": f"{ranks}, each with these players; an iteration has {ranks} batches",
            "policy lag": f"{lag:.1f} updates when the trainer binds; with fewer players less",
        }
        if o.bfloat16:
            facts["network"] += ", in bfloat16"
        if self.device.type == "cpu" and network.kind == "ba3c":
            facts["network"] += "; --network a3c is several times faster on a CPU"
            # Of the work for a state its update is about 0.8; the rest are prediction and player.
            rate = 0.8 * self.learner.measure(64)
            hours = states / rate / 3600
            hours = common.number(float(f"{hours:.2g}"))
            facts["expect"] = f"about {rate:.0f} states/s, {hours} hours per epoch"
        if ranks == 1:
            del facts["ranks"]
        self.log("training\n" + tabulate(facts.items()))

    def log(self, text: str) -> None:
        """A line in log.log and on standard output, above a progress bar if there is one."""
        if self.rank:
            return
        line = time.strftime("%m-%d %H:%M:%S ") + text
        with contextlib.suppress(OSError):  # a full disk
            self.log_file.write(line + "\n")
        with contextlib.suppress(OSError):  # where nobody reads it any more, train on
            tqdm.write(line)

    def write(self, name: str, content: bytes) -> bool:
        """Write a file of the run, and say whether it is; where that fails training goes on."""
        if self.rank:
            return False
        self.unwritten.pop(name, None)
        try:
            write_file(os.path.join(self.path, name), content)
        except OSError as error:
            self.unwritten[name] = error
            self.log(f"warning: {error}; training goes on")
            return False
        return True

    def write_json(self, name: str, content) -> None:
        """Write a JSON file of the run."""
        self.write(name, json.dumps(content, indent=1).encode())

    def save(self) -> None:
        """Write the epochs done, the checkpoint and the latest weights.

        A checkpoint goes on only beside what else there is of its run: hence it is not the first.
        """
        import model

        self.collect()
        self.at["elapsed_s"] = time.monotonic() - self.began
        run = {"env": self.env_id, "run_id": self.run_id, "options": self.chosen}
        run |= {"at": self.at, "stats": self.stats}
        if "config.json" in self.unwritten:
            self.write_json("config.json", self.config)
        self.write_json("stats.json", self.stats)
        self.write("checkpoint.pt", model.checkpoint_file(self.learner, run))
        self.write("model-latest.npz", model.weights_file(self.learner.network))
        self.saved = time.monotonic()

    def on_signal(self, signum: int, frame) -> None:
        """The first signal lets the iteration end and saves; a later one ends at once.

        Programs that pass signals on, such as timeout, send one twice in the same moment. Ranks
        above 0 go on for a while: rank 0 needs them to end its iteration, and they end with it.
        """
        if self.signal is None:
            later = RANK_END_SECONDS if self.rank else 0.0
            self.signal, self.signalled = signum, time.monotonic() + later
        elif time.monotonic() - self.signalled > SAME_SIGNAL_SECONDS:
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raise what should end the run, if there is something."""
        if self.signal is not None and time.monotonic() >= self.signalled:
            what = f"stopped by {signal.Signals(self.signal).name}"
            raise UserError(f"{what} in iteration {self.at['global_step']}", 128 + self.signal)
        for event in self.feed.check():
            self.log(f"{event}; training goes on")

    def is_good(self, error: Exception) -> bool:
        """Whether what this rank holds, now that `error` ends the run, may become the checkpoint.

        It must be that of a whole iteration, finite, and the same in all ranks as far as they know.
        """
        import model

        if isinstance(error, (FloatingPointError, model.DivergedError)) or self.ranks.is_spoilt():
            return False
        if self.ranks.is_lost(error):  # gloo fails before an update changes anything, NCCL later
            return self.device.type == "cpu"
        return self.is_whole

    def run(self) -> None:
        """Train until the last epoch is done."""
        from torch.utils.tensorboard import SummaryWriter

        from predictor import Feed

        if self.at["epoch"] >= self.options.max_epoch and not self.at["due"]:
            self.save()
            raise UserError(f"the run is done: {self.at['epoch']} epochs (--max-epoch)", 0)
        seeds = np.random.SeedSequence((self.options.seed, self.at["starts"], self.rank))
        on_signals(self.on_signal)
        if self.rank == 0:
            # TensorBoard's thread, on a full disk; all others report by themselves.
            threading.excepthook = lambda args: self.log(f"warning: {args.exc_value}")
            self.writer = SummaryWriter(self.path, purge_step=self.at["global_step"] + 1)
        self.feed = Feed(self.env_id, self.options, self.learner, seeds)
        with contextlib.closing(self.feed):
            try:
                while self.at["epoch"] < self.options.max_epoch or self.at["due"]:
                    self.check()
                    if not self.at["due"]:
                        self.run_epoch()
                    self.end_epoch()
            except Exception as error:
                reason = self.ranks.explain(error, self.signal)
                self.log(f"the run ends: {reason}")
                if (self.rows or self.unread) and self.is_good(error):
                    self.save()
                if isinstance(reason, UserError) and self.unwritten:
                    files = ", ".join(self.unwritten)
                    raise UserError(f"{reason}; not written: {files}", reason.code) from error
                if reason is error:
                    raise
                raise reason from error
            finally:
                if self.rank == 0:
                    with contextlib.suppress(Exception):  # it says again what its thread said
                        self.writer.close()
        for error in self.unwritten.values():
            raise error

    def run_epoch(self) -> None:
        """The iterations of an epoch that are not done yet."""
        at, steps, epoch = self.at, self.options.steps_per_epoch, self.at["epoch"] + 1
        names = ("learning_rate", "entropy_beta")
        self.rates = {name: scheduled(getattr(self.options, name), epoch) for name in names}
        learning_rate, warm_up = self.rates["learning_rate"], max(1, self.options.warm_up)
        self.rows, self.shown, self.epoch_began = [], 0, time.monotonic()
        hide = self.rank > 0 or None  # None: where there is no terminal
        self.bar = tqdm(desc=f"epoch {epoch}", total=steps, initial=at["epoch_step"], disable=hide)
        with self.bar:
            while at["epoch_step"] < steps:
                batch, versions = self.next_batch()
                lag = at["global_step"] - versions
                extra = (lag.mean(), lag.max(), len(self.feed.queue))
                warmth = min(1.0, (at["global_step"] + 1) / warm_up)
                self.rates["learning_rate"] = learning_rate * warmth
                self.is_whole = False
                self.unread.append(self.learner.update(batch, **self.rates, extra=extra))
                at["global_step"] += 1
                at["epoch_step"] += 1
                self.is_whole = True
                self.feed.publish(self.learner.network, at["global_step"])
                self.bar.update()
                self.is_checked = self.ranks.count == 1
                if not self.is_checked and at["global_step"] % CHECK_STEPS == 0:
                    self.learner.check_ranks()
                    self.is_checked = True
                if at["epoch_step"] < steps:
                    self.after_iteration()

    def next_batch(self):
        """Wait for a batch; before the first one, say what for."""
        while (batch := self.feed.queue.get(timeout=0.5)) is None:
            self.check()
            if not self.rows and not self.unread and time.monotonic() - self.logged > 2:
                self.logged = time.monotonic()
                there = f"{self.feed.fleet.connected} of {self.options.simulator_proc} simulators"
                states = f"{len(self.feed.queue)} of {self.options.batch_size} states"
                self.log(f"waiting for the first batch: {there} and {states} are there")
        return batch

    def after_iteration(self) -> None:
        """What is due now: metrics, a line, a checkpoint, the end."""
        now = time.monotonic()
        if self.device.type == "cpu" or len(self.unread) >= 50:  # reading waits for the GPU
            self.collect()
        if now - self.logged >= LOG_SECONDS:
            self.show(now)
        if now - self.saved >= CHECKPOINT_SECONDS and self.is_checked:
            self.save()
        self.check()

    def collect(self) -> None:
        """Read the metrics of the last iterations; FloatingPointError if one is not finite."""
        first = self.at["global_step"] - len(self.unread) + 1
        for step, metrics in enumerate(self.unread, first):
            self.rows.append(np.array(metrics.tolist()))
            for i in np.flatnonzero(~np.isfinite(self.rows[-1])):
                name, value = self.columns[i], self.rows[-1][i]
                raise FloatingPointError(f"{name} is {value} in iteration {step}")
        self.unread = []

    def means(self, first: int, seconds: float) -> dict[str, float]:
        """Metrics of this epoch's iterations from the `first` one on; None where there was none."""
        self.collect()
        rows, metrics = np.array(self.rows[first:]), dict.fromkeys(self.columns)
        if len(rows):
            metrics = dict(zip(self.columns, rows.mean(axis=0).tolist(), strict=True))
            metrics["policy_lag_max"] = float(rows[:, self.columns.index("policy_lag_max")].max())
        metrics |= self.rates | {"it_per_s": len(rows) / seconds}
        states = self.options.batch_size * self.learner.ranks  # of an iteration
        metrics["states_per_s"] = metrics["it_per_s"] * states
        scores = list(self.feed.scores)  # of the last training episodes
        metrics["train_score"] = sum(scores) / len(scores) if scores else None
        metrics["train_episodes"] = len(scores)
        return metrics

    def show(self, now: float) -> None:
        """Means since the last time: a line or the end of the progress bar, and TensorBoard."""
        m = self.means(self.shown, now - self.logged)
        self.shown, self.logged = len(self.rows), now
        self.add_scalars(m)
        score = "-" if m["train_score"] is None else f"{m['train_score']:.2f}"
        queue = f"queue {m['queue_size']:.0f}/{self.options.queue_size}, lag {m['policy_lag']:.2f}"
        text = f"{m['states_per_s']:.0f} states/s, score {score}, {queue}"
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            steps = f"{self.at['epoch_step']}/{self.options.steps_per_epoch}"
            self.log(f"epoch {self.at['epoch'] + 1} {steps}: {m['it_per_s']:.2f} it/s, {text}")

    def add_scalars(self, metrics: dict) -> None:
        """Show what there is in TensorBoard."""
        if self.rank:
            return
        for name, value in metrics.items():
            if value is not None:
                with contextlib.suppress(Exception):  # what its thread said already
                    self.writer.add_scalar(name, value, self.at["global_step"])

    def end_epoch(self) -> None:
        """Write down how the epoch went, and evaluate if it is time."""
        if not self.at["due"]:  # otherwise a run goes on that ended in the evaluation
            now = time.monotonic()
            # TensorBoard has means of some seconds; those of the epoch are for stats.json alone.
            if len(self.rows) + len(self.unread) > self.shown:
                self.add_scalars(self.means(self.shown, now - self.logged))
            metrics = self.means(0, now - self.epoch_began)
            metrics |= dict.fromkeys(EVALUATED)
            self.at |= {"epoch": self.at["epoch"] + 1, "epoch_step": 0, "due": True}
            done = {"epoch_num": self.at["epoch"], "global_step": self.at["global_step"]}
            self.stats.append(done | metrics)
        epoch = self.at["epoch"]
        if self.learner.ranks > 1:
            self.learner.check_ranks()
        if self.rank == 0 and (epoch % EVAL_EPOCH == 0 or epoch == self.options.max_epoch):
            self.save()  # so that an end in the evaluation loses nothing
            self.stats[-1] |= self.evaluate()
        if epoch < self.options.max_epoch:
            self.ranks.wait_for_evaluation(self.at["global_step"], self.check)
        self.at["due"] = False
        self.add_scalars({name: self.stats[-1].get(name) for name in EVALUATED})
        self.save()
        self.log(f"epoch {epoch} is done\n" + common.table(self.stats[-1]))
        self.logged = time.monotonic()

    def evaluate(self) -> dict[str, float | None]:
        """Score the network, within EVAL_SHARE of the time of the run, and keep the best one.

        Only an evaluation whose episodes were all played to their end has a score: otherwise the
        long ones are missing, which are the good ones of many games.
        """
        from model import weights_file
        from predictor import score

        start = time.monotonic()
        seconds = EVAL_SHARE * (start - self.began) - self.at["evaluated_s"]
        seconds = max(0.0, seconds / (1 - EVAL_SHARE))  # it is part of the time of the run
        episodes, seed = self.options.eval_episode, self.options.seed + self.at["epoch"]
        network, log = self.learner.network, lambda text: self.log(f"evaluation: {text}")
        log(f"{episodes} episodes in {seconds:.0f} s at most")
        try:
            done = score(self.env_id, network, episodes, seed, log, seconds, self.check)
        except (UserError, OSError) as error:  # there is no room for its players on a full disk
            self.check()  # if it is not an evaluation's, it is raised here
            log(f"given up: {error}{self.without_best()}")
            return {}
        finally:
            self.at["evaluated_s"] += time.monotonic() - start
        result, finished = summary(done), sum(episode.finished for episode in done)
        log(f"mean {result['mean']:.2f}, {finished} of {episodes} episodes played to their end")
        whole = finished == len(done) == episodes
        best = self.at["best_score"]
        if whole and (best is None or result["mean"] > best):
            if self.write("model-best.npz", weights_file(network)):
                self.at["best_score"] = result["mean"]
        elif not whole:
            log("it is not whole, and decides nothing" + self.without_best())
        scores = (result["mean"], result["max"]) if whole else (None, None)
        return dict(zip(EVALUATED, (*scores, finished), strict=True))

    def without_best(self) -> str:
        """What to do while there is no model-best.npz, as the rest of a sentence."""
        if self.at["best_score"] is not None:
            return ""
        ways = "--task eval, which has no limit of time, or fewer --eval-episode"
        return f"; no evaluation was whole yet, so there is no model-best.npz: {ways}"


def file_name(env_id: str) -> str:
    """What files are named that belong to a game."""
    return re.sub(r"[^\w.-]", "-", env_id)


def load_for(env_id: str | None, path: str) -> tuple:
    """Game, network, and checkpoint ({} for an .npz) out of a file, which must fit the game."""
    game = describe(env_id) if env_id else None
    import model

    network, saved = model.load(path)
    if saved:
        try:
            check_run(saved)
        except ValueError as error:
            raise UserError(f"{path} is not usable: {error}") from error
        saved["file"] = os.path.abspath(path)
        if env_id is None and ":" in saved["env"]:  # nothing in a file is executed unasked
            module, way = saved["env"].partition(":")[0], f"give --env {saved['env']}"
            raise UserError(f"{path} is of a game in the Python module {module}: {way}", 2)
        if game is not None and saved["env"] not in (env_id, game.env_id):
            raise UserError(f"{path} is a run of {saved['env']}, not of {env_id}", 2)
    game = game or describe(saved["env"])
    n, actions = network.num_actions, game.num_actions
    if n != actions:
        raise UserError(f"{path} is for a game with {n} actions; {game.env_id} has {actions}")
    return game.env_id, network, saved


def task_train(given: dict) -> None:
    """--task train."""
    interrupt_quietly()
    del given["task"]
    arguments = given.pop("arguments")
    load, output, saved = given.pop("load", None), given.pop("output", None), {}
    env_id, kind = given.pop("env", None), given.get("network")
    gpus, ranks = given.pop("gpu", None), given.pop("ranks", None)
    if load is not None:
        env_id, network, saved = load_for(env_id, load)
        if kind not in (None, network.kind):
            raise UserError(f"{load} holds the network {network.kind}, not {kind}")
    game = describe(env_id)
    env_id, actions = game.env_id, game.num_actions
    if "key" in given:
        given["key"] = os.path.abspath(given["key"])
    before = saved.get("options", {})
    resumed, changes = resumed_options(before, given)
    chosen = {"seed": secrets.randbits(32)} | resumed | given
    chosen["network"] = (kind or "ba3c") if load is None else network.kind
    place = place_run(env_id, output, saved)
    import torch

    import model

    if not 0 < actions < model.MAX_ACTIONS:
        raise UserError(f"{env_id} has {actions} actions, not 1 to {model.MAX_ACTIONS - 1}", 2)
    devices, other_devices = choose_devices(gpus, ranks, before)
    # What is wrong is said here, before ranks wait for each other.
    local = in_environment("LOCAL_WORLD_SIZE", len(devices))
    changes = other_devices + share_simulators(chosen, given, local) + changes
    options = complete(chosen, devices[0].type == "cpu", local, game.one_per_process)
    way = ""
    if place.reason and saved["file"] == os.path.join(place.path, "checkpoint.pt"):
        way = f"{place.reason}; name another --output"
    log_file = None
    if not in_environment("RANK", 0):
        log_file = open_run(place.path, place.goes_on, way)
    if len(devices) > 1 and "RANK" not in os.environ:
        log_file.close()  # rank 0 opens it again
        return launch(len(devices), arguments)
    same = {"--env": env_id, "--network": chosen["network"], "as number of actions": actions}
    same |= {flag(name): vars(options)[name.lower()] for name, *_ in LEARNING}
    with (
        log_file or contextlib.nullcontext(),  # to close it lets go of its lock
        torch_settings_kept(),
        join_ranks(devices, same, chosen["seed"]) as ranks,
    ):
        of_all = {"seed": ranks.seed, "ranks": ranks.count, "gpu": gpu_numbers(ranks.devices)}
        vars(options).update(of_all)
        chosen |= {name: value for name, value in of_all.items() if value is not None}
        torch.manual_seed(ranks.seed)
        if load is None:
            network = model.Network(chosen["network"], actions)
            if options.center_filters:
                network.center_filters()
        run = Training(env_id, chosen, options, network, ranks, place, saved, log_file, changes)
        run.run()


def load_agent(given: dict) -> tuple:
    """Game, network, number of episodes and seed of a task that plays."""
    if "load" not in given:
        path = os.path.join(os.path.dirname(__file__), "models", f"{given['env']}.npz")
        way = f", for example {os.path.relpath(path)}" if os.path.exists(path) else ""
        raise UserError(f"--task {given['task']} needs --load FILE{way}", 2)
    env_id, network, _ = load_for(given.get("env"), given["load"])
    device = find_devices(given.get("gpu"), None)[0]
    if device.type == "cuda":
        import torch

        torch.cuda.set_device(device)
    network.to(device)
    return env_id, network, given.get("episode", 100), given.get("seed", secrets.randbits(32))


def task_eval(given: dict) -> None:
    """--task eval."""
    start = time.monotonic()
    env_id, network, count, seed = load_agent(given)
    from predictor import score

    output = given.get("output")
    with common.output_directory(output):
        episodes = score(env_id, network, count, seed, log=print)
        seconds = round(time.monotonic() - start, 1)
        print(common.table(summary(episodes) | {"seed": seed, "seconds": seconds}))
        if output is not None:
            result = common.results(env_id, episodes) | {"seed": seed}
            path = os.path.join(output, "results.json")
            write_file(path, json.dumps(result, indent=1).encode())


def watch(players, network, count: int, seed: int, each: Callable) -> None:
    """Play `count` episodes, one after the other; calls `each` with those so far after each."""
    from predictor import policy_of

    episodes: list = []
    with contextlib.closing(players):
        try:
            for done in common.evaluate(players, policy_of(network), count, seed, math.inf):
                if len(done) > len(episodes):
                    with undisturbed():
                        episodes = list(done)
                        each(episodes)
                    last = common.number(episodes[-1].score)
                    print(f"{len(episodes)}/{count}, score={last}", flush=True)
        finally:
            print(common.table(summary(episodes) if episodes else {"episodes": 0}))


def task_play(given: dict) -> None:
    """--task play."""
    env_id, network, count, seed = load_agent(given)
    if "output" in given:
        output = os.path.abspath(given["output"])  # wherever a game goes
        with common.output_directory(output):
            players = Recorder(
                env_id, seed, lambda episode: os.path.join(output, f"episode{episode:06}.mp4")
            )
            return watch(players, network, count, seed, lambda episodes: None)
    players = VectorPlayers(env_id, 1, seed, lambda: None, "--window")
    try:
        watch(players, network, count, seed, lambda episodes: None)
    except SimulatorError as error:
        if error.exit_code != 0:  # 0: the window was closed
            raise UserError(f"{error}; --output DIR writes videos instead") from error


def task_gen_submit(given: dict) -> None:
    """--task gen_submit."""
    env_id, network, count, seed = load_agent(given)
    output = os.path.abspath(given.get("output", "output_dir"))  # wherever a game goes
    from model import weights_file

    if count < 100:
        print(f"{count} episodes: gym scores a submission of 100 or more")
    prefix = os.path.join(output, f"openaigym.video.0.{os.getpid()}.video")
    cubes = {k**3 for k in range(10)}  # and from 1,000 on the thousands, as gym's Monitor does

    def path_of(episode: int) -> str | None:
        recorded = episode in cubes or (episode and episode % 1000 == 0)
        return f"{prefix}{episode:06}.mp4" if recorded else None

    model, weights = file_name(env_id) + ".npz", weights_file(network)
    config = {"env_id": env_id, "network": network.kind, "num_actions": network.num_actions}
    config |= {"seed": seed, "state_shape": STATE_SHAPE, "random_actions": common.RANDOM_ACTIONS}

    def submit(episodes: list) -> None:
        common.write_submission(output, env_id, recorder, episodes, model, config, weights)

    with common.output_directory(output):
        recorder = Recorder(env_id, seed, path_of)
        try:
            watch(recorder, network, count, seed, submit)
        finally:
            if recorder.replay is None:  # there is no submission that its videos belong to
                for video in recorder.finished.values():
                    video.drop()


TASKS = {"train": task_train, "play": task_play, "eval": task_eval, "gen_submit": task_gen_submit}


@contextlib.contextmanager
def process_kept() -> Iterator[None]:
    """Leave the process of a caller as it was: how it handles signals, prints, and reports errors.

    Until then what is printed appears line by line, for somebody may be reading, and names that a
    terminal cannot show are printed as numbers.
    """
    handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
    mask, hook = signal.pthread_sigmask(signal.SIG_BLOCK, ()), threading.excepthook
    directory = os.getcwd()
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    ways = {}
    for name, stream in streams.items():
        if stream is None:  # it was closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            ways[name] = {"line_buffering": stream.line_buffering, "errors": stream.errors}
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        yield
    finally:
        threading.excepthook = hook
        os.chdir(directory)  # a game may have gone elsewhere
        for name, stream in streams.items():
            with contextlib.suppress(OSError, ValueError):  # nobody reads it, or it was closed
                if stream is None:
                    getattr(sys, name).close()
                elif name in ways:
                    stream.reconfigure(**ways[name])
            setattr(sys, name, stream)
        if threading.current_thread() is threading.main_thread():
            for signum, handler in handlers.items():
                if handler is not None:  # one that is not Python's
                    signal.signal(signum, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def torch_settings_kept() -> Iterator[None]:
    """Leave torch as a caller has set it."""
    import torch

    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def main(arguments: list[str] | None = None) -> int:
    """Run a task; returns the exit code.

    arguments: in place of those of the command line. It may be called from any thread, and again.
    """
    if arguments is None:
        arguments = sys.argv[1:]
    arguments = [str(argument) for argument in arguments]
    with process_kept():
        return run_task(arguments)


def run_task(arguments: list[str]) -> int:
    """What main does, in a process that it may change."""
    # Threads that wait should sleep: there are more of them here than cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # What ranks have to say of each other is one sentence, not torch's warnings.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    on_signals(stop, SIGNALS[1:])
    if INTERRUPTIBLE and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # of a rank: its launcher blocked them
        given = read_options(arguments)
        TASKS[given["task"]](given | {"arguments": arguments})
        return 0
    except SystemExit as error:  # of a signal, of the ranks, or of the parser, which has said why
        return error.code
    except KeyboardInterrupt:
        sentence, code = "interrupted", 130
    except (UserError, FloatingPointError, OSError) as error:
        sentence, code = str(error), getattr(error, "code", 1)
    except RuntimeError as error:
        if type(error).__name__ not in GPU_ERRORS:
            raise
        sentence, code = first_line(error), 1
    print(f"{PROGRAM}: {sentence}", file=sys.stderr)
    return code


def run_program() -> None:
    """Be this program: run a task, and exit with its code, whatever threads still do."""
    try:
        code = main()
        forced_end = threading.Timer(FORCED_END_SECONDS, os._exit, [code])
        forced_end.daemon = True
        forced_end.start()
        sys.exit(code)
    finally:
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError:  # nobody reads it any more: Python must not try again, and fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    run_program()
