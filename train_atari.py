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
from common import FRAME_SHAPE, STATE_SHAPE, Recorder, UserError, count_cores, summary, write_file
from simulator import SIGNALS, VectorPlayers, end, end_with_parent, on_signals, undisturbed

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
CHECK_STEPS = 500  # iterations after which several ranks compare their weights
RANK_END_SECONDS = 5.0  # how long rank 0 has to save if all ranks are told to end
LAUNCH_END_SECONDS = 8.0  # how long ranks have to save and to end
SIMULATOR_BYTES, PLAYER_BYTES = 5e6, 1.5e6  # what simulators do not share, measured with Breakout

EVALUATED = ("mean_score", "max_score", "eval_episodes")  # metrics of an evaluation
RUN_FILES = ("checkpoint.pt", "stats.json", "model-latest.npz", "model-best.npz")
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems that know none
GPU_ERRORS = ("OutOfMemoryError", "AcceleratorError")  # torch's, for what a program cannot help
PACKAGES = ("torch", "gymnasium", "ale-py", "numpy", "pyzmq", "msgpack")


def whole(text: str) -> int:
    """A whole number from 0, of 32 bits."""
    if not 0 <= int(text) < 2**32:
        raise ValueError
    return int(text)


def count(text: str) -> int:
    """A whole number from 1."""
    if whole(text) == 0:
        raise ValueError
    return int(text)


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
    ("gpu", ANY, str, "GPU", "GPUs, as 0,1,2; default: all, or the CPU where there is none"),
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
            flag = "--" + name.lower().replace("_", "-")
            of_a3c = LEARNING_OF_A3C.get(name.lower())
            text += f" (default {default}" + (f"; with a3c {of_a3c})" if of_a3c else ")")
            group.add_argument(flag, type=kind, metavar="X", help=text)
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
            flag, tasks = "--" + option.replace("_", "-"), listed(tasks_of(option))
            raise UserError(f"{flag} is for --task {tasks}, not for --task {given['task']}", 2)
    if "env" not in given and not given.get("load", "").endswith(".pt"):
        parser.error("--env is required")
    return given


def check_options(options: dict) -> None:
    """ValueError unless the command line could have given these options to a run."""
    flags = [f"--{option.replace('_', '-')}={value}" for option, value in options.items()]
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


def join_ranks(devices: list):
    """The device of this rank; where there are several, they are connected now."""
    import torch

    rank, local = in_environment("RANK", 0), in_environment("LOCAL_RANK", 0)
    device = devices[local % len(devices)]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        if os.environ.get("BATCH_A3C_LAUNCHER"):
            end_this = (os.kill, os.getpid(), signal.SIGTERM)
            threading.Thread(target=end_with_parent, args=end_this, daemon=True).start()
        backend = "nccl" if device.type == "cuda" else "gloo"
        # Nothing lets go of a rank that waits for the others here; it has nothing to clean up yet.
        handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # The others wait while rank 0 evaluates; a rank that ends is noticed at once.
        wait = datetime.timedelta(days=1)
        try:
            torch.distributed.init_process_group(backend, timeout=wait)
        except (RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"rank {rank} cannot join the others: {reason}") from error
        signal.signal(signal.SIGTERM, handler)
    return device


