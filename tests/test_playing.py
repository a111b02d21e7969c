"""Watching, scoring and submitting agents, as their users do, for every game of the original."""

import contextlib
import itertools
import json
import signal
import subprocess

import cv2
import numpy as np
import pytest
import torch

from common import Episode, Recorder, model_card, write_submission
from model import Network, load, weights_file
from predictor import VectorPlayers, play_episodes, policy_of
from tests.helpers import ROOT, command, run
from train_atari import game_of_file

GAMES = """
AirRaid Alien Amidar Assault Asterix Asteroids Atlantis BankHeist BattleZone BeamRider Berzerk
Breakout Carnival Centipede ChopperCommand CrazyClimber DemonAttack DoubleDunk ElevatorAction
FishingDerby Frostbite Gopher Gravitar IceHockey Jamesbond JourneyEscape Kangaroo Krull
KungFuMaster MsPacman NameThisGame Phoenix Pong Pooyan Qbert Riverraid RoadRunner Robotank Seaquest
SpaceInvaders StarGunner Tennis Tutankham UpNDown VideoPinball WizardOfWor Zaxxon
""".split()  # noqa: SIM905
CATCH = ("--env", "tests.games:Catch-v0")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """An agent that knows nothing of Catch."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("agent") / "agent.npz"
    path.write_bytes(weights_file(Network("a3c", 3)))
    return path


def frames_of(path, fps=20):
    """All frames of a video (n, rows, columns, 3), as another program decodes them."""
    video = cv2.VideoCapture(str(path))
    assert video.get(cv2.CAP_PROP_FPS) == fps
    assert int(video.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little") in (b"h264", b"avc1")
    frames = []
    while (frame := video.read()[1]) is not None:
        frames.append(frame[..., ::-1])
    return np.array(frames)


def read_submission(path):
    """Manifest and statistics as gym reads them, and the card; all of it checked."""
    (manifest,) = path.glob("openaigym.manifest.0.*.manifest.json")
    infix = manifest.name.removeprefix("openaigym.manifest.").removesuffix(".manifest.json")
    content = json.loads(manifest.read_text())
    assert set(content) == {"stats", "videos", "env_info"}
    assert set(content["env_info"]) == {"gym_version", "env_id"}
    assert content["stats"] == f"openaigym.episode_batch.{infix}.stats.json"
    stats = json.loads((path / content["stats"]).read_text())
    lists = ("timestamps", "episode_lengths", "episode_rewards", "episode_types")
    assert set(stats) == {"initial_reset_timestamp", *lists}
    assert len({len(stats[name]) for name in lists}) == 1
    assert set(stats["episode_types"]) == {"t"}  # the only ones that gym scores
    assert sorted(stats["timestamps"]) == stats["timestamps"]
    assert stats["initial_reset_timestamp"] <= stats["timestamps"][0]
    for video, meta in content["videos"]:
        what = json.loads((path / meta).read_text())
        assert set(what) == {"episode_id", "content_type", "encoder_version"}
        assert set(what["encoder_version"]) == {"backend", "version", "cmdline"}
        assert what["content_type"] == "video/mp4"
        assert video == f"openaigym.video.{infix}.video{what['episode_id']:06}.mp4"
        assert len(frames_of(path / video)) == stats["episode_lengths"][what["episode_id"]]
    _, front, text = (path / "README.md").read_text().split("---\n", 2)
    return content, stats, json.loads(front), text


def test_submission(weights, tmp_path):
    done = run(
        "--task",
        "gen_submit",
        *CATCH,
        "--load",
        weights,
        "--episode",
        10,
        cwd=tmp_path,
        PATH="",
    )  # no ffmpeg anywhere
    assert done.returncode == 0, done.stderr
    assert "gym scores a submission of 100 or more" in done.stdout
    assert "10/10, score=" in done.stdout
    path = tmp_path / "output_dir"
    content, stats, front, text = read_submission(path)
    assert [int(video[-10:-4]) for video, _ in content["videos"]] == [0, 1, 8]
    rewards = stats["episode_rewards"]
    assert len(rewards) == 10 and stats["episode_lengths"] == [30] * 10
    result = json.loads((path / "results.json").read_text())
    assert result["mean_reward"] == np.mean(rewards) and result["std_reward"] == np.std(rewards)
    assert result["n_evaluation_episodes"] == 10 and result["is_deterministic"] is False
    assert result["episode_rewards"] == rewards
    (evaluation,) = front["model-index"][0]["results"]
    score = f"{np.mean(rewards):.2f} +/- {np.std(rewards):.2f}"
    assert evaluation["metrics"][0]["value"] == score and score in text
    assert evaluation["dataset"]["name"] == "tests.games:Catch-v0"
    best = max((0, 1, 8), key=lambda episode: rewards[episode])
    recorded = dict(zip((0, 1, 8), content["videos"], strict=True))[best][0]
    assert (path / "replay.mp4").read_bytes() == (path / recorded).read_bytes()
    model, _ = load(str(path / "tests.games-Catch-v0.npz"))
    assert torch.equal(model.fc_pi.weight, load(str(weights))[0].fc_pi.weight)
    assert not list(path.glob(".*"))

    before = {p.name: p.read_bytes() for p in path.iterdir()}
    again = run("--task", "gen_submit", *CATCH, "--load", weights, "--output", path)
    assert again.returncode == 2 and "is not empty" in again.stderr
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_submission_is_whole(weights, tmp_path, signum, code):
    args = ("--task", "gen_submit", *CATCH, "--load", weights, "--episode", 100_000)
    args += ("--output", tmp_path)
    process = subprocess.Popen(command(*args), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    lines = []
    while not (lines and lines[-1].startswith("12/")):
        lines.append(process.stdout.readline())
        assert lines[-1], lines
    process.send_signal(signum)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == code
    _, stats, front, _ = read_submission(tmp_path)
    assert len(stats["timestamps"]) >= 12
    scores = [float(line.split("=")[1]) for line in lines + rest.splitlines() if "score=" in line]
    assert stats["episode_rewards"] == scores[: len(stats["episode_rewards"])]
    assert f"{np.mean(stats['episode_rewards']):.2f} +/-" in json.dumps(front)
    assert not list(tmp_path.glob(".*"))


def test_play(weights, tmp_path):
    """A window of a driver that shows nothing; no window where there is no display."""
    args = ("--task", "play", "--load", weights, "--episode", 2, "--env")
    hidden = {"SDL_VIDEODRIVER": "dummy", "SDL_AUDIODRIVER": "dummy"}
    game = "tests.games:Windowed-v0"
    done = run(*args, game, **hidden)
    assert done.returncode == 0, done.stderr
    assert "1/2, score=" in done.stdout and "2/2, score=" in done.stdout and "mean" in done.stdout
    closed = run(*args, game, **hidden, CLOSE_WINDOW=40)
    assert closed.returncode == 0, closed.stderr
    assert "1/2, score=" in closed.stdout and "2/2" not in closed.stdout
    assert closed.stdout.split("episodes")[1].split()[0] == "1"
    done = run(*args[:-1], "--env", "Freeway-v0", DISPLAY=None, WAYLAND_DISPLAY=None)
    assert done.returncode == 1
    assert "no window" in done.stderr and "--output DIR writes videos" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_play_without_a_display(weights, tmp_path):
    path = tmp_path / "videos"
    done = run("--task", "play", *CATCH, "--load", weights, "--episode", 2, "--output", path)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in path.iterdir()) == ["episode000000.mp4", "episode000001.mp4"]
    frames = frames_of(path / "episode000000.mp4")
    assert frames.shape == (30, 98, 84, 3)
    # The ball, white, one row further down in every frame until it is caught or lost.
    rows = [np.argwhere((frame > 180).all(axis=-1))[:, 0].mean() // 14 for frame in frames]
    assert rows[:6] == [1, 2, 3, 4, 5, 0] and rows[6:12] == rows[:6]


def test_eval_writes_its_results(weights, tmp_path):
    args = ("--task", "eval", *CATCH, "--load", weights, "--episode", 5, "--seed", 3, "--output")
    first, second = (run(*args, tmp_path / name) for name in ("a", "b"))
    assert first.returncode == second.returncode == 0, first.stderr
    one, other = (json.loads((tmp_path / name / "results.json").read_text()) for name in "ab")
    assert one.pop("eval_datetime") < other.pop("eval_datetime")
    assert one == other and len(one["episode_rewards"]) == 5
    assert one["mean_reward"] == np.mean(one["episode_rewards"])
    assert run(*args, tmp_path / "a").returncode == 2


def test_a_full_disk_is_one_sentence(weights, tmp_path):
    limit = ["bash", "-c", 'ulimit -f 8; trap "" XFSZ; exec "$@"', "-"]
    args = command("--task", "gen_submit", *CATCH, "--load", weights, "--output", tmp_path)
    done = subprocess.run(limit + args, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "cannot write" in line and "agent.npz" not in line


def test_a_card_is_read_whatever_the_game_is_called():
    result = {"env_id": "a: [b]#", "mean_reward": -1.0, "std_reward": 0.0}
    card = model_card(result | {"n_evaluation_episodes": 3}, "x.npz")
    front = json.loads(card.split("---\n", 2)[1])
    assert front["model-index"][0]["results"][0]["dataset"]["name"] == "a: [b]#"


# What four players earn on average in so many agent steps, at least; far above a random agent, and
# deviations below what each agent earned with three seeds.
STEPS = {"a3c": 600, "ba3c": 300}
FLOORS = {
    "Assault-v0": 400,
    "Breakout-v0": 8,
    "Breakout-v0-ba3c": 3.5,
    "CrazyClimber-v0": 3500,
    "KungFuMaster-v0": 800,
    "Pong-v0": -5,
    "Pong-v0-ba3c": -2,
    "RoadRunner-v0": 2500,
}


@pytest.mark.parametrize("agent", sorted(path.stem for path in (ROOT / "models").glob("*.npz")))
def test_a_shipped_agent_plays_well(agent):
    network, _ = load(str(ROOT / "models" / f"{agent}.npz"))
    env_id, earned = game_of_file(f"{agent}.npz"), []
    players = VectorPlayers(env_id, 4, seed=1, check=lambda: None)
    with contextlib.closing(players), contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        step = players.step
        players.step = lambda actions: earned.append(step(actions)) or earned[-1]
        evaluation = play_episodes(players, policy_of(network), 1000, seed=1, seconds=1000)
        list(itertools.islice(evaluation, STEPS[network.kind]))
    assert sum(rewards.mean() for _, rewards, _ in earned) > FLOORS[agent]


@pytest.mark.parametrize("game", GAMES)
def test_every_game(game, tmp_path):
    """Player, network, a short evaluation and a short recording; some write a submission too."""
    env_id = f"{game}-v0"
    recorder = Recorder(env_id, 1, lambda episode: str(tmp_path / f"{episode}.mp4"))
    recorder.player.max_steps = 6
    network = Network("a3c", recorder.player.num_actions)
    episodes: list[Episode] = []
    for done in play_episodes(recorder, policy_of(network), 2, seed=1, seconds=60):
        episodes = done
    recorder.close()
    assert [episode.length for episode in episodes] == [6, 6]
    height = recorder.player.screen.shape[0]
    assert frames_of(tmp_path / "0.mp4").shape == (6, height, 160, 3)
    write_submission(str(tmp_path), recorder, episodes, "x.npz", config={}, weights=b"")
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["env_id"] == env_id and result["episode_lengths"] == [6, 6]
    assert 3 <= recorder.player.num_actions <= 18
