#!/usr/bin/env python3
"""Batch-A3C on Atari games: train an agent, watch it, score it, submit it.

  train:         ./train_atari.py --env Breakout-v0 --gpu 0
  twice as fast: ./train_atari.py --env Breakout-v0 --gpu 0 --simulator-proc 16 \\
                     --players-per-simulator 4 --predict-batch-size 64 \\
                     --predictor-thread-per-gpu 1    (with 16 cores)
  on a CPU:      ./train_atari.py --env Breakout-v0 --network a3c
  resume:        ./train_atari.py --load train_log/train-atari-Breakout-v0/checkpoint.pt
  watch a model: ./train_atari.py --task play --env Breakout-v0 --load Breakout-v0.npz
  score a model: ./train_atari.py --task eval --env Breakout-v0 --load Breakout-v0.npz --episode 100
  submit it:     ./train_atari.py --task gen_submit --env Breakout-v0 --load Breakout-v0.npz \\
                     --output output_dir

play without a display: --output DIR writes videos instead. Without --load, play, eval and
gen_submit take the agent of the game in models/. The default --output of a run is
train_log/train-atari-ENV, of a submission output_dir; eval writes results.json if it is given.

A directory that already holds a run is refused, unless --load names its own checkpoint.pt: then
that run is resumed there, with its options except those given anew. A copy of a checkpoint starts a
run elsewhere.
Exit codes: 0 done, 1 failed, 2 wrong usage, 130 (Ctrl-C) and 143 (SIGTERM) stopped after saving.
Even with --seed a training run cannot be repeated to the bit: in which order players are served
depends on the load of the machine.
"""

# ruff: noqa: E402 - Ctrl-C is handled before anything else
import os
import signal

INTERRUPTIBLE = signal.getsignal(signal.SIGINT) is signal.default_int_handler
if __name__ == "__main__" and INTERRUPTIBLE:  # while the imports below take their time
    signal.signal(signal.SIGINT, lambda signum, frame: os._exit(130))

import argparse
import contextlib
import dataclasses
import datetime
import errno
import fcntl
import json
import math
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import cv2
import gymnasium
import numpy as np
from tabulate import tabulate
from tqdm import tqdm

import common
from common import SIGNALS, UserError, count, count_cores, describe, on_signals, summary, whole
from simulator import SimulatorError, split_address

# torch, and the modules that need it, are imported where they are used: --help does not wait.

PROGRAM = os.path.basename(__file__)
MODELS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "models")

# Training
EVAL_EPOCH = 3  # epochs from one evaluation to the next
EVAL_SHARE = 0.2  # of the time of a run, at most, is spent in evaluation
CHECKPOINT_SECONDS = 300
LOG_SECONDS = 10
SAME_SIGNAL_SECONDS = 0.5  # a second signal within this time is the first one once more
FORCED_END_SECONDS = 5.0  # until threads that hang in native code are left behind

# Defaults on a CPU
CPU_PREDICTORS = 4  # at most, one per two cores: Python runs one thread at a time
CPU_BATCH = 24  # most states in a prediction; half of the players, where that is less
CPU_PLAYERS = 48  # in all: in two processes per core, so that one plays while the other waits
SIMULATOR_BYTES, PLAYER_BYTES = 35e6, 1.5e6  # measured with Breakout, without what they share

# Where the user does not set the number of players, `estimate_lag` stays at or below this. The
# measured mean is lower.
MAX_LAG = 2.8

# Ranks
MAX_RANKS = 1024
CHECK_STEPS = 100  # iterations after which they compare their weights
JOIN_SECONDS = 300.0  # how long a rank waits for the others at its start
JOIN_LOG_SECONDS = 5.0  # after so long it says for which ones
# A collective waits for simulators of other ranks, which may need START_SECONDS three times.
COLLECTIVE_SECONDS = 1800.0
REASON_SECONDS = 1.0  # how long rank 0 waits for word of why another rank has ended
RANK_END_SECONDS = 5.0  # how long rank 0 has to save if all ranks are told to end
LAUNCH_END_SECONDS = 8.0  # how long ranks have to save and to end

RUN_FILES = ("checkpoint.pt", "stats.json", "model-latest.npz", "model-mean.npz", "model-best.npz")
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # on a file system without locks
GPU_ERRORS = ("OutOfMemoryError", "AcceleratorError")  # torch's, with a message for the user
PACKAGES = ("torch", "gymnasium", "ale-py", "numpy", "pyzmq", "msgpack")


# The command line


def positive(text: str) -> float:
    """A finite number above zero."""
    if not 0 < float(text) < math.inf:
        raise ValueError
    return float(text)


def fraction(text: str) -> float:
    """A number above 0, 1 at most."""
    if not 0 < float(text) <= 1:
        raise ValueError
    return float(text)


def switch(text: str) -> int:
    """0 or 1."""
    return ("0", "1").index(text)


def name(text: str) -> str:
    """The name of a file or directory, wherever a game goes."""
    if not text or "\0" in text:
        raise ValueError
    return os.path.abspath(text)


def gpus(text: str) -> str:
    """Numbers of GPUs, as 0,1,2."""
    numbers = [whole(number) for number in text.split(",")]
    if len(set(numbers)) < len(numbers):
        raise ValueError
    return text


def rank_count(text: str) -> int:
    """A number of processes that one machine may have."""
    if not 0 < int(text) <= MAX_RANKS:
        raise ValueError
    return int(text)


def schedule(text: str) -> str:
    """A schedule, as it is."""
    scheduled(text, 1)
    return text


def scheduled(text: str, epoch: int) -> float:
    """The value of a schedule, `VALUE,EPOCH:VALUE,...`, in `epoch`, counted from 1."""
    steps = [step.split(":") for step in ("1:" + text).split(",")]
    values = sorted((count(first), float(value)) for first, value in steps)
    if not all(0 <= value < math.inf for _, value in values):
        raise ValueError
    return [value for first, value in values if epoch >= first][-1]


def in_environment(name: str, default: int) -> int:
    """A number that torchrun or `launch` has left for a rank: from 1 if the default is."""
    if "RANK" not in os.environ:  # this is none
        return default
    try:
        return (count if default else whole)(os.environ.get(name, str(default)))
    except ValueError as error:
        text = f"{name} is {os.environ[name]!r} in the environment, which is no such number"
        raise UserError(text, 2) from error


PLAYING = ("play", "eval", "gen_submit")
ANY = ("train", *PLAYING)


class Option(NamedTuple):
    """An option of training that has a default."""

    name: str
    type: Callable[[str], Any]
    default: Any
    help: str


# Names and values are those of the constants of the original, tensorpack's Batch-A3C example; what
# it has not is off.
LEARNING = (
    Option("batch_size", count, 128, "new states per iteration"),
    Option("local_time_max", count, 5, "steps of an n-step return"),
    Option("gamma", fraction, 0.99, "discount per step"),
    Option("lambda", fraction, 1.0, "of lambda-returns; 1: n-step returns"),
    Option("life_loss", switch, 0, "1: a lost life ends the return, in learning only"),
    Option("learning_rate", schedule, "1e-3,20:3e-4,120:1e-4", "VALUE,EPOCH:VALUE,..."),
    Option("warm_up", whole, 0, "iterations in which the learning rate rises to its value"),
    Option("entropy_beta", schedule, "0.01,80:0.005", "VALUE,EPOCH:VALUE,..."),
    Option("anneal", switch, 0, "1: learning rate and entropy weight fall to 0 at --max-epoch too"),
    Option("adam_epsilon", positive, 1e-3, "epsilon of Adam in TensorFlow's form"),
    Option("center_filters", switch, 0, "1: convolutions of a new network see differences only"),
    Option("steps_per_epoch", count, 6000, "iterations per epoch"),
    Option("max_epoch", count, 1000, "epochs until the run is done"),
    Option("eval_episode", count, 50, f"episodes of an evaluation, every {EVAL_EPOCH} epochs"),
    Option("mean_iterations", count, 1000, "iterations in the mean of the weights"),
)
SPEED = (
    Option("simulator_proc", count, 50, "simulator processes, at most; on a CPU 2 per core"),
    Option("players_per_simulator", count, 1, f"on a CPU {CPU_PLAYERS} players in all, at most"),
    Option("predict_batch_size", count, 15, "states; on a CPU half of the players, 24 at most"),
    Option("predictor_thread_per_gpu", count, 3, "on a CPU 1 per 2 cores, 4 at most"),
    Option("queue_size", count, 128, "states that may wait for the trainer; default: a batch"),
    Option("bfloat16", switch, 0, "1: the network computes in bfloat16, faster on CPUs with AMX"),
)
# The recipe of the small network, whose gradients are far below the original's epsilon; what was
# measured of it is in models/README.md.
LEARNING_OF_A3C = {
    "local_time_max": 20,
    "lambda": 0.9,
    "life_loss": 1,
    "learning_rate": "7e-4",
    "entropy_beta": "0.01",
    "anneal": 1,
    "adam_epsilon": 1e-5,
    "center_filters": 1,
}
# Options that checkpoints of an earlier version may lack; a3c then had the defaults of ba3c.
NEW_IN_RECIPE = ("local_time_max", "lambda", "life_loss", "entropy_beta", "anneal")
NOT_IN_CHECKPOINT = ("task", "env", "load", "output", "config", "track")


