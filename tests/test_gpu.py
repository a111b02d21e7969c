"""What is different on a GPU: run where there is one. Its arithmetic is tested in test_model.py."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from model import Learner, Network, load
from predictor import ExperienceQueue, Replica
from tests.conftest import GPUS
from tests.helpers import CATCH, GAME, ROOT, command, gone, processes
from tests.test_model import golden_arrays, relative

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
CUDA = torch.device("cuda")
SMALL = ("--simulator-proc", 2, "--players-per-simulator", 8, "--predict-batch-size", 16)


def environment():
    """As it was before the tests hid the GPUs."""
    seen = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return seen | ({} if GPUS == "all" else {"CUDA_VISIBLE_DEVICES": GPUS})


def run(*args, program=()):
    program = [*program, *command(*args)[bool(program) :]]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, env=environment())
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return done


@pytest.mark.parametrize("kind", ["ba3c", "a3c"])
def test_tf32_is_near_float32(kind):
    """As it trains: gradients of the same batch on the GPU and on the CPU."""
    _, batch = golden_arrays()
    torch.manual_seed(0)
    network = Network(kind, 4)
    on_cpu = Learner(copy.deepcopy(network), torch.device("cpu"), 1e-3, threads=2)
    on_gpu = Learner(network, CUDA, 1e-3, threads=2)
    expected, gradients = on_cpu.gradients(batch, 0.01)
    terms, results = on_gpu.gradients(batch, 0.01)
    assert relative(terms.cpu().numpy(), expected.numpy()) < 1e-2
    for result, gradient in zip(results, gradients, strict=True):
        assert relative(result.cpu().numpy(), gradient.numpy()) < 5e-2


def test_predictions_are_those_of_the_cpu_while_weights_change():
    """In a stream of its own, out of pinned memory, with weights that are replaced meanwhile."""
    torch.manual_seed(0)
    network = Network("ba3c", 4)
    on_cpu, stream = Replica(network, 9), torch.cuda.Stream(priority=-1)
    states = np.random.default_rng(0).integers(256, size=(9, 4, 84, 84, 3), dtype=np.uint8)
    with torch.cuda.stream(stream):
        on_gpu = Replica(copy.deepcopy(network).to(CUDA), 16)
    assert on_gpu.staging.is_pinned()
    for version in range(20):
        for parameter in network.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
        on_cpu.load(list(network.parameters()), version)
        weights = [parameter.detach().to(CUDA) for parameter in network.parameters()]
        ready = torch.cuda.current_stream().record_event()
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            on_gpu.load(weights, version)
            for parts in ([states[:4], states[4:]], [states[version % 9 :]]):
                for result, cpu in zip(on_gpu.predict(parts), on_cpu.predict(parts), strict=True):
                    np.testing.assert_allclose(result, cpu, rtol=2e-2, atol=2e-2)


def test_graphs_are_made_while_others_predict_and_train():
    """As it is in a run that evaluates; a batch of another size needs another graph."""
    torch.manual_seed(0)
    network = Network("a3c", 4).to(CUDA)
    learner = Learner(network, CUDA, 1e-3, threads=1)
    _, batch = golden_arrays()
    done, errors, predictions = threading.Event(), [], [0, 0, 0]

    def predict(number):
        try:
            with torch.cuda.stream(torch.cuda.Stream(priority=-1)):
                replica = Replica(network, 4)
                while not done.is_set():
                    replica.predict([np.zeros((3, 4, 84, 84, 3), np.uint8)])
                    predictions[number] += 1
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=predict, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        for size in (16, 8, 16, 5):
            part = batch.split(size)[0]._replace(frames=batch.frames[: 4 * size])
            norms = [learner.update(part, 0.0, 0.01)[-1].item() for _ in range(5)]
            gradients = Learner(network, CUDA, 1e-3, threads=1).gradients(part, 0.01)[1]
            norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))
            assert norms == pytest.approx(5 * [norm.item()], rel=1e-3)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not errors and min(predictions) > 0


def test_a_batch_has_left_the_queue_when_its_update_returns():
    """Its pinned memory is filled anew at once; the GPU must not read that."""
    _, golden = golden_arrays()
    queue = ExperienceQueue(16, 16, pinned=True)
    memory = queue.batches[0]
    assert all(column.is_pinned() for column in memory)
    torch.manual_seed(0)
    network = Network("ba3c", 4)
    norms = []
    for spoil in (False, True):
        learner = Learner(copy.deepcopy(network), CUDA, 1e-3, threads=1)
        busy = torch.randn(4096, 4096, device=CUDA)
        for _ in range(10):
            for column, values in zip(memory, golden, strict=True):
                column.copy_(values)
            for _ in range(20):
                busy = busy @ busy / 64  # the copy has to wait behind this
            metrics = learner.update(memory, 1e-4, 0.01)
            if spoil:
                memory.frames.zero_()
                memory.future_rewards.fill_(100)
            norms.append(metrics[-1].item())
    assert norms[10:] == pytest.approx(norms[:10], rel=1e-2)


def test_it_learns_on_a_gpu_and_goes_on_without_one(tmp_path):
    path = tmp_path / "run"
    learning = ("--adam-epsilon", "1e-5", "--entropy-beta", "0.01,2:0.005", "--gamma", "0.9")
    learning += ("--learning-rate", "1e-3", "--warm-up", "50", "--seed", "1", "--batch-size", "64")
    steps = ("--steps-per-epoch", "300", "--eval-episode", "8")
    args = (*CATCH, *learning, *steps, *SMALL, "--gpu", "0")
    done = run(*args, "--max-epoch", 2, "--output", path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"device +cuda:0", done.stdout)
    stats = json.loads((path / "stats.json").read_text())
    assert stats[-1]["train_score"] >= 3.5 and stats[-1]["mean_score"] >= 3
    assert all(0 < epoch["policy_lag"] <= 3 for epoch in stats)
    checkpoint = path / "checkpoint.pt"
    for more, device in ((("--ranks", 1), "cpu"), (("--gpu", 0), "cuda:0")):  # and back
        epochs = len(json.loads((path / "stats.json").read_text())) + 1
        done = run(*GAME, "--load", checkpoint, "--max-epoch", epochs, *more)
        assert done.returncode == 0 and re.search(f"device +{device}", done.stdout), done.stderr
    stats = json.loads((path / "stats.json").read_text())
    assert [epoch["global_step"] for epoch in stats] == [300, 600, 900, 1200]
    assert min(epoch["train_score"] for epoch in stats[1:]) >= 3.5
    scores = []
    for gpu in ("0", None):
        args = ("--task", "eval", *GAME, "--load", checkpoint, "--episode", 20, "--seed", 0)
        done = run(*args, *(("--gpu", gpu) if gpu else ()))
        assert done.returncode == 0, done.stderr
        scores.append(float(re.search(r"mean +(\S+)", done.stdout)[1]))
    assert min(scores) >= 3


def test_torchrun_starts_a_rank_on_a_gpu(tmp_path):
    """One, where there is nothing to average: several ranks need several GPUs."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "1"]
    size = (*SMALL, "--steps-per-epoch", 20, "--batch-size", 16, "--max-epoch", 1)
    args = (*CATCH, *size, "--eval-episode", 1, "--gpu", 0, "--output", tmp_path / "run")
    done = run(*args, program=torchrun)
    assert done.returncode == 0, done.stderr
    assert load(str(tmp_path / "run" / "checkpoint.pt"))[1]["at"]["global_step"] == 20


def test_an_interrupt_leaves_nothing_on_the_gpu(tmp_path):
    args = (*CATCH, *SMALL, "--gpu", 0, "--output", tmp_path / "run")
    process = subprocess.Popen(
        command(*args), cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment()
    )
    try:
        while not re.search(r"epoch 1 \d+/6000", process.stdout.readline()):
            assert process.poll() is None
        pids = processes(tmp_path / "run")
        assert process.pid in pids
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 130 and gone(pids)
        assert load(str(tmp_path / "run" / "checkpoint.pt"))[1]["at"]["global_step"] > 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("gpus", ["99", "0,0", "x"])
def test_gpus_that_are_not_there_get_a_sentence(tmp_path, gpus):
    done = run(*CATCH, "--gpu", gpus, "--output", tmp_path / "run")
    assert done.returncode == 2 and "CUDA device" in done.stderr
