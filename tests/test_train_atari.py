"""The program as its users run it, with tiny numbers."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common import UserError
from model import load
from tests.helpers import CATCH, GAME, ROOT, TINY, processes, run, simulators, talking
from train_atari import (
    Progress,
    complete,
    find_devices,
    open_run,
    scheduled,
    scheduled_rates,
)

METRICS = {
    *("mean_score", "max_score", "policy_loss", "xentropy_loss", "value_loss", "predict_reward"),
    *("rms_advantage", "cost", "importance", "learning_rate", "entropy_beta", "policy_lag"),
    *("policy_lag_max", "it_per_s", "states_per_s", "queue_size", "train_score", "grad_norm"),
    *("train_episodes", "eval_episodes", "mean_model_score"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that learned to catch: its directory and what it printed."""
    path = tmp_path_factory.mktemp("catch") / "run"
    # Balls have nothing to do with each other: with 0.99 the returns are mostly noise.
    learning = ("--adam-epsilon", "1e-5", "--entropy-beta", "0.01,2:0.005", "--gamma", "0.9")
    learning += ("--learning-rate", "1e-3", "--warm-up", "50", "--anneal", "0", "--seed", "1")
    size = ("--batch-size", "64", "--steps-per-epoch", "150", "--max-epoch", "2")
    size += ("--simulator-proc", "2", "--players-per-simulator", "5", "--eval-episode", "8")
    done = run(*CATCH, *learning, *size, "--output", path)
    assert done.returncode == 0, done.stderr
    return path, done.stdout


def test_it_learns(trained):
    """A wrong sign, a lost reward or a mixed-up state would show here. Best is 5, random -3."""
    stats = json.loads((trained[0] / "stats.json").read_text())
    assert stats[-1]["train_score"] >= 3.5  # the mean of 100 episodes; five seeds had 4.3 to 4.9
    assert stats[-1]["mean_score"] >= 3  # of 8 episodes


def test_what_a_run_leaves(trained):
    path, output = trained
    names = {p.name for p in path.iterdir()}
    assert {"log.log", "stats.json", "config.json", "checkpoint.pt"} <= names
    assert {"model-latest.npz", "model-mean.npz", "model-best.npz"} <= names
    assert not [name for name in names if name.endswith(".tmp")]
    stats = json.loads((path / "stats.json").read_text())
    assert [epoch["epoch_num"] for epoch in stats] == [1, 2]
    assert [epoch["global_step"] for epoch in stats] == [150, 300]
    for epoch in stats:
        assert set(epoch) == METRICS | {"epoch_num", "global_step"}
        assert 0 < epoch["policy_lag"] <= 3 and epoch["policy_lag_max"] >= epoch["policy_lag"]
    assert [epoch["entropy_beta"] for epoch in stats] == [0.01, 0.005]
    assert [epoch["learning_rate"] for epoch in stats] == [1e-3, 1e-3]
    assert stats[0]["mean_score"] is stats[0]["eval_episodes"] is None
    assert stats[1]["max_score"] == 5 and stats[1]["eval_episodes"] == 8
    assert stats[1]["train_episodes"] == 100
    config = json.loads((path / "config.json").read_text())
    assert config["env"] == "tests.games:Catch-v0" and config["seed"] == 1
    assert config["versions"]["torch"] == torch.__version__
    events = EventAccumulator(str(path)).Reload()
    tags = set(events.Tags()["scalars"])
    assert tags | {"mean_model_score"} == METRICS  # that evaluation may have been cut short
    assert events.Scalars("mean_score")[-1].step == 300
    log = (path / "log.log").read_text()
    for text in ("3 actions", "685,364 parameters", "2 processes x 5 = 10", "9,600 states"):
        assert text in output and text in log
    assert load(str(path / "model-best.npz"))[0].num_actions == 3


def test_eval_repeats_itself_and_takes_both_kinds_of_files(trained):
    args = ("--task", "eval", "--env", "tests.games:Catch-v0", "--episode", 20, "--seed", 0)
    results = []
    for name in ("model-latest.npz", "model-latest.npz", "checkpoint.pt"):
        done = run(*args, "--load", trained[0] / name)
        assert done.returncode == 0, done.stderr
        table = dict(line.split() for line in done.stdout.splitlines() if len(line.split()) == 2)
        table = {k: float(v) for k, v in table.items() if re.match(r"\w", k)}
        del table["seconds"]
        results.append(table)
    assert results[0] == results[1] == results[2]
    assert results[0]["mean"] >= 3 and results[0]["episodes"] == 20
    assert results[0]["mean_length"] == 30 and results[0]["max"] == 5


