#!/usr/bin/env python3
"""Make the agents of models/, and the figure and the tables that show them.

    python models/zoo.py train --jobs 2    # a run for each game of recipe.toml, new or resumed
    python models/zoo.py evaluate          # score finished runs, ship what beats the shipped agent
    python models/zoo.py shrink            # shipped float32 weights as float16, if as good
    python models/zoo.py plot              # curve.png, from curves.json
    python models/zoo.py table             # the tables of both READMEs, between their markers

It runs train_atari.py as a user does, and reads what that leaves. Names of agents after `train`,
`evaluate` or `shrink` choose some of them. Ctrl-C stops the runs, which save first; the same
command resumes them. Only `plot` needs matplotlib (pip install matplotlib).
Exit codes: 0 done, 1 failed, 2 wrong usage, 130 (Ctrl-C), 143 (SIGTERM) and 129 stopped.
"""

import argparse
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.2
COLUMNS = 3  # of the figure
RESULTS = ".results.json"  # behind the name of an agent
OURS = ("env", "load", "output", "task", "max-epoch", "config")  # options that the zoo sets itself
MILLIONS = {1: "1 M", 2: "2 M", 4: "3-4 M", 6: "5-6 M", 10: "10 M", 20: "20 M", 50: "50 M"}
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


class ZooError(Exception):
    """Something the user can mend, as one sentence; `code` is the exit code."""

    def __init__(self, sentence: str, code: int = 1):
        super().__init__(sentence)
        self.code = code


