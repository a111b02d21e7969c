"""Players, episodes, videos and submissions, and small helpers for processes and files.

A player is a gymnasium environment as an agent sees it. Nothing here imports torch, because
simulator processes must start fast and stay small, and nothing here works with a network.
"""

import contextlib
import copy
import datetime
import difflib
import fcntl
import functools
import glob
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import site
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import ale_py
import cv2
import gymnasium
import numpy as np

IMAGE_SIZE = (84, 84)
FRAME_SHAPE = (*IMAGE_SIZE, 3)  # what a player shows; model.FRAME_SHAPE is what a network takes
MAX_EPISODE_STEPS = 10_000  # agent steps; ale-py itself sets no limit for the -v0 games
RANDOM_ACTIONS = 0.01  # share of random actions in playing and evaluation
CPU_LIMIT = "/sys/fs/cgroup/cpu.max"  # of a container: microseconds of all cores, in so many
DEFAULT_FPS = 20  # agent steps per second of a game that says nothing
PERMANENT_FAILURE = 2  # exit code of a program that would end in the same way again
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # that ask a program to end
PREFIX = "batch-a3c-"  # of the names of private directories

cv2.setNumThreads(1)  # the processes share the cores; a resize is too small to share
gymnasium.register_envs(ale_py)
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner in every process


class Stopped(SystemExit):
    """A signal ends this program; a game that calls sys.exit does not raise this."""


class UserError(Exception):
    """Something the user can mend, as one sentence; `code` is the exit code."""

    def __init__(self, sentence: str, code: int = 1):
        super().__init__(sentence)
        self.code = code


def whole(text: str) -> int:
    """A whole number from 0, of 32 bits; the type of a command-line option."""
    if not 0 <= int(text) < 2**32:
        raise ValueError
    return int(text)


def count(text: str) -> int:
    """A whole number from 1; the type of a command-line option."""
    if whole(text) == 0:
        raise ValueError
    return int(text)


def count_cores() -> int:
    """Cores that this process may use, by its affinity and by the limit of its container."""
    affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if affinity else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError), open(CPU_LIMIT) as file:  # ValueError: "max"
        quota, period = map(int, file.read().split())
        cores = min(cores, max(1, -(-quota // period)))
    return cores


# Signals and processes


def in_main_thread() -> bool:
    """Whether this thread may handle signals; elsewhere they are the caller's business."""
    return threading.current_thread() is threading.main_thread()


def on_signals(handler: Callable, signals: Sequence[int] = SIGNALS) -> None:
    """Let signals call `handler`, except SIGHUP where it is ignored, as under nohup."""
    if not in_main_thread():
        return
    for signum in signals:
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, handler)


def end_forks_on_signals() -> None:
    """Let what a game forks, as multiprocessing does, end on SIGTERM and SIGHUP.

    With handlers of this program it might not. Signals wait from before the fork until the child
    has none: one in between would be lost, and whoever ends the child would wait for ever.
    """
    before = threading.local()

    def block() -> None:
        before.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS[1:])

    def restore() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before.mask)

    def restore_in_child() -> None:
        for signum in SIGNALS[1:]:
            if callable(signal.getsignal(signum)):
                signal.signal(signum, signal.SIG_DFL)
        restore()

    os.register_at_fork(before=block, after_in_parent=restore, after_in_child=restore_in_child)


end_forks_on_signals()