def test_a_run_is_never_overwritten(trained):
    path, _ = trained
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    done = run(*CATCH, "--output", path)
    assert done.returncode == 2
    assert "holds a run" in done.stderr and "checkpoint.pt" in done.stderr
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before


def test_resume(tmp_path):
    path = tmp_path / "run"
    first = run(*CATCH, *TINY, "--max-epoch", 2, "--warm-up", 2000, "--anneal", 0, "--output", path)
    assert first.returncode == 0, first.stderr
    saved = load(str(path / "checkpoint.pt"))[1]
    assert saved["at"]["global_step"] == saved["learner"]["updates"] == 20
    resumed = run(*GAME, "--load", path / "checkpoint.pt", "--max-epoch", 3)
    assert resumed.returncode == 0, resumed.stderr
    assert "restored" in resumed.stdout and "20 iterations, 2 epochs" in resumed.stdout
    stats = json.loads((path / "stats.json").read_text())
    assert [epoch["epoch_num"] for epoch in stats] == [1, 2, 3]
    assert [epoch["global_step"] for epoch in stats] == [10, 20, 30]
    rates = [epoch["learning_rate"] for epoch in stats]  # it goes on to rise
    np.testing.assert_allclose(rates, [7e-4 * step / 2000 for step in (10, 20, 30)])
    assert stats[:2] == saved["stats"]
    again = load(str(path / "checkpoint.pt"))[1]
    assert again["learner"]["updates"] == 30 and again["options"]["batch_size"] == 16
    # Once more, elsewhere: the first run stays as it is.
    other = tmp_path / "other"
    done = run(*GAME, "--load", path / "checkpoint.pt", "--max-epoch", 4, "--output", other)
    assert done.returncode == 0, done.stderr
    assert len(json.loads((path / "stats.json").read_text())) == 3
    assert len(json.loads((other / "stats.json").read_text())) == 4


@pytest.mark.parametrize("bfloat16", [0, 1])
def test_new_run_from_weights(trained, tmp_path, bfloat16):
    path = tmp_path / "run"
    args = ("--env", "tests.games:Catch-v0", "--load", trained[0] / "model-best.npz")
    args += ("--bfloat16", bfloat16)  # weights are float32 all the same
    done = run(*args, *TINY, "--max-epoch", 1, "--learning-rate", "1e-12", "--output", path)
    assert done.returncode == 0, done.stderr
    stats = json.loads((path / "stats.json").read_text())
    assert stats[0]["global_step"] == 10  # a new run
    old, new = (load(str(p / "model-latest.npz"))[0] for p in (trained[0], path))
    best = load(str(trained[0] / "model-best.npz"))[0]
    for a, b in zip(best.parameters(), new.parameters(), strict=True):
        np.testing.assert_allclose(a.detach(), b.detach(), atol=1e-8)
    assert new.kind == old.kind == "a3c"
    for filters in new.filters():  # by default; they began so, and stayed so
        assert filters.mean((2, 3)).abs().max() < 1e-6 < 1e-2 < filters.std()


