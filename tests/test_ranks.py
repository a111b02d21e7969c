"""Several ranks that train as one."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from common import UserError
from model import Batch, DivergedError, Learner, Network, load
from tests.helpers import (
    CATCH,
    FINE,
    GAME,
    ROOT,
    TINY,
    command,
    gone,
    processes,
    run,
    run_apart,
    talking,
)
from train_atari import Ranks, check_listening, choose_devices, share_simulators


def random_batch(seed, size):
    rng = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (4 * size, 84, 84, 3), dtype=torch.uint8, generator=rng)
    newest = torch.arange(3, 4 * size, 4)
    actions = torch.randint(0, 4, (size,), generator=rng)
    probs, rewards = torch.rand(2, size, generator=rng)
    return Batch(frames, newest, actions, probs * 0.9 + 0.1, rewards * 4 - 2)


def as_rank(rank, path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=2
    )
    torch.manual_seed(rank)  # ranks begin with different weights, and take those of rank 0
    for kind in ("ba3c", "a3c"):
        learner = Learner(Network(kind, 4), torch.device("cpu"), 1e-3, threads=1)
        learner.share({})
        for step in range(3):
            metrics = learner.update(random_batch(10 * step + rank, 16), 1e-3, 0.01, (rank,))
        learner.check_ranks()
        weights = torch.cat([p.detach().reshape(-1) for p in learner.parameters])
        torch.save((weights, metrics), f"{path}/{kind}{rank}.pt")
        with torch.no_grad():
            learner.parameters[3][0] += rank * 1e-6
        with pytest.raises(DivergedError, match="different weights"):
            learner.check_ranks()
    torch.distributed.destroy_process_group()


def test_two_ranks_make_the_update_of_one_with_both_batches(tmp_path):
    torch.multiprocessing.spawn(as_rank, (str(tmp_path),), nprocs=2)
    for kind in ("ba3c", "a3c"):
        torch.manual_seed(0)
        learner = Learner(Network(kind, 4), torch.device("cpu"), 1e-3, threads=1)
        if kind == "a3c":  # what rank 0 drew before
            torch.manual_seed(0)
            Network("ba3c", 4)
            learner = Learner(Network(kind, 4), torch.device("cpu"), 1e-3, threads=1)
        for step in range(3):
            pair = [random_batch(10 * step + rank, 16) for rank in (0, 1)]
            pair[1] = pair[1]._replace(newest=pair[1].newest + len(pair[0].frames))
            both = Batch(*(torch.cat(column) for column in zip(*pair, strict=True)))
            metrics = learner.update(both, 1e-3, 0.01, (0.5,))
        expected = torch.cat([p.detach().reshape(-1) for p in learner.parameters])
        results = [torch.load(tmp_path / f"{kind}{rank}.pt") for rank in (0, 1)]
        assert torch.equal(results[0][0], results[1][0])
        np.testing.assert_allclose(results[0][0], expected, rtol=0, atol=1e-6)
        # Sums over a batch are means over the ranks; everything else is as of one batch.
        got = results[0][1].clone()
        got[:3] *= 2
        np.testing.assert_allclose(got, metrics, rtol=1e-4, atol=1e-5)


def test_ranks_train_resume_and_change_their_number(tmp_path):
    path = tmp_path / "run"
    done = run_apart(*CATCH, *TINY, "--max-epoch", 2, "--ranks", 2, "--output", path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"ranks +2, each", done.stdout)
    assert done.stdout.count("epoch 2 is done") == 1
    stats = json.loads((path / "stats.json").read_text())
    assert [epoch["global_step"] for epoch in stats] == [10, 20]
    assert stats[-1]["policy_lag"] > 0 and stats[-1]["mean_score"] is not None
    before = ("seed", "ranks", "gpu", "devices", "simulator_proc", "simulator_proc_of_a_rank")
    config = json.loads((path / "config.json").read_text())
    assert (config["ranks"], config["gpu"], config["devices"]) == (2, None, ["cpu", "cpu"])
    assert config["simulator_proc"] == 2 * config["simulator_proc_of_a_rank"]
    # It has the same ranks as before, unless it is told otherwise, which it says in one line.
    done = run_apart(*GAME, "--load", path / "checkpoint.pt", "--max-epoch", 3)
    assert done.returncode == 0, done.stderr
    assert re.search(r"ranks +2, each", done.stdout) and "otherwise" not in done.stdout
    resumed = json.loads((path / "config.json").read_text())
    assert [resumed[name] for name in before] == [config[name] for name in before]
    done = run(*GAME, "--load", path / "checkpoint.pt", "--max-epoch", 4, "--ranks", 1)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "differs from before" in line]
    assert line.endswith("1 rank on the CPU instead of 2 ranks on the CPU")
    assert json.loads((path / "config.json").read_text())["devices"] == ["cpu"]
    assert load(str(path / "checkpoint.pt"))[1]["learner"]["updates"] == 40


def test_bad_input_gets_one_sentence_before_ranks_start(tmp_path, monkeypatch):
    monkeypatch.setattr("train_atari.launch", lambda *_: 1 / 0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stats.json").write_text("[]")
    for args, text in (
        (("--output", tmp_path / "run"), "holds a run (stats.json)"),
        (("--output", tmp_path / "new", "--queue-size", 10), "can never fill a batch"),
        (("--output", tmp_path / "new", "--simulator-proc", 5), "take 4 or 6"),
    ):
        done = run(*CATCH, "--ranks", 2, *args)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert text in line
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("engine", ["script", "torchrun"])
@pytest.mark.parametrize("victim", ["rank 1", "interrupt", "all", "launcher"])
def test_the_end_of_one_is_the_end_of_all(tmp_path, engine, victim):
    if engine == "torchrun" and victim == "launcher":
        pytest.skip("torchrun itself leaves its workers when it is killed")
    sockets = tmp_path / "t"
    sockets.mkdir()
    args = (*CATCH, *FINE, "--output", tmp_path / "run", "--seed", 3)
    if engine == "script":
        program = talking(*args, "--ranks", 2)
    else:
        program = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        program += ["--nproc-per-node", "2", *talking(*args)[1:]]
    process = subprocess.Popen(
        program,
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(sockets)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        line = ""
        while not re.search(r"epoch 1 \d+/6000", line):
            line = process.stdout.readline()
            assert line, process.stderr.read()
        ranks = [pid for pid in processes(tmp_path / "run") if pid != process.pid]
        ranks.sort(key=lambda pid: b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
        assert len(ranks) == 2
        pids = ranks + processes(sockets)
        begin = time.monotonic()
        if victim == "rank 1":
            os.kill(ranks[1], signal.SIGKILL)
        elif victim == "all":  # as schedulers do; rank 0 needs the others to end its iteration
            os.kill(ranks[1], signal.SIGTERM)
            time.sleep(1)
            assert not gone(ranks[1:], 0)
            os.kill(ranks[0], signal.SIGTERM)
        elif victim == "interrupt":  # as a terminal does, where the script has put its ranks apart
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.kill()
        _, errors = process.communicate(timeout=60)
        assert gone(pids, 10) and time.monotonic() - begin < 15
        assert "GLHF" not in errors
        if engine == "script":
            assert len(errors.splitlines()) == 1, errors
            assert victim != "rank 1" or "rank 1: it was killed by signal 9" in errors
            codes = {"rank 1": 1, "interrupt": 130, "all": 143, "launcher": -9}
            assert process.returncode == codes[victim]
        if victim == "interrupt":
            said = [line for line in errors.splitlines() if line.startswith("train_atari.py")]
            assert len(said) == 1 and "stopped by SIGINT" in said[0]
        if victim != "launcher":
            assert process.returncode != 0 and errors.strip()
            assert not list(sockets.glob("batch-a3c-*")) or victim == "rank 1"
        assert load(str(tmp_path / "run" / "checkpoint.pt"))[1]["at"]["global_step"] > 0
    finally:
        process.kill()
        process.communicate()


def rank_1_of(pids):
    """Which of these processes is rank 1."""
    (found,) = (p for p in pids if b"\0RANK=1\0" in Path(f"/proc/{p}/environ").read_bytes())
    return found


@pytest.mark.parametrize("end", ["a second signal", "the launcher is killed"])
def test_ranks_end_although_one_is_held_up(tmp_path, end):
    """Rank 0 waits for gradients of rank 1, and cannot hear signals."""
    path = tmp_path / "run"
    program = talking(*CATCH, *FINE, "--ranks", 2, "--output", path)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(program, cwd=ROOT, **streams)
    held_up = None
    try:
        while not re.search(r"epoch 1 \d+/6000", process.stdout.readline()):
            assert process.poll() is None
        ranks = [pid for pid in processes(path) if pid != process.pid]
        held_up = rank_1_of(ranks)
        os.kill(held_up, signal.SIGSTOP)
        time.sleep(1)
        if end == "a second signal":
            for _ in range(2):
                process.send_signal(signal.SIGINT)
                time.sleep(1)
            last = process.communicate(timeout=30)[1].splitlines()[-1]
            assert process.returncode == 130 and gone(ranks)
            assert last.endswith("rank 0 did not end within 8 seconds and was killed")
        else:
            process.kill()
            ranks.remove(held_up)
            assert gone(ranks, 30)
    finally:
        process.kill()
        if held_up is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(held_up, signal.SIGKILL)
        process.communicate()


def test_torchrun_may_start_the_ranks_again(runs, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(runs[0], path)
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program += ["--nproc-per-node", "2", "--max-restarts", "1"]
    program += talking(*CATCH, "--load", path / "checkpoint.pt", "--max-epoch", 1000)[1:]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen(program, cwd=ROOT, **streams)
    try:
        for attempt in range(2):
            line = ""
            while not re.search(r"epoch \d+ is done", line):
                line = process.stdout.readline()
                assert line
            ranks = [pid for pid in processes(path) if pid != process.pid]
            if attempt == 0:
                os.kill(rank_1_of(ranks), signal.SIGKILL)
                assert gone(ranks, 30)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert gone(ranks, 10)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("seconds", [0.7, 2, 4])
def test_an_interrupt_while_ranks_start(tmp_path, seconds):
    """Also while one of them waits for the other, which nothing but a signal ends."""
    program = command(*CATCH, "--ranks", 2, "--output", tmp_path / "run")
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(program, cwd=ROOT, **streams)
    time.sleep(seconds)
    ranks = processes(tmp_path / "run")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and gone(ranks)
    assert "Traceback" not in errors and "frame #" not in errors


def test_an_interrupt_before_there_is_a_rank(tmp_path):
    """The main thread has blocked it then, but another thread may take it."""
    fault = "import os, signal, threading, time\n"
    fault += "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    fault += "start = train_atari.start_rank\n"
    fault += "def interrupted(*args):\n"
    fault += "    os.kill(os.getpid(), signal.SIGINT)\n"
    fault += "    time.sleep(0.2)\n"
    fault += "    return start(*args)\n"
    fault += "train_atari.start_rank = interrupted"
    args = (*CATCH, *FINE, "--ranks", "2", "--output", str(tmp_path / "run"))
    done = subprocess.run(
        [*program(tmp_path, fault), *args], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
    assert not processes(tmp_path / "run")


def listening(pids):
    """Addresses at which processes listen, as /proc/net has them."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.update(re.findall(r"socket:\[(\d+)\]", os.readlink(link)))
    rows = [
        line.split()
        for name in ("tcp", "tcp6", "udp", "udp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    # 0A: a TCP socket listens; 07: a UDP socket takes what comes.
    return [row[1] for row in rows if row[9] in inodes and row[3] in ("0A", "07")]


@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_listens_beyond_this_machine(tmp_path, ranks):
    args = (*CATCH, *FINE, "--output", tmp_path / "run", "--ranks", ranks)
    process = subprocess.Popen(
        talking(*args),
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        while not re.search(r"epoch 1 \d+/6000", line := process.stdout.readline()):
            assert line
        addresses = listening(processes(tmp_path))
        assert len(addresses) == (0 if ranks == 1 else 2)
        assert all(address.startswith("0100007F:") for address in addresses), addresses
        private = [p for p in tmp_path.glob("batch-a3c-*/ranks") if p.parent.stat().st_mode & 0o77]
        assert not private
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 130 and not list(tmp_path.glob("batch-a3c-*"))
    finally:
        process.kill()
        process.communicate()


def program(tmp_path, fault):
    """The program with something replaced: a file, for it starts its ranks by its own name."""
    path = tmp_path / "train_atari.py"
    lines = ["import os, sys", f"sys.path[0] = {str(ROOT)!r}", "import train_atari", fault]
    lines += ["train_atari.__file__ = __file__"]
    lines += ["if __name__ == '__main__': sys.exit(train_atari.main())"]
    path.write_text("\n".join(lines))
    return [sys.executable, str(path)]


def run_ranks(args_of_each, start=command(), **kwargs):  # noqa: B008
    """Ranks as torchrun would start them, on one machine: what each of them ended with."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world |= {"WORLD_SIZE": str(len(args_of_each)), "LOCAL_WORLD_SIZE": str(len(args_of_each))}
    ranks = []
    try:
        for rank, args in enumerate(args_of_each):
            ranks.append(
                subprocess.Popen(
                    [*start, *map(str, args)],
                    cwd=ROOT,
                    env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        done = [(*rank.communicate(timeout=100), rank.returncode) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    return [subprocess.CompletedProcess(start, code, out, err) for out, err, code in done]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of different seeds and lengths, with the same options of learning."""
    paths = []
    for seed, epochs in ((1, 2), (2, 1)):
        path = tmp_path_factory.mktemp("runs") / "run"
        args = (*CATCH, *TINY, "--seed", seed, "--max-epoch", epochs, "--output", path)
        done = run(*args)
        assert done.returncode == 0, done.stderr
        paths.append(path)
    return paths


def test_ranks_hold_what_rank_0_holds(runs, tmp_path):
    """Also where one loads another checkpoint, or none: as on machines that share no disk."""
    more = (*TINY, "--simulator-proc", 3, "--max-epoch", 4, "--output", tmp_path / "run")
    first, second = ((*GAME, "--load", path / "checkpoint.pt") for path in runs)
    done = run_ranks([(*first, *more), (*second, *more), (*CATCH, *more)])
    assert [rank.returncode for rank in done] == [0, 0, 0], [rank.stderr for rank in done]
    # At the end of each epoch the ranks compare their weights.
    saved = load(str(tmp_path / "run" / "checkpoint.pt"))[1]
    assert saved["learner"]["updates"] == 40 and saved["at"]["epoch"] == 4
    steps = {int(state["step"]) for state in saved["learner"]["optimizer"]["state"].values()}
    assert steps == {40} and saved["options"]["seed"] == 1
    (line,) = [line for line in done[0].stdout.splitlines() if "differs from before" in line]
    assert line.endswith("3 ranks on the CPU instead of 1 rank on the CPU")


@pytest.mark.parametrize(
    "other, text",
    [
        ((*CATCH, *TINY, "--gamma", 0.9), "--gamma 0.99, rank 1 has 0.9"),
        (("--env", "tests.games:Count-v0", "--network", "a3c", *TINY), "Catch-v0, rank 1 has tes"),
        (("--env", "tests.games:Catch-v0", *TINY), "--network a3c, rank 1 has ba3c"),
    ],
)
def test_ranks_that_train_something_else_end_with_one_sentence(tmp_path, other, text):
    output = ("--output", tmp_path / "run")
    done = run_ranks([(*CATCH, *TINY, *output), (*other, *output)])
    assert [rank.returncode for rank in done] == [2, 2]
    (line,) = (done[0].stderr + done[1].stderr).splitlines()
    assert text in line and "all ranks must train the same" in line


def test_each_rank_has_a_gpu_of_its_own():
    ranks = [{"same": {}, "gpu": gpu} for gpu in ("a", "b", "a")]
    with pytest.raises(UserError, match="own, but ranks 0 and 2 have the same one") as error:
        Ranks.check_same(ranks)
    assert error.value.code == 2
    Ranks.check_same(ranks[:2])
    Ranks.check_same([{"same": {}, "gpu": None}] * 3)
    mixed = [{"same": {}, "gpu": gpu, "device": gpu or "cpu"} for gpu in ("a", None)]
    with pytest.raises(UserError, match="rank 0 is on a, rank 1 on cpu: all ranks need a GPU"):
        Ranks.check_same(mixed)


def test_a_rank_that_never_comes_is_waited_for_with_a_line_and_a_sentence(tmp_path):
    fault = "train_atari.JOIN_SECONDS, train_atari.JOIN_LOG_SECONDS = 3.0, 0.5"
    args = (*CATCH, *TINY, "--output", tmp_path / "run")
    world = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    for rank, missing in ((0, "rank 1"), (1, "rank 0")):
        with socket.create_server(("127.0.0.1", 0)) as server:
            world |= {"MASTER_PORT": str(server.getsockname()[1]), "RANK": str(rank)}
        done = subprocess.run(
            [*program(tmp_path, fault), *map(str, args)],
            cwd=ROOT,
            env=os.environ | world,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 1
        assert f"rank {rank} of 2 waits for {missing}, 3 seconds at most" in done.stdout
        (line,) = done.stderr.splitlines()
        assert f"rank {rank} cannot join the others: waited 3 seconds for {missing}" in line


def test_ranks_share_a_seed_and_wait_for_an_evaluation(tmp_path):
    """Rank 0 draws the seed. Its evaluations may take longer than a collective."""
    fault = (
        "import predictor, time\ninit, score = predictor.Feed.__init__, predictor.score_network\n"
    )
    fault += "def spy(self, env_id, options, learner, seeds):\n"
    fault += "    print(options.seed, seeds.entropy, file=sys.stderr)\n"
    fault += "    init(self, env_id, options, learner, seeds)\n"
    fault += "def slow(*args, **kwargs):\n"
    fault += "    predictor.score_network = score\n"
    fault += "    time.sleep(7)\n"
    fault += "    return score(*args, **kwargs)\n"
    fault += "predictor.Feed.__init__, predictor.score_network = spy, slow\n"
    fault += "train_atari.COLLECTIVE_SECONDS, train_atari.EVAL_EPOCH = 4.0, 1"
    args = (*CATCH, *TINY, "--max-epoch", 2, "--ranks", 2, "--output", tmp_path / "run")
    done = subprocess.run(
        [*program(tmp_path, fault), *map(str, args)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "epoch 2 is done" in done.stdout
    seed = json.loads((tmp_path / "run" / "config.json").read_text())["seed"]
    lines = sorted(done.stderr.splitlines())
    assert lines == [f"{seed} ({seed}, 1, {rank})" for rank in (0, 1)]
    assert f"seed {seed}" in done.stdout


FAULTS = {
    "own error": """
import model
def fail(*_): raise RuntimeError("the shapes do not fit")
model.loss_terms = fail""",
    "not finite": """
import model, predictor
predict, update = predictor.Replica.predict, model.Learner.update
def predict_badly(self, parts):
    if os.environ.get("RANK") == "1" and os.path.exists(MARK):
        raise FloatingPointError("the network predicts values that are not finite")
    return predict(self, parts)
def mark(self, *args, **kwargs):
    result = update(self, *args, **kwargs)
    if self.updates == 25:
        open(MARK, "w").close()
    return result
predictor.Replica.predict, model.Learner.update = predict_badly, mark""",
    "diverged": """
import model
train_atari.CHECK_STEPS, train_atari.CHECKPOINT_SECONDS = 5, 0.0
update = model.Learner.update
def update_apart(self, *args, **kwargs):
    result = update(self, *args, **kwargs)
    if self.updates == 23 and os.environ.get("RANK") == "1":
        self.parameters[0].data += 1e-3
    return result
model.Learner.update = update_apart""",
    "half an update": """
import model
init = model.Learner.__init__
def init_then_fail(self, *args, **kwargs):
    init(self, *args, **kwargs)
    step, steps = self.optimizer.step, []
    def fail():
        step()
        steps.append(1)
        if len(steps) == 4:
            raise RuntimeError("in the middle of an update")
    self.optimizer.step = fail
model.Learner.__init__ = init_then_fail""",
}


@pytest.mark.parametrize(
    "name, text, is_sentence",
    [
        ("own error", "the shapes do not fit", False),
        ("not finite", "rank 1: the network predicts values that are not finite", True),
        ("diverged", "the ranks hold different weights; nothing is saved", True),
        ("half an update", "in the middle of an update", False),
    ],
)
def test_what_is_wrong_is_said_and_nothing_bad_is_saved(runs, tmp_path, name, text, is_sentence):
    shutil.copytree(runs[0], tmp_path / "run")
    names = ("checkpoint.pt", "model-latest.npz", "stats.json")
    before = [(tmp_path / "run" / name).read_bytes() for name in names]
    fault = f"MARK = {str(tmp_path / 'mark')!r}" + FAULTS[name]
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    args = (*GAME, "--load", checkpoint, "--steps-per-epoch", 6000, "--max-epoch", 3, "--ranks", 2)
    done = subprocess.run(
        [*program(tmp_path, fault), *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1
    assert "lost the others" not in done.stdout + done.stderr
    if is_sentence:
        (line,) = done.stderr.splitlines()
        assert line.endswith(text)
    else:
        assert "Traceback" in done.stderr and f"RuntimeError: {text}" in done.stderr
    assert text in (tmp_path / "run" / "log.log").read_text()
    assert before == [(tmp_path / "run" / name).read_bytes() for name in names]


@pytest.mark.parametrize(
    "there, gpus, ranks, before, devices, change",
    [
        (8, None, None, {}, "0,1,2,3,4,5,6,7", None),
        (8, None, None, {"ranks": 1, "gpu": "0"}, "0", None),
        (8, None, None, {"ranks": 2, "gpu": "5,3"}, "5,3", None),
        (2, None, None, {"ranks": 2, "gpu": "5,3"}, "0,1", "2 ranks on GPU 0,1 instead of 2 r"),
        (1, None, None, {"ranks": 2, "gpu": "0,1"}, "0", "1 rank on GPU 0 instead of 2 ranks on"),
        (0, None, None, {"ranks": 2, "gpu": "0,1"}, "cpu,cpu", "2 ranks on the CPU instead of 2"),
        (8, None, None, {"ranks": 2, "gpu": None}, "cpu,cpu", None),
        (8, "1", None, {"ranks": 2, "gpu": "0,1"}, "1", "1 rank on GPU 1 instead of 2 ranks on"),
        (8, None, 1, {"ranks": 1, "gpu": "0"}, "cpu", "1 rank on the CPU instead of 1 rank on G"),
        # Checkpoints of earlier versions.
        (8, None, None, {"seed": 1}, "0,1,2,3,4,5,6,7", "8 ranks on GPU 0,1,2,3,4,5,6,7 instead "),
        (1, None, None, {"seed": 1}, "0", "1 rank on GPU 0 instead of an unknown number"),
    ],
)
def test_a_resumed_run_has_its_devices(monkeypatch, there, gpus, ranks, before, devices, change):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    chosen, changes = choose_devices(gpus, ranks, before)
    names = [str(d.index) if d.type == "cuda" else "cpu" for d in chosen]
    assert ",".join(names) == devices
    assert [c.startswith(change) for c in changes] == ([] if change is None else [True])


def test_ranks_of_torchrun(monkeypatch):
    """How many they are is its choice; a resumed run says what has changed."""
    for name, value in (("RANK", 0), ("WORLD_SIZE", 4), ("LOCAL_WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    devices, changes = choose_devices(None, None, {"ranks": 2, "gpu": None})
    assert len(devices) == 2 and changes == ["4 ranks on the CPU instead of 2 ranks on the CPU"]
    assert choose_devices(None, None, {"ranks": 4, "gpu": None})[1] == []
    assert choose_devices(None, 4, {})[1] == []
    change = ["4 ranks on the CPU instead of 4 ranks on GPUs"]
    assert choose_devices(None, None, {"ranks": 4, "gpu": "0,1"})[1] == change
    with pytest.raises(UserError, match="torchrun has started 4; leave --ranks out"):
        choose_devices(None, 2, {})


def test_simulators_that_ranks_cannot_share():
    assert share_simulators({}, {}, 3) == share_simulators({"simulator_proc": 6}, {}, 3) == []
    with pytest.raises(UserError, match="take 3 or 6"):
        share_simulators({"simulator_proc": 5}, {"simulator_proc": 5}, 3)
    with pytest.raises(UserError, match=r"take 3$"):
        share_simulators({"simulator_proc": 2}, {"simulator_proc": 2}, 3)
    chosen = {"simulator_proc": 5}
    (change,) = share_simulators(chosen, {}, 3)
    assert change.startswith("3 simulators instead of 5") and chosen == {"simulator_proc": 3}


def test_a_resumed_run_neither_listens_nor_makes_another_key(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    listen = ("--listen", address, "--key", "run.key")
    args = (*CATCH, *TINY, "--max-epoch", 1, "--output", "run", *listen)
    done = run(*args, cwd=tmp_path / "here")
    assert done.returncode == 0, done.stderr
    key, checkpoint = tmp_path / "here" / "run.key", tmp_path / "here" / "run" / "checkpoint.pt"
    done = run(*GAME, "--load", checkpoint, *listen, cwd=tmp_path / "there")
    assert done.returncode == 2
    assert f"no key {tmp_path / 'there' / 'run.key'}; the key of this run is {key}" in done.stderr
    done = run(*GAME, "--load", checkpoint, "--max-epoch", 2, cwd=tmp_path / "there")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "differs from before" in line]
    assert line.endswith(f"as before it would with --listen {address} --key {key}")
    assert not list((tmp_path / "there").iterdir())
    assert json.loads((checkpoint.parent / "config.json").read_text())["listen"] is None
    assert check_listening({"seed": 1}, {}) == []
    # The start after that knows it too, and needs both.
    with_key = ("--key", tmp_path / "there" / "run.key")
    done = run(*GAME, "--load", checkpoint, "--listen", address, *with_key)
    assert done.returncode == 2 and f"the key of this run is {key}" in done.stderr
    done = run(*GAME, "--load", checkpoint, "--listen", address)
    assert done.returncode == 2 and "--listen needs --key" in done.stderr