def raise_stopped(signum: int, frame) -> None:
    """Handle a signal that ends this program."""
    raise Stopped(128 + signum)


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGHUP wait for the end of this block."""
    caught: list[int] = []
    try:
        with signals_kept():
            on_signals(lambda signum, frame: caught.append(signum))
            yield
    finally:
        for signum in caught[:1]:
            signal.raise_signal(signum)


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    """Handle signals at the end of this block as before it: a game may install handlers."""
    handlers = {signum: signal.getsignal(signum) for signum in SIGNALS if in_main_thread()}
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            if handler is not None:  # None: a handler that is not Python's
                signal.signal(signum, handler)


def end_with_parent(end: Callable, *args) -> None:
    """Wait until standard input is closed, then call `end(*args)`; runs in a thread of its own."""
    while os.read(0, 1024):
        pass
    end(*args)


def end_processes(processes: list[subprocess.Popen], seconds: float) -> None:
    """Close the standard inputs of processes, and kill those that have not ended in time."""
    for process in processes:
        process.stdin.close()
    deadline = time.monotonic() + seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.wait()


def child_environment() -> dict[str, str]:
    """The environment of a Python program that finds the same modules as this process."""
    paths = [path or os.getcwd() for path in sys.path]
    library = sysconfig.get_path("stdlib")
    of_python = {library, os.path.join(library, "lib-dynload"), *site.getsitepackages()}
    own = [path for path in paths if path not in of_python]
    return os.environ | {"PYTHONPATH": os.pathsep.join(own)}


def directory_kept() -> contextlib.chdir:
    """Be in the same directory at the end of this block: a game may go to another one."""
    try:
        return contextlib.chdir(os.getcwd())
    except FileNotFoundError as error:
        raise UserError("the current directory is gone: go to another one", 2) from error


class PrivateDirectory:
    """A directory for sockets and logs that only its owner can enter.

    `close` removes it. After a SIGKILL the next start does: a directory whose lock nobody holds is
    a leftover.
    """

    def __init__(self):
        remove_leftovers()
        self.path = tempfile.mkdtemp(prefix=PREFIX)  # mode 0700
        self.lock = os.open(self.path, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system without locks: nothing is removed there
            fcntl.flock(self.lock, fcntl.LOCK_EX)

    def close(self) -> None:
        """Remove the directory."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.lock)


