#!/usr/bin/env python3
"""Batch-A3C on Atari games: train an agent, score it.

  train:         ./train_atari.py --env Breakout-v0 --gpu 0
  on a CPU:      ./train_atari.py --env Breakout-v0 --network a3c
  go on:         ./train_atari.py --load train_log/train-atari-Breakout-v0/checkpoint.pt
  score a model: ./train_atari.py --task eval --env Breakout-v0 --load Breakout-v0.npz --episode 100

A directory that already holds a run is refused, unless --load names its own checkpoint.pt: then
that run goes on there, with its options but for those given anew.
Exit codes: 0 done, 1 failed, 2 wrong usage, 130 (Ctrl-C) and 143 (SIGTERM) stopped after saving.
Even with --seed a training run cannot be repeated to the bit: in which order players are served
depends on the load of the machine.
"""

import argparse
import contextlib
import fcntl
import json
import math
import os
import re
import secrets
import signal
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from common import STATE_SHAPE, UserError, make_env, summary, write_file

# torch and the rooms that need it are imported where they are used: --help does not wait for them.

# What changes learning: the original's values.
BATCH_SIZE = 128  # new states per iteration
LOCAL_TIME_MAX = 5  # steps of an n-step return
GAMMA = 0.99
LEARNING_RATE = "1e-3,20:3e-4,120:1e-4"  # VALUE,EPOCH:VALUE,... with the epoch from which it holds
ENTROPY_BETA = "0.01,80:0.005"
ADAM_EPSILON = 1e-3
STEPS_PER_EPOCH = 6000
MAX_EPOCH = 1000
EVAL_EPISODE = 50
EVAL_EPOCH = 3  # epochs from one evaluation to the next
# What changes only speed, and how old a policy is when it is trained on.
SIMULATOR_PROC = 50
PREDICT_BATCH_SIZE = 15
PREDICTOR_THREAD_PER_GPU = 3
CPU_PREDICTORS = 4  # at most: with more the batches get too small
CPU_PLAYERS = 32  # in all: on a CPU few processes with several players each cost least
# What a run does beside.
EVAL_SHARE = 0.2  # of the time of a run, at most, is spent in evaluation
CHECKPOINT_SECONDS = 300
LOG_SECONDS = 10
# Measured on both cores of a two-core server: states/s per core, everything together.
STATES_PER_CORE = {"ba3c": 52, "a3c": 460}
SIMULATOR_BYTES = 50e6

RUN_FILES = ("checkpoint.pt", "stats.json", "model-latest.npz", "model-best.npz")
PACKAGES = ("torch", "gymnasium", "ale-py", "numpy", "opencv-python-headless", "pyzmq", "msgpack")


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


def scheduled(text: str, epoch: int) -> float:
    """The value of a schedule, `VALUE,EPOCH:VALUE,...`, in `epoch`, counted from 1."""
    steps = [step.split(":") for step in ("1:" + text).split(",")]
    values = sorted((count(first), float(value)) for first, value in steps)
    if not all(0 <= value < math.inf for _, value in values):
        raise ValueError
    return [value for first, value in values if epoch >= first][-1]


def schedule(text: str) -> str:
    """A schedule, as it is."""
    scheduled(text, 1)
    return text


LEARNING = (  # option, type, default (None: what fits the machine), meaning
    ("batch_size", count, BATCH_SIZE, "new states per iteration"),
    ("local_time_max", count, LOCAL_TIME_MAX, "steps of an n-step return"),
    ("gamma", positive, GAMMA, "discount per step"),
    ("learning_rate", schedule, LEARNING_RATE, "VALUE,EPOCH:VALUE,..."),
    ("entropy_beta", schedule, ENTROPY_BETA, "VALUE,EPOCH:VALUE,..."),
    ("adam_epsilon", positive, ADAM_EPSILON, "epsilon of Adam in TensorFlow's form"),
    ("steps_per_epoch", count, STEPS_PER_EPOCH, "iterations per epoch"),
    ("max_epoch", count, MAX_EPOCH, "epochs until the run is done"),
    ("eval_episode", count, EVAL_EPISODE, f"episodes of an evaluation, every {EVAL_EPOCH} epochs"),
)
SPEED = (
    ("simulator_proc", count, None, f"simulator processes; {SIMULATOR_PROC}, CPU: 2 per core"),
    ("players_per_simulator", count, None, f"1; on a CPU, so many that all are {CPU_PLAYERS}"),
    ("predict_batch_size", count, PREDICT_BATCH_SIZE, "most states in one prediction"),
    ("predictor_thread_per_gpu", count, None, f"{PREDICTOR_THREAD_PER_GPU}; CPU: 1 per core to 4"),
    ("queue_size", count, None, "states that may wait for the trainer; default: a batch"),
)


