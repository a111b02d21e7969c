"""Batched predictor threads, their copies of the network, and the queue that they fill.

One thread does everything for its group of simulators: it receives what has arrived, enters it into
the books, hands finished segments to the trainer, predicts for all new states in one batch, and
replies. A state changes hands once, when it is trained on.
"""

import contextlib
import copy
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import torch
from tqdm import tqdm

import simulator
from common import count_cores, evaluate
from model import FRAME_HISTORY, STATE_SHAPE, Batch, Learner, Network, captured, in_bfloat16
from simulator import Books, Fleet, Master, Message, Segment, VectorPlayers

EVAL_PLAYERS = 16  # side by side in an evaluation
LOG_SECONDS = 10  # from one line of progress to the next, where there is no terminal
POLL_MS = 100  # how long a predictor waits for messages before it looks whether it should end
SMALLEST_GRAPH = 8  # states; below, a prediction on a GPU takes no less time
LAST_SCORES = 100  # training episodes in the mean score that is shown


class ExperienceQueue:
    """A bounded queue of states with their returns, stored as the batches they will be trained in.

    A producer waits while `size` states wait to be trained on: that is what keeps a slow trainer's
    policy from getting old. Memory: (size / batch_size + 2) batches, pinned where a GPU reads it.
    """

    def __init__(self, batch_size: int, size: int, pinned: bool = False):
        self.batch_size, self.size = batch_size, size

        # What waits (size, and the rest of a segment that was let in last), and what is trained on.
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
            while len(self) >= self.size and not self.closed:
                self.changed.wait()
            if self.closed:
                return False
            done, count = 0, len(segment.actions)
            while done < count:  # it may be cut into two batches
                batch, first = divmod(self.put_count, self.batch_size)
                end = min(done + self.batch_size - first, count)
                self.copy(segment, done, end, batch % len(self.batches), first)
                self.put_count, done = self.put_count + end - done, end
            if len(self) >= self.batch_size:
                self.changed.notify_all()
            return True

    def copy(self, segment: Segment, begin: int, end: int, batch: int, first: int) -> None:
        """Copy the states `begin` to `end` of a segment into a batch, from row `first` on."""
        frames, newest, *columns = (*self.arrays[batch], self.versions[batch])
        last, rows = len(segment.frames), slice(first, first + end - begin)
        new = segment.frames[last - end - FRAME_HISTORY + 1 : last - begin]
        start = self.frame_counts[batch] if first else 0
        self.frame_counts[batch] = stop = start + len(new)
        frames[start:stop] = new
        newest[rows] = range(stop - 1, stop - 1 - end + begin, -1)
        for column, values in zip(columns, segment[1:], strict=True):
            column[rows] = values[begin:end]

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
        # uint8 travels best; where the network needs float32 at once: one copy less.
        dtype = torch.uint8 if self.cuda or bfloat16 else torch.float
        self.memory = torch.empty((size, *STATE_SHAPE), dtype=dtype, pin_memory=self.cuda)
        if self.cuda:  # a graph predicts for as many states as it was made for
            self.states = torch.zeros_like(self.memory, device=device)
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
            self.memory[n : n + len(part)] = torch.from_numpy(part)
            n += len(part)
        if self.cuda:
            self.states[:n].copy_(self.memory[:n], non_blocking=True)
            rows = min(rows for rows in self.replays if rows >= n)  # whatever is in those above n
            result = self.replays[rows]()[:n].cpu().numpy()
        else:
            result = self.outputs(self.memory[:n]).numpy()
        if not np.isfinite(result).all():
            raise FloatingPointError("the network predicts values that are not finite")
        return result[:, :-1], result[:, -1]


def policy_of(network: Network) -> Callable[[np.ndarray], np.ndarray]:
    """The function from up to EVAL_PLAYERS uint8 states to policies (n, A) that `network` is."""
    replica = Replica(network, EVAL_PLAYERS)
    return lambda states: replica.predict([states])[0]


