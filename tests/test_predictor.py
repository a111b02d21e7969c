"""The queue, prediction, and the whole way of a state through real processes and threads."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model import Learner, Network
from predictor import ExperienceQueue, Feed, Replica, sample_actions
from simulator import Books, Segment
from tests.games import Count


def segment(*numbers):
    """States numbered in the order in which they are trained on; frame n is full of n's."""
    frames = np.stack([np.full((84, 84, 3), n, np.uint8) for n in (*numbers, 201, 202, 203)][::-1])
    columns = [[n, n / 100, n * 2.0, n + 1000] for n in numbers]
    return Segment(frames, *map(list, zip(*columns, strict=True)))


def test_queue_keeps_order_and_cuts_batches():
    queue = ExperienceQueue(batch_size=4, size=8)
    numbers = iter(range(1, 200))
    seen = []
    for _ in range(20):  # around the ring several times, segments across batches
        for length in (3, 1):
            assert queue.put(segment(*(next(numbers) for _ in range(length))))
        batch, versions = queue.get(timeout=1)
        seen += batch.actions.tolist()
        states, numbers_of = batch.states()[..., 3, 3, 1].tolist(), batch.actions.tolist()
        assert [state[3] for state in states] == numbers_of
        for state, number in zip(states, numbers_of, strict=True):
            # Segments are (1, 2, 3), (4,), (5, 6, 7), ...; before a segment's oldest: 201 to 203.
            end = number if number % 4 == 0 else number + 3 - number % 4
            assert state[::-1] == [*range(number, end + 1), 201, 202, 203][:4]
        np.testing.assert_allclose(batch.action_probs.numpy(), batch.actions.numpy() / 100)
        np.testing.assert_allclose(batch.future_rewards.numpy(), batch.actions.numpy() * 2)
        np.testing.assert_array_equal(versions, batch.actions.numpy() + 1000)
    assert seen == list(range(1, 81))


def test_queue_holds_producers_back_and_lets_them_go():
    queue = ExperienceQueue(batch_size=4, size=4)
    count = 0

    def produce():
        nonlocal count
        while queue.put(segment(1, 2, 3)):
            count += 1

    producer = threading.Thread(target=produce)
    producer.start()
    time.sleep(0.3)
    assert (count, len(queue)) == (2, 6)  # a segment comes in whole while less than `size` wait
    assert queue.get(timeout=1) is not None
    time.sleep(0.3)
    assert (count, len(queue)) == (3, 5)
    assert queue.get(timeout=1) is not None
    queue.close()
    producer.join(timeout=5)
    assert not producer.is_alive()
    assert queue.get(timeout=1) is None


def test_the_batch_in_training_is_not_overwritten():
    queue = ExperienceQueue(batch_size=4, size=6)
    queue.put(segment(1, 2, 3, 4))
    batch, _ = queue.get(timeout=1)
    for start in (10, 20, 30):
        if len(queue) < queue.size:
            queue.put(segment(*range(start, start + 4)))
    assert len(queue) == 8  # as full as it can be
    assert batch.states()[:, 3, 0, 0, 0].tolist() == batch.actions.tolist() == [1, 2, 3, 4]


def test_get_waits_no_longer_than_it_should():
    queue = ExperienceQueue(batch_size=4, size=4)
    queue.put(segment(1, 2, 3))
    assert queue.get(timeout=0.05) is None
    assert len(queue) == 3


def test_sampled_actions_follow_the_policy():
    policy = np.array([0.5, 0.0, 0.2, 0.3], np.float32)
    actions = sample_actions(np.tile(policy, (100_000, 1)), np.random.default_rng(0))
    frequency = np.bincount(actions, minlength=4) / 100_000
    np.testing.assert_allclose(frequency, policy, atol=0.01)
    assert frequency[1] == 0
    certain = np.eye(18, dtype=np.float32)
    assert sample_actions(certain, np.random.default_rng(0)).tolist() == list(range(18))


