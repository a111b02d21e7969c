"""Players against the rules of the game, and scoring."""

import math
import os
import site
import subprocess
import sys

import cv2
import gymnasium
import numpy as np
import pytest

import common
from common import Player, UserError, make_env


class Script(gymnasium.Env):
    """A game that records its actions; ends after the steps in `ends`, over all episodes."""

    observation_space = gymnasium.spaces.Box(0, 255, (210, 160, 3), np.uint8)
    action_space = gymnasium.spaces.Discrete(4)

    def __init__(self, meanings=("NOOP", "FIRE", "RIGHT", "LEFT"), ends=()):
        self.meanings, self.ends, self.calls, self.steps = meanings, ends, [], 0

    def get_action_meanings(self):
        return list(self.meanings)

    def reset(self, *, seed=None, options=None):
        self.calls.append("reset")
        return self.frame(), {}

    def step(self, action):
        self.calls.append(int(action))
        self.steps += 1
        return self.frame(), 2.5, self.steps in self.ends, False, {"lives": 3}

    def frame(self):
        return np.full((210, 160, 3), 10 * len(self.calls) % 250, np.uint8)


def test_fire_on_reset():
    env = Script()
    player = Player(env)
    frame, _ = player.reset()
    assert env.calls == ["reset", 1, 2]
    assert frame[0, 0, 0] == 30 and frame.shape == (84, 84, 3)
    assert (player.score, player.length) == (0, 0)  # what firing earned is dropped
    player.step(3)
    assert (player.score, player.length) == (2.5, 1)


def test_fire_on_reset_where_it_ends_the_episode():
    env = Script(ends=(1,))
    Player(env).reset()
    assert env.calls == ["reset", 1, "reset", 2]
    env = Script(ends=(2,))
    frame, _ = Player(env).reset()
    assert env.calls == ["reset", 1, 2, "reset"]
    assert frame[0, 0, 0] == 40


def test_no_fire_on_reset_without_a_fire_action():
    env = Script(meanings=("NOOP", "UPFIRE", "RIGHTFIRE"))
    Player(env).reset()
    assert env.calls == ["reset"]


def test_step_limit_ends_the_episode_and_lost_lives_do_not():
    player = Player(Script())
    assert player.max_steps == math.inf  # for a game that sets none
    player = Player(make_env("Breakout-v0"))
    player.env = Script()
    for _ in range(2):
        player.reset()
        overs = [player.step(0)[3] for _ in range(common.MAX_EPISODE_STEPS)]
        assert overs.index(True) == 9_999 and len(overs) == 10_000
        assert (player.score, player.length) == (25_000, 10_000)


@pytest.mark.parametrize(
    "env_id, fires, height",
    [("Breakout-v0", True, 210), ("Asterix-v0", False, 210), ("Carnival-v0", True, 214)],
)
def test_real_games(env_id, fires, height):
    env = make_env(env_id)
    assert env.observation_space.shape == (height, 160, 3)
    reference = gymnasium.make(env_id, disable_env_checker=True)
    player = Player(env)
    assert bool(player.start_actions) == fires == ("FIRE" in env.unwrapped.get_action_meanings())
    first, _ = player.reset(seed=3)
    expected, _ = reference.reset(seed=3)
    for action in (1, 2) if fires else ():
        expected = reference.step(action)[0]
    np.testing.assert_array_equal(first, cv2.resize(expected, (84, 84)))
    rng, lives = np.random.default_rng(0), set()
    for _ in range(300):
        action = int(rng.integers(player.num_actions))
        frame, reward, *ends = player.step(action)
        expected, expected_reward, *expected_ends = reference.step(action)
        lost = bool(lives) and expected_ends[2]["lives"] < min(lives)
        assert player.life_lost == lost
        lives.add(expected_ends[2]["lives"])
        np.testing.assert_array_equal(frame, cv2.resize(expected, (84, 84)))
        assert (reward, ends) == (expected_reward, expected_ends)
        if ends[0] or ends[1]:
            break
    if env_id == "Breakout-v0":
        assert len(lives) > 1  # a life was lost, and the episode went on


def test_breakout_is_the_stochastic_v0():
    env = make_env("Breakout-v0").unwrapped
    assert env.ale.getFloat("repeat_action_probability") == 0.25
    assert gymnasium.spec("Breakout-v0").kwargs["frameskip"] == (2, 5)  # 2 to 4


def test_unknown_game_gets_the_nearest_names():
    with pytest.raises(UserError, match=r"no game Beemridr-v0.*BeamRider-v0") as caught:
        make_env("Beemridr-v0")
    assert caught.value.code == 2


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Breakout-ram-v0", "no.such.module:Game-v0"])
def test_what_is_no_rgb_game_is_refused(env_id):
    with pytest.raises(UserError, match=env_id):
        make_env(env_id)


def test_a_player_is_silent():
    code = "from common import *; p = Player(make_env('Pong-v0')); p.reset(seed=1); p.step(0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout + done.stderr == b""


def test_children_find_what_this_program_finds(monkeypatch, tmp_path):
    beside_python = f"{sys.prefix}-games"  # begins like Python's own directories
    monkeypatch.syspath_prepend(beside_python)
    monkeypatch.syspath_prepend(tmp_path)
    paths = common.child_environment()["PYTHONPATH"].split(os.pathsep)
    assert paths[:2] == [str(tmp_path), beside_python]
    # Python's own come behind these: in front of them they would hide the library of another one.
    assert not {os.path.dirname(os.__file__), *site.getsitepackages()} & set(paths)


def test_lives_are_whole_numbers_of_any_kind():
    for lives in (3, np.int64(3), np.uint8(3), np.float64(3), np.array(3), np.array([3]), 3.0):
        assert common.lives_in({"lives": lives}) == 3, repr(lives)
    for info in ({}, None, [], {"lives": None}, {"lives": "x"}, {"lives": [1, 2]}, {"lives": {}}):
        assert common.lives_in(info) is None
    assert common.lives_in({"lives": math.nan}) is None


def test_a_file_is_replaced_only_by_a_whole_one(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(common.os, "fsync", fail)
        with pytest.raises(OSError, match=r"cannot write .*file: No space left"):
            common.write_file(str(path), b"new")
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    common.write_file(str(path), b"new")
    assert path.read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "limit, cores", [("max 100000", 8), ("250000 100000", 3), ("5000 100000", 1), (None, 8)]
)
def test_a_container_may_use_what_it_is_given(monkeypatch, tmp_path, limit, cores):
    monkeypatch.setattr(common, "CPU_LIMIT", str(tmp_path / "cpu.max"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    if limit is not None:
        (tmp_path / "cpu.max").write_text(limit + "\n")
    assert common.count_cores() == cores
