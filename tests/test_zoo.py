"""models/zoo.py: a tiny zoo of two games, and what it makes of the shipped data."""

import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest

from train_atari import LEARNING_OF_A3C

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "models"
RECIPE = """
machine = "a test"
evaluation = { episodes = 4, seed = 0 }
[options]
network = "a3c"
batch-size = 16
steps-per-epoch = 10
eval-episode = 1
simulator-proc = 1
players-per-simulator = 4
predict-batch-size = 4
seed = 1
[[games]]
env = "tests.games:Catch-v0"
states = 480
[[games]]
env = "tests.games:Count-v0"
states = 320
options = { gamma = 0.9 }
"""
README = "<!-- table: agents -->\nold\n<!-- end -->\n\n<!-- table: runs -->\n<!-- end -->\n"


def zoo(*args, code=0, cwd=ROOT):
    """What zoo.py prints with these arguments, which make it end with this exit code."""
    command = [sys.executable, str(MODELS / "zoo.py"), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd)
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def write_recipe(path, text=RECIPE):
    path.mkdir(exist_ok=True)
    (path / "recipe.toml").write_text(text)
    return path


def write_weights(path, seed=0):
    """Weights of the a3c network for Catch, in float32."""
    shapes = {"conv0/W": (8, 8, 12, 16), "conv1/W": (4, 4, 16, 32), "fc0/W": (2592, 256)}
    shapes |= {"fc-pi/W": (256, 3), "fc-v/W": (256, 1)}
    shapes |= {name.replace("W", "b"): shape[-1:] for name, shape in shapes.items()}
    rng = np.random.default_rng(seed)
    random = {name: 0.1 * rng.standard_normal(shape) for name, shape in shapes.items()}
    np.savez(path, **{name: array.astype(np.float32) for name, array in random.items()})


def children_of(directory):
    """Processes whose command line names a directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(directory).encode() in path.read_bytes() and path.parent.name != str(
                os.getpid()
            ):
                found.append(path.parent.name)
    return found


def test_a_tiny_zoo(tmp_path):
    """From nothing to agents, figure data and tables; what is done is not done again."""
    models, runs = write_recipe(tmp_path / "models"), tmp_path / "runs"
    shutil.copy(MODELS / "scores.toml", models)
    places = ("--models", models, "--runs", runs)
    said = zoo("train", *places, "--jobs", 2)
    assert "Catch-v0: epoch 3 of 3" in said and "Count-v0: epoch 2 of 2" in said
    assert json.loads((runs / "Count-v0" / "config.json").read_text())["gamma"] == 0.9
    assert zoo("train", *places).count("done, ") == 2

    said = zoo("evaluate", *places)
    assert said.count("it is shipped") == 2
    curves = json.loads((models / "curves.json").read_text())
    assert [row[0] for row in curves["Catch-v0"]] == [160, 320, 480]
    for agent in ("Catch-v0", "Count-v0"):
        arrays = np.load(models / f"{agent}.npz")
        assert {array.dtype for array in arrays.values()} == {np.dtype(np.float16)}
        results = json.loads((models / f"{agent}.results.json").read_text())
        assert len(results["episode_rewards"]) == 4
    assert results["agent"]["states"] == 320 and "--gamma 0.9" in results["agent"]["commands"][0]
    said = zoo("evaluate", *places)
    assert said.count("the shipped agent stays") == 2 and "written" not in said

    readme = tmp_path / "README.md"
    readme.write_text(README)
    zoo("table", "--models", models, "--readme", readme)
    text = readme.read_text()
    assert "old" not in text and "| Catch-v0 | `a3c` | a test | 480 |" in text
    assert "./train_atari.py --env tests.games:Count-v0 --network a3c" in text


def test_a_better_agent_replaces_the_shipped_one(tmp_path):
    """Of a run's latest and mean weights, the better one in the final evaluation."""
    models, run = write_recipe(tmp_path / "models"), tmp_path / "runs" / "Catch-v0"
    run.mkdir(parents=True)
    for seed, kind in enumerate(("latest", "mean")):
        write_weights(run / f"model-{kind}.npz", seed)
    epoch = {"epoch_num": 3, "global_step": 30, "mean_score": 1.0, "mean_model_score": 2.0}
    (run / "stats.json").write_text(json.dumps([epoch]))
    (run / "zoo.done").write_text("3\n")
    results = {"env_id": "Catch-v0", "mean_reward": -99.0, "std_reward": 0.0}
    (models / "Catch-v0.results.json").write_text(json.dumps(results))
    said = zoo("evaluate", "Catch-v0", "--models", models, "--runs", run.parent)
    assert "model-mean.npz" in said and "it is shipped" in said
    shipped, chosen = np.load(models / "Catch-v0.npz"), np.load(run / "model-mean.npz")
    assert (shipped["fc0/W"] == chosen["fc0/W"].astype(np.float16)).all()


