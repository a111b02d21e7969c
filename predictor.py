"""The main process's side of a state: receive, n-step returns, predict, reply, queue; and scores.

    simulators -> Master -> Rollouts -> ExperienceQueue -> trainer
        ^                      |
        +----- actions <--- Replica, a copy of the network

A predictor thread does all of this for its group of simulators: it receives what has arrived, hands
finished segments to the queue, predicts for all new states in one batch, and replies. The queue is
the only place where a state passes from one thread to another.

`score` at the end evaluates a network: it plays whole episodes and does not learn.
"""

import contextlib
import copy
import dataclasses
import itertools
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgpack
import numpy as np
import torch
import zmq
from tqdm import tqdm

import simulator
from common import (
    FRAME_SHAPE,
    RANDOM_ACTIONS,
    Episode,
    UserError,
    count_cores,
    describe,
    signals_deferred,
)
from model import FRAME_HISTORY, STATE_SHAPE, Batch, Learner, Network, captured, in_bfloat16
from simulator import FRAME_BYTES, HIGH_WATER_MARK, IS_OVER, LIFE_LOST, SimulatorPool

EVAL_PLAYERS = 16  # side by side in an evaluation
EVALUATION_LOG_SECONDS = 10  # from one line of progress to the next, where there is no terminal
POLL_MS = 100  # how long a predictor waits for messages before it looks whether it should end
MOST_MESSAGES = 1000  # that are received before some are answered
HEADER_BYTES = 2**16  # of a message, at most
REMOTE_SIMULATORS = 256  # most that may join a run that listens
THREAD_END_SECONDS = 2.0  # how long predictor threads have to end
SMALLEST_GRAPH = 8  # states; below, a prediction on a GPU takes no less time
LAST_SCORES = 100  # training episodes in the mean score that is shown


# Messages


class Message(NamedTuple):
    """One step of all k players of a simulator."""

    identity: bytes
    is_first: bool  # of this simulator
    place: int  # of the simulator among those of its master
    frames: np.ndarray  # (k, 84, 84, 3) uint8; they may change once it is answered
    rewards: list[float]  # (k,), as the game counts them
    is_over: list[bool]  # (k,)
    life_lost: list[bool]  # (k,), in an episode that goes on
    finished: list  # [score, length] of every episode that ended


@dataclasses.dataclass
class Peer:
    """A simulator as its master sees it."""

    place: int
    first_message_at: float | None = None  # time.monotonic()
    # When it was started or answered; None: it has sent its message, and waits for actions.
    owes_since: float | None = dataclasses.field(default_factory=time.monotonic)


