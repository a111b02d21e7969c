"""Small RGB games for tests, used as `--env tests.games:Catch-v0`."""

import ctypes
import multiprocessing
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time

import ale_py
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


class Lives(Catch):
    """Three lives, of which every fourth step takes one; the last one ends the episode."""

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return super().reset(seed=seed)[0], {"lives": 3}

    def step(self, action):
        self.steps += 1
        lives = 3 - self.steps // 4
        return super().step(action)[0], 0.0, lives == 0, False, {"lives": lives}


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
    wrong place shows. The first pixels of rows 0 to 2 are (step, last action, steps of the whole
    episode), the bytes of the episode's number, and those of the game's.
    """

    observation_space = gymnasium.spaces.Box(0, 255, (84, 84, 3), np.uint8)
    action_space = gymnasium.spaces.Discrete(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.game, self.episode = seed % 2**24, 0
        self.episode += 1
        self.steps, self.last = 0, 0
        self.end = 2 + int(self.np_random.integers(8))
        return self.draw(), {}

    def step(self, action):
        reward = self.reward(self.steps, int(action))
        self.steps, self.last = self.steps + 1, int(action)
        return self.draw(), reward, self.steps == self.end, False, {}

    def draw(self):
        frame = np.zeros((84, 84, 3), np.uint8)
        frame[0, 0] = (self.steps, self.last, self.end)
        frame[1, 0] = list(self.episode.to_bytes(3))
        frame[2, 0] = list(self.game.to_bytes(3))
        return frame

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


class Steady(gymnasium.Env):
    """Twenty steps that earn 1 each: what games are made of that go wrong in one way."""

    observation_space = gymnasium.spaces.Box(0, 255, (84, 84, 3), np.uint8)
    action_space = gymnasium.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.draw(), {}

    def step(self, action):
        self.steps += 1
        return self.draw(), self.reward(), self.steps == 20, False, {}

    def draw(self):
        return np.full((84, 84, 3), self.steps, np.uint8)

    def reward(self):
        return 1.0


class WithThread(Steady):
    """Draws in a thread that its constructor starts."""

    def __init__(self):
        self.work, self.done = queue.Queue(), queue.Queue()
        threading.Thread(target=self.draw_all, daemon=True).start()

    def draw_all(self):
        while True:
            self.done.put(np.full((84, 84, 3), self.work.get(), np.uint8))

    def draw(self):
        self.work.put(self.steps)
        return self.done.get(timeout=20)


EMULATOR = """import sys
number = 0
for line in sys.stdin:
    number = 0 if line == "reset\\n" else number + 1
    print(number, flush=True)
import time; time.sleep(100)
"""


class WithProcess(Steady):
    """Its emulator is a process, which ends when it is closed and not before."""

    def __init__(self):
        command = [sys.executable, "-c", EMULATOR, f"emulator of {os.environ.get('TMPDIR')}"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.emulator = subprocess.Popen(command, text=True, **pipes)

    def ask(self, word):
        self.emulator.stdin.write(word + "\n")
        self.emulator.stdin.flush()
        return int(self.emulator.stdout.readline())

    def reset(self, *, seed=None, options=None):
        assert self.ask("reset") == 0
        return super().reset(seed=seed)

    def step(self, action):
        assert self.ask("step") == self.steps + 1
        return super().step(action)

    def close(self):
        self.emulator.kill()
        self.emulator.communicate()


class OwnLuck(Steady):
    """Its generator is its constructor's: no seed reaches it. Its first reward tells it."""

    def __init__(self):
        self.luck = float(np.random.default_rng().integers(2**40))

    def reward(self):
        return self.luck


class GlobalLuck(Steady):
    """Takes its luck from the generators that all of a process share."""

    def reward(self):
        return float(random.randrange(1000) + 1000 * np.random.randint(1000))  # noqa: NPY002


class OnePerProcess(Steady):
    """A process that has one cannot make another before that is closed."""

    there = False

    def __init__(self):
        if OnePerProcess.there:
            raise RuntimeError("one emulator per process")
        OnePerProcess.there = True

    def close(self):
        OnePerProcess.there = False


class NotFinite(Steady):
    """Its fifth step earns what the environment says: nan or inf."""

    def reward(self):
        return float(os.environ.get("REWARD", "nan")) if self.steps == 5 else 1.0


class OtherFrames(Steady):
    """Its frames are of the type that the environment says, and in grey if it says so."""

    def draw(self):
        frame = super().draw().astype(os.environ["FRAME_TYPE"])
        return frame[..., 0] if "GREY" in os.environ else frame