def remove_leftovers() -> None:
    """Remove the private directories of this user whose process was killed.

    Anything else with such a name stays: a link, a pipe (opening one would wait for its other end),
    and what belongs to another user.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK
    for path in glob.glob(os.path.join(glob.escape(tempfile.gettempdir()), PREFIX + "*")):
        with contextlib.suppress(OSError):  # it belongs to somebody else, or is gone
            directory = os.open(path, flags)
            try:
                found = os.stat(directory)
                if found.st_uid != os.geteuid() or time.time() - found.st_mtime < 10:
                    continue  # the second: its process has just made it, and not locked it yet
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(directory)


# Files


def hidden(path: str, suffix: str) -> str:
    """Where a file is written until it is whole: beside `path`, where nobody looks for it."""
    directory, name = os.path.split(path)
    return os.path.join(directory, f".{name}.{suffix}")


def write_file(path: str, content: bytes) -> None:
    """Write a file that replaces `path` once it is whole and on disk.

    Raises OSError with a sentence if that fails; the old file is still there then.
    """
    temporary = hidden(path, "tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):  # it is there only if something went wrong
            os.unlink(temporary)


@contextlib.contextmanager
def output_directory(path: str) -> Iterator[None]:
    """Make an output directory, or take an empty one.

    If it is empty at the end of the block, what was made here is removed again, so that the same
    command can be repeated. Raises UserError if the directory cannot be used.
    """
    made, directory = [], os.path.abspath(path)
    while not os.path.lexists(directory):
        made.append(directory)
        directory = os.path.dirname(directory)
    try:
        try:
            os.makedirs(path, exist_ok=True)
            if os.listdir(path):
                raise UserError(f"{path} is not empty: name another --output", 2)
            if not os.access(path, os.W_OK):
                raise UserError(f"cannot write to {path}: it is read-only", 2)
        except OSError as error:
            raise UserError(f"cannot write to {path}: {error.strerror}", 2) from error
        yield
    finally:
        for directory in made:  # the innermost first; one that is not empty stays
            with contextlib.suppress(OSError):
                os.rmdir(directory)


def number(value) -> str:
    """A value as people read it: whole numbers whole, large ones never as a power of ten."""
    if value is None:
        return "-"
    if not isinstance(value, float) or not np.isfinite(value):
        return str(value)
    if value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return f"{value:.2f}" if abs(value) >= 10_000 else f"{value:.6g}"


def table(rows: dict) -> str:
    """Names and numbers, one pair a line."""
    from tabulate import tabulate  # simulators do not need it

    lines = [(name, number(value)) for name, value in rows.items()]
    return tabulate(lines, disable_numparse=True, colalign=("left", "right"))


# Games


def make_env(env_id: str, window: bool = False) -> gymnasium.Env:
    """The gymnasium environment `env_id` (`module:id` imports its module first).

    Raises UserError where there is none, or where it does not fit: an agent here sees RGB frames
    and chooses one of a number of actions. With `window` it shows itself, at the game's speed.
    """
    render = {"render_mode": "human"} if window else {}
    if window and sys.platform == "linux":  # without a display SDL would play where nobody sees it
        os.environ.setdefault("SDL_VIDEODRIVER", "wayland,x11")
    try:
        with signals_kept(), warnings.catch_warnings():  # that -v0 is out of date is known
            warnings.simplefilter("ignore")
            # The checker would look at every observation of every step: a fifth of its time.
            env = gymnasium.make(env_id, disable_env_checker=True, **render)
    except (gymnasium.error.UnregisteredEnv, ModuleNotFoundError) as error:
        games = [name for name in gymnasium.registry if re.fullmatch(r"\w+(?<!Frameskip)-v0", name)]
        nearest = ", ".join(difflib.get_close_matches(env_id, games, cutoff=0.4) or games[:3])
        reason = str(error).partition("\n")[0]
        raise UserError(f"no game {env_id} ({reason}); the nearest names: {nearest}", 2) from error
    except Stopped:
        raise
    except (Exception, SystemExit) as error:  # whatever a game or its module does when it starts
        if window:
            raise UserError(f"no window can be opened for {env_id}: {error}") from error
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{env_id} does not start: {reason}", 2) from error
    frames, actions = env.observation_space, env.action_space
    rgb = frames.dtype == np.uint8 and frames.shape is not None and frames.shape[2:] == (3,)
    if not rgb or not isinstance(actions, gymnasium.spaces.Discrete) or actions.start != 0:
        env.close()
        raise UserError(f"{env_id} is no game with RGB frames and numbered actions", 2)
    return env


@contextlib.contextmanager
def failures_named(env_id: str) -> Iterator[None]:
    """Make a sentence, a UserError, of whatever a game raises in this process."""
    try:
        yield
    except (UserError, Stopped):
        raise
    except (Exception, SystemExit) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{env_id} failed: {type(error).__name__}: {reason}") from error


def close_env(env: gymnasium.Env) -> None:
    """Close an environment, whatever that makes of it: nothing needs it any more."""
    with contextlib.suppress(UserError), failures_named("it"):
        env.close()


class Game(NamedTuple):
    """What an environment says of itself."""

    env_id: str  # as it is played: of `Breakout` it is `Breakout-v4`
    num_actions: int
    one_per_process: bool  # a process that has one cannot make another


@functools.cache
def describe(env_id: str) -> Game:
    """Make an environment and ask it; UserError as of make_env."""
    one_per_process = True
    with directory_kept():
        env = make_env(env_id)
        with contextlib.suppress(UserError):
            close_env(make_env(env_id))
            one_per_process = False
        close_env(env)
    module, colon, _ = env_id.removeprefix("ale_py:").rpartition(":")  # ale_py's are there
    name = module + colon + env.unwrapped.spec.id
    return Game(name, int(env.action_space.n), one_per_process)


def is_originals(env: gymnasium.Env) -> bool:
    """Whether this is ale-py's `Breakout-v0`, or one like it: the original's games.

    ale-py sets no limit of steps for them.
    """
    spec = env.spec
    if spec is None or spec.entry_point != "ale_py.env:AtariEnv":
        return False
    game = "".join(word.capitalize() for word in spec.kwargs["game"].split("_"))
    return spec.id == f"{game}-v0"


def frame_rate(env: gymnasium.Env) -> float:
    """Agent steps per second when a game is played at its own speed."""
    try:
        fps = float((env.metadata or {})["render_fps"])
    except (LookupError, TypeError, ValueError):
        fps = 0.0
    atari = env.unwrapped
    if isinstance(atari, ale_py.AtariEnv) and fps in (0, atari.metadata["render_fps"]):
        # It says the same whatever a step is: the console has 60 frames per second.
        skip = atari._frameskip
        fps = 60 / (skip if isinstance(skip, int) else np.mean(range(*skip)))
        while isinstance(env, gymnasium.Wrapper):
            if isinstance(env, gymnasium.wrappers.MaxAndSkipObservation):
                fps /= env._skip
            elif isinstance(env, gymnasium.wrappers.AtariPreprocessing):
                fps /= env.frame_skip
            env = env.env
    return fps if 0 < fps < math.inf else DEFAULT_FPS


def action_meanings(env: gymnasium.Env) -> list[str]:
    """What the actions of an environment mean, as it is wrapped; [] where it does not say."""
    meanings: list[str] = []
    if hasattr(env, "get_action_meanings"):
        meanings = list(env.get_action_meanings())
    elif isinstance(env, gymnasium.ActionWrapper):
        inner = action_meanings(env.env)
        if inner:
            # It may remember what it was asked: each question is for a copy of its own.
            actions = [copy.copy(env).action(action) for action in range(env.action_space.n)]
            meanings = [inner[action] for action in actions]
    elif isinstance(env, gymnasium.Wrapper):
        meanings = action_meanings(env.env)
    return meanings if len(meanings) == env.action_space.n else []


def start_actions(env: gymnasium.Env) -> list[int]:
    """The actions that an episode begins with: FIRE and the next one, where the game has FIRE.

    The original takes actions 1 and 2, which are FIRE and the first direction in its games.
    """
    try:
        meanings, innermost = action_meanings(env), action_meanings(env.unwrapped)
    except Exception:  # whatever a wrapper makes of an action that is not played
        return []
    if "FIRE" not in meanings:
        return []
    direction = next((m for m in innermost if m not in ("NOOP", "FIRE")), None)
    return [meanings.index(m) for m in ("FIRE", direction) if m in meanings]


def seed_games(seed: int) -> None:
    """Seed the generators of this process that a game may use, though it has one of its own."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


