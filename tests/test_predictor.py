"""The queue, prediction, and the whole way of a state through real processes and threads."""

import json
import threading
import time
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
import zmq

import predictor
from common import Episode, summary
from model import Network
from predictor import (
    ExperienceQueue,
    Master,
    Message,
    Replica,
    Rollouts,
    Segment,
    VectorPlayers,
    play_episodes,
    sample_actions,
)
from simulator import FRAME_BYTES
from tests.helpers import check_transitions, drain, make_feed, watch, worth_a_quarter


def segment(*numbers):
    """States numbered in the order in which they are trained on; frame n is full of n's."""
    frames = np.stack([np.full((84, 84, 3), n, np.uint8) for n in (201, 202, 203, *numbers)])
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
            first = number if number % 4 == 0 else number - number % 4 + 1
            assert state == [201, 202, 203, *range(first, number + 1)][-4:]
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
    decide, seen = Rollouts.add_actions, []

    def record(rollouts, actions, probs, values, version):
        seen.append((set(values), version))
        decide(rollouts, actions, probs, values, version)

    monkeypatch.setattr(Rollouts, "add_actions", record)
    feed = make_feed(network)
    segments = watch(feed)
    try:
        deadline, version = time.monotonic() + 60, 0
        while (version < 300 or len(seen) < 300) and time.monotonic() < deadline:
            version += 1
            set_version(version)
            feed.publish(network, version)
            feed.queue.get(timeout=0.001)
            feed.replace_ended()
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


NSTEP = json.loads((Path(__file__).parent / "golden" / "nstep.json").read_text())


def message(frame, reward=0.0, is_over=False, life_lost=False):
    frames = np.full((1, 84, 84, 3), frame, np.uint8)
    return Message(b"", False, 0, frames, [reward], [is_over], [life_lost], [])


def test_rollouts_replay_the_originals_master():
    """Every event of a scripted run: what it emits, in which order, with which return."""
    rollouts = [Rollouts(1, NSTEP["local_time_max"], NSTEP["gamma"]) for _ in range(2)]
    emitted = 0
    for number, event in enumerate(NSTEP["events"]):
        player, state = int(event["client"][-1]), str(event["state"])
        arrived = message(event["state"], event["reward"], event["isOver"])
        done = []
        for frames, *columns in rollouts[player].finish_steps(arrived):
            # The versions given below: number of the event in which the state arrived.
            ages = [NSTEP["events"][version]["state"] for version in columns[-1]]
            states = [int(frame[5, 5, 1]) for frame in frames[3:]]
            assert ages == states and len(frames) == len(states) + 3
            done += reversed(list(zip(states, *columns[:3], strict=True)))  # newest first there
        expected = [(e["state"], e["action"], e["prob"], e["R"]) for e in event["emitted"]]
        assert len(done) == len(expected)
        if expected:
            np.testing.assert_allclose(done, expected, rtol=1e-6, atol=1e-9)
        emitted += len(expected)
        rollouts[player].add_frames(arrived)
        action, policy = NSTEP["action"][state], NSTEP["policy"][state]
        rollouts[player].add_actions(
            [action], [policy[action]], [NSTEP["value"][state]], version=number
        )
        assert rollouts[player].pending == [event["memory_len_after"]]
    assert emitted == len(NSTEP["emitted_all"]) > 30


def test_rollouts_stack_frames_of_one_episode_only():
    rollouts = Rollouts(1, 5, 0.99)

    def observe(frame, is_over=False):
        arrived = message(frame, is_over=is_over)
        list(rollouts.finish_steps(arrived))
        state = rollouts.add_frames(arrived)[0, :, 40, 40, 2].tolist()
        rollouts.add_actions([0], [1.0], [0.0], 0)
        return state

    assert observe(1, is_over=True) == [0, 0, 0, 1]  # is_over of a first message is ignored
    assert [observe(frame) for frame in (2, 3)] == [[0, 0, 1, 2], [0, 1, 2, 3]]
    assert [observe(frame) for frame in (4, 5)] == [[1, 2, 3, 4], [2, 3, 4, 5]]
    assert observe(6, is_over=True) == [0, 0, 0, 6]
    assert observe(7) == [0, 0, 6, 7]
    for frame in range(8, 100):  # around the memory of frames several times
        assert observe(frame)[-3:] == [frame - 2, frame - 1, frame]


