"""Simulators that join a run over a network (here: loopback)."""

import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time

import pytest
import zmq

import simulator
from tests.helpers import ROOT, gone, processes, run, simulators, training


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def helper(address, key, *args):
    """A command that adds two simulators; its processes are found by the key's path."""
    program = [sys.executable, str(ROOT / "simulator.py"), "--connect", address, "--key", str(key)]
    program += ["--env", "tests.games:Catch-v0", "--players", "2", "--simulator-proc", "2", *args]
    return subprocess.Popen(program, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def test_simulators_come_and_go(tmp_path):
    address = f"tcp://127.0.0.1:{(port := free_port())}"
    (tmp_path / "keys").mkdir()
    key, wrong = tmp_path / "keys" / "key", tmp_path / "keys" / "wrong"
    started = []
    with training(tmp_path, "--listen", address, "--key", key) as (process, until):
        try:
            assert stat.S_IMODE(key.stat().st_mode) == 0o600
            # Who has no key, a wrong one, or speaks garbage changes nothing.
            wrong.write_bytes(b"\n".join(zmq.curve_keypair()))
            started.append(helper(address, wrong))
            context = zmq.Context()
            plain = context.socket(zmq.DEALER)
            plain.setsockopt(zmq.LINGER, 0)
            plain.connect(address)
            plain.send_multipart([b"x", b"y"])
            with socket.create_connection(("127.0.0.1", port)) as raw:
                raw.sendall(os.urandom(100_000))
            line = started[0].stderr.readline()
            assert "does not know the key" in line
            until(r"epoch 1 \d+/6000")
            context.destroy(linger=0)
            started[0].kill()
            # Who plays something else, or with another number of players, is told.
            for args in (("--env", "tests.games:Count-v0"), ("--players", "3")):
                started.append(helper(address, key, *args))
                assert "has no place for this simulator" in started[-1].stderr.readline()
                started[-1].kill()
            # Who has it joins, is killed, and joins again.
            for _ in range(2):
                started.append(helper(address, key))
                until("simulators that joined")
                pids = simulators(key)
                assert len(pids) == 2
                started[-1].kill()
                assert gone(pids)
                line = until(r"epoch 1 \d+/6000")
                assert float(re.search(r"(\S+) states/s", line)[1]) > 0
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
            assert process.returncode == 130 and "SIGINT" in errors
        finally:
            for program in started:
                program.kill()
                program.communicate()
    time.sleep(0.2)
    assert gone(processes(tmp_path / "keys"))


def test_simulators_outlive_the_run_and_join_the_next(tmp_path):
    address, key = f"tcp://127.0.0.1:{free_port()}", tmp_path / "key"
    program = None
    try:
        for name in ("1", "2"):
            (tmp_path / name).mkdir()
            args = ("--listen", address, "--key", key)
            with training(tmp_path / name, *args) as (process, _):
                program = program or helper(address, key)
                log, deadline = tmp_path / name / "run" / "log.log", time.monotonic() + 60
                while "simulators that joined" not in log.read_text():
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
                process.send_signal(signal.SIGINT)
                assert process.wait(30) == 130
            assert program.poll() is None
    finally:
        program.send_signal(signal.SIGTERM)
        program.communicate()
    assert program.returncode == 143
    assert gone(processes(key))


@pytest.mark.parametrize(
    "args, text",
    [
        (("--listen", "tcp://127.0.0.1:5555"), "--listen needs --key"),
        (("--listen", "tcp://127.0.0.1:5555", "--key", "/nowhere/key"), "cannot write the key"),
        (("--listen", "tcp://127.0.0.1:5555", "--key", str(ROOT / "README.md")), "holds no key"),
        (("--listen", "tcp://192.0.2.1:5555", "--key", "key"), "cannot listen on tcp://192.0.2.1"),
        (("--listen", "nonsense", "--key", "key"), "nonsense is no address"),
        (("--listen", "", "--key", "key"), " is no address"),
        (("--listen", "tcp://127.0.0.1:5/x", "--key", "key"), "127.0.0.1:5/x is no address"),
        (("--listen", "tcp://127.0.0.1:99999", "--key", "key"), "99999 is no address"),
    ],
)
def test_bad_input_gets_one_sentence(tmp_path, args, text):
    game = ("--env", "tests.games:Catch-v0", "--network", "a3c", "--output", tmp_path / "run")
    done = run(*game, *args, cwd=tmp_path)
    assert done.returncode in (1, 2)
    (line,) = done.stderr.splitlines()
    assert text in line


def test_a_simulator_without_a_key_does_not_start(tmp_path):
    for extra, text in (((), "--key FILE is needed"), (("--key", "none"), "cannot read the key")):
        program = [sys.executable, str(ROOT / "simulator.py"), "--connect", "tcp://127.0.0.1:1"]
        program += ["--env", "Pong-v0", *extra]
        done = subprocess.run(program, capture_output=True, text=True)
        assert done.returncode == 2 and text in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "args, text",
    [
        (("--connect", "nonsense"), "nonsense is no address: give tcp://HOST:PORT"),
        (("--connect", "tcp://:5555"), "tcp://:5555 is no address"),
        (("--connect", "tcp://127.0.0.1"), "tcp://127.0.0.1 is no address"),
        (("--connect", "tcp://127.0.0.1:99999"), "tcp://127.0.0.1:99999 is no address"),
        (("--connect", "tcp://[::1]:5/x"), "tcp://[::1]:5/x is no address"),
        (("--connect", f"tcp://{70 * 'a'}.de:5"), "aaa.de:5 is no address"),
        (("--connect", "udp://127.0.0.1:5"), "udp://127.0.0.1:5 is no address"),
        (("--connect", "tcp://127.0.0.1:1", "--players", "0"), "--players: invalid count"),
        (("--connect", "tcp://127.0.0.1:1", "--seed", "-1"), "--seed: invalid whole"),
        (("--connect", "tcp://127.0.0.1:1", "--simulator-proc", "-1"), "proc: invalid count"),
        (("--connect", "tcp://127.0.0.1:1", "--env", "Pongg-v0"), "nearest names: Pong-v0"),
    ],
)
def test_what_helpers_cannot_do_is_said_once(tmp_path, args, text):
    (tmp_path / "key").write_bytes(b"\n".join(zmq.curve_keypair()))
    program = [sys.executable, str(ROOT / "simulator.py"), "--env", "Pong-v0", *args]
    done = subprocess.run(
        [*program, "--key", str(tmp_path / "key")], capture_output=True, text=True, timeout=60
    )
    (line,) = (line for line in done.stderr.splitlines() if not line.startswith(("usage", " ")))
    assert done.returncode == 2 and text in line