def launch(ranks: int, arguments: list[str]) -> None:
    """Run this program with these arguments as so many ranks; end with the first that ends.

    Signals go to rank 0, which saves.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    world |= {"LOCAL_WORLD_SIZE": str(ranks), "BATCH_A3C_LAUNCHER": "1"}
    world["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # when one ends, the others say so in one sentence
    processes: list[subprocess.Popen] = []
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until a rank can end in good order
    on_signals(lambda signum, frame: processes[0].send_signal(signum))
    try:
        for rank in range(ranks):
            environment = os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            streams = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL if rank else None}
            command = [sys.executable, os.path.abspath(__file__), *arguments]
            process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
            processes.append(process)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        failed = 0
        while processes[0].poll() is None and not failed:
            time.sleep(0.1)
            failed = next((r for r, process in enumerate(processes) if process.poll()), 0)
    finally:
        end(processes, LAUNCH_END_SECONDS)
    if failed:
        raise UserError(f"rank {failed} ended with code {processes[failed].returncode}")
    code = processes[0].returncode
    sys.exit(code if code >= 0 else 128 - code)


def complete(chosen: dict, on_cpu: bool, ranks: int = 1) -> argparse.Namespace:
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
        table["players_per_simulator"] = max(1, CPU_PLAYERS // simulators)
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


def count_actions(env_id: str) -> int:
    """The number of actions of a game; UserError if there is no such game."""
    with contextlib.closing(common.make_env(env_id)) as env:
        return int(env.action_space.n)


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
        checkpoint = os.path.join(path, "checkpoint.pt")
        way = way or f"go on with it by --load {checkpoint}, or name another --output"
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
    it begins with; log_file: of rank 0, what open_run made of the directory.
    """

    def __init__(self, env_id, chosen, options, network, device, place, saved, log_file):
        import torch

        import model

        self.env_id, self.chosen, self.device, self.path = env_id, chosen, device, place.path
        self.options, self.log_file = options, log_file
        # By this name files know that they are of the same run.
        self.run_id = (saved.get("run_id") if place.goes_on else None) or secrets.token_hex(8)
        self.rank, local = in_environment("RANK", 0), in_environment("LOCAL_WORLD_SIZE", 1)
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
            self.began -= self.at["elapsed_s"]
        self.at["starts"] += 1
        packages = {name: version(name) for name in PACKAGES}
        packages |= {"opencv": cv2.__version__, "python": sys.version}
        self.config = {"env": env_id, "run_id": self.run_id} | vars(self.options)
        self.config |= {"versions": packages}
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
                self.log(f"the run ends: {error}")
                if not isinstance(error, FloatingPointError) and (self.rows or self.unread):
                    self.save()
                others = self.learner.ranks > 1 and type(error).__name__ not in GPU_ERRORS
                if isinstance(error, RuntimeError) and others:
                    self.signalled = 0.0  # if a signal has ended the others, it ends this one now
                    self.check()
                    reason = str(error).partition("\n")[0]
                    raise UserError(f"rank {self.rank} lost the others: {reason}") from error
                if isinstance(error, UserError) and self.unwritten:
                    files = ", ".join(self.unwritten)
                    raise UserError(f"{error}; not written: {files}", error.code) from error
                raise
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
                self.unread.append(self.learner.update(batch, **self.rates, extra=extra))
                at["global_step"] += 1
                at["epoch_step"] += 1
                self.feed.publish(self.learner.network, at["global_step"])
                self.bar.update()
                if self.learner.ranks > 1 and at["global_step"] % CHECK_STEPS == 0:
                    self.learner.check_ranks()
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
        if now - self.saved >= CHECKPOINT_SECONDS:
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
    actions = count_actions(env_id) if env_id else None
    import model

    network, saved = model.load(path)
    if saved:
        try:
            check_run(saved)
        except ValueError as error:
            raise UserError(f"{path} is not usable: {error}") from error
        saved["file"] = os.path.abspath(path)
        if env_id not in (None, saved["env"]):
            raise UserError(f"{path} is a run of {saved['env']}, not of {env_id}", 2)
        if env_id is None and ":" in saved["env"]:  # nothing in a file is executed unasked
            module, way = saved["env"].partition(":")[0], f"give --env {saved['env']}"
            raise UserError(f"{path} is of a game in the Python module {module}: {way}", 2)
    env_id = env_id or saved["env"]
    n, actions = network.num_actions, actions or count_actions(env_id)
    if n != actions:
        raise UserError(f"{path} is for a game with {n} actions; {env_id} has {actions}")
    return env_id, network, saved


def task_train(given: dict) -> None:
    """--task train."""
    del given["task"]
    arguments = given.pop("arguments")
    load, output, saved = given.pop("load", None), given.pop("output", None), {}
    env_id, kind = given.pop("env", None), given.get("network")
    gpus, ranks = given.pop("gpu", None), given.pop("ranks", None)
    if load is not None:
        env_id, network, saved = load_for(env_id, load)
        if kind not in (None, network.kind):
            raise UserError(f"{load} holds the network {network.kind}, not {kind}")
    actions = count_actions(env_id)
    chosen = {"seed": secrets.randbits(32)} | saved.get("options", {}) | given
    chosen["network"] = (kind or "ba3c") if load is None else network.kind
    place = place_run(env_id, output, saved)
    import torch

    import model

    if not 0 < actions < model.MAX_ACTIONS:
        raise UserError(f"{env_id} has {actions} actions, not 1 to {model.MAX_ACTIONS - 1}", 2)
    devices = find_devices(gpus, ranks)
    # What is wrong is said here, before ranks wait for each other.
    local = in_environment("LOCAL_WORLD_SIZE", len(devices))
    options = complete(chosen, devices[0].type == "cpu", local)
    way = ""
    if place.reason and saved["file"] == os.path.join(place.path, "checkpoint.pt"):
        way = f"{place.reason}; name another --output"
    log_file = None
    if not in_environment("RANK", 0):
        log_file = open_run(place.path, place.goes_on, way)
    if len(devices) > 1 and "RANK" not in os.environ:
        log_file.close()  # rank 0 opens it again
        return launch(len(devices), arguments)
    device = join_ranks(devices)
    torch.manual_seed(chosen["seed"])
    if load is None:
        network = model.Network(chosen["network"], actions)
        if options.center_filters:
            network.center_filters()
    with torch_settings_kept():
        Training(env_id, chosen, options, network, device, place, saved, log_file).run()


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
    if output := given.get("output"):
        with common.output_directory(output):
            players = Recorder(
                env_id, seed, lambda episode: os.path.join(output, f"episode{episode:06}.mp4")
            )
            return watch(players, network, count, seed, lambda episodes: None)
    players = VectorPlayers(env_id, 1, seed, lambda: None, "--window")
    try:
        watch(players, network, count, seed, lambda episodes: None)
    except UserError as error:
        if players.exit_code != 0:  # 0: the window was closed
            raise UserError(f"{error}; --output DIR writes videos instead") from error


def task_gen_submit(given: dict) -> None:
    """--task gen_submit."""
    env_id, network, count, seed = load_agent(given)
    output = given.get("output", "output_dir")
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
    on_signals(lambda signum, frame: sys.exit(128 + signum), SIGNALS[1:])
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
        sentence, code = str(error).partition("\n")[0], 1
    print(f"{PROGRAM}: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    finally:
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError:  # nobody reads it any more: Python must not try again, and fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
