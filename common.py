"""Players, and what is done with them without training: playing, scoring, recording, submissions.

Nothing here imports torch: simulator processes must start fast and stay small. A network is only a
function from states to policies.
"""

import contextlib
import copy
import datetime
import difflib
import functools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
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
STATE_SHAPE = (FRAME_HISTORY, *FRAME_SHAPE)  # oldest frame first
MAX_EPISODE_STEPS = 10_000  # agent steps; ale-py itself sets no limit for the -v0 games
RANDOM_ACTIONS = 0.01  # share of random actions in playing and evaluation
CPU_LIMIT = "/sys/fs/cgroup/cpu.max"  # of a container: microseconds of all cores, in so many
DEFAULT_FPS = 20  # agent steps per second of a game that says nothing
UNMENDABLE = 2  # exit code of a program that would end in the same way again

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
    """A whole number from 0, of 32 bits."""
    if not 0 <= int(text) < 2**32:
        raise ValueError
    return int(text)


def count(text: str) -> int:
    """A whole number from 1."""
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
def signals_kept() -> Iterator[None]:
    """Handle signals as before at the end: a game may have handlers of its own."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if in_main_thread else ()
    handlers = {signum: signal.getsignal(signum) for signum in signals}
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            if handler is not None:  # one that is not Python's
                signal.signal(signum, handler)


def close_env(env: gymnasium.Env) -> None:
    """Close an environment, whatever that makes of it: nothing needs it any more."""
    try:
        env.close()
    except Stopped:
        raise
    except (Exception, SystemExit):
        pass


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


class Game(NamedTuple):
    """What an environment says of itself."""

    env_id: str  # as it is played: of `Breakout` it is `Breakout-v4`
    num_actions: int
    one_per_process: bool  # a process that has one cannot make another


@functools.cache
def describe(env_id: str) -> Game:
    """Make an environment and ask it; UserError as of make_env."""
    directory = os.getcwd()
    env = make_env(env_id)
    module, colon, name = env_id.rpartition(":")
    if env.spec is not None:
        name = env.spec.id
    try:
        close_env(make_env(env_id))
        one_per_process = False
    except UserError:
        one_per_process = True
    close_env(env)
    os.chdir(directory)  # a game may have gone elsewhere
    return Game(module + colon + name, int(env.action_space.n), one_per_process)


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
    fps = (env.metadata or {}).get("render_fps") or DEFAULT_FPS
    atari = env.unwrapped
    if isinstance(atari, ale_py.AtariEnv) and fps == atari.metadata.get("render_fps"):
        # It says the same whatever a step is: the console has 60 frames per second.
        skip = atari.spec.kwargs.get("frameskip", 1)
        return 60 / (skip if isinstance(skip, int) else np.mean(range(*skip)))
    return float(fps)


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


class Player:
    """One game being played, as the agent sees it: resized frames, episodes started and limited.

    Frames are (84, 84, 3) uint8. Stacking them is the receiver's work.
    """

    def __init__(self, env: gymnasium.Env):
        self.env = env
        self.max_steps = MAX_EPISODE_STEPS if is_originals(env) else math.inf
        self.num_actions = int(env.action_space.n)
        self.start_actions = start_actions(env)
        self.score = 0.0  # of this episode, as the game counts it
        self.length = 0  # agent steps of this episode
        self.screen = np.empty(0)  # the newest frame, as the game gave it

    def reset(self, seed: int | None = None) -> np.ndarray:
        """Start an episode; returns its first frame.

        Some games wait for FIRE: see `start_actions`. What these actions earn is dropped.
        """
        self.score, self.length = 0.0, 0
        frame, _ = self.env.reset(seed=seed)
        for action in self.start_actions:
            frame, _, terminated, truncated, _ = self.env.step(action)
            if terminated or truncated:
                frame, _ = self.env.reset()
        self.screen = frame
        return cv2.resize(frame, IMAGE_SIZE)

    def step(self, action: int) -> tuple[np.ndarray, float, bool]:
        """Take one action; returns the frame, the raw reward and whether the episode is over.

        A lost life is not the end; the limit of steps is one like any other.
        """
        self.screen, reward, terminated, truncated, _ = self.env.step(action)
        try:
            reward = float(reward)
        except TypeError:  # some games give an array of one
            reward = float(np.asarray(reward).item())
        self.score += reward
        self.length += 1
        if not math.isfinite(reward) or not math.isfinite(self.score):
            game = self.env.spec.id if self.env.spec else "the game"
            place = f"in step {self.length} of an episode"
            raise UserError(f"{game}: the reward is {reward} {place}", UNMENDABLE)
        is_over = terminated or truncated or self.length >= self.max_steps
        return cv2.resize(self.screen, IMAGE_SIZE), reward, bool(is_over)


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


def evaluate(players, policy_of: Callable, episodes: int, seed: int, seconds: float) -> Iterator:
    """Play exactly `episodes` episodes side by side; every one that starts counts.

    Yields the list of those that are done, after every step. All players step together, so that the
    network sees the same batches again and one seed gives the same scores. After half of `seconds`
    no more episodes start; after all of them those under way are cut short and count as they are.

    players: has `num_players` and `step(actions)`, which returns frames,
    rewards and is_over and starts new episodes by itself; `step(None)` starts the first ones.
    policy_of: states (n, 4, 84, 84, 3) uint8 -> policies (n, A).
    """
    start, rng = time.monotonic(), np.random.default_rng(seed)
    n = players.num_players
    started = min(n, episodes)
    playing, fresh = np.arange(n) < started, np.ones(n, bool)
    score, length = np.zeros((2, n))
    states = np.zeros((n, *STATE_SHAPE), np.uint8)
    done: list[Episode] = []
    frames, rewards, is_over = players.step(None)
    while playing.any():
        states[:, :-1] = states[:, 1:]
        states[fresh] = 0
        states[:, -1] = frames
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


class Video:
    """An .mp4 that browsers play, encoded frame by frame while it is recorded.

    It takes its place when it is finished. OSError where that is not possible.
    """

    def __init__(self, path: str, screen: np.ndarray, fps: float):
        import imageio_ffmpeg  # brings an encoder along; simulators do without

        self.path, self.partial = path, hidden(path, "partial.mp4")
        self.in_place = False
        size, even = f"{screen.shape[1]}x{screen.shape[0]}", "pad=ceil(iw/2)*2:ceil(ih/2)*2"
        source = f"-f rawvideo -pix_fmt rgb24 -s {size} -r {fps:g} -i -"
        target = f"-c:v libx264 -pix_fmt yuv420p -vf {even} -movflags +faststart"
        program = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error"]
        # The encoder takes a name with a colon for a protocol, and one with a dash for an option.
        command = [*program, *source.split(), *target.split(), f"file:{self.partial}"]
        version = imageio_ffmpeg.get_ffmpeg_version()
        self.encoder = {"backend": "ffmpeg", "version": version, "cmdline": command}
        # A session of its own: Ctrl-C is for the playing process.
        pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True}
        self.process = subprocess.Popen(command, **pipes)

    def write(self, screen: np.ndarray) -> None:
        """Add a frame (rows, columns, 3) uint8."""
        try:
            self.process.stdin.write(np.ascontiguousarray(screen))
        except BrokenPipeError:
            self.finish()  # the encoder says why

    def finish(self) -> None:
        """Let the file take its place."""
        _, words = self.process.communicate()
        if self.process.returncode != 0:
            code, lines = self.process.returncode, words.decode(errors="replace").splitlines()
            reason = lines[0] if lines else f"the encoder ended with code {code}"
            raise OSError(f"no video {self.path}: {reason}")
        self.in_place = True  # before it is: an interrupt between the two must not leave a file
        os.replace(self.partial, self.path)

    def drop(self) -> None:
        """End the encoder, and remove the file."""
        self.process.kill()
        self.process.communicate()
        for path in (self.partial, self.path) if self.in_place else (self.partial,):
            with contextlib.suppress(OSError):
                os.unlink(path)


class Recorder:
    """A player of this process, as `evaluate` wants it, that records some of its episodes.

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
        """As VectorPlayers.step."""
        if actions is None:
            with failures_named(self.env_id):
                return self.player.reset(seed=self.seed)[None], np.zeros(1), np.zeros(1, bool)
        episode = len(self.times) - 1
        path = self.path_of(episode)
        if path and self.player.length == 0:
            self.video = Video(path, self.player.screen, self.fps)
        with failures_named(self.env_id):
            frame, reward, is_over = self.player.step(int(actions[0]))
        if self.video:
            self.video.write(self.player.screen)
        if is_over:
            with failures_named(self.env_id):
                frame = self.player.reset()
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
        close_env(self.player.env)