@pytest.fixture
def master(tmp_path):
    context = zmq.Context()
    master = Master(context, f"ipc://{tmp_path}/0", simulators=2, players=2)
    master.assign(b"simulator-0", 0)
    master.assign(b"simulator-3", 1)
    yield master
    master.socket.close()
    context.term()


def header(rewards=(0.0, 1.0), is_over=(False, True), finished=((3.0, 10),)):
    return msgpack.packb([rewards, is_over, finished])


def test_a_good_message(master):
    frames = np.random.default_rng(0).integers(256, size=(2, 84, 84, 3), dtype=np.uint8)
    parsed = master.parse([b"simulator-0", header(), frames.tobytes()])
    assert parsed.place == 0 and parsed.finished == [(3.0, 10)]
    assert parsed.rewards == [0, 1] and parsed.is_over == [False, True]
    np.testing.assert_array_equal(parsed.frames, frames)
    other = master.parse([b"simulator-3", header(), frames.tobytes()])
    assert other.place == 1


PIXELS = bytes(2 * FRAME_BYTES)


def test_frames_in_shared_memory(tmp_path):
    """Each place has its own; a message that brings pixels along is none of this master's."""
    context, shared = zmq.Context(), np.zeros((2, 2, 84, 84, 3), np.uint8)
    master = Master(context, f"ipc://{tmp_path}/1", 2, 2, frames=shared)
    master.assign(b"simulator-1", 1)
    shared[1] = [[[[7]]], [[[9]]]]
    assert master.parse([b"simulator-1", header(), PIXELS]) is None
    parsed = master.parse([b"simulator-1", header()])
    assert parsed.frames[:, 83, 83, 2].tolist() == [7, 9]
    master.socket.close()
    context.term()


def test_one_message_at_a_time(master):
    parts = [b"simulator-0", header(), PIXELS]
    assert master.parse(parts) is not None
    assert master.parse(parts) is None  # it was not answered
    other = [b"simulator-3", header(), PIXELS]
    message = master.parse(other)
    master.reply(message, [0, 0])
    assert master.parse(other) is not None


def test_what_a_simulator_sent_that_was_replaced_since_is_dropped(master):
    master.assign(b"simulator-9", 0)
    assert master.parse([b"simulator-0", header(), PIXELS]) is None
    assert master.parse([b"simulator-9", header(), PIXELS]) is not None


def test_who_comes_back_to_a_run_that_listens_is_new(tmp_path, monkeypatch):
    monkeypatch.setattr("simulator.HANG_SECONDS", 3.0)
    context = zmq.Context()
    master = Master(context, f"ipc://{tmp_path}/0", 1, 2, [*zmq.curve_keypair()], "Pong-v1")
    seen = []
    assert master.parse([b"Pong-v10 a", header(), PIXELS]) is None  # it plays another game
    for identity in (b"Pong-v1 a", b"Pong-v1 b", b"Pong-v1 a"):
        message = master.parse([identity, header(), PIXELS])
        seen.append(message.is_first)
        master.reply(message, [0, 0])
        assert master.parse([b"Pong-v1 c", header(), PIXELS]) is None  # no place
        assert master.parse([b"", header(), PIXELS]) is None
        master.peers[identity].owes_since -= 4.0  # and the one there is silent
    assert seen == [True, True, True] and master.joined == 3
    master.socket.close()
    context.term()