def make_parser() -> argparse.ArgumentParser:
    """The command line. Options that are not given are not in its result."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--env", help="gymnasium id of an Atari game, such as Breakout-v0 (required)")
    add("--task", choices=TASKS, default="train", help="default: train")
    add("--gpu", help="number of the GPU; default: the first, or the CPU where there is none")
    add("--load", metavar="FILE", help="weights.npz to start from, or checkpoint.pt to go on with")
    add("--output", metavar="DIR", help="of the run; default: train_log/train-atari-ENV")
    add("--episode", type=count, metavar="N", help="episodes to play (default 100)")
    add("--network", choices=("ba3c", "a3c"), help="default: ba3c; a3c is small, for a CPU")
    add("--seed", type=whole, metavar="N", help="of players, sampling, initialization")
    for title, options in (("what changes learning", LEARNING), ("what changes speed", SPEED)):
        group = parser.add_argument_group(title)
        for name, kind, default, text in options:
            text += f" (default {default})" if default else ""
            group.add_argument("--" + name.replace("_", "-"), type=kind, metavar="X", help=text)
    return parser


def find_device(gpu: str | None):
    """The torch device that --gpu names."""
    import torch

    available = torch.cuda.device_count()
    if gpu is None:
        return torch.device("cuda:0" if available else "cpu")
    if not gpu.isdecimal() or int(gpu) >= available:
        there = (
            f"CUDA devices 0 to {available - 1}" if available else "no CUDA device, only the CPU"
        )
        raise UserError(f"--gpu {gpu}: there is {there}; --gpu takes one number", 2)
    torch.cuda.set_device(int(gpu))
    return torch.device("cuda", int(gpu))


def complete(chosen: dict, on_cpu: bool) -> argparse.Namespace:
    """All options of a training run: the chosen ones, and what fits them and this machine."""
    table = {name: default for name, _, default, _ in LEARNING + SPEED}
    o, cores = argparse.Namespace(**(table | chosen)), os.cpu_count() or 1
    processes = min(2 * cores, CPU_PLAYERS) if on_cpu else SIMULATOR_PROC
    o.simulator_proc = o.simulator_proc or processes
    each = max(1, CPU_PLAYERS // o.simulator_proc) if on_cpu else 1
    o.players_per_simulator = o.players_per_simulator or each
    players = o.simulator_proc * o.players_per_simulator
    threads = min(cores, CPU_PREDICTORS) if on_cpu else PREDICTOR_THREAD_PER_GPU
    threads = min(threads, o.simulator_proc)
    o.predictor_thread_per_gpu = o.predictor_thread_per_gpu or threads
    o.queue_size = o.queue_size or o.batch_size
    if "predict_batch_size" not in chosen:
        o.predict_batch_size = min(o.predict_batch_size, players)
    size, threads = o.predict_batch_size, o.predictor_thread_per_gpu
    states = players * (o.local_time_max + 2) + o.queue_size + 2 * o.batch_size + size
    need = states * math.prod(STATE_SHAPE) + o.simulator_proc * SIMULATOR_BYTES
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    waiting = f"a queue of {o.queue_size} states can never fill a batch of {o.batch_size}"
    for wrong, sentence in (
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
    with contextlib.closing(make_env(env_id)) as env:
        return int(env.action_space.n)


def open_run(path: str, goes_on: bool):
    """Make the directory of a run ours; returns its log file, open and locked."""
    present = [name for name in RUN_FILES if os.path.exists(os.path.join(path, name))]
    if present and not goes_on:
        checkpoint = os.path.join(path, "checkpoint.pt")
        way = f"go on with it by --load {checkpoint}, or name another --output"
        raise UserError(f"{path} holds a run ({', '.join(present)}): {way}", 2)
    try:
        os.makedirs(path, exist_ok=True)
        log_file = open(os.path.join(path, "log.log"), "a", buffering=1)  # noqa: SIM115
        fcntl.flock(log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return log_file
    except BlockingIOError as error:
        raise UserError(f"another process is training in {path}", 2) from error
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}", 2) from error


class Training:
    """A run: the learner, what feeds it, and what it leaves in its directory.

    chosen: the options the user gave, now or before; saved: its checkpoint, if it goes on.
    """

    def __init__(self, env_id, chosen, network, device, path, saved):
        import torch

        import model

        self.env_id, self.chosen, self.device, self.path = env_id, chosen, device, path
        self.options = complete(chosen, device.type == "cpu")
        goes_on = bool(saved) and saved["file"] == os.path.join(path, "checkpoint.pt")
        self.log_file = open_run(path, goes_on)
        self.columns = (*model.METRICS, "policy_lag", "policy_lag_max", "queue_size")
        # Epochs and iterations done, iterations of this epoch done, starts of this program.
        self.at = {"epoch": 0, "global_step": 0, "epoch_step": 0, "starts": 0, "best_score": None}
        self.at |= {"elapsed_s": 0.0, "evaluated_s": 0.0}
        self.stats: list[dict] = []  # of the epochs done
        self.rows: list[np.ndarray] = []  # of this epoch's iterations: a value for each column
        self.unread: list[tuple] = []  # iterations whose metrics are still on the device
        self.began = self.logged = self.saved = time.monotonic()
        self.shown, self.signal = 0, None
        threads = os.cpu_count() or 1
        self.learner = model.Learner(network, device, self.options.adam_epsilon, threads)
        if saved:
            self.learner.load_state_dict(saved["learner"])
            torch.set_rng_state(saved["rng"])
            self.at, self.stats = saved["at"], saved["stats"]
            if not os.path.exists(os.path.join(path, "model-best.npz")):
                self.at["best_score"] = None
            done = "{global_step} iterations, {epoch} epochs, best score {best_score}"
            self.log(f"restored {saved['file']}: weights, optimizer, {done.format(**self.at)}")
            self.began -= self.at["elapsed_s"]
        self.at["starts"] += 1
        packages = {name: version(name) for name in PACKAGES} | {"python": sys.version}
        config = {"env": env_id} | vars(self.options) | {"versions": packages}
        self.write_json("config.json", config)
        self.announce()

    def announce(self) -> None:
        """Print what follows from the options."""
        o, network = self.options, self.learner.network
        players = o.simulator_proc * o.players_per_simulator
        states = o.steps_per_epoch * o.batch_size
        # A state waits until its segment is done, then in the queue, while others are trained on.
        lag = (players * (o.local_time_max + 3) / 2 + o.queue_size) / o.batch_size
        parameters = sum(p.numel() for p in network.parameters())
        cores = os.cpu_count() or 1
        facts = {
            "run": f"{self.env_id} ({network.num_actions} actions) in {self.path}, seed {o.seed}",
            "network": f"{network.kind}, {parameters:,} parameters",
            "device": f"{self.device}, {cores} cores, {o.predictor_thread_per_gpu} predictors",
            "players": f"{o.simulator_proc} processes x {o.players_per_simulator} = {players}",
            "epoch": f"{o.steps_per_epoch:,} iterations x {o.batch_size} = {states:,} states",
            "policy lag": f"{lag:.1f} updates when the trainer binds; with fewer players less",
        }
        if self.device.type == "cpu":
            rate = STATES_PER_CORE[network.kind] * cores
            facts["expect"] = f"about {rate} states/s, {states / rate / 3600:.2g} hours per epoch"
            if network.kind == "ba3c":
                facts["expect"] += "; --network a3c is several times faster on a CPU"
        self.log("training\n" + tabulate(facts.items()))

    def log(self, text: str) -> None:
        """A line in log.log and on standard output, above a progress bar if there is one."""
        line = time.strftime("%m-%d %H:%M:%S ") + text
        self.log_file.write(line + "\n")
        with contextlib.suppress(OSError):  # where nobody reads it any more, train on
            tqdm.write(line)

    def write(self, name: str, save: Callable) -> None:
        """Let `save(file)` write a file of the run."""
        write_file(os.path.join(self.path, name), save)

    def write_json(self, name: str, content) -> None:
        """Write a JSON file of the run."""
        self.write(name, lambda file: file.write(json.dumps(content, indent=1).encode()))

    def save(self) -> None:
        """Write the checkpoint, the latest weights, and the epochs done."""
        import torch

        import model

        self.collect()
        network = self.learner.network
        self.at["elapsed_s"] = time.monotonic() - self.began
        checkpoint = {"format": model.CHECKPOINT_FORMAT, "env": self.env_id, "options": self.chosen}
        checkpoint |= {"learner": self.learner.state_dict(), "rng": torch.get_rng_state()}
        checkpoint |= {"at": self.at, "stats": self.stats}
        self.write("checkpoint.pt", lambda file: torch.save(checkpoint, file))
        self.write("model-latest.npz", lambda file: model.save_weights(file, network))
        self.write_json("stats.json", self.stats)
        self.saved = time.monotonic()

    def on_signal(self, signum: int, frame) -> None:
        """The first signal lets the iteration end and saves; the second ends at once."""
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signum

    def check(self) -> None:
        """Raise what should end the run, if there is something."""
        if self.signal is not None:
            what = f"stopped by {signal.Signals(self.signal).name}"
            raise UserError(f"{what} in iteration {self.at['global_step']}", 128 + self.signal)
        self.feed.check()

    def run(self) -> None:
        """Train until the last epoch is done."""
        from torch.utils.tensorboard import SummaryWriter

        from predictor import Feed

        if self.at["epoch"] >= self.options.max_epoch:
            self.save()
            raise UserError(f"the run is done: {self.at['epoch']} epochs (--max-epoch)", 0)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, self.on_signal)
        seeds = np.random.SeedSequence((self.options.seed, self.at["starts"]))
        self.writer = SummaryWriter(self.path, purge_step=self.at["global_step"] + 1)
        self.feed = Feed(self.env_id, self.options, self.learner, seeds)
        with contextlib.closing(self.feed), self.writer:
            try:
                while self.at["epoch"] < self.options.max_epoch:
                    self.check()
                    self.run_epoch()
                    self.end_epoch()
            except Exception as error:
                self.log_file.write(f"{error}\n")
                if not isinstance(error, FloatingPointError) and (self.rows or self.unread):
                    self.save()
                raise

    def run_epoch(self) -> None:
        """The iterations of an epoch that are not done yet."""
        at, steps, epoch = self.at, self.options.steps_per_epoch, self.at["epoch"] + 1
        names = ("learning_rate", "entropy_beta")
        self.rates = {name: scheduled(getattr(self.options, name), epoch) for name in names}
        self.rows, self.shown, self.epoch_began = [], 0, time.monotonic()
        self.bar = tqdm(total=steps, initial=at["epoch_step"], disable=not sys.stderr.isatty())
        self.bar.set_description(f"epoch {epoch}")
        with self.bar:
            while at["epoch_step"] < steps:
                batch, versions = self.next_batch()
                lag = at["global_step"] - versions
                metrics = self.learner.update(batch, **self.rates)
                at["global_step"] += 1
                at["epoch_step"] += 1
                self.feed.publish(self.learner.network, at["global_step"])
                self.unread.append((metrics, [lag.mean(), lag.max(), len(self.feed.queue)]))
                self.bar.update()
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
        for step, (metrics, host) in enumerate(self.unread, first):
            self.rows.append(np.array([*metrics.tolist(), *host]))
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
        metrics["states_per_s"] = metrics["it_per_s"] * self.options.batch_size
        metrics["train_score"] = self.feed.mean_score()
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
        for name, value in metrics.items():
            if value is not None:
                self.writer.add_scalar(name, value, self.at["global_step"])

    def end_epoch(self) -> None:
        """Evaluate if it is time, and write down how the epoch went."""
        metrics = self.means(0, time.monotonic() - self.epoch_began)
        metrics |= {"mean_score": None, "max_score": None}
        epoch = self.at["epoch"] + 1
        self.at |= {"epoch": epoch, "epoch_step": 0}
        self.stats.append({"epoch_num": epoch, "global_step": self.at["global_step"]} | metrics)
        if epoch % EVAL_EPOCH == 0 or epoch == self.options.max_epoch:
            self.save()  # so that an end in the evaluation loses nothing
            metrics |= self.evaluate()
            self.stats[-1] |= metrics
        self.add_scalars(metrics)
        self.save()
        self.log(f"epoch {epoch} is done\n" + tabulate(self.stats[-1].items()))
        self.logged = time.monotonic()

    def evaluate(self) -> dict[str, float]:
        """Score the network, within EVAL_SHARE of the time of the run, and keep the best one."""
        from model import save_weights
        from predictor import score

        start = time.monotonic()
        seconds = EVAL_SHARE * (start - self.began) - self.at["evaluated_s"]
        seconds /= 1 - EVAL_SHARE  # evaluation is part of the time of the run
        episodes, seed = self.options.eval_episode, self.options.seed + self.at["epoch"]
        network, log = self.learner.network, lambda text: self.log(f"evaluation: {text}")
        log(f"{episodes} episodes in {seconds:.0f} s at most")
        done = score(self.env_id, network, episodes, seed, log, seconds, self.check)
        self.at["evaluated_s"] += time.monotonic() - start
        result, cut = summary(done), sum(not episode.finished for episode in done)
        log(f"mean {result['mean']:.2f}, {cut} of {len(done)} episodes cut short")
        mean = None if cut else result["mean"]  # what cut ones have so far says little
        best = self.at["best_score"]
        if best is None or (mean is not None and mean > best):
            self.at["best_score"] = mean
            self.write("model-best.npz", lambda file: save_weights(file, network))
        return {"mean_score": mean, "max_score": None if cut else result["max"]}


def load_for(env_id: str | None, path: str) -> tuple:
    """Game, network, and checkpoint ({} for an .npz) out of a file, which must fit the game."""
    actions = count_actions(env_id) if env_id else None
    import model

    network, saved = model.load(path)
    if saved and env_id not in (None, saved["env"]):
        raise UserError(f"{path} is a run of {saved['env']}, not of {env_id}", 2)
    env_id = env_id or saved["env"]
    n, actions = network.num_actions, actions or count_actions(env_id)
    if n != actions:
        raise UserError(f"{path} is for a game with {n} actions; {env_id} has {actions}")
    return env_id, network, saved


def task_train(given: dict) -> None:
    """--task train."""
    load, output, saved = given.pop("load", None), given.pop("output", None), {}
    env_id, gpu, kind = given.pop("env", None), given.pop("gpu", None), given.get("network")
    if load is not None:
        env_id, network, saved = load_for(env_id, load)
        if kind not in (None, network.kind):
            raise UserError(f"{load} holds the network {network.kind}, not {kind}")
    actions = count_actions(env_id)
    import torch

    import model

    device = find_device(gpu)
    chosen = {"seed": secrets.randbits(32)} | saved.get("options", {}) | given
    torch.manual_seed(chosen["seed"])
    if load is None:
        network = model.Network(kind or "ba3c", actions)
    chosen["network"] = network.kind
    path = os.path.join("train_log", "train-atari-" + re.sub(r"[^\w.-]", "-", env_id))
    if saved:
        saved["file"], path = os.path.abspath(load), os.path.dirname(load)
    Training(env_id, chosen, network, device, os.path.abspath(output or path), saved).run()


def task_eval(given: dict) -> None:
    """--task eval."""
    if "load" not in given:
        raise UserError("--task eval needs --load FILE", 2)
    start, seed = time.monotonic(), given.get("seed", secrets.randbits(32))
    env_id, network, _ = load_for(given.get("env"), given["load"])
    from predictor import score

    network.to(find_device(given.get("gpu")))
    episodes = score(env_id, network, given.get("episode", 100), seed, log=print)
    result = summary(episodes) | {"seconds": round(time.monotonic() - start, 1)}
    print(tabulate(result.items()))


TASKS = {"train": task_train, "eval": task_eval}


def main() -> int:
    """Run a task; returns the exit code."""
    parser = make_parser()
    given = vars(parser.parse_args())
    if "env" not in given and not given.get("load", "").endswith(".pt"):
        parser.error("--env is required")
    # Threads that wait should sleep: there are more of them here than cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda signum, frame: sys.exit(128 + signum))
    task = TASKS[given.pop("task")]
    try:
        task(given)
        return 0
    except KeyboardInterrupt:
        sentence, code = "interrupted", 130
    except (UserError, FloatingPointError, OSError) as error:
        sentence, code = str(error), getattr(error, "code", 1)
    print(f"{parser.prog}: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