class Forks(Steady):
    """Forks a worker, which it ends when it is closed."""

    def __init__(self):
        fork = multiprocessing.get_context("fork")
        self.worker = fork.Process(target=time.sleep, args=(60,), daemon=True)
        self.worker.start()

    def close(self):
        self.worker.terminate()
        self.worker.join()


class SlowReset(Steady):
    """A reset takes half a second; all players end together."""

    def reset(self, *, seed=None, options=None):
        time.sleep(0.5)
        return super().reset(seed=seed)


class Noisy(Steady):
    """Prints a line in every step, and one of its own in its last."""

    def step(self, action):
        print("a line that says nothing, as it is said in every step of this game " * 10)
        if self.steps == 19 and "DOOMED" in os.environ:
            print("these are the last words", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


class Doomed(Steady):
    """Is killed from outside in its tenth step, as by a limit of memory."""

    def step(self, action):
        if self.steps == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


class StuckInC(Steady):
    """Hangs in its tenth step in C code, which lets no other thread of Python run."""

    def step(self, action):
        if self.steps == 10:
            ctypes.PyDLL(None).sleep(3600)
        return super().step(action)


class BrokenInC(StuckInC):
    """Its tenth step fails, and then it hangs when it is closed."""

    def step(self, action):
        if self.steps == 10:
            raise RuntimeError("the emulator is gone")
        return super().step(action)

    def close(self):
        ctypes.PyDLL(None).sleep(3600)


class Rich(Steady):
    """Scores in the millions."""

    def reward(self):
        return 123456.0


class Slow(Steady):
    """Has a speed and a limit of its own."""

    metadata = {"render_modes": [], "render_fps": 7}  # noqa: RUF012


class OwnSignals(Steady):
    """Handles signals as it likes, as engines do, and goes to a directory of its own."""

    def __init__(self):
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, lambda *_: print("the game goes on"))
        os.chdir("/")


class Exits(Steady):
    """Ends its program in its tenth step, and when it is closed."""

    def step(self, action):
        if self.steps == 10:
            sys.exit(0)
        return super().step(action)

    def close(self):
        sys.exit(5)


class ArrayReward(Steady):
    """Its reward is an array of one."""

    def reward(self):
        return np.ones(1)


class TellsSeeds(Steady):
    """Writes the seeds that it is reset with to the file that the environment names."""

    def reset(self, *, seed=None, options=None):
        if seed is not None and "SEEDS" in os.environ:
            with open(os.environ["SEEDS"], "a") as file:
                file.write(f"{seed}\n")
        return super().reset(seed=seed)


class Chosen(gymnasium.ActionWrapper):
    """A game of ale-py with a choice of its actions, in an order of its own."""

    def __init__(self, env, actions):
        super().__init__(env)
        self.actions, self.action_space = actions, gymnasium.spaces.Discrete(len(actions))

    def action(self, action):
        return self.actions[action]


def pong_of_two_actions(**how):
    gymnasium.register_envs(ale_py)
    return Chosen(gymnasium.make("ALE/Pong-v5", **how), (2, 3))


def sticky_breakout(**how):
    gymnasium.register_envs(ale_py)
    return gymnasium.wrappers.StickyAction(gymnasium.make("ALE/Breakout-v5", **how), 0.5)


def breakout_reordered(**how):
    gymnasium.register_envs(ale_py)
    return Chosen(gymnasium.make("ALE/Breakout-v5", **how), (3, 2, 0, 1))


GAMES = (Catch, Chatty, Crash, NoStart, Stuck, Windowed, Recorded, Count, WithThread, WithProcess)
GAMES += (OwnLuck, GlobalLuck, OnePerProcess, NotFinite, SlowReset, Noisy, Doomed, StuckInC, Rich)
GAMES += (BrokenInC, TellsSeeds, OwnSignals, Exits, ArrayReward, Lives, OtherFrames, Forks)
for game in GAMES:
    gymnasium.register(f"{game.__name__}-v0", game)
gymnasium.register("Slow-v0", Slow, max_episode_steps=6)
gymnasium.register("Slow-v2", Slow, max_episode_steps=8)
gymnasium.register("PongOfTwoActions-v0", pong_of_two_actions)
gymnasium.register("StickyBreakout-v0", sticky_breakout)
gymnasium.register("BreakoutReordered-v0", breakout_reordered)