def results(env_id: str, episodes: list[Episode]) -> dict:
    """What results.json says of an evaluation: Hugging Face's keys, and every episode."""
    s, now = summary(episodes), datetime.datetime.now(datetime.UTC)
    result = {"env_id": env_id, "mean_reward": s["mean"], "std_reward": s["std"]}
    result |= {"n_evaluation_episodes": len(episodes), "is_deterministic": False}
    result |= {"eval_datetime": now.isoformat(), "min_reward": s["min"], "max_reward": s["max"]}
    result["episode_rewards"] = [episode.score for episode in episodes]
    return result | {"episode_lengths": [episode.length for episode in episodes]}


def model_card(result: dict, model: str) -> str:
    """README.md of a Hugging Face model repository; its front matter is JSON, a part of YAML."""
    env_id = result["env_id"]
    score = f"{result['mean_reward']:.2f} +/- {result['std_reward']:.2f}"
    metric = {"type": "mean_reward", "value": score, "name": "mean_reward", "verified": False}
    task = {"type": "reinforcement-learning", "name": "reinforcement-learning"}
    evaluation = {"task": task, "dataset": {"name": env_id, "type": env_id}, "metrics": [metric]}
    tags = [env_id, "deep-reinforcement-learning", "reinforcement-learning", "atari", "a3c"]
    front = {"library_name": "pytorch", "tags": tags}
    front["model-index"] = [{"name": "Batch-A3C", "results": [evaluation]}]
    return f"""---
{json.dumps(front, indent=2)}
---

# Batch-A3C plays {env_id}

Mean score {score} over {result["n_evaluation_episodes"]} episodes, raw as the game counts them.
The agent takes the likeliest action, and one in a hundred at random. `replay.mp4` is the best
episode that was recorded, `{model}` holds the weights with tensorpack's names and layouts:

    ./train_atari.py --task play --env {env_id} --load {model}
"""


