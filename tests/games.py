"""Small RGB games for tests, used as `--env tests.games:Catch-v0`."""

import os
import sys
import time

import gymnasium
import numpy as np


class Catch(gymnasium.Env):
    """Five balls fall, one after the other; a paddle catches (+1) or misses (-1) them.

    A perfect player scores 5, a random one about -3.
    """

    ROWS, COLUMNS, BALLS, CELL = 7, 6, 5, 14
    observation_space = gymnasium.spaces.Box(0, 255, (ROWS * CELL, COLUMNS * CELL, 3), np.uint8)
    action_space = gymnasium.spaces.Discrete(3)  # left, stay, right

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.balls = 0
        self.paddle = int(self.np_random.integers(self.COLUMNS))
        self.drop()
        return self.draw(), {}

    def drop(self):
        self.row, self.column = 0, int(self.np_random.integers(self.COLUMNS))

    def step(self, action):
        self.paddle = min(max(self.paddle + int(action) - 1, 0), self.COLUMNS - 1)
        self.row += 1
        reward = 0.0
        if self.row == self.ROWS - 1:
            reward = 1.0 if self.paddle == self.column else -1.0
            self.balls += 1
            self.drop()
        return self.draw(), reward, self.balls == self.BALLS, False, {}

    def draw(self):
        cells = np.zeros((self.ROWS, self.COLUMNS, 3), np.uint8)
        cells[self.ROWS - 1, self.paddle] = (0, 200, 0)
        cells[self.row, self.column] = (255, 255, 255)
        return cells.repeat(self.CELL, axis=0).repeat(self.CELL, axis=1)


class Crash(Catch):
    """A game that breaks after some steps."""

    def step(self, action):
        if self.balls == 2:
            raise RuntimeError("the game broke")
        return super().step(action)


class Chatty(Catch):
    """Prints where simulators once told their parent how they are."""

    def __init__(self):
        os.write(1, b"\nhello there\n")


class NoStart(Catch):
    """A game that simulators cannot start."""

    def __init__(self):
        if sys.argv[0].endswith("simulator.py"):
            raise RuntimeError("no ROM")


class Stuck(Catch):
    """Does not get through its own start."""

    def __init__(self):
        if sys.argv[0].endswith("simulator.py"):
            time.sleep(3600)


class Windowed(Catch):
    """A game with a window; the environment says after how many steps its user closes it."""

    metadata = {"render_modes": ["human"]}  # noqa: RUF012

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        self.left = int(os.environ.get("CLOSE_WINDOW", "1000")) if render_mode else 1000

    def step(self, action):
        self.left -= 1
        if not self.left:
            os._exit(0)  # as SDL does when its window is closed
        return super().step(action)


class Count(gymnasium.Env):
    """Frames carry what they belong to: game, episode, step and last action; so do rewards.

    Episodes last 2 to 9 steps. reward(step, action) is known, so that a reward or a state in the
    wrong place shows. Pixel (0, 0) of a frame is (game, episode % 250, 10 * step + last action).
    """

    observation_space = gymnasium.spaces.Box(0, 255, (84, 84, 3), np.uint8)
    action_space = gymnasium.spaces.Discrete(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.game, self.episode = seed % 251, 0
        self.episode += 1
        self.steps, self.last = 0, 0
        self.end = 2 + int(self.np_random.integers(8))
        return self.draw(), {}

    def step(self, action):
        reward = self.reward(self.steps, int(action))
        self.steps, self.last = self.steps + 1, int(action)
        return self.draw(), reward, self.steps == self.end, False, {}

    def draw(self):
        pixel = (self.game, self.episode % 250, 10 * self.steps + self.last)
        return np.broadcast_to(np.array(pixel, np.uint8), (84, 84, 3)).copy()

    @staticmethod
    def reward(step, action):
        return ((3 * step + action) % 7 - 3) / 4


class Recorded(gymnasium.Env):
    """A game that costs nothing: the same few frames again and again, 1,000 steps an episode."""

    observation_space = gymnasium.spaces.Box(0, 255, (84, 84, 3), np.uint8)
    action_space = gymnasium.spaces.Discrete(4)
    frames = np.random.default_rng(0).integers(0, 256, (16, 84, 84, 3), np.uint8)

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return self.frames[0], {}

    def step(self, action):
        self.steps += 1
        return self.frames[self.steps % 16], 1.0, self.steps == 1000, False, {}


for game in (Catch, Chatty, Crash, NoStart, Stuck, Windowed, Recorded, Count):
    gymnasium.register(f"{game.__name__}-v0", game)