class Player(gymnasium.Wrapper):
    """A game as the agent sees it: resized frames, episodes that FIRE starts and a limit ends.

    Observations are (84, 84, 3) uint8; stacking four of them is the receiver's work.
    """

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        self.observation_space = gymnasium.spaces.Box(0, 255, FRAME_SHAPE, np.uint8)
        self.max_steps = MAX_EPISODE_STEPS if is_originals(env) else math.inf
        self.name = env.spec.id if env.spec else "the game"
        self.num_actions = int(env.action_space.n)
        self.start_actions = start_actions(env)
        self.score = 0.0  # of this episode, as the game counts it
        self.length = 0  # agent steps of this episode
        self.lives: int | None = None  # that are left, where the game tells
        self.life_lost = False  # in the last step
        self.screen = np.empty(0)  # the newest frame, as the game gave it

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Start an episode; returns its first frame and what the game says beside it.

        Some games wait for FIRE: see `start_actions`. The rewards of these actions are dropped.
        UserError if the frame is not RGB in uint8.
        """
        self.score, self.length, self.life_lost = 0.0, 0, False
        self.screen, info = self.env.reset(seed=seed, options=options)
        for action in self.start_actions:
            self.screen, _, terminated, truncated, info = self.env.step(action)
            if terminated or truncated:
                self.screen, info = self.env.reset()
        self.lives = lives_in(info)
        frame = np.asarray(self.screen)
        if frame.dtype not in (np.uint8, bool) or frame.ndim != 3 or frame.shape[2] != 3:
            kind = f"{frame.dtype} {frame.shape}"
            text = f"{self.name}: a frame is {kind}, not uint8 (height, width, 3)"
            raise UserError(text, PERMANENT_FAILURE)
        return cv2.resize(self.screen, IMAGE_SIZE), info

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Take one action; returns frame, raw reward, terminated, truncated and info.

        A lost life does not end the episode. The limit of steps truncates it. UserError if the
        reward or the score is not finite.
        """
        self.screen, reward, terminated, truncated, info = self.env.step(action)
        try:
            reward = float(reward)
        except TypeError:  # some games give an array of one
            reward = float(np.asarray(reward).item())
        self.score += reward
        self.length += 1
        if not math.isfinite(reward) or not math.isfinite(self.score):
            place = f"in step {self.length} of an episode"
            raise UserError(f"{self.name}: the reward is {reward} {place}", PERMANENT_FAILURE)
        lives = lives_in(info)
        self.life_lost = lives is not None and self.lives is not None and lives < self.lives
        self.lives = lives
        truncated = bool(truncated) or self.length >= self.max_steps
        return cv2.resize(self.screen, IMAGE_SIZE), reward, bool(terminated), truncated, info


