"""Files and directories, and what of them decides: checkpoints, runs, outputs, the best model.

No test here starts Python: they call what the program calls, or the program itself.
"""

import contextlib
import copy
import errno
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import model
import predictor
import simulator
import train_atari
from common import Episode
from train_atari import (
    Ranks,
    Run,
    RunDirectory,
    RunLocation,
    complete,
    load_for,
    main,
    open_run,
)

GAME = "tests.games:Catch-v0"
CATCH = ("--env", GAME)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path, monkeypatch):
    """Whatever a test writes by a relative name is its own; simulators find the games of tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", ROOT)


@pytest.fixture(scope="module")
def run_of_two_epochs(tmp_path_factory):
    """The directory of a run that was trained for two epochs, and its weights' arrays."""
    path = tmp_path_factory.mktemp("files") / "run"
    size = ("--batch-size", 16, "--steps-per-epoch", 3, "--max-epoch", 2, "--eval-episode", 1)
    few = ("--simulator-proc", 1, "--players-per-simulator", 4, "--seed", 1)
    assert main([*CATCH, "--network", "a3c", *size, *few, "--output", path]) == 0
    return path


@pytest.fixture
def run(run_of_two_epochs, tmp_path):
    """A copy of that directory, which is a run's own as well."""
    return shutil.copytree(run_of_two_epochs, tmp_path / "run")


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "agent.npz"
    path.write_bytes(model.weights_file(model.Network("a3c", 3)))
    return path


def contents(path):
    return {p.name: p.read_bytes() for p in path.iterdir() if p.is_file()}


def sentence_of(capsys):
    """The only line on standard error, which is not the usage."""
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if not line.startswith(("usage", " "))]
    assert len(lines) == 1, lines
    return lines[0]


# The best model


def make_training(path, saved=None):
    """A run that has not begun to train, with a network of its own."""
    path.mkdir(exist_ok=True)
    chosen = {"seed": 1, "network": "a3c", "eval_episode": 4, "steps_per_epoch": 10}
    options = complete(chosen, on_cpu=True)
    network = model.Network("a3c", 3)
    log_file = open_run(str(path), is_resumed=True)
    ranks = Ranks(torch.device("cpu"), {}, seed=1)  # this one alone
    options.env = GAME
    directory = RunDirectory(RunLocation(str(path), bool(saved), "a place"), log_file)
    made = Run(chosen, options, network, ranks, directory, saved or {})
    made.feed = SimpleNamespace(replace_ended=list, scores=[])
    made.bar = SimpleNamespace(disable=False, set_postfix_str=lambda text: None)
    return made


@pytest.fixture
def training(tmp_path):
    made = make_training(tmp_path / "run")
    yield made
    made.directory.log_file.close()


def resumed(training, tmp_path):
    """The same run, started again from its checkpoint."""
    training.save()
    training.directory.log_file.close()
    path = tmp_path / "run" / "checkpoint.pt"
    _, _, saved = load_for(GAME, str(path))
    return make_training(tmp_path / "run", saved)


def evaluated(training, monkeypatch, scores, finished=True):
    """Let a network of its own be evaluated with these scores; what stats say, and the network."""
    training.learner.network.load_state_dict(model.Network("a3c", 3).state_dict())
    training.started_at -= 1000.0  # there is time for it
    episodes = [Episode(float(score), 30, finished) for score in scores]
    monkeypatch.setattr("predictor.score_network", lambda *_, **__: episodes)
    return train_atari.evaluate(training), model.weights_file(training.learner.network)


NOTHING = train_atari.NOT_EVALUATED


def test_only_whole_evaluations_choose_the_best_model(training, tmp_path, monkeypatch):
    best = tmp_path / "run" / "model-best.npz"
    # Nobody has scored these wholly: one of four episodes, and four that were cut short.
    result, _ = evaluated(training, monkeypatch, [90])
    assert result == {**NOTHING, "eval_episodes": 1}
    result, _ = evaluated(training, monkeypatch, [90] * 4, finished=False)
    assert result == {**NOTHING, "eval_episodes": 0}
    assert not best.exists() and training.at.best_score is None
    log = (tmp_path / "run" / "log.log").read_text()
    assert "there is no model-best.npz: --task eval" in log and "fewer --eval-episode" in log
    # The first whole one, one that is better, one that is not, one that is not whole.
    result, first = evaluated(training, monkeypatch, [1, 2, 3, 4])
    assert result == {**NOTHING, "mean_score": 2.5, "max_score": 4, "eval_episodes": 4}
    assert best.read_bytes() == first
    _, better = evaluated(training, monkeypatch, [3] * 4)
    assert best.read_bytes() == better != first
    for scores in ([2] * 4, [3] * 4, [90] * 3):
        evaluated(training, monkeypatch, scores)
        assert best.read_bytes() == better and training.at.best_score == 3
    # Across a resume the same holds.
    again = resumed(training, tmp_path)
    with again.directory.log_file:
        for scores in ([2] * 4, [90] * 3):
            evaluated(again, monkeypatch, scores)
            assert best.read_bytes() == better and again.at.best_score == 3
        _, best_of_all = evaluated(again, monkeypatch, [4] * 4)
        assert best.read_bytes() == best_of_all
    assert (
        "no evaluation was whole yet" not in (tmp_path / "run" / "log.log").read_text()[len(log) :]
    )


def test_the_best_score_is_that_of_a_file(training, tmp_path, monkeypatch):
    """A model that could not be written is not the one that the next must beat."""
    path = tmp_path / "run" / "model-best.npz"
    with monkeypatch.context() as full:
        full.setattr("common.write_file", lambda *_: os.open("/nowhere/x", os.O_RDONLY))
        evaluated(training, monkeypatch, [9] * 4)
    assert training.at.best_score is None and "model-best.npz" in training.directory.unwritten
    _, written = evaluated(training, monkeypatch, [5] * 4)
    assert path.read_bytes() == written and training.at.best_score == 5
    assert not training.directory.unwritten