def read(path: Path, parse: Callable, what: str, code: int = 1):
    """What a file holds; ZooError if it is not there or is damaged."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ZooError(f"there is no {what} {path}", code) from error
    except (ValueError, LookupError, TypeError) as error:
        raise ZooError(f"{path} is not a usable {what}: {error}", code) from error


def write(path: Path, content: bytes) -> None:
    """Write a file as a whole, unless it is like that already; says which of both happened."""
    if path.exists() and path.read_bytes() == content:
        print(f"{path}: unchanged")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)
    print(f"{path}: written")


# What to train


@dataclass(frozen=True)
class Run:
    """One run of the recipe."""

    agent: str  # its name: Breakout-v0, or Breakout-v0-ba3c
    env: str
    epochs: int
    states_per_iteration: int
    options: dict[str, str | int | float]
    path: Path

    @property
    def done_mark(self) -> Path:
        """A file that `train` leaves when the run has ended by itself; it holds the epochs."""
        return self.path / "zoo.done"

    @property
    def is_done(self) -> bool:
        """Whether the run has ended by itself after as many epochs or more."""
        mark = self.done_mark
        return mark.exists() and read(mark, int, "number of epochs") >= self.epochs

    def arguments(self) -> list[str]:
        """Those of train_atari.py, without the ones that only say where files are."""
        options = {"env": self.env, **self.options, "max-epoch": self.epochs}
        return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@dataclass(frozen=True)
class Recipe:
    """What recipe.toml says."""

    runs: list[Run]
    episodes: int  # of an evaluation
    seed: int
    machine: str  # for the tables


def read_recipe(path: Path, runs: Path, chosen: list[str]) -> Recipe:
    """The recipe in a file, with all of its games or those chosen; ZooError if it is not one."""
    content = read(path, tomllib.loads, "recipe", 2)

    def need(table, key: str, kind: type):
        value = table.get(key) if isinstance(table, dict) else None
        if type(value) is not kind or value in (0, "", []):
            name = {int: "a number above 0", str: "a text", dict: "a table", list: "a list"}[kind]
            raise ZooError(f"{path}: {key} is missing or is not {name}", 2)
        return value

    result = []
    for game in need(content, "games", list):
        env, states = need(game, "env", str), need(game, "states", int)
        options = need(content, "options", dict) | need({"options": {}} | game, "options", dict)
        for name, value in options.items():
            if name in OURS or type(value) not in (str, int, float):
                raise ZooError(f"{path}: {name} = {value!r} is no option of a recipe", 2)
        batch, steps = (need(options, name, int) for name in ("batch-size", "steps-per-epoch"))
        batch *= need({"ranks": 1} | options, "ranks", int)
        network = options.get("network", "ba3c")
        agent = re.sub(r"[^\w.-]", "-", env.rpartition(":")[2])  # as files are named
        agent += f"-{network}" if network != "a3c" else ""
        epochs = math.ceil(states / (batch * steps))
        result.append(Run(agent, env, epochs, batch, options, runs / agent))
    agents = [run.agent for run in result]
    if len(set(agents)) < len(agents):
        raise ZooError(f"{path}: an agent is listed twice: {', '.join(agents)}", 2)
    if unknown := set(chosen) - set(agents):
        raise ZooError(f"{path} has no {', '.join(unknown)}; it has {', '.join(agents)}", 2)
    result = [run for run in result if run.agent in chosen or not chosen]
    evaluation = need(content, "evaluation", dict)
    seed = evaluation.get("seed", 0)
    return Recipe(result, need(evaluation, "episodes", int), seed, need(content, "machine", str))


def read_epochs(run: Run) -> list[dict]:
    """The epochs in stats.json of a run, each with its iterations in all as `global_step`."""

    def parse(text: str) -> list[dict]:
        epochs = json.loads(text)
        for epoch in epochs:
            int(epoch["epoch_num"]), int(epoch["global_step"])
        return epochs

    return read(run.path / "stats.json", parse, "list of epochs")


# Running train_atari.py


def say(text: str, file: TextIO | None = None) -> None:
    """Print; nothing ends because nobody reads any more, as after Ctrl-C with `| tee`."""
    file = file or sys.stdout
    try:
        print(text, file=file, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())  # for what is still in its buffer


def run_programs(
    commands: dict[str, list[str]], logs: Path, jobs: int, progress: Callable[[str], None]
) -> dict[str, int]:
    """Run train_atari.py with the arguments of each name, `jobs` at a time; returns exit codes.

    What they print goes to logs/NAME.log. SIGINT, SIGTERM and SIGHUP stop them, and a training run
    saves then; a second signal kills them. In both cases this waits for their end.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting, working, codes, signals, answered = list(commands), {}, {}, [], 0
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before = {n: signal.signal(n, lambda number, frame: signals.append(number)) for n in numbers}
    try:
        while working or (waiting and not signals):
            while waiting and len(working) < jobs and not signals:
                name = waiting.pop(0)
                say(f"{name}: train_atari.py {shlex.join(commands[name])}")
                command = [sys.executable, str(ROOT / "train_atari.py"), *commands[name]]
                # A group of its own: Ctrl-C reaches this program alone, which passes it on once.
                with open(logs / f"{name}.log", "wb") as log:
                    how = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
                    working[name] = subprocess.Popen(command, process_group=0, **how)
            time.sleep(POLL_SECONDS)
            if len(signals) > answered:
                for process in working.values():
                    os.killpg(process.pid, signal.SIGKILL if answered else signal.SIGTERM)
                answered = len(signals)
            for name, process in list(working.items()):
                progress(name)
                if process.poll() is not None:
                    codes[name] = working.pop(name).returncode
                    if codes[name] and not signals:
                        text = (logs / f"{name}.log").read_text(errors="replace").strip()
                        reason = text.rpartition("\n")[2]
                        say(f"{name}: exit code {codes[name]}: {reason}")
    finally:
        for process in working.values():  # an error has ended the loop: they save
            os.killpg(process.pid, signal.SIGTERM)
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in working.values():
            process.wait()
    if signals:
        raise ZooError("stopped; the same command goes on from here", 128 + signals[0])
    return codes


