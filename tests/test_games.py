"""Games of other people: what they may do, and what becomes of those that go wrong."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

import simulator
from common import Player, UserError, describe, frame_rate, make_env, start_actions
from model import Network, weights_file
from predictor import VectorPlayers, score_network
from tests.helpers import (
    ROOT,
    check_transitions,
    command,
    command_line,
    drain,
    gone,
    make_feed,
    pids_of,
    processes,
    run,
    training,
    watch,
    worth_a_quarter,
)
from train_atari import main

TINY = ("--network", "a3c", "--batch-size", 16, "--steps-per-epoch", 5, "--eval-episode", 2)


@pytest.fixture
def weights(tmp_path):
    """An agent for any game of three actions."""
    path = tmp_path / "agent.npz"
    path.write_bytes(weights_file(Network("a3c", 3)))
    return path


def feed_of(game, **changes):
    """A feed of four players in two processes."""
    sizes = {"simulator_proc": 2, "players_per_simulator": 2, "predict_batch_size": 4}
    sizes |= {"predictor_thread_per_gpu": 1} | changes
    return make_feed(Network("a3c", 3), f"tests.games:{game}-v0", **sizes)


def events_until(feed, enough, seconds=60):
    """What is said of simulators while training continues, until `enough(events)`."""
    events, deadline = [], time.monotonic() + seconds
    while not enough(events):
        assert time.monotonic() < deadline, events
        feed.queue.get(timeout=0.05)
        events += feed.replace_ended()
    return events


@pytest.mark.parametrize("game", ["WithThread", "WithProcess", "OnePerProcess"])
def test_each_simulator_makes_its_own_games(game):
    players = 1 if game == "OnePerProcess" else 2
    feed = feed_of(game, players_per_simulator=players, predict_batch_size=players)
    try:
        drain(feed, 300)
        assert feed.pool.replace_ended() == []
    finally:
        feed.close()
    episodes = score_network(f"tests.games:{game}-v0", Network("a3c", 3), 4, seed=0, log=print)
    assert [(e.score, e.length, e.finished) for e in episodes] == [(20, 20, True)] * 4


@pytest.mark.parametrize("end", ["close", "kill the simulator", "kill the run"])
def test_a_game_that_has_a_process_leaves_none(tmp_path, monkeypatch, end):
    def emulators():
        found = processes(f"emulator of {tmp_path}")
        return [pid for pid in found if b"emulator of" in command_line(pid)]

    if end == "kill the run":
        (tmp_path / "t").mkdir()
        monkeypatch.setattr("tests.helpers.CATCH", ("--env", "tests.games:WithProcess-v0"))
        args = ("--network", "a3c")
        with training(tmp_path, *args) as (process, until):
            while len(pids := processes(f"emulator of {tmp_path}")) < 4:
                until(r"epoch 1 \d+/6000")  # the second simulator still starts
            process.kill()
            assert gone(pids)
        return
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    feed = feed_of("WithProcess")
    try:
        events_until(feed, lambda _: feed.pool.connected == 2)
        assert len(emulators()) == 4
        if end == "kill the simulator":
            before = set(emulators())
            os.kill(pids_of(feed.pool)[0], 9)
            events_until(feed, len)
            events_until(feed, lambda _: feed.pool.connected == 2)
            assert len(emulators()) == 4 and len(before & set(emulators())) == 2
    finally:
        feed.close()
    assert emulators() == []


def first_rewards(game, seed):
    """The first reward of each of four players in two processes."""
    players = VectorPlayers(f"tests.games:{game}-v0", 4, seed, check=lambda: None)
    try:
        players.step(None)
        return players.step(np.zeros(4, int))[1].tolist()
    finally:
        players.close()


def test_no_two_players_have_the_same_luck(monkeypatch):
    monkeypatch.setattr("predictor.count_cores", lambda: 2)
    for game in ("OwnLuck", "GlobalLuck"):
        assert len(set(first_rewards(game, 5))) == 4
    # What a seed can reach repeats itself: also the generators that all of a process share.
    assert first_rewards("GlobalLuck", 5) == first_rewards("GlobalLuck", 5)
    assert first_rewards("GlobalLuck", 5) != first_rewards("GlobalLuck", 6)


def test_every_start_and_every_rank_has_seeds_of_its_own(tmp_path, monkeypatch):
    def seeds_of(name, *args):
        """The seeds of the players of a run, each of which is there once."""
        monkeypatch.setenv("SEEDS", str(tmp_path / f"{name}.txt"))
        game = ("--env", "tests.games:TellsSeeds-v0", *TINY, "--simulator-proc", 2)
        sizes = ("--players-per-simulator", 2, "--eval-episode", 1, "--queue-size", 16)
        assert main([*game, *sizes, *args]) == 0
        seeds = (
            (tmp_path / f"{name}.txt").read_text().split()[: 2 * 2]
        )  # those of evaluations come later
        assert len(set(seeds)) == len(seeds) == 4
        return set(seeds)

    run_of = ("--output", tmp_path / "run")
    first = seeds_of("first", "--seed", 7, "--max-epoch", 1, *run_of)
    checkpoint = ("--load", tmp_path / "run" / "checkpoint.pt")
    resumed = seeds_of("resumed", "--max-epoch", 2, *checkpoint)
    again = seeds_of("again", "--seed", 7, "--max-epoch", 1, "--output", tmp_path / "again")
    other = seeds_of("other", "--seed", 8, "--max-epoch", 1, "--output", tmp_path / "other")
    assert first == again
    assert not first & resumed and not first & other
    ranks = ("--ranks", 2, "--output", tmp_path / "ranks")  # with one simulator each
    of_ranks = seeds_of("ranks", "--seed", 7, "--max-epoch", 1, *ranks)
    assert len(of_ranks & first) == 2  # those of rank 0


def test_a_recording_repeats_itself_too(tmp_path, weights):
    args = ("--task", "gen_submit", "--env", "tests.games:GlobalLuck-v0", "--load", weights)
    results = []
    for name in ("a", "b"):
        path = tmp_path / name
        done = run(*args, "--episode", 1, "--seed", 3, "--output", path)
        assert done.returncode == 0, done.stderr
        results.append(json.loads((path / "results.json").read_text())["episode_rewards"])
    assert results[0] == results[1]


def test_one_emulator_per_process_is_the_default_where_the_game_needs_it(tmp_path):
    args = ("--env", "tests.games:OnePerProcess-v0", *TINY, "--simulator-proc", 2)
    done = run(*args, "--max-epoch", 1, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["players_per_simulator"] == 1
    done = run(*args, "--players-per-simulator", 2, "--output", tmp_path / "other")
    assert done.returncode == 1 and "one emulator per process" in done.stderr
    assert "--players-per-simulator 1" in done.stderr and done.stderr.count("\n") == 1


def test_an_environment_counts_as_it_says_of_itself():
    assert describe("Breakout").env_id == "Breakout-v4"  # gymnasium's newest
    assert describe("Breakout-v0").env_id == "Breakout-v0"
    assert describe("tests.games:Slow").env_id == "tests.games:Slow-v2"
    assert describe("tests.games:OnePerProcess-v0").one_per_process
    assert not describe("tests.games:WithProcess-v0").one_per_process
    player = Player(make_env("tests.games:Slow-v0"))
    player.reset()
    assert [player.step(0)[3] for _ in range(6)] == [False] * 5 + [True]
    limits = {"Breakout-v0": 10_000, "SpaceInvaders-v0": 10_000, "UpNDown-v0": 10_000}
    limits |= dict.fromkeys(("Breakout-v4", "ALE/Breakout-v5", "BreakoutNoFrameskip-v0"), np.inf)
    limits |= dict.fromkeys(("tests.games:PongOfTwoActions-v0", "tests.games:Rich-v0"), np.inf)
    for env_id, limit in limits.items():
        assert Player(make_env(env_id)).max_steps == limit, env_id
    speeds = {"Breakout-v0": 20, "ALE/Breakout-v5": 15, "BreakoutNoFrameskip-v4": 60}
    speeds |= {"tests.games:Slow-v0": 7, "tests.games:Rich-v0": 20}
    speeds |= {"tests.games:StickyBreakout-v0": 15, "tests.games:BreakoutReordered-v0": 15}
    for env_id, speed in speeds.items():
        assert frame_rate(make_env(env_id)) == speed, env_id
    skipping = gymnasium.wrappers.MaxAndSkipObservation(make_env("BreakoutNoFrameskip-v4"), 4)
    assert frame_rate(skipping) == 15
    unusual = make_env("tests.games:Slow-v0")
    for rate in (None, "fast", math.nan, math.inf, 0, -3):
        unusual.unwrapped.metadata = {"render_fps": rate}
        assert frame_rate(unusual) == 20, rate


def test_fire_is_found_where_the_wrappers_have_put_it():
    assert start_actions(make_env("Breakout-v0")) == [1, 2]  # FIRE, RIGHT
    reordered = make_env("tests.games:BreakoutReordered-v0")
    assert start_actions(reordered) == [3, 1]  # the same two
    calls = []
    inner = reordered.unwrapped
    step = inner.step
    inner.step = lambda action: calls.append(int(action)) or step(action)
    Player(reordered).reset(seed=0)
    assert calls == [1, 2]
    sticky = {tuple(start_actions(make_env("tests.games:StickyBreakout-v0"))) for _ in range(8)}
    assert sticky == {(1, 2)}  # it remembers actions, but not those that it was only asked about
    assert start_actions(make_env("tests.games:PongOfTwoActions-v0")) == []
    Player(make_env("tests.games:PongOfTwoActions-v0")).reset(seed=0)


@pytest.mark.parametrize("reward", ["nan", "inf"])
def test_a_reward_that_is_not_finite_is_named_at_once_in_every_task(tmp_path, weights, reward):
    game = ("--env", "tests.games:NotFinite-v0")
    for task in (
        (*TINY, "--output", tmp_path / "run"),
        ("--task", "eval", "--load", weights, "--episode", 2),
        ("--task", "play", "--load", weights, "--episode", 2, "--output", tmp_path / "play"),
        ("--task", "gen_submit", "--load", weights, "--output", tmp_path / "submission"),
    ):
        done = run(*game, *task, REWARD=reward)
        assert done.returncode in (1, 2), task
        assert f"NotFinite-v0: the reward is {reward} in step 5" in done.stderr, task
        assert done.stderr.count("\n") == 1 and not re.search(r"mean +nan", done.stdout)


@pytest.mark.parametrize(
    "how, text",
    [
        ({"FRAME_TYPE": "float64"}, "a frame is float64 (84, 84, 3), not uint8"),
        ({"FRAME_TYPE": "uint8", "GREY": "1"}, "a frame is uint8 (84, 84), not uint8 (height"),
    ],
)
def test_frames_that_are_not_what_a_game_declares_are_named(tmp_path, weights, how, text):
    game = ("--env", "tests.games:OtherFrames-v0")
    for task in (
        (*TINY, "--output", tmp_path / "run"),
        ("--task", "play", "--load", weights, "--episode", 1, "--output", tmp_path / "play"),
        ("--task", "gen_submit", "--load", weights, "--output", tmp_path / "submission"),
    ):
        done = run(*game, *task, **how)
        assert done.returncode in (1, 2), task
        assert f"OtherFrames-v0: {text}" in done.stderr and done.stderr.count("\n") == 1, task


def test_a_game_that_forks_can_end_what_it_forked():
    """multiprocessing's terminate comes before the child has done anything."""
    code = "import common; common.on_signals(common.raise_stopped, common.SIGNALS[1:])\n"
    code += "for _ in range(40): common.make_env('tests.games:Forks-v0').close()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60)
    assert done.returncode == 0