def test_evaluations_have_a_fifth_of_the_time_of_a_run(training, monkeypatch):
    seconds = []

    def score(env_id, network, episodes, seed, log, limit, check):
        assert episodes == 4
        seconds.append(limit)
        training.started_at -= 10.0  # as long as it takes
        return [Episode(1.0, 30, True)] * 4

    monkeypatch.setattr("predictor.score_network", score)
    training.started_at = time.monotonic() - 100.0
    train_atari.evaluate(training)
    assert seconds[0] == pytest.approx(25.0, abs=0.5)  # of 125
    training.at.evaluated_s = 10.0
    train_atari.evaluate(training)
    assert seconds[1] == pytest.approx((0.2 * 110 - 10) / 0.8, abs=0.5)
    training.at.evaluated_s = 1000.0  # more than that, by the start of its players
    assert train_atari.evaluate(training) == NOTHING and len(seconds) == 2


def test_after_one_that_was_cut_short_an_evaluation_waits_for_twice_the_time(
    training, tmp_path, monkeypatch
):
    """So a run whose evaluations do not fit into their time has a best model in the end."""
    now, limits = [training.started_at], []

    def score(env_id, network, episodes, seed, log, limit, check):
        limits.append(round(limit))
        now[0] += min(limit, 60.0)  # which is what it needs
        return [Episode(1.0, 30, limit >= 60.0)] * 4

    clock = SimpleNamespace(monotonic=lambda: now[0], strftime=time.strftime)
    monkeypatch.setattr("train_atari.time", clock)
    monkeypatch.setattr("predictor.score_network", score)
    results = []
    for _ in range(7):
        now[0] += 80.0  # of training
        training.at.epoch += 3
        results.append(train_atari.evaluate(training))
    # A fifth of the time in all. It is put off until there are 40 seconds, then until there are 80.
    assert limits == [20, 40, 80]
    assert [result["eval_episodes"] for result in results] == [0, None, 0, None, None, None, 4]
    assert "evaluation: put off, it may need 80 s" in (tmp_path / "run" / "log.log").read_text()
    assert training.at.best_score == 1.0


def test_a_score_is_limited_in_time(monkeypatch):
    """Two hundred episodes do not fit into a moment, and those that do are not whole."""
    done = predictor.score_network(GAME, model.Network("a3c", 3), 200, 1, print, seconds=0.5)
    assert 0 < len(done) < 200


def test_what_ends_the_run_is_not_taken_for_the_end_of_an_evaluation(training, monkeypatch):
    def fail():
        raise common.UserError("simulator 0 ended with code 1: the game broke")

    training.feed.replace_ended = fail
    monkeypatch.setattr("predictor.score_network", lambda *args: args[-1]())
    with pytest.raises(common.UserError, match="the game broke"):
        train_atari.evaluate(training)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x93NUMPY"])
def test_weights_that_are_no_npz_are_named(tmp_path, capsys, content):
    path = tmp_path / "Catch-v0.npz"
    path.write_bytes(content)
    assert main(["--task", "eval", *CATCH, "--load", str(path)]) == 1
    assert sentence_of(capsys).endswith(f"{path} is not usable: it is no .npz, or not a whole one")


def test_other_episodes_are_evaluated_at_once(training, tmp_path):
    training.chosen["eval_episode"], training.at.needed_s = 100, 1e6
    training.save()
    training.directory.log_file.close()
    _, _, saved = load_for(GAME, str(tmp_path / "run" / "checkpoint.pt"))
    assert make_training(tmp_path / "run", saved).at.needed_s == 0