def test_float16_is_shipped_where_it_scores_as_well(tmp_path):
    """And float32 stays where it does not; what float16 is already is not evaluated."""
    models, env_id = write_recipe(tmp_path / "models"), "tests.games:Catch-v0"
    results = {"env_id": env_id, "std_reward": 1.0, "n_evaluation_episodes": 100, "seed": 0}
    for before, kind in ((99.0, np.float32), (-99.0, np.float16)):
        write_weights(models / "Catch-v0.npz")
        text = json.dumps(results | {"mean_reward": before, "agent": {"states": 7}})
        (models / "Catch-v0.results.json").write_text(text)
        zoo("shrink", "--models", models, "--runs", tmp_path / "runs")
        assert np.load(models / "Catch-v0.npz")["fc0/W"].dtype == kind
    shipped = json.loads((models / "Catch-v0.results.json").read_text())
    assert len(shipped["episode_rewards"]) == 100 and shipped["agent"] == {"states": 7}
    assert zoo("shrink", "--models", models, "--runs", tmp_path / "runs") == ""


@pytest.mark.parametrize("reader", ["stays", "ends"])
def test_what_was_interrupted_is_resumed(tmp_path, reader):
    """Ctrl-C stops the runs, which save, leaves no process, and the same command goes on.

    Also where it ends the reader of what is printed, as in `| tee`.
    """
    text = RECIPE.replace("states = 480", "states = 16_000").replace("states = 320", "states = 160")
    models, runs = write_recipe(tmp_path / "models", text), tmp_path / "runs"
    places = ("--models", models, "--runs", runs, "--jobs", 2)
    command = [sys.executable, str(MODELS / "zoo.py"), "train", *map(str, places)]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    process = subprocess.Popen(command, **how)
    lines = iter(process.stdout.readline, "")
    assert any("Catch-v0: epoch" in line for line in lines)
    if reader == "ends":
        process.stdout.close()
        time.sleep(2)  # it says more
    process.send_signal(signal.SIGINT)
    assert reader == "ends" or "stopped" in process.stdout.read()
    assert process.wait(120) == 130
    assert "stopped by SIGTERM" in (runs / "Catch-v0.log").read_text()
    assert not list(runs.glob("*/.*"))  # a file that a kill has left unfinished
    until = time.monotonic() + 10  # simulators end after their master
    while children_of(tmp_path) and time.monotonic() < until:
        time.sleep(0.1)
    assert not children_of(tmp_path)
    assert (runs / "Catch-v0" / "checkpoint.pt").exists()

    steps = json.loads((runs / "Catch-v0" / "stats.json").read_text())[-1]["global_step"]
    assert 0 < steps < 1000
    epochs = steps // 10 + 2
    write_recipe(models, text.replace("16_000", str(160 * epochs)))
    said = zoo("train", *places)
    assert "checkpoint.pt" in said
    stats = json.loads((runs / "Catch-v0" / "stats.json").read_text())
    assert [epoch["epoch_num"] for epoch in stats] == list(range(1, epochs + 1))


def test_runs_save_when_an_error_ends_the_zoo(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(MODELS))
    run_programs = importlib.import_module("zoo").run_programs
    run = tmp_path / "run"
    command = ["--env", "tests.games:Catch-v0", "--network", "a3c", "--batch-size", "16"]
    command += ["--simulator-proc", "1", "--players-per-simulator", "4", "--output", str(run)]

    def progress(name):
        if " epoch 1 " in (tmp_path / "Catch-v0.log").read_text():
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        run_programs({"Catch-v0": command}, tmp_path, 1, progress)
    assert (run / "checkpoint.pt").exists()


def test_a_run_that_fails_is_named(tmp_path):
    text = RECIPE.replace("Count-v0", "Crash-v0")
    models = write_recipe(tmp_path / "models", text)
    said = zoo("train", "Crash-v0", "--models", models, "--runs", tmp_path / "runs", code=1)
    assert "failed: Crash-v0" in said and "exit code 1" in said