def train(recipe: Recipe, a: argparse.Namespace) -> None:
    """Run what is not done, and resume what was interrupted."""
    runs = {run.agent: run for run in recipe.runs if not run.is_done}
    for run in recipe.runs:
        if run.agent not in runs:
            print(f"{run.agent}: done, {run.epochs} epochs in {run.path}")
    commands, shown = {}, {}
    for name, run in runs.items():
        checkpoint = run.path / "checkpoint.pt"
        resume = ["--load", str(checkpoint)] if checkpoint.exists() else []
        commands[name] = [*run.arguments(), "--output", str(run.path), *resume]

    def progress(name: str) -> None:
        stats = runs[name].path / "stats.json"
        changed = stats.stat().st_mtime if stats.exists() else None
        if shown.setdefault(name, changed) != changed:
            shown[name] = changed
            for epoch in read_epochs(runs[name])[-1:]:
                score, last = epoch.get("train_score"), runs[name].epochs
                say(f"{name}: epoch {epoch['epoch_num']} of {last}, score {score}")

    codes = run_programs(commands, a.runs, a.jobs, progress)
    for name, code in codes.items():
        if code == 0:
            write(runs[name].done_mark, f"{runs[name].epochs}\n".encode())
    if failed := [name for name, code in codes.items() if code]:
        raise ZooError(f"failed: {', '.join(failed)}; see {a.runs}/NAME.log")


# Agents


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # whatever a damaged file makes of its reader
        raise ZooError(f"{path} is not a usable file of weights: {error}") from error


def pack(arrays: dict[str, np.ndarray]) -> bytes:
    """The smallest .npz of these weights: in float16, unless one of them is too large for it."""
    with np.errstate(over="ignore"):
        half = {name: array.astype(np.float16) for name, array in arrays.items()}
    if all(np.isfinite(array).all() for array in half.values()):
        arrays = half
    files = []
    for save in (np.savez, np.savez_compressed):
        file = io.BytesIO()
        save(file, **arrays)
        files.append(file.getvalue())
    return min(files, key=len)


def score(agent: str, env: str, weights: bytes, path: Path, episodes: int, seed: int) -> dict:
    """Evaluate weights in the directory `path`, unless their results are there already."""
    model, results = path / f"{agent}.npz", path / "results" / "results.json"
    if not model.exists() or model.read_bytes() != weights:
        results.unlink(missing_ok=True)
        write(model, weights)
    if not results.exists():
        shutil.rmtree(results.parent, ignore_errors=True)
        options = {"task": "eval", "env": env, "load": model, "episode": episodes, "seed": seed}
        options["output"] = results.parent
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        if run_programs({agent: words}, path, 1, lambda name: None)[agent]:
            raise ZooError(f"{agent} was not evaluated; see {path}/{agent}.log")
    return read_results(results)


def read_results(path: Path) -> dict:
    """An evaluation: results.json, of an agent with what is known of its run as `agent`."""

    def parse(text: str) -> dict:
        results = json.loads(text)
        float(results["mean_reward"]), float(results["std_reward"]), results["env_id"]
        return {"agent": {}} | results

    return read(path, parse, "file of results")


def ship(models: Path, agent: str, weights: bytes, results: dict) -> None:
    """Put an agent and its results into models/."""
    write(models / f"{agent}.npz", weights)
    write(models / f"{agent}{RESULTS}", f"{json.dumps(results, indent=1)}\n".encode())


def evaluate(recipe: Recipe, a: argparse.Namespace) -> None:
    """Ship the better weights of each finished run, if they beat the agent that is shipped."""
    for run in recipe.runs:
        if not run.is_done or not (epochs := read_epochs(run)):
            print(f"{run.agent}: not evaluated, for its run is not done")
            continue
        scores = {"latest": epochs[-1].get("mean_score")}
        scores["mean"] = epochs[-1].get("mean_model_score")
        whole = {kind: mean for kind, mean in scores.items() if mean is not None}
        kind = max(whole, key=whole.get) if whole else "latest"
        print(f"{run.agent}: model-{kind}.npz, for the final evaluation was {scores}")
        weights = pack(read_weights(run.path / f"model-{kind}.npz"))
        path = run.path / "evaluation"
        results = score(run.agent, run.env, weights, path, recipe.episodes, recipe.seed)
        mean, shipped = results["mean_reward"], a.models / f"{run.agent}{RESULTS}"
        if shipped.exists() and mean <= (old := read_results(shipped)["mean_reward"]):
            print(f"{run.agent}: {mean:,.2f} is not above {old:,.2f}: the shipped agent stays")
            continue
        print(f"{run.agent}: {mean:,.2f} in {recipe.episodes} episodes: it is shipped")
        results["agent"] = {
            "network": run.options.get("network", "ba3c"),
            "weights": f"model-{kind}.npz",
            "states": epochs[-1]["global_step"] * run.states_per_iteration,
            "hours": round(hours_of(epochs), 2),
            "machine": recipe.machine,
            "commands": [f"./train_atari.py {shlex.join(run.arguments())}"],
        }
        ship(a.models, run.agent, weights, results)
        merge_curve(a.models / "curves.json", run, epochs)