def test_weights_that_are_not_finite_are_not_saved(training, tmp_path):
    training.save()
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with torch.no_grad():
        training.learner.network.fc_v.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"fc_v\.bias is not finite after iteration"):
        training.save()
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_a_run_without_room_for_tensorboard_is_a_run(training, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", full)
    monkeypatch.setattr("threading.excepthook", None)
    with contextlib.ExitStack() as stack:
        train_atari.start_writer(training, False, stack)
        training.metrics.add_scalars({"cost": 1.0}, 1)
    said = (tmp_path / "run" / "log.log").read_text()
    assert "nothing goes to TensorBoard: No space left on device; training continues" in said


def test_a_run_that_was_saved_while_another_started_is_not_resumed_from_before(
    training, monkeypatch, tmp_path, capsys
):
    training.save()
    training.directory.log_file.close()
    path = tmp_path / "run" / "checkpoint.pt"
    content = path.read_bytes()
    monkeypatch.setattr(model, "load", lambda p, load=model.load: (load(p), rewrite())[0])

    def rewrite():
        os.utime(path, ns=(1, 1))

    assert main([*CATCH, "--load", str(path), "--max-epoch", "1"]) == 1
    assert f"{path} was written anew meanwhile: start again" in sentence_of(capsys)
    assert path.read_bytes() == content


def test_the_seed_of_an_evaluation_is_one_that_simulators_take(training, monkeypatch):
    seeds = []
    training.options.seed, training.at.epoch = 2**32 - 1, 3
    monkeypatch.setattr(
        "predictor.score_network",
        lambda *args: seeds.append(args[3]) or [Episode(1.0, 30, True)] * 4,
    )
    train_atari.evaluate(training)
    assert seeds == [2]


def test_an_evaluation_that_is_given_up_keeps_the_threads_of_torch(training, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("predictor.VectorPlayers", full)
    monkeypatch.setattr("predictor.count_cores", lambda: 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert train_atari.evaluate(training) == train_atari.NOT_EVALUATED
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


def test_tensorboard_has_means_of_seconds_and_an_epoch_has_its_own(training, monkeypatch):
    scalars, metrics = [], training.metrics
    metrics.writer = SimpleNamespace(add_scalar=lambda *a: scalars.append(a))
    training.rates = {"learning_rate": 1e-3, "entropy_beta": 0.01}
    monkeypatch.setattr(training, "save", lambda: None)
    metrics.epoch_started_at = time.monotonic() - 1.0
    cost = metrics.columns.index("cost")
    for step in range(10):
        training.at.global_step = step + 1
        metrics.rows.append(np.zeros(len(metrics.columns)))
        metrics.rows[-1][cost] = step
        if step == 5:
            train_atari.show(training)
    evaluation = {"mean_score": 5.0, "max_score": 7.0, "eval_episodes": 4}
    monkeypatch.setattr("train_atari.evaluate", lambda run: evaluation)
    monkeypatch.setattr("train_atari.EVAL_EPOCH", 1)
    train_atari.end_epoch(training)
    assert [s[1:] for s in scalars if s[0] == "cost"] == [(2.5, 6), (7.5, 10)]
    assert training.stats[-1]["cost"] == 4.5
    for name, value in evaluation.items():
        assert training.stats[-1][name] == value
        assert [s[1:] for s in scalars if s[0] == name] == [(value, 10)]
    assert training.stats[-1]["train_episodes"] == 0


@pytest.mark.parametrize(
    "value, text",
    [
        (633519123, "633519123"),
        (2469120.0, "2469120"),
        (16184832, "16184832"),
        (-21.0, "-21"),
        (71175.25, "71175.25"),
        (2469120.5, "2469120.50"),
        (119.123456, "119.123"),
        (3e-4, "0.0003"),
        (None, "-"),
        (float("inf"), "inf"),
    ],
)
def test_whole_numbers_are_printed_whole(value, text):
    assert common.number(value) == text
    assert common.table({"x": value}).split() == ["-" * 1, "-" * len(text), "x", text] + [
        "-" * 1,
        "-" * len(text),
    ]


def test_what_tasks_print_has_whole_numbers(training, weights, tmp_path, monkeypatch, capsys):
    huge = [Episode(2469120.0, 16184832, True), Episode(2469122.0, 16184832, True)]
    monkeypatch.setattr("predictor.score_network", lambda *_, **__: huge)
    assert main(["--task", "eval", *CATCH, "--load", weights, "--seed", 633519123]) == 0
    printed = capsys.readouterr().out
    for text in ("mean 2469121", "max 2469122", "seed 633519123", "mean_length 16184832"):
        assert text in " ".join(printed.split())

    step = common.Player.step
    monkeypatch.setattr(
        "common.Player.step",
        lambda self, action: (step(self, action)[0], 1e6, self.length == 2, False, {}),
    )
    assert main(["--task", "play", *CATCH, "--load", weights, "--episode", 1, "--output", "v"]) == 0
    printed = capsys.readouterr().out
    assert "1/1, score=2000000\n" in printed or "1/1, score=-" not in printed
    assert "e+0" not in printed
    training.at = train_atari.Progress(epoch=2, due=True, global_step=16184832)
    training.stats = [{"epoch_num": 1}, {"epoch_num": 2, "global_step": 16184832, "cost": 2e6}]
    train_atari.end_epoch(training)
    printed = " ".join(capsys.readouterr().out.split())
    assert "global_step 16184832 cost 2000000 " in printed


# Which directory a run is in


def goes_on_in(path, arguments, capsys):
    """Load a checkpoint of a run that is done; whether it was gone on with in `path`."""
    before = contents(path)
    code = main(["--max-epoch", 2, *CATCH, *arguments])
    printed = capsys.readouterr()
    assert code == 0 and "the run is done" in printed.err, printed
    changed = contents(path) != before
    assert (f"the run is resumed in {path}" in printed.out) == changed
    assert ("a new run in" in printed.out) != changed
    return changed


def test_a_run_goes_on_in_its_own_directory(run, tmp_path, capsys):
    assert goes_on_in(run, ("--load", run / "checkpoint.pt"), capsys)
    assert goes_on_in(run, ("--load", "run/checkpoint.pt", "--output", "run"), capsys)
    os.symlink("run", "link")
    assert goes_on_in(tmp_path / "link", ("--load", "link/checkpoint.pt", "--output", run), capsys)
    assert not os.path.exists("train_log")


def test_an_epoch_that_has_become_shorter_is_done(run):
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    state["at"] |= {"epoch": 1, "epoch_step": 2}
    state["stats"] = state["stats"][:1]
    torch.save(state, run / "checkpoint.pt")
    shorter = ("--steps-per-epoch", 2, "--max-epoch", 2)
    assert main([*CATCH, "--load", run / "checkpoint.pt", *shorter]) == 0
    epochs = json.loads((run / "stats.json").read_text())
    assert [epoch["epoch_num"] for epoch in epochs] == [1, 2] and epochs[1]["cost"] is None
    assert epochs[0]["learning_rate"] > epochs[1]["learning_rate"] == 0  # it falls over the run


def test_a_copy_of_a_whole_directory_is_a_directory_of_its_own(run, tmp_path, capsys):
    before = contents(run)
    copied = shutil.copytree(run, tmp_path / "copy")
    assert goes_on_in(copied, ("--load", copied / "checkpoint.pt"), capsys)
    assert contents(run) == before


@pytest.mark.parametrize("place", ["alone", "renamed", "beside", "here", "own"])
def test_any_other_copy_of_a_checkpoint_begins_a_run_elsewhere(run, tmp_path, capsys, place):
    backup = tmp_path / "backup"
    backup.mkdir()
    file = backup / ("best.pt" if place == "renamed" else "checkpoint.pt")
    arguments = ["--load", file]
    if place == "own":
        backup, file = run, run / "best.pt"
        arguments = ["--load", file]
    shutil.copy(run / "checkpoint.pt", file)
    if place == "beside":
        for name in ("stats.json", "model-latest.npz", "log.log"):
            shutil.copy(run / name, backup)
    if place == "here":
        os.chdir(backup)
        arguments = ["--load", "checkpoint.pt"]
    assert not goes_on_in(backup, arguments, capsys)
    (new,) = (backup if place == "here" else tmp_path).glob("train_log/*")
    assert new.name == "train-atari-tests.games-Catch-v0"
    _, _, old = load_for(GAME, str(file))
    _, _, saved = load_for(GAME, str(new / "checkpoint.pt"))
    assert saved["run_id"] != old["run_id"]
    assert saved["stats"] == old["stats"] and saved["learner"]["updates"] == 6
    weights = [each["learner"]["network"]["fc_pi.weight"] for each in (old, saved)]
    assert torch.equal(*weights)
    if place == "here":
        shutil.rmtree("train_log")
    # And there it goes on.
    elsewhere = tmp_path / "elsewhere"
    assert main(["--max-epoch", 2, *CATCH, *arguments, "--output", elsewhere]) == 0
    capsys.readouterr()
    assert goes_on_in(elsewhere, ("--load", elsewhere / "checkpoint.pt"), capsys)


def test_a_directory_that_holds_another_run_is_refused(run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "train_log" / "train-atari-tests.games-Catch-v0")
    backup = tmp_path / "backup"
    backup.mkdir()
    shutil.copy(run / "checkpoint.pt", backup)
    before = contents(other), contents(backup)
    assert main(["--max-epoch", 3, *CATCH, "--load", backup / "checkpoint.pt"]) == 2
    assert f"{other} holds a run" in sentence_of(capsys)
    # Nor is a checkpoint written over that lies alone where it should go on.
    arguments = ("--load", backup / "checkpoint.pt", "--output", backup)
    assert main(["--max-epoch", 3, *CATCH, *arguments]) == 2
    sentence = sentence_of(capsys)
    assert "it has no log.log" in sentence and sentence.endswith("name another --output")
    assert (contents(other), contents(backup)) == before


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda run: (run / "log.log").unlink(), "it has no log.log"),
        (lambda run: (run / "stats.json").unlink(), "it has no stats.json"),
        (lambda run: (run / "stats.json").write_text("{"), "its stats.json is damaged"),
        (lambda run: (run / "config.json").write_text("[]"), "its config.json is damaged"),
        (lambda run: rewrite(run, run_id="x"), "its config.json is of another run"),
        (
            lambda run: (run / "stats.json").write_text('[{"epoch_num": 1, "global_step": 9}]'),
            "its stats.json is of another run",
        ),
    ],
)
def test_a_directory_must_agree_with_the_checkpoint(run, capsys, change, why):
    change(run)
    before = contents(run)
    assert main(["--max-epoch", 2, *CATCH, "--load", run / "checkpoint.pt"]) == 0
    assert f"{run} is not the directory of that run: {why})" in capsys.readouterr().out
    assert contents(run) == before


