#!/usr/bin/env python3
"""What this machine can do, what the program makes of it, and where the time goes.

  limits    each part alone: players, predictions, updates; and the bound that they imply
  pipeline  everything but the network: on the real game, and on frames that cost nothing
  train     end to end, beside the bound measured in the same run
  ranks     two ranks beside one, a simulated GPU each, on frames that cost nothing
  capacity  what machines should reach and what binds, computed from costs measured here

    python tests/benchmark.py train --network a3c --seconds 60
    python tests/benchmark.py train --simulate-gpu 1.5 4   # this machine with a GPU of that speed
    python tests/benchmark.py pipeline --simulator-proc 4  # with any option of train_atari.py

`limits` and `train` use the GPU if there is one and no `--ranks 1` says otherwise. Figures are
medians of --repeat runs; run it on an idle machine (Linux; CPU times come from /proc).
core-us is microseconds of one core, for one state.
"""

import argparse
import concurrent.futures
import contextlib
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tabulate import tabulate  # noqa: E402

import model  # noqa: E402
import predictor  # noqa: E402
from common import Player, count_cores, describe, make_env  # noqa: E402
from train_atari import complete, find_devices, make_parser  # noqa: E402

RECORDED = "tests.games:Recorded-v0"
CORES = count_cores()


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used, by the clock of the scheduler."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def tree_seconds(pid: int) -> float:
    """CPU time of all threads of a process."""
    with contextlib.suppress(FileNotFoundError):
        return sum(cpu_seconds(f"{pid}/task/{t.name}") for t in Path(f"/proc/{pid}/task").iterdir())
    return 0.0


def rate(work, states: int, seconds: float) -> float:
    """States per second of a function that handles `states` of them, on one thread."""
    work()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        work()
        count += states
    return count / (time.perf_counter() - start)


def player_rate(o, env_id: str, seconds: float) -> float:
    """Steps per second of a bare player."""
    player, rng = Player(make_env(env_id)), random.Random(0)
    player.reset(seed=0)

    def step():
        _, _, terminated, truncated, _ = player.step(rng.randrange(player.num_actions))
        if terminated or truncated:
            player.reset()

    return rate(step, 1, seconds)


def forward_rate(o, env_id: str, seconds: float) -> float:
    """Predictions per second on one thread."""
    import torch

    torch.set_num_threads(1)
    network = model.Network(o.network, describe(env_id).num_actions)
    size = (o.predict_batch_size, *model.STATE_SHAPE)
    states = torch.randint(0, 256, size, dtype=torch.uint8)
    if o.device.type == "cuda":  # with the way to the GPU and back
        torch.cuda.set_device(o.device)
        torch.set_float32_matmul_precision("high")
        replica = predictor.Replica(network.to(o.device), len(states), o.bfloat16)
        return rate(lambda: replica.predict([states.numpy()]), len(states), seconds)
    network = model.in_bfloat16(network) if o.bfloat16 else network
    with torch.inference_mode():
        return rate(lambda: network(states), len(states), seconds)


def train_rate(o, env_id: str, seconds: float) -> float:
    """States per second of updates on one thread."""
    import torch

    frames = torch.randint(0, 256, (4 * o.batch_size, *model.FRAME_SHAPE), dtype=torch.uint8)
    ones = torch.ones(o.batch_size)
    batch = model.Batch(frames, torch.arange(3, 4 * o.batch_size, 4), ones.long(), ones, ones)
    if o.device.type == "cuda":
        torch.cuda.set_device(o.device)
        batch = model.Batch(*(column.pin_memory() for column in batch))
    network = model.Network(o.network, describe(env_id).num_actions)
    learner = model.Learner(network, o.device, 1e-3, threads=1, bfloat16=o.bfloat16)
    return rate(lambda: learner.update(batch, 1e-4, 0.01, (0.0,)), o.batch_size, seconds)


PARTS = {"player": player_rate, "forward": forward_rate, "train": train_rate}


