"""Several ranks that train as one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from model import Batch, Learner, Network, load
from tests.test_faults import gone
from tests.test_train_atari import CATCH, GAME, ROOT, TINY, command, processes, run


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
        for step in range(3):
            metrics = learner.update(random_batch(10 * step + rank, 16), 1e-3, 0.01, (rank,))
        learner.check_ranks()
        weights = torch.cat([p.detach().reshape(-1) for p in learner.parameters])
        torch.save((weights, metrics), f"{path}/{kind}{rank}.pt")
        with torch.no_grad():
            learner.parameters[3][0] += rank * 1e-6
        with pytest.raises(RuntimeError, match="different weights"):
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
    done = run(*CATCH, *TINY, "--max-epoch", 2, "--ranks", 2, "--output", path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"ranks +2, each", done.stdout)
    assert done.stdout.count("epoch 2 is done") == 1
    stats = json.loads((path / "stats.json").read_text())
    assert [epoch["global_step"] for epoch in stats] == [10, 20]
    assert stats[-1]["policy_lag"] > 0 and stats[-1]["mean_score"] is not None
    done = run(*GAME, "--load", path / "checkpoint.pt", "--max-epoch", 3)
    assert done.returncode == 0, done.stderr
    assert load(str(path / "checkpoint.pt"))[1]["learner"]["updates"] == 30


def test_bad_input_gets_one_sentence_of_all_ranks(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stats.json").write_text("[]")
    for args, text in (
        (("--output", tmp_path / "run"), "holds a run (stats.json)"),
        (("--output", tmp_path / "new", "--queue-size", 10), "can never fill a batch"),
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
    args = (*CATCH, "--batch-size", 16, "--output", tmp_path / "run", "--seed", 3)
    if engine == "script":
        program = command(*args, "--ranks", 2)
    else:
        program = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        program += ["--nproc-per-node", "2", *command(*args)[1:]]
    process = subprocess.Popen(
        program,
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(sockets)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
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
        elif victim == "interrupt":
            process.send_signal(signal.SIGINT)
        else:
            process.kill()
        _, errors = process.communicate(timeout=60)
        assert gone(pids, 10) and time.monotonic() - begin < 15
        if engine == "script":
            assert "Traceback" not in errors
            codes = {"rank 1": 1, "interrupt": 130, "all": 143, "launcher": -9}
            assert process.returncode == codes[victim]
        if victim != "launcher":
            assert process.returncode != 0 and errors.strip()
            assert not list(sockets.glob("batch-a3c-*")) or victim == "rank 1"
        assert load(str(tmp_path / "run" / "checkpoint.pt"))[1]["at"]["global_step"] > 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("seconds", [0.7, 1.5, 3, 4])
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
