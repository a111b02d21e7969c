"""Small RGB games for tests, used as `--env tests.games:Catch-v0`."""

import gymnasium
import numpy as np


class Catch(gymnasium.Env):
    """Five balls fall, one after the other; a paddle at the bottom catches (+1) or misses (-1) them.

    A perfect player scores 5, a random one about -3.
    """

    ROWS, COLUMNS, BALLS, CELL = 7, 6, 5, 14
    observation_space = gymnasium.spaces.Box(0, 255, (ROWS * CELL, COLUMNS * CELL, 3), np.uint8)
    action_space = gymnasium.spaces.Discrete(3)  # left, stay, right
    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.balls = 0
        self.paddle = int(self.np_random.integers(self.COLUMNS))
        self.drop()
        return self.render(), {}

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
        return self.render(), reward, self.balls == self.BALLS, False, {}

    def render(self):
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


for game in (Catch, Crash):
    gymnasium.register(f"{game.__name__}-v0", game)