class Enough(BaseException):
    """Ends a program that would try for ever."""


@pytest.mark.parametrize(
    "error, text",
    [
        (ConnectionRefusedError(111, "Connection refused"), "(Connection refused)"),
        (socket.gaierror(-2, "Name or service not known"), "(Name or service not known)"),
        (TimeoutError("timed out"), "(timed out)"),
    ],
)
def test_a_run_out_of_reach_is_named_once_and_tried_again(
    tmp_path, monkeypatch, capsys, error, text
):
    (tmp_path / "key").write_bytes(b"\n".join(zmq.curve_keypair()))
    tries = []

    def fail(*args, **kwargs):
        tries.append(args)
        raise error

    def sleep(seconds):
        if len(tries) == 3:
            raise Enough

    monkeypatch.setattr(simulator, "create_connection", fail)
    monkeypatch.setattr(simulator.time, "sleep", sleep)
    monkeypatch.setattr(simulator, "on_signals", lambda *args: None)
    arguments = ["--connect", "tcp://run.invalid:5555", "--env", "tests.games:Catch-v0"]
    monkeypatch.setattr(sys, "argv", ["simulator.py", *arguments, "--key", f"{tmp_path}/key"])
    with pytest.raises(Enough):
        simulator.main()
    assert tries == [(("run.invalid", 5555),)] * 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"cannot reach tcp://run.invalid:5555 {text}; trying again"


def test_simulators_that_came_first_join_a_run_over_ipv6(tmp_path):
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
            address = f"tcp://[::1]:{server.getsockname()[1]}"
    except OSError:
        pytest.skip("this machine has no IPv6")
    key = tmp_path / "key"
    key.write_bytes(b"\n".join(zmq.curve_keypair()))
    program = helper(address, key)
    try:
        assert "cannot reach" in program.stderr.readline()
        with training(tmp_path, "--listen", address, "--key", key) as (process, until):
            while "simulators that joined" not in (tmp_path / "run" / "log.log").read_text():
                until(r"epoch 1 \d+/6000")
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
    finally:
        program.send_signal(signal.SIGTERM)
        program.communicate()
    assert gone(processes(key))