def hours_of(epochs: list[dict]) -> float:
    """Hours of training, without evaluations."""
    seconds, before = 0.0, 0
    for epoch in epochs:
        seconds += (epoch["global_step"] - before) / (epoch.get("it_per_s") or math.inf)
        before = epoch["global_step"]
    return seconds / 3600


def merge_curve(path: Path, run: Run, epochs: list[dict]) -> None:
    """Put a run's rows [states, training score, evaluation] into curves.json, a curve a line."""
    curves = read(path, json.loads, "file of curves") if path.exists() else {}
    states = run.states_per_iteration
    curves[run.agent] = [
        [epoch["global_step"] * states, epoch.get("train_score"), epoch.get("mean_score")]
        for epoch in epochs
    ]
    lines = ",\n".join(
        f" {json.dumps(name)}: {json.dumps(curves[name])}" for name in sorted(curves)
    )
    write(path, f"{{\n{lines}\n}}\n".encode())


def shrink(a: argparse.Namespace) -> None:
    """Ship float16 weights for float32 ones where 100 episodes score as well.

    That is: the mean is not lower by more than the standard error of the difference.
    """
    agents = read_agents(a.models)
    if not agents or not agents.keys() >= set(a.agent):
        raise ZooError(f"{a.models} has only these agents: {', '.join(agents) or 'none'}", 2)
    for agent, old in agents.items():
        arrays = read_weights(a.models / f"{agent}.npz")
        if agent not in (a.agent or [agent]) or all(x.itemsize == 2 for x in arrays.values()):
            continue
        weights, path = pack(arrays), a.runs / "shrink" / agent
        new = score(agent, old["env_id"], weights, path, 100, old.get("seed", 0))
        variances = [one["std_reward"] ** 2 / one["n_evaluation_episodes"] for one in (old, new)]
        error, change = math.sqrt(sum(variances)), new["mean_reward"] - old["mean_reward"]
        print(f"{agent}: {change:+,.2f} with float16, standard error {error:,.2f}")
        if change > -error:
            ship(a.models, agent, weights, new | {"agent": old["agent"]})


# The figure and the tables


def read_agents(models: Path) -> dict[str, dict]:
    """The results of all agents in a directory, by their names."""
    names = sorted(path.name[: -len(RESULTS)] for path in models.glob(f"*{RESULTS}"))
    return {name: read_results(models / f"{name}{RESULTS}") for name in names}


def read_others(models: Path) -> dict[str, dict]:
    """What is known of the games: scores.toml."""
    return read(models / "scores.toml", tomllib.loads, "file of scores")


def read_curves(models: Path) -> dict[str, list]:
    """Rows [states, training score, evaluation] by the name of the agent, and of other runs."""
    return read(models / "curves.json", json.loads, "file of curves")