def lives_in(info) -> int | None:
    """The number of lives that a game says are left, or None if it says nothing of them."""
    lives = info.get("lives") if isinstance(info, dict) else None
    if lives is None or isinstance(lives, int):
        return lives
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        return int(np.asarray(lives).item())
    return None


# Episodes, videos and submissions


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


class Video:
    """An .mp4 that browsers play, encoded while it is recorded.

    It gets its name when it is finished. Raises OSError if that is not possible.
    """

    def __init__(self, path: str, screen: np.ndarray, fps: float):
        import imageio_ffmpeg  # simulators do not need it

        logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)  # it may resize by a pixel
        self.path, self.partial = path, hidden(path, "partial.mp4")
        self.num_frames = 0
        height, width = screen.shape[:2]
        options = {"fps": fps, "macro_block_size": 2, "ffmpeg_log_level": "quiet"}
        self.encoder = {
            "backend": "ffmpeg",
            "version": imageio_ffmpeg.get_ffmpeg_version(),
            "cmdline": ["imageio_ffmpeg.write_frames", f"{width}x{height}", json.dumps(options)],
        }
        # ffmpeg takes a name with a colon for a protocol, and one with a dash for an option.
        self.frames = imageio_ffmpeg.write_frames(
            f"file:{self.partial}",
            (width, height),
            output_params=["-movflags", "+faststart"],
            **options,
        )
        self.frames.send(None)

    def write(self, screen: np.ndarray) -> None:
        """Add a frame (rows, columns, 3) uint8."""
        try:
            self.frames.send(np.ascontiguousarray(screen))
        except OSError as error:
            raise OSError(f"cannot write {self.path}: the encoder has ended") from error
        self.num_frames += 1

    def finish(self) -> None:
        """Give the file its name."""
        import imageio_ffmpeg

        self.frames.close()
        try:
            encoded, _ = imageio_ffmpeg.count_frames_and_secs(f"file:{self.partial}")
        except RuntimeError:  # it is no video: the disk is full, for example
            encoded = 0
        if encoded != self.num_frames:
            what = f"it has {encoded} of {self.num_frames} frames"
            raise OSError(f"cannot write {self.path}: {what}")
        os.replace(self.partial, self.path)

    def drop(self) -> None:
        """End the encoder, and remove the file, whether it has its name already or not."""
        self.frames.close()
        for path in (self.partial, self.path):
            with contextlib.suppress(OSError):
                os.unlink(path)