def test_the_large_network_says_on_a_cpu_what_to_expect(tmp_path):
    done = run("--env", "tests.games:Catch-v0", *TINY, "--max-epoch", 1, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--network a3c is several times faster" in done.stdout
    rate, hours = re.search(r"about (\d+) states/s, (\S+) hours per epoch", done.stdout).groups()
    o = json.loads((tmp_path / "config.json").read_text())
    states = o["steps_per_epoch"] * o["batch_size"]
    assert float(hours) == pytest.approx(states / float(rate) / 3600, rel=0.1)


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_leaves_nothing(tmp_path, signum, code):
    sockets = tmp_path / "t"
    sockets.mkdir()
    args = (*CATCH, "--batch-size", 16, "--output", tmp_path / "run")
    process = subprocess.Popen(
        talking(*args),
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(sockets)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = ""
    while not re.search(r"epoch 1 \d+/6000", line):
        line = process.stdout.readline()
        assert line, process.stderr.read()
    assert re.search(r"/6000: \S+ it/s, \S+ states/s, score \S+, queue \S+, lag \S+$", line)
    assert simulators(sockets) and list(sockets.glob("batch-a3c-*"))
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors.count("\n") == 1 and f"stopped by {signum.name}" in errors
    assert not processes(sockets) and not list(sockets.glob("batch-a3c-*"))
    steps = load(str(tmp_path / "run" / "checkpoint.pt"))[1]["at"]["global_step"]
    assert steps > 0
    # The run goes on in the middle of its epoch.
    at = (*GAME, "--load", tmp_path / "run" / "checkpoint.pt", "--steps-per-epoch", steps + 5)
    done = run(*at, "--max-epoch", 1, "--eval-episode", 1)
    assert done.returncode == 0, done.stderr
    stats = json.loads((tmp_path / "run" / "stats.json").read_text())
    assert stats[0]["global_step"] == steps + 5


def test_an_error_in_a_simulator_ends_the_run(tmp_path):
    sockets = tmp_path / "t"
    sockets.mkdir()
    args = ("--env", "tests.games:Crash-v0", "--network", "a3c", "--output", tmp_path / "run")
    done = run(*args, "--batch-size", 16, TMPDIR=sockets)
    assert done.returncode == 1
    assert re.search(r"simulator \d+ ended with code 1.*the game broke\n$", done.stderr)
    assert done.stderr.count("\n") == 1
    assert not processes(sockets) and not list(sockets.glob("batch-a3c-*"))


@pytest.mark.parametrize(
    "args, code, text",
    [
        ((), 2, "--env is required"),
        (("--env", "Brekout-v0"), 2, "nearest names: Breakout-v0"),
        (("--task", "play"), 2, "--env is required"),
        (("--task", "play", "--env", "Freeway-v0"), 2, "there is no agent for Freeway-v0 in"),
        (("--load", "mine.npz"), 1, "there is no file mine.npz"),
        (("--config", "nowhere.json"), 2, "it has no nowhere.json"),
        (("--config", __file__), 2, "is damaged"),
        (("--env", "Pong-v0", "--track"), 2, "pip install wandb"),
        (("--env", "CartPole-v1"), 2, "no game with RGB frames"),
        (("--env", "Pong-v0", "--gpu", "99"), 2, "CUDA device"),
        (("--env", "Pong-v0", "--gpu", "0,0"), 2, "invalid gpus value: '0,0'"),
        (("--env", "Pong-v0", "--simulator-proc", "0"), 2, "simulator-proc"),
        (("--env", "Pong-v0", "--batch-size", "-1"), 2, "batch-size"),
        (("--env", "Pong-v0", "--gamma", "nan"), 2, "invalid fraction value: 'nan'"),
        (("--env", "Pong-v0", "--gamma", "1.5"), 2, "invalid fraction value: '1.5'"),
        (("--env", "Pong-v0", "--ranks", str(2**32 - 1)), 2, "invalid rank_count value"),
        (("--env", "Pong-v0", "--key", "key"), 2, "--key is for --listen ADDRESS"),
        (("--env", "Pong-v0", "--seed", "-1"), 2, "seed"),
        (("--env", "Pong-v0", "--seed", str(2**70)), 2, "seed"),
        (("--env", "Pong-v0", "--players-per-simulator", "50000000"), 2, "GB of memory"),
        (("--env", "Pong-v0", "--batch-size", "100000000"), 2, "GB of memory"),
        (("--env", "Pong-v0", "--load", ""), 1, "there is no file"),
        (("--env", "Pong-v0", "--learning-rate", "1e-3,x"), 2, "learning-rate"),
        (("--env", "Pong-v0", "--center-filters", "2"), 2, "invalid switch value: '2'"),
        (("--env", "Pong-v0", "--predict-batch-size", "1000"), 2, "can never fill"),
        (("--env", "Pong-v0", "--batch-size", "500", "--queue-size", "400"), 2, "can never fill"),
        (("--env", "Pong-v0", "--network", "big"), 2, "invalid choice"),
        (("--env", "Pong-v0", "--load", "nowhere.npz"), 1, "there is no file nowhere.npz"),
        (("--load", "nowhere.pt"), 1, "there is no file nowhere.pt"),
        (("--env", "Pong-v0", "--output", "/dev/null/run"), 2, "cannot write"),
        (("--env", "Pong-v0", "--output", __file__), 2, "cannot write"),
        (("--env", "Pong-v0", "--output", "\udcff"), 2, "needs a name in UTF-8"),
    ],
)
def test_bad_input_gets_one_sentence(tmp_path, args, code, text):
    done = run(*args, cwd=tmp_path)
    assert done.returncode == code
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("usage", " "))]
    assert len(lines) == 1 and text in lines[0]
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, value, code, text",
    [
        ("RANK", "", 2, "RANK is '' in the environment, which is no such number"),
        ("LOCAL_WORLD_SIZE", "0", 2, "LOCAL_WORLD_SIZE is '0' in the environment"),
        ("MASTER_PORT", "70000", 2, "MASTER_PORT is 70000 in the environment, which is no port"),
        ("WORLD_SIZE", None, 1, "rank 0 cannot join the others: WORLD_SIZE is not set"),
    ],
)
def test_a_rank_without_the_others_gets_one_sentence(tmp_path, name, value, code, text):
    world = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    world[name] = value
    world = {name: value for name, value in world.items() if value is not None}
    done = run(*CATCH, "--output", tmp_path / "run", **world)
    assert done.returncode == code
    assert len(done.stderr.splitlines()) == 1 and text in done.stderr