def flag(name: str) -> str:
    """`batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


def make_parser() -> argparse.ArgumentParser:
    """The command line. Options that are not given are not in its result."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(task="train")
    add = parser.add_argument
    add("--env", metavar="ENV", help="gymnasium id of an Atari game, such as Breakout-v0")
    add("--task", choices=ANY, help="default: train")
    add("--gpu", type=gpus, metavar="GPU", help="such as 0,1; default: all, or the CPU")
    add("--load", metavar="FILE", help="weights.npz to start from, or checkpoint.pt to resume")
    add("--output", type=name, metavar="DIR", help="directory of a run, or of what a task writes")
    add("--seed", type=whole, metavar="N", help="of players, sampling, initialization")
    add = parser.add_argument_group(f"only for {listed(PLAYING)}").add_argument
    add("--episode", type=count, metavar="N", help="episodes to play (default 100)")
    add = parser.add_argument_group("only for train").add_argument
    add("--network", choices=("ba3c", "a3c"), help="default: ba3c; a3c is small, for a CPU")
    add("--config", type=name, metavar="FILE", help="config.json of a run, to train the same")
    add("--track", action="store_true", help="show metrics in Weights & Biases (install wandb)")
    add("--ranks", type=rank_count, metavar="N", help="processes that train as one, on a CPU")
    add("--listen", metavar="ADDRESS", help="tcp://0.0.0.0:PORT, where simulators may join")
    add("--key", type=name, metavar="FILE", help="for them to join; is made if it is not there")
    for title, options in (("what changes learning", LEARNING), ("what changes speed", SPEED)):
        group = parser.add_argument_group(f"only for train: {title}")
        for option in options:
            default = f"default {option.default}"
            if option.name in LEARNING_OF_A3C:
                default += f"; with a3c {LEARNING_OF_A3C[option.name]}"
            text = f"{option.help} ({default})"
            group.add_argument(flag(option.name), type=option.type, metavar="X", help=text)
    return parser


def listed(names: tuple) -> str:
    """Names as a sentence lists them."""
    return " and ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]


def tasks_of(name: str) -> tuple[str, ...]:
    """The tasks that take this option."""
    if name in ("env", "task", "gpu", "load", "output", "seed"):
        return ANY
    return PLAYING if name == "episode" else ("train",)


def read_options(arguments: list[str] | None) -> dict:
    """The options that are given on the command line, by name; SystemExit if they are wrong.

    UserError for an option that the task does not have, and where nothing tells the game.
    """
    given = vars(make_parser().parse_args(arguments))
    for option in given:
        if given["task"] not in tasks_of(option):
            tasks = f"--task {listed(tasks_of(option))}"
            raise UserError(f"{flag(option)} is for {tasks}, not for --task {given['task']}", 2)
    if "key" in given and "listen" not in given:
        raise UserError("--key is for --listen ADDRESS", 2)
    if not given.keys() & {"env", "load", "config"}:
        raise UserError("--env is required, for example --env Breakout-v0", 2)
    return given


def check_options(options: dict) -> None:
    """ValueError unless the command line could have given these options to a run."""
    flags = [f"{flag(option)}={value}" for option, value in options.items()]
    parser = make_parser()
    parser.error = refuse_value
    parsed = vars(parser.parse_args(flags))
    del parsed["task"]
    for option, value in options.items():
        # It may be one that only looks like an option of that name, or like a value of its type.
        fits = option in parsed and type(parsed[option]) is type(value) and parsed[option] == value
        if not fits or option in NOT_IN_CHECKPOINT or "train" not in tasks_of(option):
            raise ValueError(f"it has an option {option!a} with the value {value!a}")


def refuse_value(message: str) -> None:
    """What a parser does with an option of a file that it does not take."""
    raise ValueError(f"its options are wrong: {message}")