def write_submission(
    directory, env_id, recorder, episodes, model: str, config: dict, weights: bytes | None = None
) -> None:
    """Write all that stands beside the videos in `directory`, as of the episodes so far.

    For gym, what its Monitor wrote; for Hugging Face, what its hub shows of an agent. The first
    time it writes the `weights` too, into the file `model`.
    """

    infix, videos, files = f"0.{os.getpid()}", [], {}
    for episode, video in recorder.finished.items():
        name = os.path.basename(video.path)
        meta = {"episode_id": episode, "content_type": "video/mp4"}
        meta["encoder_version"] = video.encoder
        videos.append([name, name.replace(".mp4", ".meta.json")])
        files[videos[-1][1]] = json.dumps(meta)
    result, stats_name = results(env_id, episodes), f"openaigym.episode_batch.{infix}.stats.json"
    stats = {"initial_reset_timestamp": recorder.times[0], "timestamps": recorder.times[1:]}
    stats |= {"episode_lengths": result["episode_lengths"]}
    stats |= {"episode_rewards": result["episode_rewards"], "episode_types": ["t"] * len(episodes)}
    info = {"gym_version": gymnasium.__version__, "env_id": env_id}
    manifest = {"stats": stats_name, "videos": videos, "env_info": info}
    files |= {stats_name: json.dumps(stats), "results.json": json.dumps(result, indent=1)}
    files[f"openaigym.manifest.{infix}.manifest.json"] = json.dumps(manifest)
    files |= {"config.json": json.dumps(config, indent=1), "README.md": model_card(result, model)}
    contents: dict = {name: text.encode() for name, text in files.items()}
    best = max(recorder.finished, key=lambda episode: episodes[episode].score)
    if best != recorder.replay:
        contents["replay.mp4"] = recorder.finished[best].path
    if weights is not None and recorder.replay is None:
        contents[model] = weights
    write_files({os.path.join(directory, name): content for name, content in contents.items()})
    recorder.replay = best


@contextlib.contextmanager
def output_directory(path: str | None) -> Iterator[None]:
    """Make an output directory, or take an empty one; None: there is none.

    If nothing is in it at the end, whatever was made here is removed again, so that the same
    command may be given once more. UserError where the directory cannot be used.
    """
    if path is None:
        yield
        return
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
    """A value as people read it: never as a power of ten where that is large, whole ones whole."""
    if value is None:
        return "-"
    if not isinstance(value, float) or not np.isfinite(value):
        return str(value)
    if value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return f"{value:.2f}" if abs(value) >= 10_000 else f"{value:.6g}"


def table(rows: dict) -> str:
    """Names and numbers, one pair a line."""
    from tabulate import tabulate  # simulators do without

    lines = [(name, number(value)) for name, value in rows.items()]
    return tabulate(lines, disable_numparse=True, colalign=("left", "right"))


def hidden(path: str, suffix: str) -> str:
    """Where a file is written until it is whole: beside `path`, where nobody looks for it."""
    directory, name = os.path.split(path)
    return os.path.join(directory, f".{name}.{suffix}")


def write_file(path: str, content: bytes) -> None:
    """Write a file that takes the place of `path` when it is whole and on disk; see write_files."""
    write_files({path: content})


def write_files(contents: dict[str, bytes | str]) -> None:
    """Write files that take their places when all of them are whole and on disk.

    contents: of each path; a str is the path of a file to copy. OSError with a sentence where that
    is not possible; before all are on disk every file stays as it was.
    """
    try:
        for path, content in contents.items():
            with open(hidden(path, "tmp"), "wb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    with open(content, "rb") as source:
                        shutil.copyfileobj(source, file)
                file.flush()
                os.fsync(file.fileno())
        for path in contents:
            os.replace(hidden(path, "tmp"), path)
    except BaseException as error:
        for each in contents:
            with contextlib.suppress(OSError):
                os.unlink(hidden(each, "tmp"))
        if isinstance(error, OSError):
            raise OSError(f"cannot write {path}: {error.strerror}") from error
        raise