@pytest.mark.parametrize(
    "text, sentence",
    [
        (None, "there is no recipe"),
        ("[options", "is not a usable recipe"),
        ("machine = 1", "games is missing"),
        (RECIPE.replace("states = 480", "states = 0"), "states is missing or is not a number"),
        (RECIPE.replace("states = 480", "states = '480'"), "states is missing or is not a number"),
        (RECIPE.replace("batch-size = 16", ""), "batch-size is missing"),
        (RECIPE.replace("seed = 1", "load = 'x.npz'"), "load = 'x.npz' is no option of a recipe"),
        (RECIPE.replace("seed = 1", "seed = [1]"), "seed = [1] is no option"),
        (RECIPE.replace("Count-v0", "Catch-v0"), "an agent is listed twice"),
        (RECIPE.replace("episodes = 4", "episodes = true"), "episodes is missing or is not"),
    ],
)
def test_a_bad_recipe_is_one_sentence(tmp_path, text, sentence):
    models = tmp_path / "models" if text is None else write_recipe(tmp_path / "models", text)
    said = zoo("train", "--models", models, "--runs", tmp_path / "runs", code=2)
    assert sentence in said and said.count("\n") == 1


def test_other_bad_input_is_one_sentence(tmp_path):
    models = write_recipe(tmp_path / "models")
    places = ("--models", models, "--runs", tmp_path / "runs")
    assert "has no Chess-v0; it has Catch-v0" in zoo("train", "Chess-v0", *places, code=2)
    assert "--jobs must be 1 or more" in zoo("train", *places, "--jobs", 0, code=2)
    assert zoo("evaluate", *places).count("its run is not done") == 2
    assert "has only these agents: none" in zoo("shrink", *places, code=2)
    readme = tmp_path / "README.md"
    assert "there is no README" in zoo("table", "--readme", readme, code=1)
    readme.write_text("nothing")
    assert "has no marker" in zoo("table", "--readme", readme, code=1)
    readme.write_text("<!-- table: prices -->\n<!-- end -->\n")
    assert "there is no table prices" in zoo("table", "--readme", readme, code=1)
    shutil.copy(MODELS / "Pong-v0.results.json", models / "x.results.json")
    for content in (b"", b"<html>", (MODELS / "Pong-v0.npz").read_bytes()[:9999]):
        (models / "x.npz").write_bytes(content)
        assert "x.npz is not a usable file of weights" in zoo("shrink", *places, code=1)
    (models / "x.results.json").write_text('{"mean_reward": 1}')
    (models / "scores.toml").write_text("")
    readme.write_text(README)
    args = ("table", "--models", models, "--readme", readme)
    assert "x.results.json is not a usable file of results" in zoo(*args, code=1)


def test_the_shipped_recipe_is_one():
    recipe = tomllib.loads((MODELS / "recipe.toml").read_text())
    assert len({game["env"] for game in recipe["games"]}) == len(recipe["games"]) == 12
    # It is what the program does by itself.
    by_name = {name.replace("-", "_"): value for name, value in recipe["options"].items()}
    assert LEARNING_OF_A3C.items() <= by_name.items()


def test_tables_come_out_of_the_shipped_data(tmp_path):
    """Running `table` again leaves both READMEs as they are, whatever stood between the markers."""
    assert len((ROOT / "README.md").read_bytes()) <= 12 * 1024
    for path in (ROOT / "README.md", MODELS / "README.md"):
        shipped, copy = path.read_text(), tmp_path / path.name
        emptied = re.sub(r"(<!-- table: \w+ -->\n).*?(<!-- end -->)", r"\1\2", shipped, flags=re.S)
        assert len(emptied) < len(shipped)
        for text in (emptied, shipped):
            copy.write_text(text)
            zoo("table", "--readme", copy)
            assert copy.read_text() == shipped


def test_the_figure_comes_out_of_the_shipped_data(tmp_path):
    """The same picture each time; and the shipped one, with the matplotlib that drew that."""
    pytest.importorskip("matplotlib")
    models = tmp_path / "models"
    models.mkdir()
    for path in [*MODELS.glob("*.json"), MODELS / "scores.toml"]:
        shutil.copy(path, models)
    assert "written" in zoo("plot", "--models", models)
    assert "unchanged" in zoo("plot", "--models", models)
    drawn, shipped = ((path / "curve.png").read_bytes() for path in (models, MODELS))
    version = re.compile(rb"Matplotlib version[\d.]+")
    if version.search(drawn)[0] == version.search(shipped)[0]:
        assert drawn == shipped


def test_plot_without_matplotlib_is_one_sentence(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(MODELS / "zoo.py"), "plot", "--models", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr == "zoo.py: plot needs matplotlib: pip install matplotlib\n"


def test_the_snippet_of_the_readme_plays():
    """The lines of models/README.md that load an agent and act, as they stand there."""
    text = (MODELS / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) > 0