def rewrite(run, **changes):
    """Change what the configuration of a run says; None: take it out."""
    config = json.loads((run / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (run / "config.json").write_text(json.dumps(config))


def test_a_run_that_has_no_name_is_known_by_its_seed(run, capsys):
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    del saved["run_id"], saved["at"]["due"]  # as an earlier version wrote it
    torch.save(saved, run / "checkpoint.pt")
    rewrite(run, run_id=None)
    assert goes_on_in(run, ("--load", run / "checkpoint.pt"), capsys)
    torch.save(saved, run / "checkpoint.pt")  # stopped before its first checkpoint
    assert goes_on_in(run, ("--load", run / "checkpoint.pt"), capsys)
    torch.save(saved, run / "checkpoint.pt")
    rewrite(run, run_id=None, seed=2)
    assert not goes_on_in(run, ("--load", run / "checkpoint.pt"), capsys)


@pytest.mark.parametrize("epochs", [0, 1, 3])
def test_stats_may_be_of_another_moment_of_the_run(run, capsys, epochs):
    """It was killed between two files, or goes back to an earlier checkpoint."""
    stats = json.loads((run / "stats.json").read_text())
    stats = (stats + [stats[-1] | {"epoch_num": 3, "global_step": 9}])[:epochs]
    (run / "stats.json").write_text(json.dumps(stats))
    assert goes_on_in(run, ("--load", run / "checkpoint.pt"), capsys)


def test_a_configuration_that_could_not_be_written_is_written_later(training, tmp_path):
    path = tmp_path / "run" / "config.json"
    config = path.read_text()
    path.unlink()
    training.directory.unwritten["config.json"] = OSError("no room")
    training.save()
    assert path.read_text() == config and json.loads(config)["run_id"] == training.run_id
    assert not training.directory.unwritten


# What a checkpoint must hold


def paths_of(state, path=()):
    """All places in a checkpoint, as tuples of keys."""
    if isinstance(state, dict) and len(path) < 5:
        for key, value in state.items():
            yield (*path, key)
            yield from paths_of(value, (*path, key))
    elif isinstance(state, list) and path == ("stats",):
        yield from paths_of(state[0], (*path, 0))


NEEDLESS = {"due", "run_id", "param_groups"}  # of which something else is made


def changed(state, place, **value):
    """A copy of a checkpoint with another value in one place, or without it."""
    key, *rest = place
    copied = copy.copy(state)
    if rest:
        copied[key] = changed(state[key], rest, **value)
    elif value:
        copied[key] = value["value"]
    else:
        del copied[key]
    return copied


def test_a_checkpoint_without_a_key_or_with_a_wrong_type_is_refused(run):
    good = torch.load(run / "checkpoint.pt", weights_only=True)
    model.read_checkpoint(good)
    train_atari.check_run(good)
    places = [place for place in paths_of(good) if "param_groups" not in place]
    places = [place for place in places if place[2:4] not in {("state", n) for n in range(1, 20)}]
    assert len(places) > 60
    for place in places:
        # An option or a metric may be missing: earlier versions had fewer, and a run has defaults.
        known = place[0] in ("options", "stats") and len(place) > 1
        needed = ("epoch_num", "global_step")
        optional = place[-1] in ("due", "needed_s", "run_id", "mean") or (
            known and place[-1] not in needed
        )
        states = [changed(good, place, value={"wrong": ["type"]})]
        if not optional:
            states.append(changed(good, place))
        for state in states:
            with pytest.raises(ValueError) as caught:
                model.read_checkpoint(state)
                train_atari.check_run(state)
                raise AssertionError(place)
            assert str(caught.value).startswith("it"), place


@pytest.mark.parametrize(
    "place, value, text",
    [
        (("learner", "num_actions"), True, "num_actions is no int"),
        (("learner", "num_actions"), 0, "it is for 0 actions"),
        (("learner", "num_actions"), model.MAX_ACTIONS, "it is for 1000 actions"),
        (("learner", "kind"), "resnet", "a network 'resnet'"),
        (("learner", "updates"), -1, "it has -1 updates"),
        (("learner", "updates"), 0, "variables that its network has not"),
        (
            ("learner", "optimizer"),
            {"state": {}, "param_groups": []},
            "no learner.optimizer.state.0",
        ),
        (
            ("learner", "network", "fc_v.bias"),
            torch.zeros(2),
            "fc_v.bias is (2,) torch.float32, not (1,)",
        ),
        (("learner", "network", "fc_v.bias"), torch.zeros(1).int(), "is (1,) torch.int32, not"),
        (("learner", "network", "fc_v.bias"), torch.full((1,), torch.nan), "is not finite"),
        (("learner", "network", "more"), torch.zeros(2), "variables that its network has not"),
        (("rng",), torch.zeros(3, dtype=torch.uint8), "is not usable"),
        (("rng",), torch.zeros(3), "its rng is (3,) torch.float32"),
        (("env",), "Pong-v0\nmore", "its env is no name"),
        (("options", "batch_size"), "16", "option 'batch_size' with the value '16'"),
        (("options", "batch_size"), -1, "invalid count value: '-1'"),
        (("options", "batch_siz"), 16, "option 'batch_siz'"),
        (("options", "gamma"), torch.nan, "invalid fraction value"),
        (("options", "learning_rate"), "1e-3,x", "invalid schedule value"),
        (("options", "episode"), 3, "option 'episode'"),
        (("options", "output"), "/", "option 'output'"),
        (("options", "ranks"), "many", "invalid rank_count value: 'many'"),
        (("options", "ranks"), 2**31, "invalid rank_count value"),
        (("options", "gpu"), 7, "option 'gpu'"),
        (("options", "gpu"), "0,x", "invalid gpus value"),
        (("options", "help"), "x", "its options are wrong"),
        (("at", "global_step"), -1, "its global_step is -1"),
        (("at", "epoch"), 3, "its stats are not those of 3 epochs"),
        (("at", "elapsed_s"), torch.nan, "its elapsed_s is nan"),
        (("at", "later"), 1, "its at has 'later', which is unknown"),
        (("at", "best_score"), torch.inf, "its best_score is inf"),
        (("stats", 0, "cost"), "1", "its stats are no numbers"),
        (("stats", 0, "epoch_num"), 2, "its stats are not those of 2 epochs"),
    ],
)
def test_a_checkpoint_with_a_wrong_value_gets_one_sentence(run, capsys, place, value, text):
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    holder = state
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    torch.save(state, "changed.pt")
    assert main([*CATCH, "--load", "changed.pt", "--max-epoch", 2]) in (1, 2)
    sentence = sentence_of(capsys)
    assert "changed.pt is" in sentence and text in sentence
    assert not os.path.exists("train_log")


def test_a_file_names_no_module_to_import(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "trap.py").write_text("open('it ran', 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    for task in ((), ("--task", "eval")):
        torch.save(state | {"env": "trap:Catch-v0"}, "other.pt")
        assert main([*task, "--load", "other.pt"]) == 2
        assert "give --env trap:Catch-v0" in sentence_of(capsys)
        torch.save(state | {"env": "Cach-v0"}, "other.pt")
        assert main([*task, "--load", "other.pt"]) == 2
        assert "no game Cach-v0" in sentence_of(capsys)
    assert not os.path.exists("it ran") and "trap" not in sys.modules
    assert main(["--max-epoch", 2, *CATCH, "--load", run / "checkpoint.pt"]) == 0
    # A game that needs no module needs no --env either.
    network = model.Network("a3c", 6)
    learner = model.Learner(network, torch.device("cpu"), 1e-3, 1)
    state |= {"env": "Pong-v0", "learner": learner.state_dict()}
    torch.save(state, "pong.pt")
    assert load_for(None, "pong.pt")[0] == "Pong-v0"


# What is left where nothing is whole


def interrupt(*_, **__):
    raise KeyboardInterrupt


def fail(*_, **__):
    raise OSError("cannot write: no room")


@pytest.mark.parametrize(
    "task, place, how, code",
    [
        ("gen_submit", "common.Player.step", interrupt, 130),
        ("gen_submit", "common.Video.write", fail, 1),
        ("gen_submit", "common.Video.finish", interrupt, 130),
        ("gen_submit", "common.write_submission", fail, 1),
        ("gen_submit", "common.write_file", fail, 1),
        ("play", "common.Video.write", interrupt, 130),
        ("play", "common.Video.finish", fail, 1),
        ("eval", "predictor.VectorPlayers", fail, 1),
        ("eval", "predictor.play_episodes", interrupt, 130),
        ("eval", "common.write_file", fail, 1),
    ],
)
def test_what_failed_may_be_done_once_more(weights, monkeypatch, capsys, task, place, how, code):
    command = ["--task", task, *CATCH, "--load", weights, "--episode", 2, "--output", "a/b"]
    there = code == 1  # the directory, or only in those cases
    if there:
        os.makedirs("a/b")
    with monkeypatch.context() as broken:
        broken.setattr(place, how)
        assert main(command) == code
    sentence_of(capsys)
    assert os.path.exists("a") == there
    assert not there or os.listdir("a/b") == []
    assert main(command) == 0
    assert len(os.listdir("a/b")) >= 1


def test_a_video_that_took_its_place_goes_with_its_episode(weights, tmp_path, monkeypatch):
    """An interrupt comes after the file has its name, and before anything else knows of it."""
    finish = common.Video.finish

    def late(self):
        finish(self)
        raise KeyboardInterrupt

    command = ["--task", "gen_submit", *CATCH, "--load", weights, "--episode", 2]
    monkeypatch.setattr("common.Video.finish", late)
    assert main(command) == 130
    assert not os.path.exists("output_dir")


# Paths are paths

NAMES = ["run:1", "-x", "a b [c] {d} 50%d é", "s3://x"]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_of_any_name(weights, name, monkeypatch):
    file = f"{name.replace('/', '-')}.npz"
    shutil.copy(weights, file)
    for task, there in (("play", "episode000000.mp4"), ("gen_submit", "replay.mp4")):
        output = f"{name}/{task}" if name == "-x" else f"{name}-{task}"
        arguments = [f"--load={file}", f"--output={output}", "--episode", 1]
        assert main(["--task", task, *CATCH, *arguments]) == 0
        assert os.path.getsize(os.path.join(output, there)) > 1000
    monkeypatch.setattr("predictor.score_network", lambda *_, **__: [Episode(1.0, 2, True)])
    assert main(["--task", "eval", *CATCH, f"--load={file}", f"--output={name}-eval"]) == 0
    assert os.listdir(f"{name}-eval") == ["results.json"]


@pytest.mark.parametrize("name", NAMES)
def test_runs_of_any_name(run, name, monkeypatch):
    """On a terminal that shows ASCII alone, too."""
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr("sys.stdout", screen)
    shutil.copy(run / "checkpoint.pt", f"{name.replace('/', '-')}.pt")
    load = f"--load={name.replace('/', '-')}.pt"
    assert main([*CATCH, load, f"--output={name}", "--max-epoch", 2]) == 0
    assert screen.encoding == "ascii" and screen.errors == "strict"
    screen.flush()
    assert b"begins with what" in screen.buffer.getvalue()
    assert name.strip("/").split("/")[-1] in Path(name, "log.log").read_text("utf-8")
    assert main([*CATCH, f"--load={name}/checkpoint.pt", "--max-epoch", 2]) == 0


@pytest.mark.parametrize("name", NAMES)
def test_keys_of_any_name(name):
    os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
    assert simulator.make_key(name) == simulator.read_key(name)


# Temporary directories


@pytest.fixture(params=["t", "[t]", "a b:c", "é*"])
def temporary(request, tmp_path, monkeypatch):
    path = tmp_path / request.param
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    return path


def test_what_was_left_is_removed_and_nothing_else(temporary, monkeypatch):
    left, fresh, foreign = (temporary / f"{common.PREFIX}{name}" for name in "abc")
    for path in (left, foreign):
        path.mkdir()
        (path / "log").write_text("")
        os.utime(path, (0, 0))
    fresh.mkdir()
    os.mkfifo(temporary / f"{common.PREFIX}pipe")  # nobody will ever open its other end
    os.utime(temporary / f"{common.PREFIX}pipe", (0, 0))
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    os.utime(elsewhere, (0, 0))
    os.symlink(elsewhere, temporary / f"{common.PREFIX}link")
    held = os.stat(foreign).st_ino
    stat = os.stat

    def owner(path, *args, **kwargs):
        found = stat(path, *args, **kwargs)
        mine = os.geteuid() if found.st_ino != held else os.geteuid() + 1
        return SimpleNamespace(
            st_uid=mine, st_mtime=found.st_mtime, st_mode=found.st_mode, st_ino=found.st_ino
        )

    with monkeypatch.context() as seen:
        seen.setattr("common.os.stat", owner)
        swept = threading.Thread(target=common.remove_leftovers, daemon=True)
        swept.start()
        swept.join(10)
    assert not swept.is_alive()
    names = {path.name.removeprefix(common.PREFIX) for path in temporary.iterdir()}
    assert names == {"b", "c", "pipe", "link", "elsewhere"}


def test_players_where_a_file_system_knows_no_locks(temporary, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    done = predictor.score_network(GAME, model.Network("a3c", 3), 1, 1, print)
    assert [episode.length for episode in done] == [30]
    assert list(temporary.iterdir()) == []


# The command line, from Python too


@pytest.mark.parametrize(
    "arguments, text",
    [
        (("--task", "train", "--episode", 7), "--episode is for --task play, eval and gen_submit"),
        (("--episode", 7), "not for --task train"),
        (("--task", "eval", "--network", "a3c"), "--network is for --task train"),
        (("--task", "play", "--batch-size", 7), "--batch-size is for --task train, not for"),
        (("--task", "gen_submit", "--eval-episode", 7), "--eval-episode is for --task train"),
        (("--task", "eval", "--bfloat16", 1), "--bfloat16 is for --task train"),
        (("--task", "eval", "--listen", "tcp://x"), "--listen is for --task train"),
        (("--task", "eval", "--ranks", 2), "--ranks is for --task train"),
        (("--output", ""), "invalid name value: ''"),
        (("--key", "a\0b"), "invalid name value"),
    ],
)
def test_an_option_that_a_task_has_not_is_refused(capsys, arguments, text):
    assert main(["--env", "Pong-v0", *arguments]) == 2
    assert text in sentence_of(capsys)
    assert os.listdir() == []


def test_a_file_that_is_named_after_a_game_needs_no_env():
    for file, game in (
        ("Breakout-v0.npz", "Breakout-v0"),
        ("models/Breakout-v0-ba3c.npz", "Breakout-v0"),
        ("ALE-Breakout-v5.npz", "ALE/Breakout-v5"),
        ("ALE-Breakout-v5-2.npz", "ALE/Breakout-v5"),
        ("model-best.npz", None),
        ("Breakout-v01.npz", None),
    ):
        assert train_atari.game_of_file(file) == game, file


def test_a_file_is_what_it_holds_whatever_its_name_is(weights, run, monkeypatch, capsys):
    monkeypatch.setattr("predictor.score_network", lambda *_, **__: [Episode(1.0, 2, True)])
    shutil.copy(weights, "weights")
    assert main(["--task", "eval", "--load", "weights"]) == 2
    assert "weights is not named after a game: give --env" in sentence_of(capsys)
    assert main(["--task", "eval", "--load", "weights", *CATCH]) == 0
    shutil.copy(run / "checkpoint.pt", "old")
    assert main(["--task", "eval", "--load", "old", *CATCH]) == 0
    capsys.readouterr()
    assert main(["--load", "old", *CATCH, "--output", "new", "--max-epoch", 2]) == 0
    assert "a run is resumed only from its checkpoint.pt" in capsys.readouterr().out


def test_without_a_file_the_agent_of_the_game_plays(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("train_atari.MODELS", str(tmp_path))
    monkeypatch.setattr("predictor.score_network", lambda *_, **__: [Episode(1.0, 2, True)])
    shutil.copy(weights, "tests.games-Catch-v0.npz")
    assert main(["--task", "eval", *CATCH]) == 0
    assert "the agent is tests.games-Catch-v0.npz" in capsys.readouterr().out
    for game in ("Pong-v0", "ale_py:Pong-v0"):
        assert main(["--task", "eval", "--env", game]) == 2
        assert "there is no agent for Pong-v0 in" in sentence_of(capsys)


def test_a_resumed_run_learns_as_before_whatever_the_defaults_are(run, monkeypatch):
    """Checkpoints hold all that changes learning; earlier ones only what was chosen."""

    def resumed(epochs):
        assert main(["--load", run / "checkpoint.pt", *CATCH, "--max-epoch", epochs]) == 0
        config = json.loads((run / "config.json").read_text())
        return [config[name] for name in ("lambda", "local_time_max", "life_loss", "anneal")]

    other = {"lambda": 0.5, "local_time_max": 3, "life_loss": 0, "anneal": 0}
    with monkeypatch.context() as later:
        later.setattr("train_atari.LEARNING_OF_A3C", train_atari.LEARNING_OF_A3C | other)
        assert resumed(3) == [0.9, 15, 1, 1]  # batches of 16 have no place for 20 steps
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    learning = {option.name for option in train_atari.LEARNING}
    assert learning <= state["options"].keys()
    for name in learning - {"batch_size", "steps_per_epoch", "max_epoch", "eval_episode"}:
        del state["options"][name]
    torch.save(state, run / "checkpoint.pt")
    assert resumed(4) == [1.0, 5, 0, 0]
    assert resumed(5) == [1.0, 5, 0, 0]


def test_a_run_takes_the_options_of_another_one(run, tmp_path, capsys):
    """All of learning, those of speed that were chosen there, and what is given beside it."""
    config = json.loads((run / "config.json").read_text())
    config |= {"gamma": 0.9, "queue_size": 77}  # the second followed from others
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = [*CATCH, "--config", "config.json", "--output", "new", "--max-epoch", 1]
    assert main([*arguments, "--eval-episode", 2]) == 0
    made = json.loads((tmp_path / "new" / "config.json").read_text())
    expected = {"env": GAME, "network": "a3c", "seed": 1, "batch_size": 16, "steps_per_epoch": 3}
    expected |= {"gamma": 0.9, "queue_size": 16, "simulator_proc": 1, "eval_episode": 2}
    expected |= {"players_per_simulator": 4, "max_epoch": 1}
    assert {name: made[name] for name in expected} == expected
    config["batch_size"] = "many"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main([*arguments, "--output", "other"]) == 2
    assert "config.json is not usable: its options are wrong" in sentence_of(capsys)
    (tmp_path / "config.json").write_text("[" * 200_000)
    assert main([*arguments, "--output", "other"]) == 2
    assert "config.json is not usable: its config.json is damaged" in sentence_of(capsys)
    assert not os.path.exists("other")


def test_the_config_of_an_earlier_run_trains_what_it_trained(run, tmp_path, capsys):
    config = json.loads((run / "config.json").read_text())
    for name in ("lambda", "life_loss", "anneal"):
        del config[name]
    config |= {"local_time_max": 5, "entropy_beta": "0.01", "max_epoch": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["--config", "config.json", *CATCH, "--output", "new"]) == 0
    made = json.loads((tmp_path / "new" / "config.json").read_text())
    assert [made[name] for name in ("lambda", "life_loss", "anneal")] == [1.0, 0, 0]
    assert main(["--config", "config.json", *CATCH, "--load", run / "checkpoint.pt"]) == 2
    assert "a checkpoint has options of its own" in sentence_of(capsys)


def test_a_config_runs_no_code_unasked(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "effects.py").write_text("open('effects', 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = json.loads((run / "config.json").read_text()) | {"env": "effects:Pong-v0"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["--config", "config.json", "--output", "new"]) == 2
    assert "in the Python module effects: give --env effects:Pong-v0" in sentence_of(capsys)
    assert not os.path.exists("effects") and not os.path.exists("new")


def test_metrics_go_to_weights_and_biases_if_asked(tmp_path, monkeypatch, capsys):
    """By its synchronization with TensorBoard, which begins before the writer is made."""
    calls = []
    wandb = SimpleNamespace(
        init=lambda **how: calls.append(how), finish=lambda: calls.append("finish")
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("train_atari.find_spec", lambda name: name == "wandb")
    assert main([*CATCH, *TINY, "--track", "--output", "run"]) == 0
    started, finished = calls
    assert started["sync_tensorboard"] is True and started["dir"] == str(tmp_path / "run")
    assert started["config"]["batch_size"] == 16 and finished == "finish"
    saved = torch.load("run/checkpoint.pt", weights_only=True)
    assert started["id"] == saved["run_id"] and "track" not in saved["options"]
    calls.clear()
    wandb.init = lambda **how: calls.append(sys.stdin.read()) or 1 / 0  # it may ask for a key
    assert main([*CATCH, *TINY, "--track", "--output", "other"]) == 1
    assert "--track: division by zero" in sentence_of(capsys) and calls == [""]


def test_the_mean_of_the_weights_is_scored_in_the_end(training, tmp_path, monkeypatch):
    best, networks = tmp_path / "run" / "model-best.npz", []
    learner = training.learner

    def score(env_id, network, *_, **__):
        networks.append(network)
        return [Episode(2.0 if network is learner.mean_network else 1.0, 30, True)] * 4

    monkeypatch.setattr("predictor.score_network", score)
    result = train_atari.evaluate(training)
    assert networks == [learner.network] and result["mean_model_score"] is None
    with torch.no_grad():
        learner.mean_network.fc_v.bias += 1
    training.at.epoch = training.options.max_epoch
    result = train_atari.evaluate(training)
    assert networks[1:] == [learner.network, learner.mean_network]
    assert (result["mean_score"], result["mean_model_score"]) == (1.0, 2.0)
    assert best.read_bytes() == model.weights_file(learner.mean_network)
    assert training.at.best_score == 2.0


def test_every_option_belongs_to_a_task(capsys):
    for action in train_atari.make_parser()._actions:
        if action.dest != "help":
            tasks = train_atari.tasks_of(action.dest)
            assert tasks and set(tasks) <= set(train_atari.TASKS)
    assert set(train_atari.ANY) == set(train_atari.TASKS)


def test_more_actions_than_files_may_have_are_refused_before_training(monkeypatch, capsys):
    monkeypatch.setattr("model.MAX_ACTIONS", 3)
    assert main([*CATCH, *TINY]) == 2
    assert f"{GAME} has 3 actions, not 1 to 2" in sentence_of(capsys)
    assert os.listdir() == []


TINY = ("--batch-size", 16, "--steps-per-epoch", 3, "--max-epoch", 1, "--eval-episode", 1)
TINY += ("--simulator-proc", 1, "--players-per-simulator", 4, "--network", "a3c")


@pytest.mark.parametrize("where", ["main", "thread"])
def test_main_leaves_a_caller_as_it_was(where, weights, monkeypatch):
    """From a notebook, say: output that is no file, handlers of its own, another thread."""
    monkeypatch.setattr("sys.stdout", io.StringIO())
    monkeypatch.setattr("sys.stderr", io.StringIO())
    handlers = {s: lambda signum, frame: None for s in common.SIGNALS}
    before = {s: signal.signal(s, handler) for s, handler in handlers.items()}
    state = threading.excepthook, signal.pthread_sigmask(signal.SIG_BLOCK, ())
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    codes = []

    def use():
        for number in (1, 2):
            codes.append(main([*CATCH, *TINY, "--output", f"run{number}"]))
        codes.append(main(["--task", "eval", *CATCH, "--load", weights, "--episode", 1]))
        codes.append(main(["--task", "nonsense"]))

    try:
        if where == "main":
            use()
        else:
            thread = threading.Thread(target=use)
            thread.start()
            thread.join()
        assert codes == [0, 0, 0, 2], sys.stderr.getvalue()
        assert {s: signal.getsignal(s) for s in handlers} == handlers
        assert state == (threading.excepthook, signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        assert torch.get_num_threads() == 2
        assert "epoch 1 is done" in sys.stdout.getvalue()
        assert isinstance(sys.stdout, io.StringIO)
    finally:
        torch.set_num_threads(threads)
        for signum, handler in before.items():
            signal.signal(signum, handler)


def test_main_where_the_directory_is_gone(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    os.rmdir(tmp_path / "gone")
    for task in ((*CATCH, *TINY), ("--task", "eval", "--load", "agent.npz")):
        assert main([*task]) == 2
        assert "the current directory is gone" in sentence_of(capsys)


def test_main_without_any_output(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert main(["--env", "Pong-v0", "--episode", 7]) == 2
    assert sys.stdout is sys.stderr is None


def test_constants_of_model_and_players_agree():
    assert model.FRAME_SHAPE == common.FRAME_SHAPE
    with contextlib.closing(common.make_env("Pong-v0")) as env:
        assert common.Player(env).reset(seed=1)[0].shape == model.FRAME_SHAPE