@pytest.mark.parametrize(
    "parts",
    [
        [b"simulator-0"],
        [b"simulator-0", header()],
        [b"simulator-0", header(), PIXELS, b""],
        [b"simulator-1", header(), PIXELS],
        [b"", header(), PIXELS],
        [b"simulator-0", b"", PIXELS],
        [b"simulator-0", b"\xc1garbage", PIXELS],
        [b"simulator-0", header() + b"x", PIXELS],
        [b"simulator-0", msgpack.packb(None), PIXELS],
        [b"simulator-0", msgpack.packb([1, 2, 3]), PIXELS],
        [b"simulator-0", msgpack.packb({"a": 1, "b": 2, "c": 3}), PIXELS],
        [b"simulator-0", header(rewards=[0.0]), PIXELS],
        [b"simulator-0", header(rewards=[0.0, "x"]), PIXELS],
        [b"simulator-0", header(rewards=[0.0, float("nan")]), PIXELS],
        [b"simulator-0", header(rewards=[[0.0], [0.0, 1.0]]), PIXELS],
        [b"simulator-0", header(finished=[]), PIXELS],
        [b"simulator-0", header(finished=[[1.0]]), PIXELS],
        [b"simulator-0", header(finished=[[float("nan"), 10]]), PIXELS],
        [b"simulator-0", header(finished=[[float("inf"), 10]]), PIXELS],
        [b"simulator-0", header(), PIXELS[1:]],
        [b"simulator-0", header(), PIXELS + b"x"],
    ],
)
def test_bad_messages_are_dropped(master, parts):
    assert master.parse(parts) is None
    assert not any(peer.first_message_at for peer in master.peers.values())


def test_bad_messages_on_the_socket_are_counted_and_change_nothing(master, tmp_path):
    context = zmq.Context()
    sockets = []
    for identity in (b"simulator-0", b"intruder"):
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, identity)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(f"ipc://{tmp_path}/0")
        sockets.append(socket)
    sockets[1].send(b"garbage")
    sockets[1].send_multipart([header(), PIXELS])
    sockets[0].send_multipart([b"garbage", PIXELS])
    sockets[0].send_multipart([header(), PIXELS])
    received = []
    deadline = time.monotonic() + 10
    while (not received or master.dropped < 3) and time.monotonic() < deadline:
        received += master.receive(most=100, timeout_ms=100)
    assert [message.identity for message in received] == [b"simulator-0"]
    assert master.dropped == 3
    master.reply(received[0], [1, 3])
    assert msgpack.unpackb(sockets[0].recv()) == [1, 3]
    for socket in sockets:
        socket.close()
    context.term()


class Scripted:
    """Side by side: episode k of player i lasts `length(i, k)` steps and earns 1 in each."""

    def __init__(self, num_players, length):
        self.num_players, self.length = num_players, length

    def step(self, actions):
        n = self.num_players
        if actions is None:
            self.episode, self.steps = np.zeros((2, n), int)
            return np.zeros((n, 84, 84, 3), np.uint8), np.zeros(n), np.zeros(n, bool)
        self.steps += 1
        over = np.array([self.steps[i] == self.length(i, self.episode[i]) for i in range(n)])
        self.episode += over
        self.steps[over] = 0
        return np.zeros((n, 84, 84, 3), np.uint8), np.ones(n), over


def uniform(states):
    return np.full((len(states), 4), 0.25)


def test_every_episode_that_starts_counts():
    """One player plays long episodes, the other short ones: the long one must not be dropped."""
    players = Scripted(2, lambda player, episode: 40 if player == 0 else 4)
    *_, done = play_episodes(players, uniform, episodes=5, seed=0, seconds=1e9)
    assert sorted(done) == [Episode(4, 4, True)] * 4 + [Episode(40, 40, True)]
    assert summary(done)["mean"] == pytest.approx((4 * 4 + 40) / 5)
    assert summary(done)["episodes"] == 5


def test_the_states_of_an_evaluation_stack_frames_of_one_episode_only():
    frames = np.random.default_rng(0).integers(1, 256, (9, 2, 84, 84, 3), dtype=np.uint8)
    players = Scripted(2, lambda player, episode: 8 if player == 0 else 3)
    step, count, seen = players.step, 0, []

    def show(actions):
        nonlocal count
        count += 1
        return frames[count - 1], *step(actions)[1:]

    def policy(states):
        seen.append(states.copy())
        return uniform(states)

    players.step = show
    list(play_episodes(players, policy, episodes=3, seed=0, seconds=1e9))
    assert len(seen) >= 6
    for i, states in enumerate(seen):
        for player, start in ((0, 0), (1, i - i % 3)):
            for j, frame in zip(range(i - 3, i + 1), states[player], strict=True):
                expected = frames[j, player] if j >= start else np.zeros((84, 84, 3))
                np.testing.assert_array_equal(frame, expected)