def test_a_program_that_is_no_rank_is_alone_whatever_else_the_environment_says(tmp_path):
    output = tmp_path / "run"
    args = (*CATCH, *TINY, "--max-epoch", 1, "--output", output)
    done = run(*args, LOCAL_WORLD_SIZE="2", LOCAL_RANK="1")
    assert done.returncode == 0 and done.stderr == ""
    assert "2 processes x" in done.stdout
    assert json.loads((output / "config.json").read_text())["simulator_proc_of_a_rank"] == 2


def test_weights_that_do_not_fit(trained, tmp_path):
    weights = trained[0] / "model-best.npz"
    for task in ("train", "eval"):
        done = run("--task", task, "--env", "Breakout-v0", "--load", weights, cwd=tmp_path)
        assert done.returncode == 1
        assert "3 actions" in done.stderr and "Breakout-v0 has 4" in done.stderr
    args = ("--env", "tests.games:Catch-v0", "--load", weights, "--network", "ba3c")
    done = run(*args, "--output", tmp_path / "run")
    assert done.returncode == 1 and "holds the network a3c, not ba3c" in done.stderr
    done = run("--env", "Pong-v0", "--load", trained[0] / "checkpoint.pt", cwd=tmp_path)
    assert done.returncode == 2 and "Catch-v0, not of Pong-v0" in done.stderr
    assert not list(tmp_path.iterdir())


def test_help_is_quick_and_complete():
    code = "import sys, train_atari; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
    done = run("--help")
    assert done.returncode == 0
    for text in ("--task eval", "--env Breakout-v0 --gpu 0", "default 128", "is refused", "130"):
        assert text in re.sub(r"\s+", " ", done.stdout), text
    for option in ("simulator-proc", "predict-batch-size", "predictor-thread-per-gpu", "gamma"):
        assert f"--{option}" in done.stdout


def test_where_no_socket_can_be(tmp_path):
    deep = tmp_path / ("x" * 120)
    deep.mkdir()
    not_in_utf8 = tmp_path / "\udcff"
    not_in_utf8.mkdir()
    for path in (deep, not_in_utf8):
        done = run(*CATCH, "--output", tmp_path / "run", TMPDIR=path)
        assert done.returncode == 1 and "cannot listen on ipc" in done.stderr
        assert not list(path.glob("batch-a3c-*"))
        shutil.rmtree(tmp_path / "run")


def test_a_gpu_for_which_the_driver_is_too_old_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_devices(None, None) == [torch.device("cpu")]
    with pytest.raises(UserError, match="no CUDA device, only the CPU"):
        find_devices("0", None)


def test_any_number_of_cores_and_players(monkeypatch):
    sizes = ((2, 6, 4), (2, 48, 1), (16, 8, 6), (16, 100, 1), (64, 1, 48))
    for cores, players, simulator_proc in sizes:
        monkeypatch.setattr("train_atari.count_cores", lambda cores=cores: cores)
        o = complete({"players_per_simulator": players}, on_cpu=True)
        assert o.simulator_proc == simulator_proc