class Recorder:
    """A player of this process, as evaluations want one, that records some of its episodes.

    path_of: episode, counted from 0 -> path of its .mp4, or None. A video has one frame per agent
    step, what the game showed after it.
    """

    num_players = 1

    def __init__(self, env_id: str, seed: int, path_of: Callable[[int], str | None]):
        seed_games(seed)
        self.env_id = env_id
        self.player = Player(make_env(env_id))
        self.fps = frame_rate(self.player.env)
        self.seed, self.path_of = seed, path_of
        self.video: Video | None = None
        self.finished: dict[int, Video] = {}  # by episode
        self.replay: int | None = None  # the episode of replay.mp4
        self.times = [time.time()]  # of the first reset, and of the end of each episode

    def step(self, actions: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Act, (1,), or start (None): frames (1, 84, 84, 3), rewards (1,), is_over (1,)."""
        if actions is None:
            with failures_named(self.env_id):
                frame, _ = self.player.reset(seed=self.seed)
            return frame[None], np.zeros(1), np.zeros(1, bool)
        episode = len(self.times) - 1
        path = self.path_of(episode)
        if path and self.player.length == 0:
            self.video = Video(path, self.player.screen, self.fps)
        with failures_named(self.env_id):
            frame, reward, terminated, truncated, _ = self.player.step(int(actions[0]))
        if self.video:
            self.video.write(self.player.screen)
        is_over = terminated or truncated
        if is_over:
            with failures_named(self.env_id):
                frame, _ = self.player.reset()
            now = time.time()  # an interrupt here drops the episode
            if self.video:
                self.video.finish()
                self.finished[episode], self.video = self.video, None
            self.times.append(now)
        return frame[None], np.array([reward]), np.array([is_over])

    def close(self) -> None:
        """Drop what is not finished."""
        if self.video:
            self.video.drop()
        close_env(self.player)


def results(env_id: str, episodes: list[Episode]) -> dict:
    """What results.json says of an evaluation: Hugging Face's keys, and every episode."""
    scores = summary(episodes)
    return {
        "env_id": env_id,
        "mean_reward": scores["mean"],
        "std_reward": scores["std"],
        "n_evaluation_episodes": len(episodes),
        "is_deterministic": False,
        "eval_datetime": datetime.datetime.now(datetime.UTC).isoformat(),
        "min_reward": scores["min"],
        "max_reward": scores["max"],
        "episode_rewards": [episode.score for episode in episodes],
        "episode_lengths": [episode.length for episode in episodes],
    }


def model_card(result: dict, model: str) -> str:
    """README.md of a Hugging Face model repository; its front matter is JSON, a part of YAML."""
    env_id = result["env_id"]
    score = f"{result['mean_reward']:.2f} +/- {result['std_reward']:.2f}"
    evaluation = {
        "task": {"type": "reinforcement-learning", "name": "reinforcement-learning"},
        "dataset": {"name": env_id, "type": env_id},
        "metrics": [
            {"type": "mean_reward", "value": score, "name": "mean_reward", "verified": False}
        ],
    }
    front = {
        "library_name": "pytorch",
        "tags": [env_id, "deep-reinforcement-learning", "reinforcement-learning", "atari", "a3c"],
        "model-index": [{"name": "Batch-A3C", "results": [evaluation]}],
    }
    return f"""---
{json.dumps(front, indent=2)}
---

# Batch-A3C plays {env_id}

Mean score {score} over {result["n_evaluation_episodes"]} episodes, raw as the game counts them.
The agent takes the likeliest action, and one in a hundred at random. `replay.mp4` is the best
episode that was recorded, `{model}` holds the weights with tensorpack's names and layouts:

    ./train_atari.py --task play --env {env_id} --load {model}
"""


def write_json(directory: str, name: str, content) -> None:
    """Write a JSON file."""
    write_file(os.path.join(directory, name), json.dumps(content, indent=1).encode())


def write_submission(
    directory: str, recorder: Recorder, episodes: list, model: str, config: dict, weights: bytes
) -> None:
    """Write everything beside the videos in `directory`, as of the episodes so far.

    For gym, what its Monitor wrote; for Hugging Face, what its hub shows of an agent. The first
    time it writes the `weights` too, into the file `model`. Files come before those that name them.
    """
    if recorder.replay is None:
        write_file(os.path.join(directory, model), weights)
    best = max(recorder.finished, key=lambda episode: episodes[episode].score)
    if best != recorder.replay:
        with open(recorder.finished[best].path, "rb") as video:
            write_file(os.path.join(directory, "replay.mp4"), video.read())
    result = results(recorder.env_id, episodes)
    write_json(directory, "results.json", result)
    write_json(directory, "config.json", config)
    write_file(os.path.join(directory, "README.md"), model_card(result, model).encode())
    write_monitor_files(directory, recorder, episodes)
    recorder.replay = best


def write_monitor_files(directory: str, recorder: Recorder, episodes: list[Episode]) -> None:
    """Write what gym's Monitor wrote beside its videos: metadata, statistics, and the manifest."""
    infix = f"0.{os.getpid()}"
    videos = []
    for episode, video in recorder.finished.items():
        name = os.path.basename(video.path)
        meta_name = name.replace(".mp4", ".meta.json")
        videos.append([name, meta_name])
        meta = {
            "episode_id": episode,
            "content_type": "video/mp4",
            "encoder_version": video.encoder,
        }
        write_json(directory, meta_name, meta)
    stats_name = f"openaigym.episode_batch.{infix}.stats.json"
    stats = {
        "initial_reset_timestamp": recorder.times[0],
        "timestamps": recorder.times[1:],
        "episode_lengths": [episode.length for episode in episodes],
        "episode_rewards": [episode.score for episode in episodes],
        "episode_types": ["t"] * len(episodes),
    }
    write_json(directory, stats_name, stats)
    manifest = {
        "stats": stats_name,
        "videos": videos,
        "env_info": {"gym_version": gymnasium.__version__, "env_id": recorder.env_id},
    }
    write_json(directory, f"openaigym.manifest.{infix}.manifest.json", manifest)
