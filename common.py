"""Players, and what is done with them without training: stacking, scoring, files.

Nothing here imports torch: simulator processes must start fast and stay small. A network is only a
function from states to policies.
"""

import contextlib
import difflib
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import ale_py
import cv2
import gymnasium
import numpy as np

IMAGE_SIZE = (84, 84)
FRAME_HISTORY = 4
FRAME_SHAPE = (*IMAGE_SIZE, 3)
STATE_SHAPE = (*IMAGE_SIZE, 3 * FRAME_HISTORY)
MAX_EPISODE_STEPS = 10_000  # agent steps; ale-py itself sets no limit for the -v0 games
RANDOM_ACTIONS = 0.01  # share of random actions in playing and evaluation

cv2.setNumThreads(1)  # the processes share the cores; a resize is too small to share
gymnasium.register_envs(ale_py)
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner in every process


class UserError(Exception):
    """Something the user can mend, as one sentence; `code` is the exit code."""

    def __init__(self, sentence: str, code: int = 1):
        super().__init__(sentence)
        self.code = code


def make_env(env_id: str, **render) -> gymnasium.Env:
    """The gymnasium environment `env_id` (`module:id` imports its module first).

    Raises UserError where there is none, or where it does not fit: an agent here sees RGB frames
    and chooses one of a number of actions.
    """
    try:
        with warnings.catch_warnings():  # that -v0 is out of date is the user's choice
            warnings.simplefilter("ignore")
            # The checker would look at every observation of every step: a fifth of its time.
            env = gymnasium.make(env_id, disable_env_checker=True, **render)
    except Exception as error:  # whatever a game or its module does when it starts
        games = [name for name in gymnasium.registry if re.fullmatch(r"\w+(?<!Frameskip)-v0", name)]
        nearest = ", ".join(difflib.get_close_matches(env_id, games, cutoff=0.4) or games[:3])
        reason = str(error).partition("\n")[0]
        raise UserError(f"no game {env_id} ({reason}); the nearest names: {nearest}", 2) from error
    frames, actions = env.observation_space, env.action_space
    rgb = frames.dtype == np.uint8 and frames.shape is not None and frames.shape[2:] == (3,)
    if not rgb or not isinstance(actions, gymnasium.spaces.Discrete) or actions.start != 0:
        env.close()
        raise UserError(f"{env_id} is no game with RGB frames and numbered actions", 2)
    return env


class Player:
    """One game being played, as the agent sees it: resized frames, episodes started and limited.

    Frames are (84, 84, 3) uint8. Stacking them is the receiver's work.
    """

    def __init__(self, env: gymnasium.Env, max_steps: int = MAX_EPISODE_STEPS):
        self.env = env
        self.max_steps = max_steps
        self.num_actions = int(env.action_space.n)
        meanings = getattr(env.unwrapped, "get_action_meanings", list)()
        self.fires_on_reset = "FIRE" in meanings
        self.score = 0.0  # of this episode, as the game counts it
        self.length = 0  # agent steps of this episode

    def reset(self, seed: int | None = None) -> np.ndarray:
        """Start an episode; returns its first frame.

        Where the game has a FIRE action it is taken, then action 2: some games wait for it. What
        they earn is dropped.
        """
        self.score, self.length = 0.0, 0
        frame, _ = self.env.reset(seed=seed)
        for action in (1, 2) if self.fires_on_reset else ():
            frame, _, terminated, truncated, _ = self.env.step(action)
            if terminated or truncated:
                frame, _ = self.env.reset()
        return cv2.resize(frame, IMAGE_SIZE)

    def step(self, action: int) -> tuple[np.ndarray, float, bool]:
        """Take one action; returns the frame, the raw reward and whether the episode is over.

        A lost life is not the end; the limit of steps is one like any other.
        """
        frame, reward, terminated, truncated, _ = self.env.step(action)
        self.score += float(reward)
        self.length += 1
        is_over = terminated or truncated or self.length >= self.max_steps
        return cv2.resize(frame, IMAGE_SIZE), float(reward), bool(is_over)


def stack_frame(previous: np.ndarray | None, frame: np.ndarray, out: np.ndarray) -> None:
    """Write into `out` the state that follows `previous` when `frame` arrives.

    previous: (84, 84, 12) uint8, or None at the start of an episode, when the three missing frames
    are zero; frame: (84, 84, 3); out: (84, 84, 12), contiguous, another array than `previous`.
    """
    if previous is None:
        out.fill(0)
    else:  # all channels one frame down: a single copy of memory, then the newest three are wrong
        np.copyto(out.reshape(-1)[:-3], previous.reshape(-1)[3:])
    last = out.shape[-1] - 3
    cv2.mixChannels([frame], [out], [0, last, 1, last + 1, 2, last + 2])


class Episode(NamedTuple):
    """An episode that was played: its raw score and its length in agent steps."""

    score: float
    length: int
    finished: bool  # False: cut short, because the time was over


def summary(episodes: list[Episode]) -> dict[str, float]:
    """Mean, standard deviation, minimum, maximum of the scores, and how they came about."""
    scores = np.array([episode.score for episode in episodes])
    return {
        "mean": float(scores.mean()),
        "std": float(scores.std()),
        "min": float(scores.min()),
        "max": float(scores.max()),
        "episodes": len(episodes),
        "mean_length": float(np.mean([episode.length for episode in episodes])),
    }


def greedy_actions(policy: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(n,) actions: the likeliest of each policy (n, A), one in a hundred at random."""
    random = rng.random(len(policy)) < RANDOM_ACTIONS
    return np.where(random, rng.integers(policy.shape[1], size=len(policy)), policy.argmax(axis=1))


def evaluate(
    players, policy_of: Callable, episodes: int, seed: int, seconds: float
) -> Iterator[list[Episode]]:
    """Play exactly `episodes` episodes side by side; every one that starts counts.

    Yields the list of those that are done, after every step. All players step together, so that the
    network sees the same batches again and one seed gives the same scores. After half of `seconds`
    no more episodes start; after all of them those under way are cut short and count as they are.

    players: has `num_players` and `step(actions)`, which returns frames,
    rewards and is_over and starts new episodes by itself; `step(None)` starts the first ones.
    policy_of: states (n, 84, 84, 12) uint8 -> policies (n, A).
    """
    start, rng = time.monotonic(), np.random.default_rng(seed)
    n = players.num_players
    started = min(n, episodes)
    playing, fresh = np.arange(n) < started, np.ones(n, bool)
    score, length = np.zeros((2, n))
    states, spare = np.zeros((2, n, *STATE_SHAPE), np.uint8)
    done: list[Episode] = []
    frames, rewards, is_over = players.step(None)
    while playing.any():
        for i in range(n):
            stack_frame(None if fresh[i] else states[i], frames[i], spare[i])
        states, spare = spare, states
        frames, rewards, is_over = players.step(greedy_actions(policy_of(states), rng))
        score += rewards
        length += 1
        elapsed = time.monotonic() - start
        for i in np.flatnonzero(playing & (is_over | (elapsed > seconds))):
            done.append(Episode(float(score[i]), int(length[i]), bool(is_over[i])))
            playing[i] = started < episodes and elapsed < seconds / 2
            started += playing[i]
        score[is_over], length[is_over] = 0, 0
        fresh = is_over
        yield done


def write_file(path: str, save: Callable) -> None:
    """Let `save(file)` write a file that takes the place of `path` when it is whole and on disk."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