def test_prediction():
    network = Network("a3c", 5)
    states = torch.randint(0, 256, (3, 4, 84, 84, 3), dtype=torch.uint8)
    parts, replica = [states[:1].numpy(), states[1:].numpy()], Replica(network, 4)
    policy, value = replica.predict(parts)
    logits, expected = network(states)
    np.testing.assert_allclose(policy, logits.softmax(1).detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(value, expected.detach().numpy(), rtol=1e-5)
    with torch.no_grad():
        network.fc_v.bias.fill_(float("nan"))
    replica.predict(parts)  # with weights of its own
    replica.load(list(network.parameters()), 1)
    with pytest.raises(FloatingPointError):
        replica.predict(parts)


def test_prediction_in_bfloat16():
    network = Network("ba3c", 5)
    states = np.random.default_rng(0).integers(256, size=(3, 4, 84, 84, 3), dtype=np.uint8)
    exact, replica = Replica(network, 3), Replica(network, 3, bfloat16=True)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    for version in (1, 2):
        results = []
        for one in (exact, replica):
            one.load(list(network.parameters()), version)
            results.append(np.column_stack(one.predict([states])))
        np.testing.assert_allclose(*results, rtol=5e-2, atol=5e-2)
        assert np.abs(results[0] - results[1]).max() > 1e-5
        np.testing.assert_allclose(results[1][:, :-1].sum(1), 1, rtol=1e-5)  # its head is exact
        with torch.no_grad():
            network.fc_pi.bias += torch.arange(5)


def options(**changes):
    values = {"batch_size": 32, "queue_size": 32, "local_time_max": 5, "gamma": 0.5}
    values |= {"simulator_proc": 4, "players_per_simulator": 3, "predict_batch_size": 8}
    values |= {"predictor_thread_per_gpu": 2, "bfloat16": 0, "listen": None, "key": None}
    return SimpleNamespace(**(values | changes))


def make_feed(network, env_id="tests.games:Count-v0", **changes):
    learner = Learner(network, torch.device("cpu"), adam_epsilon=1e-3, threads=1)
    seeds = np.random.SeedSequence(1)
    return Feed(env_id, options(**changes), learner, seeds)


def watch(feed):
    """Record the segments that go into the queue; of their frames what Count writes there."""
    segments, put = [], feed.queue.put

    def record(segment):
        segments.append(segment._replace(frames=segment.frames[:, :3, 0].copy()))
        return put(segment)

    feed.queue.put = record
    return segments


def drain(feed, states):
    deadline, got = time.monotonic() + 60, 0
    while got < states and time.monotonic() < deadline:
        feed.check()
        got += feed.queue.batch_size if feed.queue.get(timeout=0.2) is not None else 0
    assert got >= states


def worth_a_quarter():
    """A network for which every state is worth 1/4, so that every return is known."""
    network = Network("a3c", 4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.fc_v.bias.fill_(0.25)
    return network


def stamp(rows):
    """(game, episode), (step, last action, steps of the episode) of a frame of Count."""
    number = int.from_bytes(rows[2]), int.from_bytes(rows[1])
    return number, tuple(map(int, rows[0]))


def check_transitions(segments):
    """Every transition on its own, and that none is lost or comes twice.

    Of each game the last episode may be there in part: it was cut by the end, or by a kill. Returns
    how many transitions there were, and the numbers of the episodes of each game.
    """
    steps_of: dict[tuple, list[int]] = {}  # by game and episode
    lengths = {}
    for frames, *columns in segments:
        following = later = None
        for i, (action, prob, future_reward, _) in enumerate(zip(*columns, strict=True)):
            stack = frames[len(frames) - 4 - i : len(frames) - i]
            number, (step, last, length) = stamp(stack[3])
            # The stack: frames of this very episode, zeros before its start.
            for back in (1, 2, 3):
                if step >= back:
                    past_number, (past_step, *_) = stamp(stack[3 - back])
                    assert (past_number, past_step) == (number, step - back)
                else:
                    assert not stack[3 - back].any()
            reward = Count.reward(step, int(action))
            if following is None:  # the newest: after it the episode is over, or worth 1/4
                bootstrap = 0.0 if step == length - 1 else 0.25
                expected = reward + 0.5 * bootstrap
            else:
                # The next frame carries the action that led to it, and it is the action trained on.
                assert following == (number, step + 1, int(action))
                expected = reward + 0.5 * later
            assert future_reward == pytest.approx(expected, abs=1e-6)
            assert prob == pytest.approx(0.25)
            following, later = (number, step, last), future_reward
            steps_of.setdefault(number, []).append(step)
            lengths[number] = length
    episodes_of: dict[int, set[int]] = {}
    for game, episode in steps_of:
        episodes_of.setdefault(game, set()).add(episode)
    for game, episodes in episodes_of.items():
        assert sorted(episodes) == list(range(1, len(episodes) + 1))
        for episode in episodes:
            steps = sorted(steps_of[game, episode])
            assert steps == list(range(len(steps)))
            assert len(steps) == lengths[game, episode] or episode == len(episodes)
    return sum(map(len, steps_of.values())), episodes_of


def test_states_actions_rewards_and_players_stay_together():
    """With a game whose frames say what they are: every transition is checked on its own."""
    torch.manual_seed(0)
    feed = make_feed(worth_a_quarter())
    segments = watch(feed)
    try:
        drain(feed, 6000)
    finally:
        feed.close()
    checked, episodes_of = check_transitions(segments)
    assert len(episodes_of) == 12 and checked >= 6000
    assert all(len(episodes) > 20 for episodes in episodes_of.values())


def test_a_prediction_uses_one_version_and_says_which(monkeypatch):
    """Value and all logits are the version number: whatever is torn or mislabelled shows."""
    network = Network("a3c", 4)

    def set_version(version):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.zero_()
            network.fc_v.bias.fill_(version)
            network.fc_pi.bias.copy_(torch.tensor([0.0, 0.0, 0.0, version / 100]))

    set_version(0)
    decide, seen = Books.decide, []

    def record(books, actions, probs, values, version):
        seen.append((set(values), version))
        decide(books, actions, probs, values, version)

    monkeypatch.setattr(Books, "decide", record)
    feed = make_feed(network)
    segments = watch(feed)
    try:
        deadline, version = time.monotonic() + 60, 0
        while (version < 300 or len(seen) < 300) and time.monotonic() < deadline:
            version += 1
            set_version(version)
            feed.publish(network, version)
            feed.queue.get(timeout=0.001)
            feed.check()
    finally:
        feed.close()
    assert version >= 300 and len(seen) >= 300
    assert all(values == {float(version)} for values, version in seen)
    for segment in segments:
        columns = segment.actions, segment.action_probs, segment.versions
        for action, action_prob, version in zip(*columns, strict=True):
            favourite = np.exp(version / 100)
            prob = (favourite if action == 3 else 1) / (3 + favourite)
            assert action_prob == pytest.approx(prob, rel=1e-4)


def test_what_breaks_a_predictor_reaches_the_trainer():
    network = Network("a3c", 4)
    with torch.no_grad():
        network.fc_pi.bias.fill_(float("inf"))
    feed = make_feed(network)
    try:
        with pytest.raises(FloatingPointError):
            drain(feed, 10_000)
    finally:
        feed.close()


def test_lag_stays_bounded_when_the_trainer_is_slow():
    network = Network("a3c", 4)
    feed = make_feed(network)
    lags, version = [], 0
    try:
        while version < 40:
            got = feed.queue.get(timeout=10)
            assert got is not None
            lags.append(version - got[1].mean())
            time.sleep(0.05)
            version += 1
            feed.publish(network, version)
    finally:
        feed.close()
    # 12 players x 4 steps of a segment / 32 + 32 / 32 waiting; the first ones come from version 0.
    assert 0.5 < np.mean(lags[10:]) <= 3