def alone(part: str, o, env_id: str, seconds: float, processes: int = 1) -> float:
    """States per second of one part in each of so many processes at once: their mean."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, spawn) as pool:
        # A first short time, so that all of them have started when they are measured.
        for time_of_each in (0.5, seconds):
            work = [(o, env_id, time_of_each)] * processes
            rates = list(pool.map(PARTS[part], *zip(*work, strict=True)))
    return float(np.mean(rates))


def parts_alone(o, env_id: str, seconds: float) -> dict[str, float]:
    """States per second of each part on one core, and the bounds that they imply for all cores.

    Once with the other cores idle, once with the same on each of them: cores share memory and
    caches, and are often halves of one. On a GPU one thread at a time predicts and trains, and
    either it binds or the players do.
    """
    result = {}
    if o.device.type == "cuda":
        result["player (all busy)"] = alone("player", o, env_id, seconds, CORES)
        for part in ("forward", "train"):
            result[part] = alone(part, o, env_id, seconds)
        result["bound of the cores"] = CORES * result["player (all busy)"]
        result["bound of the GPU"] = 1 / (1 / result["forward"] + 1 / result["train"])
        result["bound"] = min(result["bound of the cores"], result["bound of the GPU"])
        return result
    for processes, others in ((1, ""), (CORES, " (all busy)")):
        rates = {part: alone(part, o, env_id, seconds, processes) for part in PARTS}
        result |= {part + others: states_per_s for part, states_per_s in rates.items()}
        bound = CORES / sum(1 / states_per_s for states_per_s in rates.values())
        result["bound" + others] = bound
    return result


class Instant:
    """A network that costs nothing: with a simulated GPU it waits as long as that would compute."""

    def __new__(cls, num_actions: int, forward_ms: float, gpu: threading.Lock):
        import torch

        class Module(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.zeros(1))

            def __deepcopy__(self, memo):
                return self

            def forward(self, states):
                if forward_ms:
                    with gpu:
                        time.sleep(forward_ms / 1e3)
                return torch.zeros(len(states), num_actions), torch.zeros(len(states))

        return Module()


class Waiter:
    """A learner that waits as long as a GPU would compute, and then for the other ranks."""

    def __init__(self, network, train_ms: float, gpu: threading.Lock):
        import torch

        self.network, self.device, self.updates = network, torch.device("cpu"), 0
        self.train_ms, self.gpu = train_ms, gpu
        self.gradient = torch.zeros(700_000)  # of the small network

    def update(self, batch, **rates):
        """Wait."""
        import torch

        if self.train_ms:
            with self.gpu:
                time.sleep(self.train_ms / 1e3)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.gradient)


def timed(owner, name: str, spent: dict[str, float]):
    """Count the CPU time of a function's thread in `spent`; returns what undoes it."""
    function = getattr(owner, name)

    def wrapper(*args, **kwargs):
        start = time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] += time.thread_time() - start

    setattr(owner, name, wrapper)
    return lambda: setattr(owner, name, function)