def test_a_game_neither_takes_signals_nor_the_directory(tmp_path, weights):
    game = ("--env", "tests.games:OwnSignals-v0")
    process = subprocess.Popen(
        command("--task", "eval", *game, "--load", weights, "--episode", 1_000_000),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert any("episodes" in line for line in process.stdout)  # it tells its progress
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert gone(processes(tmp_path))
    finally:
        process.kill()
        process.communicate()
    for task in (
        ("--task", "eval", "--load", "agent.npz", "--episode", 2, "--output", "eval"),
        ("--task", "play", "--load", "agent.npz", "--episode", 1, "--output", "play"),
        ("--task", "gen_submit", "--load", "agent.npz", "--episode", 1),
        (*TINY, "--max-epoch", 1, "--output", "run"),
    ):
        done = run(*game, *task, cwd=tmp_path)
        assert done.returncode == 0, (task, done.stderr)
    for path in ("eval/results.json", "play/episode000000.mp4", "output_dir/results.json"):
        assert (tmp_path / path).exists()
    assert (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("task", ["eval", "play", "gen_submit"])
@pytest.mark.parametrize(
    "game, text", [("Exits", "SystemExit: 0"), ("Crash", "RuntimeError: the game broke")]
)
def test_a_game_that_fails_is_named(tmp_path, weights, task, game, text):
    args = ("--task", task, "--env", f"tests.games:{game}-v0", "--load", weights)
    done = run(*args, "--episode", 2, "--output", tmp_path / "out")
    assert done.returncode == 1 and text in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_reward_may_be_an_array_of_one():
    (episode,) = score_network(
        "tests.games:ArrayReward-v0", Network("a3c", 3), 1, seed=0, log=print
    )
    assert episode.score == 20


def test_simulators_find_the_modules_that_their_caller_finds(tmp_path, monkeypatch, weights):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "nobody_else_has.py").write_text("import tests.games\n")
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    args = ("--task", "eval", "--env", "nobody_else_has:Rich-v0", "--load", weights)
    done = run(*args, "--episode", 2)
    assert done.returncode == 0, done.stderr


def test_patience_is_for_one_reset_not_for_those_of_all_players(monkeypatch):
    monkeypatch.setattr(simulator, "HANG_SECONDS", 1.5)
    feed = feed_of("SlowReset", simulator_proc=1, players_per_simulator=6)
    try:
        drain(feed, 300)  # more than two episodes of all: six resets of half a second each
        assert feed.replace_ended() == []
    finally:
        feed.close()


def test_a_game_that_hangs_in_c_code_is_replaced(monkeypatch):
    monkeypatch.setattr(simulator, "HANG_SECONDS", 1.0)
    feed = feed_of("StuckInC")
    try:
        events = events_until(feed, lambda events: len(events) >= 2)
        sentence = r"simulator \d was silent for \d seconds, or its game did not close: .+"
        assert all(re.fullmatch(sentence, event) for event in events)
    finally:
        feed.close()


def test_a_game_that_fails_and_then_does_not_close_says_why_it_failed():
    feed = feed_of("BrokenInC")
    try:
        event = events_until(feed, len)[0]
        assert "its game did not close: RuntimeError: the emulator is gone" in event
    finally:
        feed.close()


def test_a_run_that_was_stopped_for_a_while_goes_on(monkeypatch):
    """Simulators that were stopped with it in the middle of a step are replaced."""
    monkeypatch.setattr(simulator, "HANG_SECONDS", 1.0)
    feed = make_feed(worth_a_quarter())
    segments = watch(feed)
    try:
        drain(feed, 200)
        pids = pids_of(feed.pool)
        for pid in pids:
            os.kill(pid, 19)
        time.sleep(1.5)  # this process does nothing meanwhile, as if it were stopped
        for pid in pids:
            os.kill(pid, 18)
        drain(feed, 2000)
        events_until(feed, lambda _: feed.pool.connected == 4)
    finally:
        feed.close()
    check_transitions(segments)


def test_what_games_print_is_bounded_and_its_end_is_kept(monkeypatch):
    monkeypatch.setattr(simulator, "LOG_BYTES", 50_000)
    monkeypatch.setattr(simulator, "LOG_LOOK_SECONDS", 0.0)
    feed, sizes = feed_of("Noisy"), []
    try:
        while len(sizes) < 100:
            drain(feed, 64)
            sizes.append(
                sum(f.stat().st_size for f in Path(feed.pool.directory.path).glob("*.log"))
            )
        # What is written between two looks comes on top.
        assert max(sizes[50:]) < 1_000_000 and min(sizes[50:]) > 0
    finally:
        feed.close()
    monkeypatch.setenv("DOOMED", "1")
    feed = feed_of("Noisy")
    try:
        event = events_until(feed, len)[0]
        assert "killed by signal 9: these are the last words" in event
    finally:
        feed.close()


def test_a_simulator_that_is_killed_again_and_again_ends_the_run(monkeypatch):
    monkeypatch.setattr(simulator, "MAX_EARLY_KILLS", 4)
    monkeypatch.setattr(
        simulator, "EARLY_KILL_SECONDS", 0.25
    )  # its start takes longer, and counts not
    feed = feed_of("Doomed")
    try:
        with pytest.raises(UserError, match=r"4 times in a row.*is there too little memory"):
            events_until(feed, lambda events: len(events) > 20)
    finally:
        feed.close()


def test_a_large_score_is_a_score():
    torch.manual_seed(0)
    (episode,) = score_network("tests.games:Rich-v0", Network("a3c", 3), 1, seed=0, log=print)
    assert episode.score == 20 * 123456