class Feed:
    """What feeds the trainer: simulators, a predictor thread for each group of them, the queue.

    `error` is what has ended a predictor, if something has.
    """

    def __init__(self, env_id: str, options, learner: Learner, seeds: np.random.SeedSequence):
        self.options, self.device = options, learner.device
        self.pinned = self.device.type == "cuda"
        self.error: BaseException | None = None
        self.dropped = 0
        self.scores: deque = deque(maxlen=LAST_SCORES)  # of finished training episodes
        self.queue = ExperienceQueue(options.batch_size, options.queue_size, self.pinned)
        self.network = learner.network
        self.publish(self.network, learner.updates)
        self.threads: list[threading.Thread] = []
        simulators, players = options.simulator_proc, options.players_per_simulator
        groups, seed = options.predictor_thread_per_gpu, int(seeds.generate_state(1)[0])
        self.fleet, self.joined = Fleet(env_id, simulators, players, groups, seed), 0
        self.masters = list(self.fleet.masters)
        try:
            if options.listen:
                key, places = simulator.make_key(options.key), simulator.REMOTE_SIMULATORS
                remote = Master(self.fleet.context, options.listen, places, players, key, env_id)
                self.masters.append(remote)
            for master, seed in zip(self.masters, seeds.spawn(len(self.masters)), strict=True):
                thread = threading.Thread(target=self.serve, args=(master, seed), daemon=True)
                thread.start()
                self.threads.append(thread)
        except BaseException:
            self.close()
            raise

    def serve(self, master: Master, seed: np.random.SeedSequence) -> None:
        """A predictor thread: answer the simulators of one master until the queue is closed."""
        torch.set_num_threads(1)
        stream = contextlib.nullcontext()
        try:
            if self.pinned:  # of another pool than the streams in which graphs are made
                stream = torch.cuda.stream(torch.cuda.Stream(self.device, priority=-1))
            o = self.options
            books: dict[int, Books] = {}  # by place
            rng = np.random.default_rng(seed)
            size = max(o.predict_batch_size, master.players)
            with stream:
                replica = Replica(self.network, size, o.bfloat16)
                while not self.queue.closed:
                    self.answer(master.receive(size, POLL_MS), master, books, rng, replica)
        except BaseException as error:  # whatever it is ends the run, so the trainer must know
            self.error = error
            self.queue.close()

    def answer(self, messages: list[Message], master, books, rng, replica: Replica) -> None:
        """Enter messages into the books, choose actions for all their players, and reply."""
        states, k = [], master.players
        for message in messages:
            self.scores.extend(score for score, _ in message.finished)
            if message.is_first:  # of one that was there before everything is dropped
                o = self.options
                books[message.place] = Books(k, o.local_time_max, o.gamma)
            for segment in books[message.place].settle(message):
                if not self.queue.put(segment):
                    return
            states.append(books[message.place].observe(message))
        if not messages:
            return
        # After waiting for the queue: the newest. They are held until the prediction is there, for
        # a GPU may read them until then.
        weights, version, ready = self.published
        if ready is not None:
            torch.cuda.current_stream().wait_event(ready)
        replica.load(weights, version)
        policy, value = replica.predict(states)
        actions = sample_actions(policy, rng)
        probs = policy[np.arange(len(actions)), actions]
        columns = actions.tolist(), probs.tolist(), value.tolist()
        for i, message in enumerate(messages):
            part = [column[i * k : (i + 1) * k] for column in columns]
            master.reply(message, part[0])
            books[message.place].decide(*part, version)

    def publish(self, network: Network, version: int) -> None:
        """Let predictors use the weights of `network` from their next batch on: a copy of them."""
        weights = [parameter.detach().clone() for parameter in network.parameters()]
        ready = torch.cuda.current_stream().record_event() if self.pinned else None
        self.published = weights, version, ready  # one assignment: nobody sees half of it

    def check(self) -> list[str]:
        """What happened to simulators since the last time; raises what has to end the run."""
        if self.error is not None:
            raise self.error
        events = self.fleet.check()
        dropped = sum(master.dropped for master in self.masters)
        if dropped and not self.dropped:
            events.append("messages of others, of other games, or for other --players are dropped")
        joined = sum(master.joined for master in self.masters)
        if joined > self.joined:
            events.append(f"remote simulators that joined: {joined - self.joined}")
        self.dropped, self.joined = dropped, joined
        return events

    def close(self) -> None:
        """End threads and processes."""
        with simulator.undisturbed():
            self.queue.close()
            deadline = time.monotonic() + simulator.END_SECONDS
            for thread in self.threads:
                thread.join(max(0.0, deadline - time.monotonic()))
            hung = any(thread.is_alive() for thread in self.threads)
            self.fleet.close(hung)  # one that hangs in native code may still use its socket


@contextlib.contextmanager
def threads_of_torch(threads: int) -> Iterator[None]:
    """Let this thread compute with so many; what it had before it has again at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def score(env_id, network, episodes, seed, log, seconds=math.inf, check=lambda: None):
    """Evaluate a network on all cores, with progress; returns a list of common.Episode."""
    start = logged = time.monotonic()
    cores = count_cores()
    # With little time, few players: so that at least their episodes come to an end.
    side_by_side = int(min(episodes, EVAL_PLAYERS, max(cores, seconds / 10)))

    players = VectorPlayers(env_id, side_by_side, seed, check)
    bar = tqdm(total=episodes, desc="evaluation", disable=None)
    with contextlib.closing(players), bar, threads_of_torch(cores):
        seconds -= time.monotonic() - start
        for done in evaluate(players, policy_of(network), episodes, seed, seconds):
            bar.update(len(done) - bar.n)
            if bar.disable and time.monotonic() - logged > LOG_SECONDS:
                logged = time.monotonic()
                log(f"{len(done)} of {episodes} episodes")
    return done