def feed_and_train(o, env_id: str, seconds: float, gpu_ms: tuple | None, train: bool) -> dict:
    """Run feed and trainer as a run does, for `seconds` after they have warmed up.

    gpu_ms: (forward, train) milliseconds of a simulated GPU, None for the real network.
    """
    num_actions = describe(env_id).num_actions
    if gpu_ms is None:
        network = model.Network(o.network, num_actions)
        learner = model.Learner(network, o.device, 1e-3, CORES, bfloat16=o.bfloat16)
    else:
        gpu = threading.Lock()
        learner = Waiter(Instant(num_actions, gpu_ms[0], gpu), gpu_ms[1] if train else 0, gpu)
    spent = dict.fromkeys(("predict", "answer"), 0.0)
    real = predictor.Replica.predict
    if gpu_ms == (0, 0):  # nothing of torch either
        rows = o.predict_batch_size + o.players_per_simulator
        policy = np.full((rows, num_actions), 1 / num_actions, np.float32)
        predictor.Replica.predict = lambda replica, parts: (
            policy[: sum(map(len, parts))],
            policy[: sum(map(len, parts)), 0],
        )
    undo = [timed(predictor.Replica, "predict", spent), timed(predictor.Predictor, "answer", spent)]
    feed = predictor.Feed(env_id, o, learner, np.random.SeedSequence(0))
    pids: list[int] = []
    states, lags, begin = 0, [], None
    try:
        warm = time.monotonic() + 600
        while begin is None or time.monotonic() < begin[0] + seconds:
            if (got := feed.queue.get(timeout=0.5)) is None:
                feed.replace_ended()
                continue
            if begin is None and feed.pool.connected == o.simulator_proc:
                warm = min(warm, time.monotonic() + 3)
                if time.monotonic() >= warm or seconds < 1:
                    feed.replace_ended()
                    pids = [slot.process.pid for slot in feed.pool.slots]
                    cpu = time.process_time(), sum(map(tree_seconds, pids))
                    begin = (time.monotonic(), *cpu, dict(spent))
                    states, lags = 0, []
            batch, versions = got
            lag = learner.updates - versions
            try:
                learner.update(batch, learning_rate=1e-5, entropy_beta=0.01)
            except RuntimeError:  # another rank's time was over
                break
            if gpu_ms is not None:
                learner.updates += 1
            feed.publish(learner.network, learner.updates)
            lags.append((lag.mean(), lag.max()))
            states += len(versions)
        wall = time.monotonic() - begin[0]
        main = time.process_time() - begin[1]
        simulators = sum(map(tree_seconds, pids)) - begin[2]
        parts = {name: spent[name] - begin[3][name] for name in spent}
    finally:
        feed.close()
        for restore in undo:
            restore()
        predictor.Replica.predict = real
    us = 1e6 / states
    return {
        "states/s": states / wall,
        "it/s": states / wall / o.batch_size,
        "lag mean": float(np.mean([mean for mean, _ in lags])),
        "lag max": int(max(most for _, most in lags)),
        "core-us main": main * us,
        "core-us simulators": simulators * us,
        "core-us predict": parts["predict"] * us,
        "core-us transport and rollouts": (parts["answer"] - parts["predict"]) * us,
        "core-us train": (main - parts["answer"]) * us,
        "core-us waiting": (CORES * wall - main - simulators) * us,
    }


def median(rows: list[dict]) -> dict:
    """The median of each figure over repeated runs."""
    return {name: float(np.median([row[name] for row in rows])) for name in rows[0]}


def show(title: str, figures: dict) -> None:
    """A table."""
    print(f"\n{title}")
    print(tabulate([(name, f"{value:,.2f}") for name, value in figures.items()]), flush=True)


def limits(args, o, env_id: str) -> None:
    """Each part alone."""
    one = median([parts_alone(o, env_id, args.seconds) for _ in range(args.repeat)])
    show(f"{env_id}, {o.network}: states/s on one core, bounds for {CORES}", one)


def pipeline(args, o, env_id: str) -> None:
    """Everything but the network."""
    for game in (env_id, RECORDED):
        rows = []
        for _ in range(args.repeat):
            row = {"players alone/s": CORES * alone("player", o, game, args.seconds, CORES)}
            row |= feed_and_train(o, game, args.seconds, args.simulate_gpu or (0, 0), train=False)
            row["share of players alone"] = row["states/s"] / row["players alone/s"]
            bare = 1e6 * CORES / row["players alone/s"]
            row["core-us simulators above player"] = row["core-us simulators"] - bare
            rows.append(row)
        drop = ("lag mean", "lag max", "core-us train")
        show(f"pipeline, {game}", {k: v for k, v in median(rows).items() if k not in drop})


def train(args, o, env_id: str) -> None:
    """End to end."""
    rows = []
    for _ in range(args.repeat):
        row = {} if args.simulate_gpu else parts_alone(o, env_id, args.seconds / 6)
        row |= feed_and_train(o, env_id, args.seconds, args.simulate_gpu, train=True)
        if "bound" in row:
            row["share of the bound"] = row["states/s"] / row["bound"]
            if "bound (all busy)" in row:
                row["share (all busy)"] = row["states/s"] / row["bound (all busy)"]
        rows.append(row)
    show(f"train, {env_id}, {'simulated GPU' if args.simulate_gpu else o.network}", median(rows))