def test_more_players_than_episodes():
    players = Scripted(4, lambda player, episode: 3 + player)
    *_, done = play_episodes(players, uniform, episodes=2, seed=0, seconds=1e9)
    assert done == [Episode(3, 3, True), Episode(4, 4, True)]


def test_when_the_time_is_over_episodes_are_cut_short():
    players = Scripted(3, lambda player, episode: 10**9)
    *_, done = play_episodes(players, uniform, episodes=30, seed=0, seconds=0.2)
    assert len(done) == 3 and not any(episode.finished for episode in done)
    assert all(episode.score == episode.length > 0 for episode in done)


def test_actions_are_greedy_but_for_one_in_a_hundred():
    policy = np.tile([0.1, 0.2, 0.6, 0.1], (100_000, 1))
    actions = predictor.greedy_actions(policy, np.random.default_rng(0))
    others = np.bincount(actions, minlength=4)[[0, 1, 3]]
    np.testing.assert_allclose(others, 250, atol=5 * np.sqrt(250))


@pytest.mark.parametrize("cores, processes", [(1, 1), (3, 3), (6, 4), (12, 7)])
def test_there_are_as_many_players_as_wanted_on_any_number_of_cores(monkeypatch, cores, processes):
    monkeypatch.setattr("predictor.count_cores", lambda: cores)
    players = VectorPlayers("tests.games:Count-v0", 7, seed=5, check=lambda: None)
    try:
        assert players.num_players == 7 and len(players.slots) == processes
        for actions in (None, np.zeros(7, int), np.ones(7, int)):
            assert [len(column) for column in players.step(actions)] == [7, 7, 7]
    finally:
        players.close()


def test_players_that_step_together_repeat_themselves():
    def play():
        players = VectorPlayers("Breakout-v0", 4, seed=5, check=lambda: None)
        try:
            steps = [players.step(None)]
            rng = np.random.default_rng(1)
            steps += [players.step(rng.integers(4, size=4)) for _ in range(150)]
        finally:
            players.close()
        return [
            np.concatenate([np.ravel(part) for part in column])
            for column in zip(*steps, strict=True)
        ]

    first, second = play(), play()
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    frames = first[0].reshape(151, 4, -1)
    assert not np.array_equal(frames[:, 0], frames[:, 1])  # each player has a seed of its own


def returns_of(events, **how):
    """The returns of one player's states: events are (reward, is_over, life_lost), value 2.0."""
    rollouts, returns = Rollouts(1, 3, 0.5, **how), []
    for number, (reward, is_over, life_lost) in enumerate(events):
        arrived = message(number, reward, is_over, life_lost)
        for segment in rollouts.finish_steps(arrived):
            returns += segment.future_rewards
        rollouts.add_frames(arrived)
        rollouts.add_actions([0], [1.0], [2.0], number)
    return returns


def test_lambda_returns():
    """R = r + gamma * ((1 - lambda) * V(s') + lambda * R'), by hand for three states."""
    plain = [(1.0, False, False)] * 5
    third = 1 + 0.5 * 2
    assert returns_of(plain) == [1 + 0.5 * (1 + 0.5 * third), 1 + 0.5 * third, third]
    second = 1 + 0.5 * (0.1 * 2 + 0.9 * third)
    first = 1 + 0.5 * (0.1 * 2 + 0.9 * second)
    assert returns_of(plain, lambda_=0.9) == pytest.approx([first, second, third])
    # After the last state of an episode nothing follows, whatever lambda is.
    over = [(0.0, False, False), (1.0, False, False), (1.0, True, False)]
    assert returns_of(over, lambda_=0.9) == pytest.approx([1 + 0.5 * (0.1 * 2 + 0.9 * 1), 1])


def test_a_lost_life_ends_a_return_where_it_should():
    lost = [(0.0, False, False), (1.0, False, False), (1.0, False, True), (1.0, False, False)]
    assert returns_of(lost) == []  # the segment is not full yet
    assert returns_of(lost, life_loss=True) == [1 + 0.5 * 1, 1]
