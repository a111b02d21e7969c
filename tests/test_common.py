"""Players against the rules of the game, and scoring."""

import math
import os
import subprocess
import sys

import cv2
import gymnasium
import numpy as np
import pytest

import common
from common import Episode, Player, UserError, evaluate, make_env, summary


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
    frame = player.reset()
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
    frame = Player(env).reset()
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
        overs = [player.step(0)[2] for _ in range(common.MAX_EPISODE_STEPS)]
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
    first = player.reset(seed=3)
    expected, _ = reference.reset(seed=3)
    for action in (1, 2) if fires else ():
        expected = reference.step(action)[0]
    np.testing.assert_array_equal(first, cv2.resize(expected, (84, 84)))
    rng, lives = np.random.default_rng(0), set()
    for _ in range(300):
        action = int(rng.integers(player.num_actions))
        frame, reward, is_over = player.step(action)
        expected, expected_reward, terminated, truncated, info = reference.step(action)
        lives.add(info["lives"])
        np.testing.assert_array_equal(frame, cv2.resize(expected, (84, 84)))
        assert (reward, is_over) == (expected_reward, terminated or truncated)
        if is_over:
            break
    if env_id == "Breakout-v0":
        assert len(lives) > 1  # a life was lost, and the episode went on


def test_breakout_is_the_stochastic_v0():
    env = make_env("Breakout-v0").unwrapped
    assert env.ale.getFloat("repeat_action_probability") == 0.25
    assert gymnasium.spec("Breakout-v0").kwargs["frameskip"] == (2, 5)  # 2 to 4


class Scripted:
    """Side by side: episode k of player i lasts `length(i, k)` steps and earns 1 in each."""

    def __init__(self, num_players, length):
        self.num_players, self.length = num_players, length

    def step(self, actions):
        n = self.num_players
        if actions is None:
            self.episode, self.steps = np.zeros((2, n), int)
            return np.zeros((n, 84, 84, 3), np.uint8), np.zeros(n), np.zeros(n, bool)
        self.steps += 1
        over = np.array([self.steps[i] == self.length(i, self.episode[i]) for i in range(n)])
        self.episode += over
        self.steps[over] = 0
        return np.zeros((n, 84, 84, 3), np.uint8), np.ones(n), over


def uniform(states):
    return np.full((len(states), 4), 0.25)


def test_every_episode_that_starts_counts():
    """One player plays long episodes, the other short ones: the long one must not be dropped."""
    players = Scripted(2, lambda player, episode: 40 if player == 0 else 4)
    *_, done = evaluate(players, uniform, episodes=5, seed=0, seconds=1e9)
    assert sorted(done) == [Episode(4, 4, True)] * 4 + [Episode(40, 40, True)]
    assert summary(done)["mean"] == pytest.approx((4 * 4 + 40) / 5)
    assert summary(done)["episodes"] == 5


def test_the_states_of_an_evaluation_stack_frames_of_one_episode_only():
    frames = np.random.default_rng(0).integers(1, 256, (9, 2, 84, 84, 3), dtype=np.uint8)
    players = Scripted(2, lambda player, episode: 8 if player == 0 else 3)
    step, count, seen = players.step, 0, []

    def show(actions):
        nonlocal count
        count += 1
        return frames[count - 1], *step(actions)[1:]

    def policy_of(states):
        seen.append(states.copy())
        return uniform(states)

    players.step = show
    list(evaluate(players, policy_of, episodes=3, seed=0, seconds=1e9))
    assert len(seen) >= 6
    for i, states in enumerate(seen):
        for player, start in ((0, 0), (1, i - i % 3)):
            for j, frame in zip(range(i - 3, i + 1), states[player], strict=True):
                expected = frames[j, player] if j >= start else np.zeros((84, 84, 3))
                np.testing.assert_array_equal(frame, expected)


def test_more_players_than_episodes():
    players = Scripted(4, lambda player, episode: 3 + player)
    *_, done = evaluate(players, uniform, episodes=2, seed=0, seconds=1e9)
    assert done == [Episode(3, 3, True), Episode(4, 4, True)]


def test_when_the_time_is_over_episodes_are_cut_short():
    players = Scripted(3, lambda player, episode: 10**9)
    *_, done = evaluate(players, uniform, episodes=30, seed=0, seconds=0.2)
    assert len(done) == 3 and not any(episode.finished for episode in done)
    assert all(episode.score == episode.length > 0 for episode in done)


def test_actions_are_greedy_but_for_one_in_a_hundred():
    policy = np.tile([0.1, 0.2, 0.6, 0.1], (100_000, 1))
    actions = common.greedy_actions(policy, np.random.default_rng(0))
    others = np.bincount(actions, minlength=4)[[0, 1, 3]]
    np.testing.assert_allclose(others, 250, atol=5 * np.sqrt(250))


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


def test_files_that_belong_together_take_their_places_together(tmp_path):
    (tmp_path / "video").write_bytes(b"frames")
    one, two, copied = (str(tmp_path / name) for name in ("one", "two", "copied"))
    common.write_files({one: b"1", copied: str(tmp_path / "video"), two: b"2"})
    assert (tmp_path / "copied").read_bytes() == b"frames"
    with pytest.raises(OSError, match=r"cannot write .*two: No such file"):
        common.write_files({one: b"new", two: str(tmp_path / "nowhere")})
    assert (tmp_path / "one").read_bytes() == b"1" and (tmp_path / "two").read_bytes() == b"2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copied", "one", "two", "video"]


@pytest.mark.parametrize(
    "limit, cores", [("max 100000", 8), ("250000 100000", 3), ("5000 100000", 1), (None, 8)]
)
def test_a_container_may_use_what_it_is_given(monkeypatch, tmp_path, limit, cores):
    monkeypatch.setattr(common, "CPU_LIMIT", str(tmp_path / "cpu.max"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    if limit is not None:
        (tmp_path / "cpu.max").write_text(limit + "\n")
    assert common.count_cores() == cores