def as_rank(rank: int, count: int, directory: str, o, seconds: float, gpu_ms: tuple) -> None:
    """Measure one of `count` ranks."""
    import torch

    if count > 1:
        rendezvous = f"file://{directory}/{count}"
        torch.distributed.init_process_group(
            "gloo", init_method=rendezvous, rank=rank, world_size=count
        )
    row = feed_and_train(o, RECORDED, seconds, gpu_ms, train=True)
    Path(directory, f"{count}.{rank}").write_text(str(row["states/s"]))


def ranks(args, o, env_id: str) -> None:
    """Two ranks beside one."""
    import torch

    rows, gpu_ms = [], args.simulate_gpu or (5.0, 20.0)
    for _ in range(args.repeat):
        row = {}
        for count in (1, 2):
            with tempfile.TemporaryDirectory() as directory:
                work = (count, directory, o, args.seconds, gpu_ms)
                torch.multiprocessing.spawn(as_rank, work, nprocs=count)
                rates = [float(p.read_text()) for p in Path(directory).glob(f"{count}.*")]
            row[f"states/s of {count}"] = sum(rates)
        rows.append(row | {"ratio": row["states/s of 2"] / row["states/s of 1"]})
    show(f"ranks, a GPU of {gpu_ms} ms each", median(rows))


def capacity(args, o, env_id: str) -> None:
    """What machines should reach."""
    parts = median([parts_alone(o, env_id, args.seconds) for _ in range(args.repeat)])
    runs = [feed_and_train(o, env_id, args.seconds, (0, 0), False) for _ in range(args.repeat)]
    flow = median(runs)
    main, simulators = flow["core-us main"] / 1e6, flow["core-us simulators"] / 1e6
    network = 1 / parts["forward (all busy)"] + 1 / parts["train (all busy)"]
    rows = []
    for cores in (2, 4, 8, 16, 32, 64):
        rows.append((cores, "-", cores / (main + simulators + network), "cores"))
        for gpus in (1, 2, 4, 8) if args.simulate_gpu else ():
            forward, update = (ms / 1e3 for ms in args.simulate_gpu)
            bounds = {
                "cores": cores / (main + simulators),
                "GPU": gpus / (forward / o.predict_batch_size + update / o.batch_size),
                "main process": gpus / main,  # Python runs on one core at a time, a rank per GPU
            }
            binds = min(bounds, key=bounds.get)
            rows.append((cores, gpus, bounds[binds], binds))
    costs = {"simulator": simulators, "main process": main, "network on a core": network}
    text = ", ".join(f"{name} {seconds * 1e6:.0f}" for name, seconds in costs.items())
    print(f"\n{env_id}, {o.network}, core-us per state: {text}; GPU ms: {args.simulate_gpu}")
    print(tabulate(rows, ("cores", "GPUs", "states/s", "what binds"), floatfmt=",.0f"))


def main() -> None:
    """Run one of the benchmarks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    import torch

    parser.add_argument("what", choices=("limits", "pipeline", "train", "ranks", "capacity"))
    parser.add_argument("--seconds", type=float, default=20, help="of each measurement")
    parser.add_argument("--repeat", type=int, default=3, help="runs; figures are their medians")
    text = "a GPU that takes so long for a prediction and for an update"
    metavar = ("FORWARD_MS", "TRAIN_MS")
    parser.add_argument("--simulate-gpu", nargs=2, type=float, metavar=metavar, help=text)
    args, rest = parser.parse_known_args()
    given = vars(make_parser().parse_args(["--env", "Breakout-v0", *rest]))
    env_id, network = given.pop("env"), given.get("network", "ba3c")
    del given["task"]
    device = find_devices(given.pop("gpu", None), given.pop("ranks", None))[0]
    if args.what in ("ranks", "capacity") or args.simulate_gpu:
        device = torch.device("cpu")
    o = complete(given | {"network": network}, device.type == "cpu")
    o.device = device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    figures = f"{o.simulator_proc} simulators x {o.players_per_simulator} players"
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    print(
        f"{CORES} cores, {place}, {figures}, {o.predictor_thread_per_gpu} predictors for up to "
        f"{o.predict_batch_size} states, queue {o.queue_size}"
    )
    functions = (limits, pipeline, train, ranks, capacity)
    {function.__name__: function for function in functions}[args.what](args, o, env_id)


if __name__ == "__main__":
    main()