def test_where_a_file_system_knows_no_locks(tmp_path, monkeypatch):
    """As Lustre often does; for every other reason there is a sentence."""
    log_file = open_run(str(tmp_path), is_resumed=False)
    with log_file, pytest.raises(UserError, match="another process is training"):
        open_run(str(tmp_path), is_resumed=False)

    def fail(number):
        def flock(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("fcntl.flock", flock)

    for number in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
        fail(number)
        with open_run(str(tmp_path), is_resumed=False) as log_file:
            log_file.write("a line")
    fail(errno.EIO)
    with pytest.raises(UserError, match="Input/output error"):
        open_run(str(tmp_path), is_resumed=False)


def test_schedules():
    text = "1e-3,20:3e-4,120:1e-4"
    values = [scheduled(text, epoch) for epoch in (1, 19, 20, 119, 120, 1000)]
    assert values == [1e-3, 1e-3, 3e-4, 3e-4, 1e-4, 1e-4]


def test_rates_may_fall_to_0_over_the_run():
    chosen = {"learning_rate": "1e-3,3:2e-3", "entropy_beta": "0.01", "steps_per_epoch": 10}
    chosen |= {"max_epoch": 4, "warm_up": 4}

    def rates(epoch, epoch_step, anneal):
        at = Progress(epoch=epoch, epoch_step=epoch_step, global_step=10 * epoch + epoch_step)
        return scheduled_rates(complete(chosen | {"anneal": anneal}, on_cpu=False), at)

    assert rates(1, 5, 0) == {"learning_rate": 1e-3, "entropy_beta": 0.01}
    assert rates(3, 9, 0) == {"learning_rate": 2e-3, "entropy_beta": 0.01}
    assert rates(0, 1, 0)["learning_rate"] == pytest.approx(0.5e-3)  # of four warm-up iterations
    for epoch, epoch_step, left in ((1, 0, 0.75), (1, 5, 0.625), (3, 9, 0.025)):
        plain, annealed = (rates(epoch, epoch_step, anneal) for anneal in (0, 1))
        for name, value in plain.items():
            assert annealed[name] == pytest.approx(left * value)


def test_defaults_on_a_gpu_are_the_originals():
    o = complete({}, on_cpu=False)
    assert (o.simulator_proc, o.players_per_simulator) == (50, 1)
    assert (o.predict_batch_size, o.predictor_thread_per_gpu) == (15, 3)
    assert (o.batch_size, o.local_time_max, o.gamma, o.adam_epsilon) == (128, 5, 0.99, 1e-3)
    assert (o.learning_rate, o.warm_up) == ("1e-3,20:3e-4,120:1e-4", 0)
    assert (o.steps_per_epoch, o.max_epoch, o.eval_episode) == (6000, 1000, 50)
    small = complete({"network": "a3c", "learning_rate": "1e-3"}, on_cpu=False)
    assert (small.adam_epsilon, small.learning_rate, small.warm_up) == (1e-5, "1e-3", 0)
    assert (o.center_filters, small.center_filters) == (0, 1)
    assert (vars(o)["lambda"], o.life_loss, o.anneal) == (1, 0, 0)


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("players", [1, 5, 100])
def test_defaults_of_the_small_network_keep_the_policy_lag_low(monkeypatch, on_cpu, players):
    """Its longer segments wait longer, so that there are fewer players."""
    monkeypatch.setattr("train_atari.count_cores", lambda: 2)
    chosen = {"network": "a3c"} | ({} if players == 1 else {"players_per_simulator": players})
    o = complete(chosen, on_cpu)
    assert (vars(o)["lambda"], o.local_time_max, o.life_loss, o.anneal) == (0.9, 20, 1, 1)
    assert o.simulator_proc * o.players_per_simulator == max(20, players)
    assert o.predict_batch_size <= max(15, players / 2)
    # A batch that is smaller than a segment would never be full of finished ones.
    assert complete(chosen | {"batch_size": 16, "queue_size": 16}, on_cpu).local_time_max == 15


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("network", ["ba3c", "a3c"])
@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"local_time_max": 20},
        {"local_time_max": 60},
        {"batch_size": 32},
        {"batch_size": 512},
        {"batch_size": 64, "local_time_max": 10, "players_per_simulator": 2},
    ],
)
def test_defaults_keep_the_policy_lag_low_whatever_changes_it(monkeypatch, network, on_cpu, chosen):
    monkeypatch.setattr("train_atari.count_cores", lambda: 2)
    o = complete({"network": network} | chosen, on_cpu)
    players = o.simulator_proc * o.players_per_simulator
    assert 2 <= players <= (48 if on_cpu else 50 * o.players_per_simulator)
    assert (players * (o.local_time_max + 3) / 2 + o.queue_size) / o.batch_size <= 2.8


def test_a_long_queue_has_its_lag_by_choice(monkeypatch):
    monkeypatch.setattr("train_atari.count_cores", lambda: 2)
    o = complete({"queue_size": 2048}, on_cpu=True)
    assert o.simulator_proc * o.players_per_simulator == 48


def test_what_a_user_chooses_is_not_changed():
    fast = {"simulator_proc": 240, "predict_batch_size": 30, "predictor_thread_per_gpu": 6}
    assert vars(complete(fast, on_cpu=False)).items() >= fast.items()