def plot(a: argparse.Namespace) -> None:
    """Draw curve.png: the training scores of each game, between random and original."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ZooError("plot needs matplotlib: pip install matplotlib", 2) from error
    matplotlib.rcdefaults()
    curves, agents, others = read_curves(a.models), read_agents(a.models), read_others(a.models)
    games = sorted({game_of(name) for name in curves})
    rows = math.ceil(len(games) / COLUMNS)
    figure = Figure((13, 3 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for axes in panels[len(games) :]:
        axes.remove()
    for axes, game in zip(panels, games, strict=False):
        draw_game(axes, game, curves, agents, others.get(game, {}))
    figure.supylabel("score", fontsize=9)
    text = "line: last 100 training episodes; star: 100 episodes of the shipped agent"
    figure.supxlabel(f"million states ({text})", fontsize=9)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=80)
    write(a.models / "curve.png", file.getvalue())


def game_of(curve: str) -> str:
    """The game of a curve: of an agent, or of another run, which has a remark behind a space."""
    return curve.split()[0].removesuffix("-ba3c")


def draw_game(axes, game: str, curves: dict, agents: dict, other: dict) -> None:
    """One panel.

    Where a game is far from the original's score, its scale is the root of the distance to the
    random one: so both fit.
    """
    names = sorted(name for name in curves if game_of(name) == game)
    zero, original = other.get("random", [0])[0], other.get("original", -math.inf)
    scores = [row[1] for name in names for row in curves[name] if row[1] is not None]
    best = max(scores, default=zero)
    is_far = best - zero < (original - zero) / 3
    if is_far:
        axes.set_yscale(
            "function",
            functions=(
                lambda score: np.sign(score - zero) * np.sqrt(np.abs(score - zero)),
                lambda root: zero + np.sign(root) * root**2,
            ),
        )
    for name in names:
        agent, _, remark = name.partition(" ")
        label = remark or ("ba3c" if agent.endswith("-ba3c") else "a3c")
        states, scores, evaluations = zip(*curves[name], strict=True)
        millions = np.array(states) / 1e6
        (line,) = axes.plot(millions, np.array(scores, float), label=label)
        axes.plot(millions, np.array(evaluations, float), ".", color=line.get_color())
        if not remark and agent in agents and "states" in agents[agent]["agent"]:
            result = agents[agent]
            at = result["agent"]["states"] / 1e6, result["mean_reward"]
            axes.plot(*at, "*", color=line.get_color(), markersize=10)
    for name, style, value in (
        ("random", ":", other.get("random", [None])[0]),
        ("original", "--", other.get("original")),
    ):
        if value is not None:
            axes.axhline(value, color="gray", linestyle=style, label=f"{name} {value:,}")
    axes.set_title(game + (", root scale" if is_far else ""), fontsize=10)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)


def number(value: float | None) -> str:
    """A score as the tables have it."""
    if value is None:
        return ""
    return f"{value:,.1f}" if abs(value) < 200 and value != int(value) else f"{value:,.0f}"


def spread(mean: float, deviation: float) -> str:
    """A mean score and the deviation of the episodes, with as many digits."""
    digits = 1 if abs(mean) < 200 else 0
    return f"{mean:,.{digits}f} ± {deviation:,.{digits}f}"


def markdown(header: str, rows: list[list[str]], left: int = 1) -> str:
    """A table; the first `left` columns hold text, the others numbers."""
    count = header.count("|") - 1
    lines = [header, f"|{'---|' * left}{'--:|' * (count - left)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def agents_table(models: Path) -> str:
    """The agents: what they learned from, and how they score."""
    others, rows = read_others(models), []
    for agent, result in read_agents(models).items():
        facts = result["agent"]
        other = others.get(result["env_id"], {})
        row = [agent, f"`{facts.get('network', '')}`", facts.get("machine", "")]
        row += [number(facts.get("states")), str(facts.get("hours", ""))]
        row += [spread(result["mean_reward"], result["std_reward"])]
        row += [number(other.get("random", [None])[0]), number(other.get("original"))]
        rows.append(row)
    header = "| agent | network | trained on | states | hours | score | random | original |"
    return markdown(header, rows, 3)


def runs_table(models: Path) -> str:
    """What was evaluated of each agent, and the commands that made it."""
    blocks = []
    for agent, result in read_agents(models).items():
        facts, score = result["agent"], spread(result["mean_reward"], result["std_reward"])
        kind = next(iter(read_weights(models / f"{agent}.npz").values())).dtype
        low, high = number(result.get("min_reward")), number(result.get("max_reward"))
        text = f"**{agent}**: {facts.get('weights')} as {kind}; {score}, from {low} to {high}, "
        text += f"with `--seed {result.get('seed')}`. {facts.get('remark', '')}".strip()
        lines = "\n".join(facts.get("commands", []))
        blocks.append(f"{text}\n\n```\n{lines}\n```")
    return "\n\n".join(blocks)


def games_table(models: Path) -> str:
    """The games of the original, with its scores, ours, and those of others."""
    agents, rows = read_agents(models), []
    for game, other in read_others(models).items():
        ours = [r["mean_reward"] for r in agents.values() if r["env_id"] == game]
        sticky = other.get("others", {})
        at_10 = [sticky.get(f"SLM-Lab 5 {name}", {}).get("10") for name in ("A2C", "PPO")]
        scores = (other["original"], max(ours, default=None), other.get("lstm"), *at_10)
        rows.append([game.removesuffix("-v0"), str(other["actions"]), *map(number, scores)])
    header = "| game | actions | original | ours | A3C-LSTM | A2C, 10 M | PPO, 10 M |"
    return markdown(header, rows)


def references_table(models: Path) -> str:
    """Scores of others by millions of states, beside training scores of ours."""
    curves, rows = read_curves(models), []
    for game, other in read_others(models).items():
        others = other.get("others", {})
        ours = {}
        for curve in (game, f"{game} recipe", f"{game}-ba3c"):
            points = [[row for row in curves.get(curve, ()) if row[0] <= 1e6 * m] for m in MILLIONS]
            by = f"ours, `{'ba3c' if curve.endswith('-ba3c') else 'a3c'}`"
            by += ", the recipe" if curve.endswith("recipe") else ""
            ours[by] = {
                str(millions): point[-1][1]
                for millions, point in zip(MILLIONS, points, strict=True)
                if point and point[-1][0] > 0.85e6 * millions
            }
        ours = {by: scores for by, scores in ours.items() if scores}
        for name, scores in (ours | others).items() if ours else ():
            values = [number(scores.get(str(millions))) for millions in MILLIONS]
            rows.append([game.removesuffix("-v0"), name, *values])
    return markdown(f"| game | by | {' | '.join(MILLIONS.values())} |", rows, 2)


TABLES = {
    "agents": agents_table,
    "runs": runs_table,
    "games": games_table,
    "references": references_table,
}


def table(a: argparse.Namespace) -> None:
    """Write the tables between the markers of the READMEs."""

    def fill(match: re.Match) -> str:
        if match[2] not in TABLES:
            raise ZooError(f"there is no table {match[2]}, only {', '.join(TABLES)}")
        return f"{match[1]}\n{TABLES[match[2]](a.models)}\n\n{match[3]}"

    for path in a.readme or [ROOT / "README.md", a.models / "README.md"]:
        text = read(path, str, "README")
        if not MARKED.search(text):
            raise ZooError(
                f"{path} has no marker <!-- table: NAME --> with an <!-- end --> after it"
            )
        write(path, MARKED.sub(fill, text).encode())


def main() -> int:
    """Run a subcommand; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("train", "evaluate", "shrink", "plot", "table"):
        command = commands.add_parser(name)
        command.add_argument("--models", type=Path, default=ROOT / "models", metavar="DIR")
        if name in ("train", "evaluate", "shrink"):
            command.add_argument("agent", nargs="*", help="such as Breakout-v0; default: all")
            command.add_argument("--runs", type=Path, default="train_log/zoo", metavar="DIR")
        if name in ("train", "evaluate"):
            command.add_argument("--recipe", type=Path, metavar="FILE", help="not recipe.toml")
        if name == "train":
            command.add_argument("--jobs", type=int, default=1, help="runs side by side")
        if name == "table":
            command.add_argument("--readme", type=Path, action="append", metavar="FILE")
    a = parser.parse_args()
    try:
        if getattr(a, "jobs", 1) < 1:
            raise ZooError("--jobs must be 1 or more", 2)
        if a.command in ("train", "evaluate"):
            recipe = read_recipe(a.recipe or a.models / "recipe.toml", a.runs, a.agent)
            {"train": train, "evaluate": evaluate}[a.command](recipe, a)
        else:
            {"shrink": shrink, "plot": plot, "table": table}[a.command](a)
    except (ZooError, OSError) as error:
        say(f"zoo.py: {error}", sys.stderr)
        return getattr(error, "code", 1)
    except KeyboardInterrupt:
        say("zoo.py: interrupted", sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