class Master:
    """The socket that a group of simulators talks to: a ZeroMQ ROUTER.

    One thread uses the socket; the thread that starts simulators calls `assign`. A simulator has a
    place (a number) among those of its master, and an identity that no other ever has. With a key
    the master is open: whoever has the key gets a place, and keeps it until it is silent for
    HANG_SECONDS and another one needs it. Its identity begins with the game, which must be `game`.

    frames: where simulators leave theirs, (simulators, players, 84, 84, 3); None: they send them.
    """

    def __init__(
        self,
        context: zmq.Context,
        address: str,
        simulators: int,
        players: int,
        key: list[bytes] | None = None,
        game: str = "",
        frames: np.ndarray | None = None,
    ):
        self.address, self.players, self.is_open = address, players, key is not None
        self.game, self.frames = f"{game} ".encode() if key else b"", frames
        self.sizes = [players * FRAME_BYTES] if frames is None else []  # of what follows a header
        self.num_places, self.num_players = simulators, simulators * players
        self.peers: dict[bytes, Peer] = {}  # by identity
        self.replaced: set[bytes] = set()  # identities that have lost their place
        self.joined = 0  # simulators that an open master has given a place
        self.dropped = 0  # messages that no simulator of this master can have sent
        self.socket = context.socket(zmq.ROUTER)
        self.socket.set_hwm(HIGH_WATER_MARK)  # before bind: later it would do nothing
        self.socket.setsockopt(zmq.MAXMSGSIZE, players * FRAME_BYTES + HEADER_BYTES)
        self.socket.setsockopt(zmq.IPV6, int("[" in address))
        if key:
            self.socket.curve_server = True
            self.socket.curve_publickey, self.socket.curve_secretkey = key
            self.socket.setsockopt(zmq.HEARTBEAT_IVL, 5000)
        try:
            self.socket.bind(address)
        except (zmq.ZMQError, UnicodeError) as error:  # of a long TMPDIR, for example
            raise UserError(f"cannot listen on {address}: {error}") from error

    def assign(self, identity: bytes, place: int) -> Peer:
        """Give a place to a simulator; the messages of the previous holder are dropped."""
        for other, peer in list(self.peers.items()):
            if peer.place == place:
                self.replaced.add(other)
                del self.peers[other]
        peer = self.peers[identity] = Peer(place)
        return peer

    def find_place(self) -> int | None:
        """A free place of an open master, or that of a silent simulator; None if all are in use."""
        taken = {peer.place for peer in self.peers.values()}
        vacant = (place for place in range(self.num_places) if place not in taken)
        long_ago = time.monotonic() - simulator.HANG_SECONDS
        owing = (peer for peer in self.peers.values() if peer.owes_since is not None)
        silent = (peer.place for peer in owing if peer.owes_since < long_ago)
        return next(itertools.chain(vacant, silent), None)

    def receive(self, most: int, timeout_ms: int) -> list[Message]:
        """Messages that have arrived, of `most` players together, but at least one message.

        It waits for the first for `timeout_ms`; [] if none comes.
        """
        messages: list[Message] = []
        self.socket.poll(timeout_ms)
        for _ in range(MOST_MESSAGES):
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            if (message := self.parse(parts)) is None:
                self.refuse(parts[0])
                continue
            messages.append(message)
            if len(messages) >= most // self.players:
                break
        return messages

    def refuse(self, identity: bytes) -> None:
        """Count a message that cannot be used, and tell its sender if it has no place.

        A message of a known simulator is not counted: it came too late, or twice.
        """
        peer = self.peers.get(identity)
        is_known = peer is not None and peer.first_message_at is not None
        if not is_known and identity not in self.replaced:
            self.dropped += 1
        if self.is_open and peer is None:
            self.socket.send_multipart([identity, msgpack.packb(None)])

    def parse(self, parts: list[bytes]) -> Message | None:
        """The message in these parts, or None if they are not one of a known simulator."""
        k = self.players
        if len(parts) < 2 or not (self.is_open or parts[0] in self.peers):
            return None
        identity, header, *pixels = parts
        try:
            rewards, ends, finished = msgpack.unpackb(header)
            rewards, ends = [float(reward) for reward in rewards], [int(end) for end in ends]
            finished = [(float(score), int(length)) for score, length in finished]
        except (ValueError, TypeError, OverflowError, msgpack.UnpackException):
            return None
        is_over = [end == IS_OVER for end in ends]
        fits = len(rewards) == len(ends) == k and len(finished) == sum(is_over)
        fits = fits and [len(part) for part in pixels] == self.sizes
        fits = fits and identity.startswith(self.game)
        if not fits or not all(map(math.isfinite, [*rewards, *(score for score, _ in finished)])):
            return None
        peer = self.peers.get(identity)  # another thread may replace it meanwhile
        if peer is None and self.is_open and (place := self.find_place()) is not None:
            peer = self.assign(identity, place)
            self.joined += 1
        if peer is None or peer.owes_since is None:  # it has no place, or has not been answered
            return None
        is_first = peer.first_message_at is None
        if is_first:
            peer.first_message_at = time.monotonic()
        peer.owes_since = None
        if self.frames is None:
            frames = np.frombuffer(pixels[0], np.uint8).reshape(k, *FRAME_SHAPE)
        else:
            frames = self.frames[peer.place]
        return Message(
            identity,
            is_first,
            peer.place,
            frames,
            rewards,
            is_over,
            [end == LIFE_LOST for end in ends],
            finished,
        )

    def reply(self, message: Message, actions: list[int]) -> None:
        """Send the actions (k,) of the players of `message`."""
        if peer := self.peers.get(message.identity):
            peer.owes_since = time.monotonic()
        self.socket.send(message.identity, zmq.SNDMORE)
        self.socket.send(msgpack.packb(actions))