def defaults(chosen: dict, on_cpu: bool, ranks: int, one_per_process: bool) -> dict:
    """Values of all options that fit the chosen ones, this machine, and its number of ranks.

    simulator_proc counts the simulators of all ranks. one_per_process: a process can hold only one
    of this game.
    """
    cores = max(1, count_cores() // ranks)
    values = {option.name: option.default for option in LEARNING + SPEED}
    values |= {"listen": None, "key": None}
    if chosen.get("network") == "a3c":
        values |= LEARNING_OF_A3C
    values["queue_size"] = batch_size = (values | chosen)["batch_size"]
    values["local_time_max"] = max(1, min(values["local_time_max"], batch_size - 1))
    of_each = chosen.get("players_per_simulator", 1)
    most_players = CPU_PLAYERS if on_cpu else of_each * values["simulator_proc"]
    planned = values | chosen | {"queue_size": batch_size}  # a longer queue has its lag by choice
    while most_players > 1 and estimate_lag(most_players, planned) > MAX_LAG:
        most_players -= 1
    most_simulators = max(1, most_players // of_each)
    values["simulator_proc"] = min(values["simulator_proc"], ranks * most_simulators)
    if on_cpu:
        values["simulator_proc"] = ranks * min(2 * cores, most_simulators)
    simulators = max(1, (values | chosen)["simulator_proc"] // ranks)
    if on_cpu:
        players = 1 if one_per_process else most_players // simulators
        values["players_per_simulator"] = max(1, players)
        values["predictor_thread_per_gpu"] = min(-(-cores // 2), CPU_PREDICTORS)
    players = simulators * (values | chosen)["players_per_simulator"]
    if on_cpu:
        values["predict_batch_size"] = min(CPU_BATCH, -(-players // 2))
    values["predictor_thread_per_gpu"] = min(values["predictor_thread_per_gpu"], simulators)
    values["predict_batch_size"] = min(values["predict_batch_size"], players)
    return values


def estimate_lag(players: int, options: dict) -> float:
    """An upper estimate of the mean policy lag, in updates, of so many players of a rank.

    With a full queue a state waits for the rest of its segment of m states, (m - 1) / 2 steps in
    the mean, for two steps more until the segment is handed out, and then in the queue.
    """
    waiting = players * (options["local_time_max"] + 3) / 2 + options["queue_size"]
    return waiting / options["batch_size"]


def refuse(o: argparse.Namespace, ranks: int) -> None:
    """UserError unless the options of a rank fit each other and this machine."""
    players = o.simulator_proc * o.players_per_simulator
    size, threads = o.predict_batch_size, o.predictor_thread_per_gpu
    if o.listen is not None:
        split_address(o.listen)
        if not o.key:
            raise UserError("--listen needs --key FILE, which simulators need to join", 2)
    if size > players:
        raise UserError(f"{players} players can never fill a predict batch of {size} states", 2)
    if threads > o.simulator_proc:
        raise UserError(f"{threads} predictor threads need as many simulators", 2)
    if o.queue_size < o.batch_size:
        what = f"a queue of {o.queue_size} states"
        raise UserError(f"{what} can never fill a batch of {o.batch_size}", 2)
    if o.local_time_max >= o.batch_size:
        raise UserError("--local-time-max must be below --batch-size", 2)
    rollout_frames = 3 * players * (o.local_time_max + 3)
    queue_frames = 4 * (o.queue_size + 3 * o.batch_size + size)
    need = (rollout_frames + queue_frames) * math.prod(common.FRAME_SHAPE)
    need += o.simulator_proc * SIMULATOR_BYTES + players * PLAYER_BYTES
    need *= ranks
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > memory:
        raise UserError(f"this takes {need / 1e9:.0f} GB of {memory / 1e9:.0f} GB of memory", 2)


def complete(
    chosen: dict, on_cpu: bool, ranks: int = 1, one_per_process: bool = False
) -> argparse.Namespace:
    """All options of a rank: the chosen ones, and what fits them and its share of this machine."""
    o = argparse.Namespace(**(defaults(chosen, on_cpu, ranks, one_per_process) | chosen))
    o.simulator_proc = max(1, o.simulator_proc // ranks)
    refuse(o, ranks)
    return o


def with_earlier_defaults(options: dict) -> dict:
    """Complete the options in a file of an earlier version, in which a3c had ba3c's defaults."""
    if not options or "lambda" in options:
        return options
    of_then = (option for option in LEARNING if option.name in NEW_IN_RECIPE)
    return {option.name: option.default for option in of_then} | options


def refuse_module(path: str, env_id: str) -> None:
    """UserError where a file names a game in a Python module: no file runs code unasked."""
    module, colon, _ = env_id.partition(":")
    if colon:
        way = f"give --env {env_id}"
        raise UserError(f"{path} is of a game in the Python module {module}: {way}", 2)


def read_config(path: str, env_id: str | None) -> dict:
    """What another run's config.json says of the game, the network and learning, and of speed.

    Of speed only what was chosen there: the rest follows from the machine. env_id: that of the
    command line.
    """
    try:
        config = read_json(path, dict)
        chosen = config.get("chosen")
        if not isinstance(chosen, dict) or not isinstance(config.get("env"), str):
            raise ValueError("it has no game or options")
        options = {option.name: config[option.name] for option in LEARNING if option.name in config}
        options = with_earlier_defaults(options)
        known = {option.name for option in SPEED} | {"network", "seed"}
        options |= {name: value for name, value in chosen.items() if name in known}
        check_options(options)
    except ValueError as error:
        raise UserError(f"{path} is not usable: {error}", 2) from error
    if env_id is None:
        refuse_module(path, config["env"])
    return {"env": config["env"]} | options


# GPUs and ranks


def find_devices(gpus: str | None, ranks: int | None) -> list:
    """The torch devices of this machine that --gpu and --ranks name, one for each rank."""
    import torch

    # The driver may know GPUs for which it is too old: torch says so, and the CPU is there.
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus is None and (ranks or not available):
        return [torch.device("cpu")] * (ranks or 1)
    numbers = [int(gpu) for gpu in gpus.split(",")] if gpus is not None else range(available)
    if max(numbers) >= available or ranks:
        cuda = f"CUDA devices 0 to {available - 1}" if available else "no CUDA device, only the CPU"
        raise UserError(f"--gpu {gpus}: there is {cuda}; --ranks is for the CPU alone", 2)
    return [torch.device("cuda", number) for number in numbers]


def gpu_numbers(devices: list) -> str | None:
    """What --gpu is for these devices, or for their names; None for the CPU."""
    numbers = [str(device).removeprefix("cuda:") for device in devices if str(device) != "cpu"]
    return ",".join(dict.fromkeys(numbers)) or None


def resumed_devices(count: int, gpu: str | None) -> list:
    """A device for each rank of a resumed run: those that it had, if this machine has them."""
    available = find_devices(None, None)
    if gpu is None or available[0].type == "cpu":
        return find_devices(None, count)
    by_number = {str(device.index): device for device in available}
    devices = [by_number[number] for number in gpu.split(",") if number in by_number]
    return devices if len(devices) == count else available[:count]


def choose_devices(gpus: str | None, ranks: int | None, before: dict) -> tuple[list, list[str]]:
    """The devices of the ranks on this machine; for a resumed run, what differs from before.

    gpus, ranks: the options as given now; before: the options in the checkpoint of a resumed run.
    """
    by_torchrun = "RANK" in os.environ and "BATCH_A3C_LAUNCHER" not in os.environ
    world = in_environment("WORLD_SIZE", 1) if by_torchrun else None
    if by_torchrun and ranks not in (None, world):
        text = f"--ranks {ranks}: torchrun has started {world}; leave --ranks out"
        raise UserError(text, 2)

    def description(count: int | None, gpu: str | None) -> str:
        if count is None:
            return "an unknown number"
        of_torchrun = "GPUs" if by_torchrun else f"GPU {gpu}"  # each machine has numbers of its own
        return f"{count} rank{'s' * (count > 1)} on {'the CPU' if gpu is None else of_torchrun}"

    ranks_before, gpu_before = before.get("ranks"), before.get("gpu")
    if gpus is not None or ranks is not None or ranks_before is None:
        devices = find_devices(gpus, ranks)
    else:
        local = in_environment("LOCAL_WORLD_SIZE", 1) if by_torchrun else ranks_before
        devices = resumed_devices(local, gpu_before)
    now = description(world or len(devices), gpu_numbers(devices))
    then = description(ranks_before, gpu_before)
    return devices, [f"{now} instead of {then}"] if before and now != then else []


def check_listening(before: dict, given: dict) -> list[str]:
    """What a resumed run that has listened before does differently; UserError if it may not.

    It listens again only if it is told to, and never makes another key unasked.
    """
    if not before.keys() >= {"listen", "key"}:
        return []
    listen, key = before["listen"], before["key"]
    if "listen" not in given:
        return [f"it does not listen; as before it would with --listen {listen} --key {key}"]
    new_key = given.get("key", key)
    if new_key != key and os.path.exists(key) and not os.path.exists(new_key):
        raise UserError(f"there is no key {new_key}; the key of this run is {key}", 2)
    return []


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


class Ranks(contextlib.AbstractContextManager):
    """The ranks that train as one, as one of them sees them. Without others it is rank 0 of 1.

    Ranks meet in a store, where each leaves what it is, and later why it ended: torchrun's, or a
    file in a private directory of `launch`. As a context it ends the connection, and this process
    with one sentence of all ranks: rank 0 says it.
    """

    def __init__(self, device, same: dict, seed: int):
        """Connect the ranks. same: options that all of them must have; seed: that of rank 0."""
        from torch import cuda, distributed

        self.rank, self.count, self.store = in_environment("RANK", 0), 1, distributed.HashStore()
        self.device, self.devices, self.seed = device, [str(device)], seed
        self.waiting = False  # it has said that it waits
        self.prints = not in_environment("LOCAL_RANK", 0)  # what holds for all, on its machine
        if "RANK" not in os.environ:
            return
        try:
            self.count = self.world_size()
            self.store = self.find_store()
            self.store.set_timeout(datetime.timedelta(seconds=JOIN_SECONDS))
            gpu = str(cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
            about = {"same": same, "device": str(device), "gpu": gpu, "seed": seed}
            of_all = self.gather(about)
            self.devices = [of_one["device"] for of_one in of_all]
            self.seed = of_all[0]["seed"]
            self.check_same(of_all)
            if in_environment("LOCAL_WORLD_SIZE", 1) == self.count:
                listen_on_loopback()
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
        """The error of a rank that could not reach the others."""
        return UserError(f"rank {self.rank} cannot join the others: {reason}")

    def world_size(self) -> int:
        """The number of ranks, of which this must be one."""
        if "BATCH_A3C_LAUNCHER" not in os.environ:
            for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
                if name not in os.environ:
                    raise self.cannot_join(f"{name} is not set")
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
        if port > 65535:
            raise UserError(f"MASTER_PORT is {port} in the environment, which is no port", 2)
        serves, begin = self.rank == 0 and not of_torchrun, time.monotonic()
        while not serves:  # torch would wait without a word, and deaf to Ctrl-C
            with contextlib.suppress(OSError):
                socket.create_connection((address, port), timeout=2).close()
                break
            self.log_waiting(begin, "rank 0")
            time.sleep(0.2)
        store = distributed.TCPStore(address, port, self.count, serves, wait_for_workers=False)
        # torchrun's store outlives a restart, and holds what the ranks said before it.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return distributed.PrefixStore(f"attempt {attempt}", store)

    def log_waiting(self, begin: float, whom: str) -> None:
        """Say once for whom this rank waits; UserError after JOIN_SECONDS."""
        waited = time.monotonic() - begin
        if waited > JOIN_LOG_SECONDS and not self.waiting and self.prints:
            text = f"rank {self.rank} of {self.count} waits for {whom}"
            print(f"{text}, {JOIN_SECONDS:.0f} seconds at most", flush=True)
            self.waiting = True
        if waited > JOIN_SECONDS:
            raise self.cannot_join(f"waited {JOIN_SECONDS:.0f} seconds for {whom}")

    def gather(self, about: dict) -> list[dict]:
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
            self.log_waiting(begin, ", ".join(f"rank {rank}" for rank in missing))
            time.sleep(0.05)

    @staticmethod
    def check_same(of_all: list[dict]) -> None:
        """UserError unless all ranks train the same, each on a GPU of its own or all on a CPU."""
        gpus = [about["gpu"] for about in of_all]
        for rank, about in enumerate(of_all):
            for name, value in of_all[0]["same"].items():
                other = about["same"].get(name)
                if other != value:
                    text = f"rank 0 has {name} {value}, rank {rank} has {other}"
                    raise UserError(f"{text}: all ranks must train the same", 2)
            if (gpus[rank] is None) != (gpus[0] is None):
                text = f"rank 0 is on {of_all[0]['device']}, rank {rank} on {about['device']}"
                raise UserError(f"{text}: all ranks need a GPU, or none", 2)
            first = gpus.index(gpus[rank])
            if gpus[rank] is not None and first != rank:
                text = f"ranks {first} and {rank} have the same one"
                raise UserError(f"each rank needs a GPU of its own, but {text}", 2)

    def wait_for_evaluation(self, number: int, check: Callable[[], None]) -> None:
        """Let the other ranks wait until rank 0 is here; a collective would not wait so long.

        number: of the iterations so far; check: what a waiting rank looks after.
        """
        from model import collective

        key = f"evaluated {number}"
        while True:
            with collective():
                if self.rank == 0:
                    self.store.set(key, "")
                if self.store.check([key]):
                    return
            check()
            time.sleep(0.1)

    def report_of_another(self) -> dict | None:
        """Why another rank has ended, if one has left word of that."""
        with contextlib.suppress(RuntimeError):  # the store went with rank 0
            for rank in range(self.count):
                key = f"end {rank}"
                if rank != self.rank and self.store.check([key]):
                    return {"rank": rank} | json.loads(self.store.get(key))
        return None

    def has_bad_weights(self) -> bool:
        """Whether another rank has ended because the weights are not good any more."""
        other = self.report_of_another()
        return other is not None and other["weights_are_bad"]

    def explain(self, error: Exception, signum: int | None = None) -> Exception:
        """What the run ends with: this error, or what lies behind it in another rank.

        signum: of the signal that this rank was sent, if it was.
        """
        from torch import distributed

        import model

        lost = isinstance(error, (model.RanksError, distributed.DistError))
        stopped = getattr(error, "code", 1) > 128
        if not lost and not stopped:
            text = first_line(error) if is_sentence(error) else f"{type(error).__name__}: {error}"
            code, weights_are_bad = getattr(error, "code", 1), isinstance(error, FloatingPointError)
            with contextlib.suppress(RuntimeError):
                report_end(self.store, self.rank, text, code, weights_are_bad)
            return error
        waits = self.prints and not stopped and not signum
        deadline = time.monotonic() + (REASON_SECONDS if waits else 0)
        while (other := self.report_of_another()) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if other is not None:
            return UserError(f"rank {other['rank']}: {other['text']}", other["code"])
        if stopped:
            return error
        if signum:
            return UserError(f"stopped by {signal.Signals(signum).name}", 128 + signum)
        return UserError(f"rank {self.rank} lost the others: {error}")

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        from torch import distributed

        if not distributed.is_initialized():
            return
        reason = self.explain(error) if isinstance(error, Exception) else error
        if error is None or self.device.type == "cpu":  # NCCL would wait for lost ranks
            distributed.destroy_process_group()  # otherwise gloo may abort this process at its end
        if not self.prints and (is_sentence(reason) or isinstance(reason, KeyboardInterrupt)):
            sys.exit(getattr(reason, "code", 1 if is_sentence(reason) else 130))
        if reason is not error:
            raise reason from error


def end_rank() -> None:
    """End this rank as SIGTERM does, even while it waits for another and cannot hear signals."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LAUNCH_END_SECONDS + 2)  # where `launch` still runs, it has killed this rank by then
    os._exit(128 + signal.SIGTERM)


def join_ranks(devices: list, same: dict, seed: int) -> Ranks:
    """Connect this rank with the others, if there are any."""
    local = in_environment("LOCAL_RANK", 0)
    device = devices[local % len(devices)]
    if device.type == "cuda":
        import torch

        torch.cuda.set_device(device)
    if "BATCH_A3C_LAUNCHER" in os.environ:
        end = threading.Thread(target=common.end_with_parent, args=(end_rank,), daemon=True)
        end.start()
    try:
        return Ranks(device, same, seed)
    except UserError as error:
        if local and error.code == 2:  # all ranks have found it, and one of them says it
            sys.exit(error.code)
        raise


def report_end(store, rank: int, text: str, code: int = 1, weights_are_bad: bool = False) -> None:
    """Tell the other ranks why a rank has ended or ends; the first reason counts."""
    if not store.check([f"end {rank}"]):
        about = {"text": text, "code": code, "weights_are_bad": weights_are_bad}
        store.set(f"end {rank}", json.dumps(about))


def interrupt_quietly() -> None:
    """Let Ctrl-C end this rank without a word, for another one of this machine says it."""
    if in_environment("LOCAL_RANK", 0) and INTERRUPTIBLE:
        signal.signal(signal.SIGINT, common.raise_stopped)


def listen_on_loopback() -> None:
    """Let gloo and NCCL listen on the loopback interface alone."""
    names = {name for _, name in socket.if_nameindex()}
    for name in names & {"lo", "lo0"}:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = name


def how_it_ended(code: int) -> str:
    """What an exit code says, as subprocess has it."""
    return f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"


def start_rank(rank: int, ranks: int, directory: str, arguments: list[str]) -> subprocess.Popen:
    """Start this program with these arguments as one of so many ranks; see `launch`."""
    environment = common.child_environment() | {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "BATCH_A3C_LAUNCHER": directory,
    }
    return subprocess.Popen(
        [sys.executable, os.path.abspath(__file__), *arguments],
        env=environment,
        stdin=subprocess.PIPE,  # it closes when the launcher ends
        stdout=subprocess.DEVNULL if rank else None,
        start_new_session=True,
    )


def launch(ranks: int, arguments: list[str]) -> None:
    """Run this program with these arguments as so many ranks; end with the first that ends.

    Signals go to rank 0, which saves, and says what there is to say. After a second one it has
    LAUNCH_END_SECONDS: while it waits for another rank it cannot hear them.
    """
    from torch import distributed

    processes: list[subprocess.Popen] = []
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until a rank can end in good order
    received: list[tuple[float, int]] = []  # signals: when, and which
    on_signals(lambda signum, frame: received.append((time.monotonic(), signum)))
    forwarded, ends_at_once = 0, False
    with contextlib.closing(common.PrivateDirectory()) as directory:
        failed = 0
        try:
            for rank in range(ranks):
                processes.append(start_rank(rank, ranks, directory.path, arguments))
            store = distributed.FileStore(f"{directory.path}/ranks", ranks)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            while processes[0].poll() is None and not failed and not ends_at_once:
                for _, signum in received[forwarded:]:
                    processes[0].send_signal(signum)
                    forwarded += 1
                if received:
                    ends_at_once = received[-1][0] - received[0][0] > SAME_SIGNAL_SECONDS
                time.sleep(0.1)
                failed = next((r for r, process in enumerate(processes) if process.poll()), 0)
            failed = failed if processes[0].poll() is None else 0
            if failed:
                report_end(store, failed, f"it {how_it_ended(processes[failed].returncode)}")
                # Rank 0 will notice, unless it waits for simulators or evaluates.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    processes[0].wait(REASON_SECONDS + 1)
        finally:
            common.end_processes(processes, LAUNCH_END_SECONDS)
    code = processes[0].returncode
    if code == -signal.SIGKILL and ends_at_once:
        text = f"rank 0 did not end within {LAUNCH_END_SECONDS:g} seconds and was killed"
        raise UserError(text, 128 + received[0][1])
    silent = code in (128 + signal.SIGTERM, -signal.SIGKILL)  # it was ended before it could speak
    last = failed if failed and silent else 0
    code = processes[last].returncode
    if code < 0:
        raise UserError(f"rank {last} {how_it_ended(code)}", 1 if last else 128 - code)
    sys.exit(code)


# The run directory


def check_run(saved: dict) -> None:
    """ValueError unless a checkpoint says all that is needed to resume its run."""
    from model import check_form

    check_form(saved, {"env": str, "options": dict, "at": dict, "stats": list})
    # Earlier versions did not have all of this.
    at, stats = {"due": False, "needed_s": 0.0, **saved["at"]}, saved["stats"]
    fields = {field.name: field.type for field in dataclasses.fields(Progress)}
    check_form({"run_id": "", **saved, "at": at}, {"run_id": str, "at": fields})
    if not saved["env"].isprintable():
        raise ValueError("its env is no name")
    check_options(saved["options"])
    if unknown := at.keys() - fields:
        raise ValueError(f"its at has {min(unknown)!a}, which is unknown here")
    for name, value in at.items():
        if name != "best_score" and not 0 <= value < 2**53:
            raise ValueError(f"its {name} is {value}")
    if not math.isfinite(at["best_score"] or 0.0):  # None before the first whole evaluation
        raise ValueError(f"its best_score is {at['best_score']}")
    for epoch in stats:
        check_form(epoch, {"epoch_num": int, "global_step": int}, "stats")
        if not all(value is None or type(value) in (int, float) for value in epoch.values()):
            raise ValueError("its stats are no numbers")
    if [epoch["epoch_num"] for epoch in stats] != list(range(1, at["epoch"] + 1)):
        raise ValueError(f"its stats are not those of {at['epoch']} epochs")
    if at["due"] and not stats:
        raise ValueError("an evaluation is due before the first epoch")


def read_json(path: str, kind: type):
    """What is in a file; ValueError where it does not hold such a thing."""
    try:
        with open(path, "rb") as file:
            content = json.load(file)
        if not isinstance(content, kind):
            raise ValueError
        return content
    except OSError as error:
        raise ValueError(f"it has no {os.path.basename(path)}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its {os.path.basename(path)} is damaged") from error


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


class RunLocation(NamedTuple):
    """Where a run is."""

    path: str
    is_resumed: bool  # the run in `path` continues; False: a new one starts there
    sentence: str  # the same, for the log
    way: str = ""  # what the error advises if `path` already holds a run


def locate_run(env_id: str, output: str | None, saved: dict) -> RunLocation:
    """The directory of a run that begins with a checkpoint, or with none ({}).

    A checkpoint's run is resumed only in its own directory, and from checkpoint.pt itself: every
    other copy of it, wherever it lies, starts a run of its own.
    """
    path = os.path.abspath(output or os.path.join("train_log", f"train-atari-{file_name(env_id)}"))
    if not saved:
        return RunLocation(path, False, f"a new run in {path}")
    directory, file = os.path.split(saved["file"])
    if file != "checkpoint.pt":
        reason = "a run is resumed only from its checkpoint.pt"
    elif output is not None and os.path.realpath(path) != os.path.realpath(directory):
        reason = "--output names another directory"
    else:
        try:
            check_directory(directory, saved)
            return RunLocation(directory, True, f"the run is resumed in {directory}")
        except ValueError as error:
            reason = f"{directory} is not the directory of that run: {error}"
    sentence = f"a new run in {path} begins with what {saved['file']} holds ({reason})"
    is_there = saved["file"] == os.path.join(path, "checkpoint.pt")
    way = f"{reason}; name another --output" if is_there else ""
    return RunLocation(path, False, sentence, way)


def open_run(path: str, is_resumed: bool, way: str = ""):
    """Make the directory of a run ours; returns its log file, open and locked.

    UserError where that cannot be; `way`: what to do if it holds a run, if not to resume that.
    """
    present = [name for name in RUN_FILES if os.path.exists(os.path.join(path, name))]
    if present and not is_resumed:
        if "checkpoint.pt" in present:
            checkpoint = os.path.join(path, "checkpoint.pt")
            way = way or f"resume it with --load {checkpoint}, or name another --output"
        else:  # it was ended before its first checkpoint was whole
            way = "name another --output, or remove it: there is no checkpoint to resume"
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


# Training


class RunDirectory:
    """The files of a run. Only rank 0 writes; for the others every method does nothing.

    A file that cannot be written is in `unwritten`, and training continues. What is written when:

        config.json              at the start
        log.log                  with every line that is shown
        events.out.tfevents.*    every LOG_SECONDS and after an epoch, by TensorBoard
        checkpoint.pt, stats.json, model-latest.npz, model-mean.npz
                                 every CHECKPOINT_SECONDS (ranks: when they have compared their
                                 weights), before an evaluation, after an epoch, and at the end
        model-best.npz           after an evaluation that is the best so far
    """

    def __init__(self, location: RunLocation, log_file=None):
        self.location, self.path, self.log_file = location, location.path, log_file
        self.unwritten: dict[str, OSError] = {}  # files that are out of date, and why

    def log(self, text: str) -> None:
        """A line in log.log and on standard output, above a progress bar if there is one."""
        if self.log_file is None:
            return
        line = time.strftime("%m-%d %H:%M:%S ") + text
        with contextlib.suppress(OSError):  # a full disk
            self.log_file.write(line + "\n")
        with contextlib.suppress(OSError):  # where nobody reads it any more, train on
            tqdm.write(line)

    def write(self, name: str, content: bytes) -> bool:
        """Write a file, and say whether that went well."""
        if self.log_file is None:
            return False
        self.unwritten.pop(name, None)
        try:
            common.write_file(os.path.join(self.path, name), content)
        except OSError as error:
            self.unwritten[name] = error
            self.log(f"warning: {error}; training continues")
            return False
        return True

    def write_json(self, name: str, content) -> None:
        """Write a JSON file."""
        self.write(name, json.dumps(content, indent=1).encode())


class Metrics:
    """What the iterations of an epoch have measured: checked and shown.

    Metrics stay on the device until they are needed, because reading them waits for a GPU.
    """

    def __init__(self, columns: tuple[str, ...]):
        self.columns = columns
        self.writer = None  # TensorBoard's, of rank 0
        self.start_epoch()

    def start_epoch(self) -> None:
        """Forget the epoch before."""
        self.rows: list[np.ndarray] = []  # (columns,) of each iteration
        self.unread: list = []  # the same of the last iterations, still on the device
        self.num_shown = 0  # iterations that a line or TensorBoard has shown
        self.epoch_started_at = self.shown_at = time.monotonic()

    def __len__(self) -> int:
        return len(self.rows) + len(self.unread)

    def collect(self, last_step: int) -> None:
        """Read what is unread, up to iteration `last_step`; FloatingPointError if not finite."""
        first_step = last_step - len(self.unread) + 1
        for step, row in enumerate(self.unread, first_step):
            self.rows.append(np.array(row.tolist()))
            for i in np.flatnonzero(~np.isfinite(self.rows[-1])):
                name, value = self.columns[i], self.rows[-1][i]
                raise FloatingPointError(f"{name} is {value} in iteration {step}")
        self.unread = []

    def add_scalars(self, metrics: dict, step: int) -> None:
        """Show in TensorBoard what there is of these metrics."""
        for name, value in metrics.items():
            if value is not None and self.writer is not None:
                with contextlib.suppress(Exception):  # its thread has reported it already
                    self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what TensorBoard has not written yet."""
        with contextlib.suppress(Exception):  # it says again what its thread said
            self.writer.close()


@dataclasses.dataclass
class Progress:
    """How far a run is: a part of its checkpoint."""

    epoch: int = 0  # epochs done
    global_step: int = 0  # iterations done: updates, and so the version of the weights
    epoch_step: int = 0  # of this epoch
    starts: int = 0  # of this program
    best_score: float | None = None  # that of model-best.npz
    elapsed_s: float = 0.0
    evaluated_s: float = 0.0  # of these, in evaluations
    needed_s: float = 0.0  # by the next evaluation, as far as is known
    due: bool = False  # the iterations of an epoch are done, its evaluation is not


class Run:
    """A training run, restored from a checkpoint or new: the state that `train` works on.

    chosen: the options that the user gave, now or before, and all that change learning; options:
    all of them, and the game; saved: the checkpoint ({} for a new run).
    """

    def __init__(
        self, chosen: dict, options, network, ranks: Ranks, directory: RunDirectory, saved: dict
    ):
        import model

        self.chosen, self.options, self.ranks, self.directory = chosen, options, ranks, directory
        if ranks.rank:
            options.listen = None
        # By this name files know that they are of the same run.
        is_resumed = directory.location.is_resumed
        self.run_id = (saved.get("run_id") if is_resumed else None) or secrets.token_hex(8)
        self.metrics = Metrics((*model.METRICS, "policy_lag", "policy_lag_max", "queue_size"))
        self.at, self.stats = Progress(), []  # stats: an object for each epoch done
        self.rates: dict[str, float] = {}  # learning_rate and entropy_beta of the last iteration
        self.started_at = self.saved_at = time.monotonic()
        self.feed = self.bar = None  # predictor.Feed and tqdm's bar, while it trains
        self.signum: int | None = None  # of the signal that ends the run
        self.ends_at = 0.0  # when it ends the run
        self.is_whole = True  # not in the middle of an update
        self.local_ranks = in_environment("LOCAL_WORLD_SIZE", 1)
        self.learner = model.Learner(
            network,
            ranks.device,
            options.adam_epsilon,
            threads=max(1, count_cores() // self.local_ranks),
            center_filters=options.center_filters,
            bfloat16=options.bfloat16,
            mean_iterations=options.mean_iterations,
        )
        if saved:
            self.restore(saved)
        shared = self.learner.share({"at": dataclasses.asdict(self.at), "stats": self.stats})
        self.at, self.stats = Progress(**shared["at"]), shared["stats"]
        self.started_at -= self.at.elapsed_s
        self.at.starts += 1
        self.config = self.make_config()
        self.directory.write_json("config.json", self.config)
        self.announce()

    def restore(self, saved: dict) -> None:
        """Hold what a checkpoint holds."""
        import torch

        self.learner.load_state_dict(saved["learner"])
        torch.set_rng_state(saved["rng"])
        self.at, self.stats = Progress(**saved["at"]), saved["stats"]
        if not os.path.exists(os.path.join(self.directory.path, "model-best.npz")):
            self.at.best_score = None
        if saved["options"].get("eval_episode") != self.chosen.get("eval_episode"):
            self.at.needed_s = 0.0  # that was for another number of episodes
        done = f"{self.at.global_step} iterations, {self.at.epoch} epochs"
        what = f"weights, optimizer, {done}, best score {self.at.best_score}"
        self.log(f"restored {saved['file']}: {what}")

    def log(self, text: str) -> None:
        """As RunDirectory.log."""
        self.directory.log(text)

    def make_config(self) -> dict:
        """What config.json says."""
        packages = {name: version(name) for name in PACKAGES}
        return {
            "env": self.options.env,
            "run_id": self.run_id,
            **vars(self.options),
            "simulator_proc": self.options.simulator_proc * self.local_ranks,
            "simulator_proc_of_a_rank": self.options.simulator_proc,
            "devices": self.ranks.devices,
            "chosen": self.chosen,
            "versions": packages | {"opencv": cv2.__version__, "python": sys.version},
        }

    def announce(self) -> None:
        """Print what follows from the options."""
        o, network = self.options, self.learner.network
        players = o.simulator_proc * o.players_per_simulator
        states = o.steps_per_epoch * o.batch_size
        lag = estimate_lag(players, vars(o))
        parameters = sum(p.numel() for p in network.parameters())
        device = self.ranks.device
        facts = {
            "game": f"{o.env}, {network.num_actions} actions",
            "run": f"{self.directory.path}, seed {o.seed}, {o.max_epoch:,} epochs",
            "network": f"{network.kind}, {parameters:,} parameters",
            "device": f"{device}, {count_cores()} cores, predictors: {o.predictor_thread_per_gpu}",
            "players": f"{o.simulator_proc} processes x {o.players_per_simulator} = {players}",
            "epoch": f"{o.steps_per_epoch:,} iterations x {o.batch_size} = {states:,} states",
            "policy lag": f"about {lag:.1f} updates or less in the mean, with a full queue",
        }
        if self.ranks.count > 1:
            ranks = self.ranks.count
            facts["ranks"] = f"{ranks}, each with these players; an iteration has {ranks} batches"
        if o.bfloat16:
            facts["network"] += ", in bfloat16"
        if device.type == "cpu" and network.kind == "ba3c":
            facts["network"] += "; --network a3c is several times faster on a CPU"
            # Of the work for a state its update is about 0.8; the rest are prediction and player.
            rate = 0.8 * self.learner.measure(64)
            hours = common.number(float(f"{states / rate / 3600:.2g}"))
            facts["expect"] = f"about {rate:.0f} states/s, {hours} hours per epoch"
        self.log("training\n" + tabulate(facts.items()))

    def on_signal(self, signum: int, frame) -> None:
        """The first signal lets the iteration end and saves; a later one ends at once.

        Programs that pass signals on, such as timeout, send one twice in the same moment. Ranks
        above 0 continue for a while: rank 0 needs them to end its iteration, and they end with it.
        """
        if self.signum is None:
            later = RANK_END_SECONDS if self.ranks.rank else 0.0
            self.signum, self.ends_at = signum, time.monotonic() + later
        elif time.monotonic() - self.ends_at > SAME_SIGNAL_SECONDS:
            raise KeyboardInterrupt

    def supervise(self) -> None:
        """Replace simulators that have ended; raise what should end the run, if there is that."""
        if self.signum is not None and time.monotonic() >= self.ends_at:
            what = f"stopped by {signal.Signals(self.signum).name}"
            raise UserError(f"{what} in iteration {self.at.global_step}", 128 + self.signum)
        for event in self.feed.replace_ended():
            self.log(f"{event}; training continues")
            if self.ranks.rank:  # its log goes nowhere
                print(f"rank {self.ranks.rank}: {event}; training continues", file=sys.stderr)

    def means(self, first: int, since: float) -> dict[str, float | None]:
        """Each metric over the iterations from the `first` one of this epoch on.

        A mean, of policy_lag_max the maximum; None if there were no iterations. since:
        time.monotonic() when they began, for the speed.
        """
        self.metrics.collect(self.at.global_step)
        columns, rows = self.metrics.columns, np.array(self.metrics.rows[first:])
        means = dict.fromkeys(columns)
        if len(rows):
            means = dict(zip(columns, rows.mean(axis=0).tolist(), strict=True))
            means["policy_lag_max"] = float(rows[:, columns.index("policy_lag_max")].max())
        it_per_s = len(rows) / (time.monotonic() - since)
        scores = list(self.feed.scores)  # of the last training episodes
        return {
            **means,
            "it_per_s": it_per_s,
            **self.rates,
            "states_per_s": it_per_s * self.options.batch_size * self.ranks.count,
            "train_score": sum(scores) / len(scores) if scores else None,
            "train_episodes": len(scores),
        }

    def save(self) -> None:
        """Write stats.json, checkpoint.pt and the weights.

        FloatingPointError, and nothing is written, if a metric or a weight is not finite. A
        checkpoint is resumed only beside config.json and stats.json: these are written before it.
        """
        import model

        self.metrics.collect(self.at.global_step)
        for name, weight in self.learner.network.named_parameters():
            if not weight.isfinite().all():
                raise FloatingPointError(
                    f"{name} is not finite after iteration {self.at.global_step}"
                )
        self.at.elapsed_s = time.monotonic() - self.started_at
        if "config.json" in self.directory.unwritten:
            self.directory.write_json("config.json", self.config)
        self.directory.write_json("stats.json", self.stats)
        run = {
            "env": self.options.env,
            "run_id": self.run_id,
            "options": self.chosen,
            "at": dataclasses.asdict(self.at),
            "stats": self.stats,
        }
        self.directory.write("checkpoint.pt", model.checkpoint_file(self.learner, run))
        self.directory.write("model-latest.npz", model.weights_file(self.learner.network))
        self.directory.write("model-mean.npz", model.weights_file(self.learner.mean_network))
        self.saved_at = time.monotonic()


def train(run: Run, track: bool = False) -> None:
    """Train until the last epoch is done."""
    from model import RanksError
    from predictor import Feed

    if run.at.epoch >= run.options.max_epoch and not run.at.due:
        run.save()
        raise UserError(f"the run is done: {run.at.epoch} epochs (--max-epoch)", 0)
    seeds = np.random.SeedSequence((run.options.seed, run.at.starts, run.ranks.rank))
    on_signals(run.on_signal)
    with contextlib.ExitStack() as stack:
        if run.ranks.rank == 0:
            start_writer(run, track, stack)
        run.feed = stack.enter_context(
            contextlib.closing(Feed(run.options.env, run.options, run.learner, seeds))
        )
        try:
            while run.at.epoch < run.options.max_epoch or run.at.due:
                run.supervise()
                if not run.at.due:
                    train_epoch(run)
                end_epoch(run)
        except FloatingPointError as error:  # the last checkpoint is better
            end_early(run, error, save=False)
        except RanksError as error:  # gloo fails before an update changes anything, NCCL later
            end_early(run, error, save=run.ranks.device.type == "cpu")
        except Exception as error:  # a signal, a simulator, a full memory, a defect
            end_early(run, error, save=run.is_whole)
    for error in run.directory.unwritten.values():
        raise error


def start_writer(run: Run, track: bool, stack: contextlib.ExitStack) -> None:
    """Let metrics go to TensorBoard, and to Weights & Biases if `track`, until `stack` ends."""
    # TensorBoard's thread, on a full disk; all others report by themselves.
    threading.excepthook = lambda args: run.log(f"warning: {args.exc_value}")
    if track:
        start_tracking(run, stack)
    from torch.utils.tensorboard import SummaryWriter  # after wandb.init, which replaces a part

    try:
        run.metrics.writer = SummaryWriter(run.directory.path, purge_step=run.at.global_step + 1)
    except OSError as error:  # a full disk
        run.log(f"warning: nothing goes to TensorBoard: {error.strerror}; training continues")
    stack.enter_context(contextlib.closing(run.metrics))


def start_tracking(run: Run, stack: contextlib.ExitStack) -> None:
    """Let Weights & Biases follow TensorBoard until `stack` ends; UserError if it cannot."""
    import wandb

    path, stdin = run.directory.path, sys.stdin
    try:
        with open(os.devnull) as sys.stdin:  # who has not logged in is told, not asked
            wandb.init(
                project="batch-a3c",
                name=os.path.basename(path),
                id=run.run_id,
                resume="allow",
                dir=path,
                config=run.config,
                sync_tensorboard=True,
            )
    except Exception as error:
        raise UserError(f"--track: {first_line(error)}") from error
    finally:
        sys.stdin = stdin
    stack.callback(wandb.finish)


def train_epoch(run: Run) -> None:
    """The iterations of an epoch that are not done yet."""
    at, o, metrics = run.at, run.options, run.metrics
    metrics.start_epoch()
    run.rates = scheduled_rates(o, at)
    hide = run.ranks.rank > 0 or None  # None: where there is no terminal
    run.bar = tqdm(
        desc=f"epoch {at.epoch + 1}", total=o.steps_per_epoch, initial=at.epoch_step, disable=hide
    )
    with run.bar:
        while at.epoch_step < o.steps_per_epoch:
            batch, versions = next_batch(run)
            run.rates = scheduled_rates(o, at)
            lag = at.global_step - versions
            extra = (lag.mean(), lag.max(), len(run.feed.queue))  # as metrics.columns end
            run.is_whole = False
            metrics.unread.append(run.learner.update(batch, **run.rates, extra=extra))
            at.global_step += 1
            at.epoch_step += 1
            run.is_whole = True
            run.feed.publish(run.learner.network, at.global_step)
            run.bar.update()
            if run.ranks.count > 1 and at.global_step % CHECK_STEPS == 0:
                run.learner.check_ranks()
            if at.epoch_step < o.steps_per_epoch:
                after_iteration(run)


def scheduled_rates(o: argparse.Namespace, at: Progress) -> dict[str, float]:
    """Learning rate and entropy weight of the next iteration."""
    learning_rate = scheduled(o.learning_rate, at.epoch + 1)
    entropy_beta = scheduled(o.entropy_beta, at.epoch + 1)
    if o.anneal:
        left = max(0.0, 1 - (at.epoch + at.epoch_step / o.steps_per_epoch) / o.max_epoch)
        learning_rate, entropy_beta = learning_rate * left, entropy_beta * left
    if o.warm_up:
        learning_rate *= min(1.0, (at.global_step + 1) / o.warm_up)
    return {"learning_rate": learning_rate, "entropy_beta": entropy_beta}


def next_batch(run: Run) -> tuple:
    """Wait for a batch, and the versions that chose its actions; log what the first one needs."""
    said_at = time.monotonic()
    while (batch := run.feed.queue.get(timeout=0.5)) is None:
        run.supervise()
        if not len(run.metrics) and time.monotonic() - said_at > 2:
            said_at = time.monotonic()
            there = f"{run.feed.pool.connected} of {run.options.simulator_proc} simulators"
            states = f"{len(run.feed.queue)} of {run.options.batch_size} states"
            run.log(f"waiting for the first batch: {there} and {states} are there")
    if not len(run.metrics):  # the first line of an epoch has the speed since its first batch
        run.metrics.shown_at = time.monotonic()
    return batch


def after_iteration(run: Run) -> None:
    """Do what is due once in a while: read metrics, show them, save; end if something asks to."""
    now = time.monotonic()
    if run.ranks.device.type == "cpu" or len(run.metrics.unread) >= 50:  # reading waits for a GPU
        run.metrics.collect(run.at.global_step)
    if now - run.metrics.shown_at >= LOG_SECONDS:
        show(run)
    # Ranks save what they have just compared.
    is_compared = run.ranks.count == 1 or run.at.global_step % CHECK_STEPS == 0
    if now - run.saved_at >= CHECKPOINT_SECONDS and is_compared:
        run.save()
    run.supervise()


def show(run: Run) -> None:
    """Means since the last time: a line or the end of the progress bar, and TensorBoard."""
    m = run.means(run.metrics.num_shown, run.metrics.shown_at)
    run.metrics.num_shown, run.metrics.shown_at = len(run.metrics), time.monotonic()
    run.metrics.add_scalars(m, run.at.global_step)
    score = "-" if m["train_score"] is None else f"{m['train_score']:.2f}"
    queue = f"queue {m['queue_size']:.0f}/{run.options.queue_size}, lag {m['policy_lag']:.2f}"
    text = f"{m['states_per_s']:.0f} states/s, score {score}, {queue}"
    run.bar.set_postfix_str(text)
    if run.bar.disable:
        steps = f"{run.at.epoch_step}/{run.options.steps_per_epoch}"
        run.log(f"epoch {run.at.epoch + 1} {steps}: {m['it_per_s']:.2f} it/s, {text}")


def end_epoch(run: Run) -> None:
    """Write down how the epoch went, and evaluate if it is time."""
    at, metrics = run.at, run.metrics
    if not at.due:  # otherwise a run is resumed that ended in the evaluation
        # TensorBoard has means of some seconds; those of the epoch are for stats.json alone.
        if len(metrics) > metrics.num_shown:
            metrics.add_scalars(run.means(metrics.num_shown, metrics.shown_at), at.global_step)
        at.epoch, at.epoch_step, at.due = at.epoch + 1, 0, True
        run.stats.append(
            {
                "epoch_num": at.epoch,
                "global_step": at.global_step,
                **run.means(0, metrics.epoch_started_at),
                **NOT_EVALUATED,
            }
        )
    if run.ranks.count > 1:
        run.learner.check_ranks()
    is_last = at.epoch >= run.options.max_epoch
    if run.ranks.rank == 0 and (at.epoch % EVAL_EPOCH == 0 or is_last):
        run.save()  # so that an end in the evaluation loses nothing
        run.stats[-1] |= evaluate(run)
    if not is_last:
        run.ranks.wait_for_evaluation(at.global_step, run.supervise)
    at.due = False
    metrics.add_scalars({name: run.stats[-1].get(name) for name in NOT_EVALUATED}, at.global_step)
    run.save()
    run.log(f"epoch {at.epoch} is done\n" + common.table(run.stats[-1]))


# What an evaluation adds to the metrics of an epoch: scores of the latest weights, episodes that
# they have played to their end, and in the last epoch the score of the mean of the weights.
NOT_EVALUATED = dict.fromkeys(("mean_score", "max_score", "eval_episodes", "mean_model_score"))


def evaluate(run: Run) -> dict[str, float | None]:
    """Score the network, in the last epoch the mean of the weights too, and keep the best.

    All evaluations together have EVAL_SHARE of the time of the run. After one that was cut short,
    which is worth nothing, the next is put off until it has twice the time.
    """
    start, at = time.monotonic(), run.at
    seconds = EVAL_SHARE * (start - run.started_at) - at.evaluated_s
    seconds = max(0.0, seconds / (1 - EVAL_SHARE))  # this one is part of the time of the run
    is_last = at.epoch >= run.options.max_epoch
    if seconds < at.needed_s and not is_last:
        run.log(f"evaluation: put off, it may need {at.needed_s:.0f} s, and has {seconds:.0f} s")
        return dict(NOT_EVALUATED)
    try:
        result = evaluate_network(run, run.learner.network, "evaluation", seconds)
        taken = time.monotonic() - start
        at.needed_s = taken if result["mean_score"] is not None else 2 * taken
        if is_last:
            left = max(0.0, seconds - taken)
            of_mean = evaluate_network(run, run.learner.mean_network, "mean of the weights", left)
            result["mean_model_score"] = of_mean["mean_score"]
        return result
    finally:
        at.evaluated_s += time.monotonic() - start


def evaluate_network(run: Run, network, title: str, seconds: float) -> dict[str, float | None]:
    """Score a network within so many seconds; it becomes model-best.npz if it is the best.

    Only an evaluation whose episodes were all played to their end has a score: otherwise the long
    ones are missing, which are the good ones of many games.
    """
    from model import weights_file
    from predictor import score_network

    def log(text: str) -> None:
        run.log(f"{title}: {text}")

    at, num_episodes = run.at, run.options.eval_episode
    log(f"{num_episodes} episodes in {seconds:.0f} s at most")
    seed = (run.options.seed + at.epoch) % 2**32
    try:
        episodes = score_network(
            run.options.env, network, num_episodes, seed, log, seconds, run.supervise
        )
    except (UserError, OSError) as error:  # no room for its players on a full disk, for example
        run.supervise()  # raises once more what ends the run, not only this evaluation
        log(f"given up: {error}{without_best(run)}")
        return dict(NOT_EVALUATED)
    finished = sum(episode.finished for episode in episodes)
    if finished < num_episodes:
        what = f"cut short, {finished} of {num_episodes} episodes played to their end"
        log(f"{what}, so it does not choose the best model{without_best(run)}")
        return NOT_EVALUATED | {"eval_episodes": finished}
    result = summary(episodes)
    log(f"mean {result['mean']:.2f} of {num_episodes} episodes")
    is_best = at.best_score is None or result["mean"] > at.best_score
    if is_best and run.directory.write("model-best.npz", weights_file(network)):
        at.best_score = result["mean"]
    return NOT_EVALUATED | {
        "mean_score": result["mean"],
        "max_score": result["max"],
        "eval_episodes": finished,
    }


def without_best(run: Run) -> str:
    """What to do while there is no model-best.npz, as the rest of a sentence."""
    if run.at.best_score is not None:
        return ""
    ways = "--task eval, which has no limit of time, or fewer --eval-episode"
    return f"; no evaluation was whole yet, so there is no model-best.npz: {ways}"


def end_early(run: Run, error: Exception, save: bool) -> None:
    """End a run that is not done: save if the weights are good, and raise the reason."""
    reason = run.ranks.explain(error, run.signum)
    run.log(f"the run ends: {reason}")
    if save and len(run.metrics) and not run.ranks.has_bad_weights():
        run.save()
    if isinstance(reason, UserError) and run.directory.unwritten:
        files = ", ".join(run.directory.unwritten)
        raise UserError(f"{reason}; not written: {files}", reason.code) from error
    raise reason


# Tasks


def file_name(env_id: str) -> str:
    """What files are named that belong to a game."""
    return re.sub(r"[^\w.-]", "-", env_id)


def game_of_file(path: str) -> str | None:
    """The registered game that a file is named after: `Breakout-v0-ba3c.npz`, or None."""
    stem = os.path.basename(path).removesuffix(".npz")
    games = [game for game in gymnasium.registry if f"{stem}-".startswith(f"{file_name(game)}-")]
    return max(games, key=len, default=None)


@common.signals_deferred()
def import_torch() -> None:
    """Import torch: an exception of a signal in its C++ code would abort this program."""
    import torch  # noqa: F401


def modified_at(path: str) -> int | None:
    """When a file was written, in ns; None if there is none."""
    with contextlib.suppress(OSError, ValueError):
        return os.stat(path).st_mtime_ns
    return None


def load_for(env_id: str | None, path: str) -> tuple:
    """Game, network, and checkpoint ({} for an .npz) out of a file, which must fit the game."""
    game = describe(env_id) if env_id else None
    import_torch()
    import model

    modified = modified_at(path)
    network, saved = model.load(path)
    if saved:
        try:
            check_run(saved)
        except ValueError as error:
            raise UserError(f"{path} is not usable: {error}") from error
        saved["file"], saved["modified"] = os.path.abspath(path), modified
        if game is None:
            refuse_module(path, saved["env"])
            game = describe(saved["env"])
        elif saved["env"] not in (env_id, game.env_id):
            raise UserError(f"{path} is a run of {saved['env']}, not of {env_id}", 2)
    elif game is None:
        env_id = game_of_file(path)
        if env_id is None:
            raise UserError(f"{path} is not named after a game: give --env ENV", 2)
        game = describe(env_id)
    n, actions = network.num_actions, game.num_actions
    if n != actions:
        raise UserError(f"{path} is for a game with {n} actions; {game.env_id} has {actions}")
    return game.env_id, network, saved


def task_train(given: dict) -> None:
    """--task train."""
    interrupt_quietly()
    arguments = given.pop("arguments")
    track = given.pop("track", False)
    if track and find_spec("wandb") is None:
        raise UserError("--track needs Weights & Biases: pip install wandb", 2)
    config = given.pop("config", None)
    if config is not None:
        given = read_config(config, given.get("env")) | given
    load, output, saved = given.pop("load", None), given.pop("output", None), {}
    env_id, network = given.pop("env", None), None
    if load is not None:
        env_id, network, saved = load_for(env_id, load)
        if saved and config is not None:
            raise UserError("--config starts a run, and a checkpoint has options of its own", 2)
        kind = given.setdefault("network", network.kind)
        if kind != network.kind:
            raise UserError(f"{load} holds the network {network.kind}, not {kind}")
    game = describe(env_id)
    import_torch()
    import torch

    place = locate_run(game.env_id, output, saved)
    devices, chosen, options, changes = plan_run(game, given, saved)
    log_file = None
    if not in_environment("RANK", 0):
        log_file = open_run(place.path, place.is_resumed, place.way)
        if place.is_resumed and saved["modified"] != modified_at(saved["file"]):
            raise UserError(f"{saved['file']} was written anew meanwhile: start again")
    if len(devices) > 1 and "RANK" not in os.environ:
        log_file.close()  # rank 0 opens it again
        return launch(len(devices), arguments)
    with contextlib.ExitStack() as stack:
        if log_file is not None:
            stack.enter_context(log_file)  # to close it lets go of its lock
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        same = shared_options(game, options)
        ranks = stack.enter_context(join_ranks(devices, same, chosen["seed"]))
        agreed = {"seed": ranks.seed, "ranks": ranks.count, "gpu": gpu_numbers(ranks.devices)}
        vars(options).update(agreed, env=game.env_id)
        chosen = {name: value for name, value in (chosen | agreed).items() if value is not None}
        network = new_network(game, options) if network is None else network
        directory = RunDirectory(place, log_file)
        directory.log(place.sentence)
        if changes:
            directory.log("differs from before: " + "; ".join(changes))
        train(Run(chosen, options, network, ranks, directory, saved), track)


def plan_run(game: common.Game, given: dict, saved: dict) -> tuple:
    """Devices, chosen options, all options; for a resumed run, what differs from before.

    What is wrong with them is said here, before ranks wait for each other.
    """
    from model import MAX_ACTIONS

    if not 0 < game.num_actions < MAX_ACTIONS:
        actions = f"{game.num_actions} actions, not 1 to {MAX_ACTIONS - 1}"
        raise UserError(f"{game.env_id} has {actions}", 2)
    gpus, ranks = given.pop("gpu", None), given.pop("ranks", None)
    before = with_earlier_defaults(saved.get("options", {}))
    chosen = {"seed": secrets.randbits(32), "network": "ba3c"} | before | given
    devices, changes = choose_devices(gpus, ranks, before)
    local_ranks = in_environment("LOCAL_WORLD_SIZE", len(devices))
    changes += share_simulators(chosen, given, local_ranks) + check_listening(before, given)
    now = {name: chosen[name] for name in chosen if name in given or name not in ("listen", "key")}
    options = complete(now, devices[0].type == "cpu", local_ranks, game.one_per_process)
    # What changes learning is saved as it is: another version may have other defaults.
    chosen |= {option.name: vars(options)[option.name] for option in LEARNING}
    return devices, chosen, options, changes


def shared_options(game: common.Game, options: argparse.Namespace) -> dict:
    """What all ranks must have in common."""
    same = {"--env": game.env_id, "--network": options.network}
    same["as number of actions"] = game.num_actions
    for option in LEARNING:
        same[flag(option.name)] = vars(options)[option.name]
    return same


def new_network(game: common.Game, options: argparse.Namespace):
    """A network that has not learned anything."""
    import torch

    import model

    torch.manual_seed(options.seed)
    network = model.Network(options.network, game.num_actions)
    if options.center_filters:
        network.center_filters()
    return network


def load_agent(given: dict) -> tuple:
    """Game, network, number of episodes and seed of a task that plays."""
    env_id, path = given.get("env"), given.get("load")
    if path is None:
        env_id = describe(env_id).env_id
        path = os.path.join(MODELS, f"{file_name(env_id)}.npz")
        if not os.path.exists(path):
            raise UserError(f"there is no agent for {env_id} in {MODELS}: give --load FILE", 2)
        print(f"the agent is {os.path.relpath(path)}")
    env_id, network, _ = load_for(env_id, path)
    device = find_devices(given.get("gpu"), None)[0]
    if device.type == "cuda":
        import torch

        torch.cuda.set_device(device)
    network.to(device)
    return env_id, network, given.get("episode", 100), given.get("seed", secrets.randbits(32))


def task_eval(given: dict) -> None:
    """--task eval."""
    start = time.monotonic()
    env_id, network, num_episodes, seed = load_agent(given)
    from predictor import score_network

    output = given.get("output")
    with contextlib.nullcontext() if output is None else common.output_directory(output):
        episodes = score_network(env_id, network, num_episodes, seed, log=print)
        seconds = round(time.monotonic() - start, 1)
        print(common.table(summary(episodes) | {"seed": seed, "seconds": seconds}))
        if output is not None:
            result = common.results(env_id, episodes) | {"seed": seed}
            common.write_json(output, "results.json", result)


def watch(players, network, num_episodes: int, seed: int, each: Callable) -> None:
    """Play episodes one after the other; calls `each` with those so far after each."""
    import predictor

    episodes: list = []
    policy = predictor.policy_of(network)
    with contextlib.closing(players):
        try:
            for done in predictor.play_episodes(players, policy, num_episodes, seed, math.inf):
                if len(done) > len(episodes):
                    with common.signals_deferred():
                        episodes = list(done)
                        each(episodes)
                    last = common.number(episodes[-1].score)
                    print(f"{len(episodes)}/{num_episodes}, score={last}", flush=True)
        finally:
            print(common.table(summary(episodes) if episodes else {"episodes": 0}))


def task_play(given: dict) -> None:
    """--task play."""
    env_id, network, num_episodes, seed = load_agent(given)
    from predictor import VectorPlayers

    if "output" in given:
        output = given["output"]
        with common.output_directory(output):
            players = common.Recorder(
                env_id, seed, lambda episode: os.path.join(output, f"episode{episode:06}.mp4")
            )
            return watch(players, network, num_episodes, seed, lambda episodes: None)
    players = VectorPlayers(env_id, 1, seed, lambda: None, "--window")
    try:
        watch(players, network, num_episodes, seed, lambda episodes: None)
    except SimulatorError as error:
        if error.exit_code != 0:  # 0: the window was closed
            raise UserError(f"{error}; --output DIR writes videos instead") from error


def task_gen_submit(given: dict) -> None:
    """--task gen_submit."""
    env_id, network, num_episodes, seed = load_agent(given)
    output = os.path.abspath(given.get("output", "output_dir"))  # wherever a game goes
    from model import STATE_SHAPE, weights_file

    if num_episodes < 100:
        print(f"{num_episodes} episodes: gym scores a submission of 100 or more")
    prefix = os.path.join(output, f"openaigym.video.0.{os.getpid()}.video")
    cubes = {k**3 for k in range(10)}  # and from 1,000 on the thousands, as gym's Monitor does

    def path_of(episode: int) -> str | None:
        recorded = episode in cubes or (episode and episode % 1000 == 0)
        return f"{prefix}{episode:06}.mp4" if recorded else None

    model, weights = file_name(env_id) + ".npz", weights_file(network)
    config = {
        "env_id": env_id,
        "network": network.kind,
        "num_actions": network.num_actions,
        "seed": seed,
        "state_shape": STATE_SHAPE,
        "random_actions": common.RANDOM_ACTIONS,
    }

    def submit(episodes: list) -> None:
        common.write_submission(output, recorder, episodes, model, config, weights)

    with common.output_directory(output):
        recorder = common.Recorder(env_id, seed, path_of)
        try:
            watch(recorder, network, num_episodes, seed, submit)
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
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with common.signals_kept(), contextlib.ExitStack() as stack:
        stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
        stack.callback(setattr, threading, "excepthook", threading.excepthook)
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            stack.callback(setattr, sys, name, stream)
            if stream is None:  # it was closed
                setattr(sys, name, stack.enter_context(open(os.devnull, "w")))
            elif hasattr(stream, "reconfigure"):
                before = {"line_buffering": stream.line_buffering, "errors": stream.errors}
                stack.callback(reconfigure, stream, **before)
                reconfigure(stream, line_buffering=True, errors="backslashreplace")
        yield


def reconfigure(stream, **how) -> None:
    """Change how a stream is written, unless it is closed, or nobody reads it any more."""
    with contextlib.suppress(OSError, ValueError):
        stream.reconfigure(**how)


@process_kept()
def main(arguments: list[str] | None = None) -> int:
    """Run a task; returns the exit code.

    arguments: in place of those of the command line. It may be called from any thread, and again.
    """
    arguments = [str(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    # Threads that wait should sleep: there are more of them here than cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # What ranks have to say of each other is one sentence, not torch's warnings.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    on_signals(common.raise_stopped, SIGNALS[1:])
    if INTERRUPTIBLE and common.in_main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # of a rank: its launcher blocked them
        with common.directory_kept():
            given = read_options(arguments)
            TASKS[given.pop("task")](given | {"arguments": arguments})
        return 0
    except SystemExit as error:  # of a signal, of the ranks, or of the parser, which has said why
        return error.code
    except KeyboardInterrupt:
        sentence, code = "interrupted", 130
    except Exception as error:
        if not is_sentence(error):
            raise
        sentence = first_line(error) if isinstance(error, RuntimeError) else str(error)  # of a GPU
        code = getattr(error, "code", 1)
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