class LocalPool(SimulatorPool):
    """The simulators of this process, in groups with a master each.

    Simulator i belongs to group i % groups; each has `players` players. options: further ones of
    the simulator program.
    """

    def __init__(
        self, env_id: str, simulators: int, players: int, groups: int, seed: int, *options: str
    ):
        super().__init__(env_id, simulators, players, seed, *options)
        self.context = zmq.Context()
        self.masters: list[Master] = []
        frames = None
        try:
            if hasattr(os, "memfd_create"):  # on Linux; it has no name that could be left behind
                self.shared_fds = [os.memfd_create("batch-a3c-frames")]
                os.ftruncate(self.shared_fds[0], simulators * players * FRAME_BYTES)
                frames = simulator.share_frames(self.shared_fds[0], players)
            for group in range(groups):
                address = f"ipc://{self.directory.path}/{group}"
                size = len(range(group, simulators, groups))
                of_group = None if frames is None else frames[group::groups]
                master = Master(self.context, address, size, players, frames=of_group)
                self.masters.append(master)
            self.start_missing()
        except BaseException:
            self.close()
            raise

    def master_of(self, index: int) -> Master:
        """The master of a simulator."""
        return self.masters[index % len(self.masters)]

    def register(self, index: int) -> str:
        """As SimulatorPool.register; and give the new simulator the place of the old one."""
        identity = super().register(index)
        self.master_of(index).assign(identity.encode(), index // len(self.masters))
        return identity

    def options(self, index: int) -> list[str]:
        """The address of its master, and where its frames go."""
        frames = [f"--frames-fd={fd}" for fd in self.shared_fds]
        return [f"--connect={self.master_of(index).address}", *frames]

    def first_message_at(self, index: int) -> float | None:
        """When the first message of a simulator came."""
        return self.master_of(index).peers[self.slots[index].identity.encode()].first_message_at

    def replace_ended(self) -> list[str]:
        """Start new simulators in place of those that have ended; returns a sentence for each."""
        events = self.collect_ended()
        self.start_missing()
        return events

    @signals_deferred()
    def close(self, in_use: bool = False) -> None:
        """End all simulators and remove the sockets.

        in_use: a thread may still use a master, so that the sockets cannot be closed.
        """
        super().close()
        if not in_use:
            self.context.destroy(linger=0)
        while self.shared_fds:
            os.close(self.shared_fds.pop())


# n-step returns


class Segment(NamedTuple):
    """Consecutive states of a player, oldest first, and what was done in them."""

    frames: np.ndarray  # (m + 3, 84, 84, 3) uint8, a view: valid until the next `add_frames`.
    # State i is frames[i : i + 4].
    actions: list[int]  # (m,)
    action_probs: list[float]  # (m,)
    future_rewards: list[float]  # (m,), the returns; the original calls them so
    versions: list[int]  # (m,), of the weights that chose the actions


class Step(NamedTuple):
    """What was chosen and predicted for the k players of a simulator in one state each."""

    actions: list[int]
    action_probs: list[float]
    values: list[float]
    version: int
    rewards: list[float]  # clipped; filled in once they are known


class Rollouts:
    """The last states of the players of a simulator, until their returns are known.

    A segment is finished when it has `local_time_max` states and a newer one follows, whose value
    V(s') stands for all that comes; or when the episode ends, which may add one state. The returns
    (Sutton & Barto 2018, section 12.1), from the newest state to the oldest:

        R = r + gamma * ((1 - lambda) * V(s') + lambda * R')    s', R': the next state, its return

    The newest state has R' = V(s'), which is 0 at the end of an episode. With lambda = 1 this is
    the n-step return of Mnih et al. 2016, algorithm S3. Rewards are clipped to [-1, 1]. With
    `life_loss` a lost life ends a segment as the end of an episode does; the frames stay.
    """

    def __init__(
        self,
        players: int,
        local_time_max: int,
        gamma: float,
        lambda_: float = 1.0,
        life_loss: bool = False,
    ):
        self.local_time_max, self.gamma, self.lambda_ = local_time_max, gamma, lambda_
        self.life_loss = life_loss
        self.steps: deque[Step] = deque(maxlen=local_time_max + 1)
        self.pending = [0] * players  # states of each player whose return is not known yet
        # When the frames are full, the last `kept_frames` move to the front.
        self.kept_frames = local_time_max + FRAME_HISTORY - 1
        self.frames = np.zeros((players, 3 * self.kept_frames, *FRAME_SHAPE), np.uint8)
        self.num_frames = FRAME_HISTORY - 1

    def finish_steps(self, message: Message) -> Iterator[Segment]:
        """Enter the rewards of the last actions; yields the segments that this finishes.

        A first message answers no action: its rewards and ends are ignored.
        """
        if self.steps:
            self.steps[-1].rewards.extend(min(max(r, -1.0), 1.0) for r in message.rewards)
        for player, count in enumerate(self.pending):
            is_over = message.is_over[player] or (self.life_loss and message.life_lost[player])
            if is_over and count:
                yield self.segment(player, count, newer=0, next_value=0.0)
                self.pending[player] = 0
            elif count > self.local_time_max:  # the newest state stays: its value ends the returns
                value = self.steps[-1].values[player]
                yield self.segment(player, self.local_time_max, newer=1, next_value=value)
                self.pending[player] = 1

    def segment(self, player: int, count: int, newer: int, next_value: float) -> Segment:
        """The `count` states before the `newer` newest ones, with their returns.

        next_value: of the state that follows them, 0 where the episode is over.
        """
        actions, action_probs, returns, versions = [], [], [], []
        next_return = next_value
        for age in range(newer, newer + count):  # from the newest to the oldest
            step = self.steps[-1 - age]
            mixed = (1 - self.lambda_) * next_value + self.lambda_ * next_return
            next_return = step.rewards[player] + self.gamma * mixed
            next_value = step.values[player]
            actions.append(step.actions[player])
            action_probs.append(step.action_probs[player])
            returns.append(next_return)
            versions.append(step.version)
        end = self.num_frames - newer
        frames = self.frames[player, end - count - FRAME_HISTORY + 1 : end]
        return Segment(frames, actions[::-1], action_probs[::-1], returns[::-1], versions[::-1])

    def add_frames(self, message: Message) -> np.ndarray:
        """Enter the new frames; returns the states (k, 4, 84, 84, 3) that they complete, a view."""
        if self.num_frames == self.frames.shape[1]:
            self.frames[:, : self.kept_frames] = self.frames[:, -self.kept_frames :]
            self.num_frames = self.kept_frames
        self.frames[:, self.num_frames] = message.frames
        self.num_frames += 1
        first = self.num_frames - FRAME_HISTORY
        for player in np.flatnonzero(message.is_over):  # an episode starts
            self.frames[player, first : self.num_frames - 1] = 0
        return self.frames[:, first : self.num_frames]

    def add_actions(
        self, actions: list[int], action_probs: list[float], values: list[float], version: int
    ) -> None:
        """Remember what was chosen and predicted in the newest states, (k,) each."""
        self.steps.append(Step(actions, action_probs, values, version, []))
        self.pending = [count + 1 for count in self.pending]


class ExperienceQueue:
    """A bounded queue of states with their returns, stored as the batches they are trained in.

    A full queue, of `size` states, blocks the predictors: this bounds the policy lag. Memory:
    (size / batch_size + 2) batches, pinned for a GPU.
    """

    def __init__(self, batch_size: int, size: int, pinned: bool = False):
        self.batch_size, self.size = batch_size, size
        # Two more than wait: one is trained on, one has the rest of the segment that came in last.
        count = -(-size // batch_size) + 2
        self.batches = [Batch.empty(batch_size, pin_memory=pinned) for _ in range(count)]
        self.arrays = [tuple(column.numpy() for column in batch) for batch in self.batches]
        self.versions = np.zeros((len(self.batches), batch_size), np.int64)
        self.frame_counts = [0] * len(self.batches)
        self.put_count = 0  # states that ever came in
        self.got_count = 0  # states that ever went out
        self.closed = False
        self.changed = threading.Condition()

    def __len__(self) -> int:
        return self.put_count - self.got_count

    def put(self, segment: Segment) -> bool:
        """Copy a segment into the queue; waits while it is full. False if the queue was closed."""
        with self.changed:
            self.changed.wait_for(lambda: len(self) < self.size or self.closed)
            if self.closed:
                return False
            done, count = 0, len(segment.actions)
            while done < count:  # it may be cut into two batches
                number, row = divmod(self.put_count, self.batch_size)
                end = min(done + self.batch_size - row, count)
                self.copy(segment, done, end, number % len(self.batches), row)
                self.put_count += end - done
                done = end
            if len(self) >= self.batch_size:
                self.changed.notify_all()
            return True

    def copy(self, segment: Segment, begin: int, end: int, number: int, row: int) -> None:
        """Copy the states `begin` to `end` of a segment into a batch, from `row` on."""
        frames, newest, actions, action_probs, future_rewards = self.arrays[number]
        rows = slice(row, row + end - begin)
        new = segment.frames[begin : end + FRAME_HISTORY - 1]
        first = self.frame_counts[number] if row else 0
        last = self.frame_counts[number] = first + len(new)
        frames[first:last] = new
        newest[rows] = range(first + FRAME_HISTORY - 1, last)
        actions[rows] = segment.actions[begin:end]
        action_probs[rows] = segment.action_probs[begin:end]
        future_rewards[rows] = segment.future_rewards[begin:end]
        self.versions[number, rows] = segment.versions[begin:end]

    def get(self, timeout: float) -> tuple[Batch, np.ndarray] | None:
        """The next batch and the versions (B,) that chose its actions; None after `timeout` s.

        Both are the queue's own memory: they stay as they are until the next call.
        """
        with self.changed:
            self.changed.wait_for(lambda: len(self) >= self.batch_size or self.closed, timeout)
            if len(self) < self.batch_size or self.closed:
                return None
            number = self.got_count // self.batch_size % len(self.batches)
            self.got_count += self.batch_size
            self.changed.notify_all()
            batch = self.batches[number]
            frames = batch.frames[: self.frame_counts[number]]
            return batch._replace(frames=frames), self.versions[number]

    def close(self) -> None:
        """Wake everybody up; nothing goes in or out any more."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()


# Prediction


def sample_actions(policy: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(n,) int64 actions drawn from policies (n, A)."""
    cumulative = policy[:, :-1].cumsum(axis=1)  # above all of it: the last action
    return (cumulative <= rng.random((len(policy), 1))).sum(axis=1)


class Replica:
    """A copy of a network that predicts for up to `size` states together.

    Each predictor thread has one and loads new versions into it: what it predicts with never
    changes meanwhile.
    """

    def __init__(self, network: Network, size: int, bfloat16: bool = False):
        copied = in_bfloat16(network) if bfloat16 else copy.deepcopy(network)
        self.network = copied.requires_grad_(False)
        self.weights = list(self.network.parameters())
        device = self.weights[0].device
        self.cuda, self.version = device.type == "cuda", -1
        # uint8 is the cheapest to copy to a GPU; float32 saves a conversion on a CPU.
        dtype = torch.uint8 if self.cuda or bfloat16 else torch.float
        self.staging = torch.empty((size, *STATE_SHAPE), dtype=dtype, pin_memory=self.cuda)
        if self.cuda:  # a graph predicts for as many states as it was made for
            self.states = torch.zeros_like(self.staging, device=device)
            self.replays = {}
            while not self.replays or size >= SMALLEST_GRAPH:
                states = self.states[:size]
                self.replays[size] = captured(lambda states=states: self.outputs(states))
                size //= 2

    def load(self, weights: list[torch.Tensor], version: int) -> None:
        """Predict with these weights from now on, if it has not loaded this version already."""
        if version != self.version:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, weights)
            self.version = version

    def outputs(self, states: torch.Tensor) -> torch.Tensor:
        """(n, A + 1): the policies, and behind them the values."""
        with torch.inference_mode():
            logits, value = self.network(states)
            return torch.cat((logits.softmax(dim=1), value[:, None]), dim=1)

    def predict(self, parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Policy (n, A) and value (n,), float32, of the uint8 states in `parts` together.

        parts: (k, 4, 84, 84, 3) each. Raises FloatingPointError if a result is not finite.
        """
        n = 0
        for part in parts:
            self.staging[n : n + len(part)] = torch.from_numpy(part)
            n += len(part)
        if self.cuda:
            self.states[:n].copy_(self.staging[:n], non_blocking=True)
            rows = min(rows for rows in self.replays if rows >= n)  # whatever is in those above n
            result = self.replays[rows]()[:n].cpu().numpy()
        else:
            result = self.outputs(self.staging[:n]).numpy()
        if not np.isfinite(result).all():
            raise FloatingPointError("the network predicts values that are not finite")
        return result[:, :-1], result[:, -1]


class Predictor(threading.Thread):
    """The thread that answers the simulators of one master until the queue is closed."""

    def __init__(self, feed: "Feed", master: Master, seed: np.random.SeedSequence):
        super().__init__(daemon=True)
        self.feed, self.master, self.options = feed, master, feed.options
        self.size = max(feed.options.predict_batch_size, master.players)  # states, at most
        self.rng = np.random.default_rng(seed)
        self.rollouts: dict[int, Rollouts] = {}  # by place
        self.replica: Replica | None = None

    def run(self) -> None:
        """Answer; whatever ends this thread ends the run, so the trainer has to know."""
        torch.set_num_threads(1)
        stream = contextlib.nullcontext()
        try:
            if self.feed.pinned:  # of another pool than the streams in which graphs are made
                stream = torch.cuda.stream(torch.cuda.Stream(self.feed.device, priority=-1))
            with stream:
                self.replica = Replica(self.feed.network, self.size, self.options.bfloat16)
                while not self.feed.queue.closed:
                    self.answer(self.master.receive(self.size, POLL_MS))
        except BaseException as error:
            self.feed.error = error
            self.feed.queue.close()

    def answer(self, messages: list[Message]) -> None:
        """Enter messages into the rollouts, choose actions for all their players, and reply."""
        if not messages:
            return
        o, k, states = self.options, self.master.players, []
        for message in messages:
            self.feed.scores.extend(score for score, _ in message.finished)
            if message.is_first:  # what is left of another simulator in this place is dropped
                self.rollouts[message.place] = Rollouts(
                    k, o.local_time_max, o.gamma, vars(o)["lambda"], bool(o.life_loss)
                )
            rollouts = self.rollouts[message.place]
            for segment in rollouts.finish_steps(message):
                if not self.feed.queue.put(segment):
                    return
            states.append(rollouts.add_frames(message))
        # The newest weights, taken after waiting for the queue. They are held until the prediction
        # is there, because a GPU may read them until then.
        weights, version, ready = self.feed.published
        if ready is not None:
            torch.cuda.current_stream().wait_event(ready)
        self.replica.load(weights, version)
        policy, value = self.replica.predict(states)
        actions = sample_actions(policy, self.rng)
        probs = policy[np.arange(len(actions)), actions]
        actions, probs, values = actions.tolist(), probs.tolist(), value.tolist()
        for i, message in enumerate(messages):
            part = slice(i * k, (i + 1) * k)
            self.master.reply(message, actions[part])
            self.rollouts[message.place].add_actions(
                actions[part], probs[part], values[part], version
            )


class Feed:
    """The trainer's source of experience: simulators, a predictor for each group, and the queue.

    `error` is what has ended a predictor, or has to end the run, if something has.
    """

    def __init__(self, env_id: str, options, learner: Learner, seeds: np.random.SeedSequence):
        self.options, self.device = options, learner.device
        self.pinned = self.device.type == "cuda"
        self.error: BaseException | None = None
        self.dropped = self.joined = 0
        self.scores: deque = deque(maxlen=LAST_SCORES)  # of finished training episodes
        self.queue = ExperienceQueue(options.batch_size, options.queue_size, self.pinned)
        self.network = learner.network
        self.publish(self.network, learner.updates)
        self.predictors: list[Predictor] = []
        simulators, players = options.simulator_proc, options.players_per_simulator
        groups, seed = options.predictor_thread_per_gpu, int(seeds.generate_state(1)[0])
        self.pool = LocalPool(env_id, simulators, players, groups, seed)
        self.masters = list(self.pool.masters)
        try:
            if options.listen:
                key = simulator.make_key(options.key)
                remote = Master(
                    self.pool.context, options.listen, REMOTE_SIMULATORS, players, key, env_id
                )
                self.masters.append(remote)
            for master, seed in zip(self.masters, seeds.spawn(len(self.masters)), strict=True):
                predictor = Predictor(self, master, seed)
                predictor.start()
                self.predictors.append(predictor)
        except BaseException:
            self.close()
            raise

    def publish(self, network: Network, version: int) -> None:
        """Let predictors use the weights of `network` from their next batch on: a copy of them."""
        weights = [parameter.detach().clone() for parameter in network.parameters()]
        ready = torch.cuda.current_stream().record_event() if self.pinned else None
        self.published = weights, version, ready  # one assignment: nobody sees half of it

    def replace_ended(self) -> list[str]:
        """As LocalPool.replace_ended, and raise what has to end the run.

        What else has happened since the last time is in the sentences, too.
        """
        if self.error is not None:
            raise self.error
        try:
            events = self.pool.replace_ended()
        except UserError as error:  # whoever asks again is told again
            self.error = error
            raise
        dropped = sum(master.dropped for master in self.masters)
        if dropped and not self.dropped:
            events.append("messages of others, of other games, or for other --players are dropped")
        joined = sum(master.joined for master in self.masters)
        if joined > self.joined:
            events.append(f"remote simulators that joined: {joined - self.joined}")
        self.dropped, self.joined = dropped, joined
        return events

    @signals_deferred()
    def close(self) -> None:
        """End threads and processes."""
        self.queue.close()
        deadline = time.monotonic() + THREAD_END_SECONDS
        for predictor in self.predictors:
            predictor.join(max(0.0, deadline - time.monotonic()))
        hangs = any(predictor.is_alive() for predictor in self.predictors)
        self.pool.close(in_use=hangs)  # one that hangs in native code may still use its socket


# Evaluation


class VectorPlayers(LocalPool):
    """`num_players` players in processes on all cores that step together.

    If one of the processes ends, so does the evaluation, because an episode that was played in part
    cannot be scored. check: called while they are waited for.
    """

    max_failures = 1

    def __init__(self, env_id: str, num_players: int, seed: int, check: Callable, *options: str):
        of_each = 1 if describe(env_id).one_per_process else -(-num_players // count_cores())
        processes = -(-num_players // of_each)
        self.num_players, self.check_run = num_players, check
        self.unused = processes * of_each - num_players  # of the last process; nobody sees them
        self.waiting: list[Message] = []
        super().__init__(env_id, processes, of_each, 1, seed, *options)

    def step(self, actions: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Act, (n,), or start (None): frames (n, 84, 84, 3), rewards (n,), is_over (n,).

        Where an episode is over the frame is the first of the next one.
        """
        (master,) = self.masters
        if self.waiting:
            actions = np.pad(actions, (0, self.unused))
        for message in self.waiting:
            first = message.place * master.players
            master.reply(message, actions[first : first + master.players].tolist())
        self.waiting = []
        while len(self.waiting) < len(self.slots):
            self.waiting += master.receive(master.num_players, timeout_ms=200)
            self.check_run()
            for event in self.collect_ended():
                raise UserError(event)
            self.start_missing()
        self.waiting.sort(key=lambda message: message.place)
        columns = zip(*((m.frames, m.rewards, m.is_over) for m in self.waiting), strict=True)
        return tuple(np.concatenate(column)[: self.num_players] for column in columns)


def policy_of(network: Network) -> Callable[[np.ndarray], np.ndarray]:
    """The function from up to EVAL_PLAYERS uint8 states to policies (n, A) that `network` is."""
    replica = Replica(network, EVAL_PLAYERS)
    return lambda states: replica.predict([states])[0]


def greedy_actions(policy: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(n,) actions: the likeliest of each policy (n, A), one in a hundred at random."""
    random = rng.random(len(policy)) < RANDOM_ACTIONS
    return np.where(random, rng.integers(policy.shape[1], size=len(policy)), policy.argmax(axis=1))


def play_episodes(
    players, policy: Callable, episodes: int, seed: int, seconds: float
) -> Iterator[list[Episode]]:
    """Play exactly `episodes` episodes side by side.

    Every episode that starts counts, or short ones would be favoured.

    Yields the list of those that are done, after every step. All players step together, so that the
    network sees the same batches again and one seed gives the same scores. After so many seconds no
    more episodes start, and those under way are cut short and count as they are.

    players: VectorPlayers, or common.Recorder.
    policy: states (n, 4, 84, 84, 3) uint8 -> policies (n, A).
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
        frames, rewards, is_over = players.step(greedy_actions(policy(states), rng))
        score += rewards
        length += 1
        elapsed = time.monotonic() - start
        for i in np.flatnonzero(playing & (is_over | (elapsed > seconds))):
            done.append(Episode(float(score[i]), int(length[i]), bool(is_over[i])))
            playing[i] = started < episodes and elapsed <= seconds
            started += playing[i]
        score[is_over], length[is_over] = 0, 0
        fresh = is_over
        yield done


def score_network(
    env_id: str,
    network: Network,
    episodes: int,
    seed: int,
    log: Callable[[str], None],
    seconds: float = math.inf,
    check: Callable[[], None] = lambda: None,
) -> list[Episode]:
    """Evaluate a network on all cores, within about so many seconds.

    log: is told of progress where there is no terminal; check: is called again and again, and may
    raise what has to end the evaluation.
    """
    start = logged = time.monotonic()
    cores = count_cores()
    players = VectorPlayers(env_id, min(episodes, EVAL_PLAYERS), seed, check)
    bar = tqdm(total=episodes, desc="evaluation", disable=None)
    with contextlib.closing(players), bar, contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(cores)
        seconds -= time.monotonic() - start
        for done in play_episodes(players, policy_of(network), episodes, seed, seconds):
            bar.update(len(done) - bar.n)
            if bar.disable and time.monotonic() - logged > EVALUATION_LOG_SECONDS:
                logged = time.monotonic()
                log(f"{len(done)} of {episodes} episodes")
    return done
