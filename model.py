"""The network, its loss and update, and its weight files: the maths of Batch-A3C.

Sources: Mnih et al. 2016, "Asynchronous Methods for Deep Reinforcement Learning" (the loss: section
4 and algorithm S3); Kingma & Ba 2015, "Adam" (the update, in the form at the end of its section 2);
Yong et al. 2020, "Gradient Centralization" (updates that leave the means of filters as they are).
"""

import contextlib
import copy
import functools
import io
import os
import re
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed, nn

MAX_ARRAY_BYTES = 2**26  # of a variable in a file; the largest one here has 13 MB
MAX_ACTIONS = 1000  # games and files have fewer
MAX_UPDATES = 2**53
BA3C_ONLY = {"conv2/W", "conv2/b", "conv3/W", "conv3/b", "prelu/alpha"}
NETWORKS = ("ba3c", "a3c")
ZERO = torch.zeros(())
CHECKPOINT_FORMAT = "batch-a3c 1"
FRAME_SHAPE, FRAME_HISTORY = (84, 84, 3), 4
STATE_SHAPE = (FRAME_HISTORY, *FRAME_SHAPE)  # oldest frame first
LOSSES = ("policy_loss", "xentropy_loss", "value_loss", "cost")
METRICS = (*LOSSES, "importance", "rms_advantage", "predict_reward", "grad_norm")
# On a CPU a batch is cut into parts of at most so many states, one thread each: their activations
# stay in the caches, and no thread waits for another. More parts balance the threads, fewer repeat
# less work. Measured on two cores, where 22 makes six parts of a batch.
CPU_PART = {"ba3c": 22, "a3c": 64, "bfloat16": 64}  # "bfloat16" is for either network
CAPTURE = threading.Lock()  # CUDA graphs are made one after the other
warm_up_stream = functools.cache(torch.cuda.Stream)  # one for all graphs: a stream keeps memory


class WeightFileError(OSError):
    """A weight file that cannot be used; the text is a sentence that says why."""


class RanksError(RuntimeError):
    """A collective of the ranks failed: another rank has ended, or cannot be reached."""


class DivergedError(FloatingPointError):
    """The ranks do not hold the same weights any more."""


@contextlib.contextmanager
def collective() -> Iterator[None]:
    """Turn whatever gloo or NCCL raise in this block into a RanksError of one line."""
    try:
        yield
    except RuntimeError as error:
        # gloo: `[/path/to/pair.cc:537] What happened. This is typically caused by a remote ...`
        text = re.sub(r"^\[\S+:\d+\] ", "", str(error).partition("\n")[0])
        raise RanksError(text.partition(". This is typically")[0]) from error


class Network(nn.Module):
    """Policy and value of a state.

    `ba3c` is the larger network of Batch-A3C, `a3c` the small one of the A3C paper (section 8).
    """

    def __init__(self, kind: str, num_actions: int):
        super().__init__()
        self.kind = kind
        self.num_actions = num_actions
        channels = 3 * FRAME_HISTORY  # history * 3 + rgb, oldest frame first
        if kind == "ba3c":
            self.conv0 = nn.Conv2d(channels, 32, 5, padding=2)
            self.conv1 = nn.Conv2d(32, 32, 5, padding=2)
            self.conv2 = nn.Conv2d(32, 64, 4)  # padded 1 before and 2 after, in forward
            self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
            self.fc0 = nn.Linear(10 * 10 * 64, 512)
            self.prelu = nn.PReLU(init=0.001)
        else:
            self.conv0 = nn.Conv2d(channels, 16, 8, stride=4)
            self.conv1 = nn.Conv2d(16, 32, 4, stride=2)
            self.fc0 = nn.Linear(9 * 9 * 32, 256)
        self.fc_pi = nn.Linear(self.fc0.out_features, num_actions)
        self.fc_v = nn.Linear(self.fc0.out_features, 1)
        for layer in self.children():
            if not isinstance(layer, nn.PReLU):  # He et al. 2015: N(0, sqrt(2 / fan_in))
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        self.to(memory_format=torch.channels_last)

    def filters(self) -> list[torch.Tensor]:
        """Those of the convolutions, (out, in, rows, columns), without gradients."""
        return [parameter.data for parameter in self.parameters() if parameter.dim() == 4]

    def center_filters(self) -> None:
        """Make filters blind to whatever is the same all over their window."""
        for filters in self.filters():
            filters -= filters.mean((2, 3), keepdim=True)

    def first_layer(self, state: torch.Tensor, interleave: bool) -> torch.Tensor:
        """The first convolution of states, as conv2d or as conv3d; the results agree.

        With `interleave` the frames of a state become its channels, as the weights have them, which
        is cheap on a GPU and in bfloat16. Without, time is one more dimension of the convolution.
        """
        conv0 = self.conv0
        # x / 255 is folded into the weights: 4,800 divisions instead of 84,672 per state.
        weight = conv0.weight / 255
        if interleave:
            x = state.permute(0, 2, 3, 1, 4).flatten(3).to(weight.dtype).permute(0, 3, 1, 2)
            return F.conv2d(x, weight, conv0.bias, conv0.stride, conv0.padding)
        x = state.to(torch.float, memory_format=torch.contiguous_format).permute(0, 4, 1, 2, 3)
        weight = weight.unflatten(1, (FRAME_HISTORY, 3)).transpose(1, 2)
        stride, padding = (1, *conv0.stride), (0, *conv0.padding)
        return F.conv3d(x, weight, conv0.bias, stride, padding).squeeze(2)

    def forward(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, A) and value (B,) of states (B, 4, 84, 84, 3), 0 to 255, uint8 or float32."""
        interleave = state.is_cuda or self.conv0.weight.dtype == torch.bfloat16
        x = self.first_layer(state, interleave)
        if self.kind == "ba3c":
            x = F.relu(F.max_pool2d(x, 2))  # = max_pool(relu(x)), on a quarter of the elements
            x = F.relu(F.max_pool2d(self.conv1(x), 2))
            x = F.relu(F.max_pool2d(self.conv2(F.pad(x, (1, 2, 1, 2))), 2))
            x = F.relu(self.conv3(x))
        else:
            x = F.relu(self.conv1(F.relu(x)))
        x = self.fc0(x.permute(0, 2, 3, 1).flatten(1))  # (row * width + column) * C + channel
        x = (self.prelu(x) if self.kind == "ba3c" else F.relu(x)).float()
        return self.fc_pi(x), self.fc_v(x).squeeze(1)


def in_bfloat16(network: Network) -> Network:
    """A copy that computes in bfloat16, except for its heads: their results are not rounded.

    A CPU with AMX multiplies such matrices several times faster.
    """
    network = copy.deepcopy(network)
    for layer in network.children():
        if layer not in (network.fc_pi, network.fc_v):
            layer.to(torch.bfloat16)
    return network


class Batch(NamedTuple):
    """Training data of B states: tensors on one device."""

    frames: torch.Tensor  # (F, 84, 84, 3) uint8; a state is four that follow each other
    newest: torch.Tensor  # (B,) int64, of each state the index of its last frame
    actions: torch.Tensor  # (B,) int64
    action_probs: torch.Tensor  # (B,) float32, when the action was chosen
    future_rewards: torch.Tensor  # (B,) float32, the returns

    @classmethod
    def empty(cls, size: int, **how) -> "Batch":
        """Memory for `size` states of which no two share a frame; how: options of torch.empty."""
        frames = torch.empty((FRAME_HISTORY * size, *FRAME_SHAPE), dtype=torch.uint8, **how)
        dtypes = (*2 * [torch.int64], *2 * [torch.float32])
        return cls(frames, *(torch.empty(size, dtype=dtype, **how) for dtype in dtypes))

    def split(self, size: int) -> list["Batch"]:
        """Consecutive parts of at most `size` states."""
        columns = (column.split(size) for column in self[1:])
        return [Batch(self.frames, *part) for part in zip(*columns, strict=True)]

    def states(self) -> torch.Tensor:
        """(B, 4, 84, 84, 3) uint8."""
        history = torch.arange(1 - FRAME_HISTORY, 1, device=self.newest.device)
        index = (self.newest[:, None] + history).flatten()
        # Copies whole frames, where frames[index] goes pixel by pixel: 1 against 31 us per state.
        return self.frames.index_select(0, index).unflatten(0, (-1, FRAME_HISTORY))


def loss_terms(logits: torch.Tensor, value: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The sums over a batch that cost and metrics are made of.

    Returns (6,): policy loss, cross entropy (negative entropy), value loss, importance, squared
    advantage, value. The advantage here is V(s) - R, so that its product with log pi(a|s) is to be
    minimized (Mnih et al. 2016, section 4); each product is weighted with the importance
    pi(a|s) / mu(a|s), because the policy mu that chose the action is a few updates older. 1e-6,
    1e-8 and the limit of 10 are those of the original, tensorpack's Batch-A3C example.
    """
    policy = F.softmax(logits, dim=1)
    log_probs = torch.log(policy + 1e-6)
    pi_a = policy.gather(1, batch.actions[:, None]).squeeze(1)
    log_pi_a = log_probs.gather(1, batch.actions[:, None]).squeeze(1)
    importance = (pi_a / (batch.action_probs + 1e-8)).clamp(0, 10).detach()
    advantage = value.detach() - batch.future_rewards
    policy_loss = (log_pi_a * advantage * importance).sum()
    xentropy_loss = (policy * log_probs).sum()
    value_loss = 0.5 * (value - batch.future_rewards).square().sum()
    sums = (importance.sum(), advantage.square().sum(), value.sum())
    return torch.stack((policy_loss, xentropy_loss, value_loss, *sums))


def cost_of(terms: torch.Tensor, entropy_beta: float, batch_size: int) -> torch.Tensor:
    """The cost that is minimized: (policy + beta * cross entropy + value loss) / B."""
    return (terms[0] + entropy_beta * terms[1] + terms[2]) / batch_size


def clip_gradients(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Limit each variable's L2 norm to 0.1 * its number of elements, in place.

    Returns the L2 norm () of all gradients together as they were before.
    """
    norms = torch.stack([torch.linalg.vector_norm(g) for g in gradients])
    for gradient, norm in zip(gradients, norms, strict=True):
        gradient.mul_((0.1 * gradient.numel() / norm).clamp(max=1))
    return torch.linalg.vector_norm(norms)


def captured(function: Callable) -> Callable:
    """`function`, which reads and writes tensors on a GPU, as a CUDA graph.

    One launch takes the place of dozens, for each of which Python's threads would wait for each
    other. It works on the same memory every time, whatever it is called with, and so does what it
    returns.
    """
    with CAPTURE:
        stream = warm_up_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries make what they need, and choose their kernels
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on with whatever they do.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = function()

    def replay(*_):
        graph.replay()
        return result

    return replay


class Learner:
    """A network in training: one call of `update` is one iteration.

    With `center_filters` the mean of a filter over rows and columns never changes. Pixels are not
    negative and most of them are background, so that otherwise the many small steps of a filter's
    weights add up to a large one of its output, in all states at once, until it is below zero.

    `mean_network` has the running mean of the weights over about the last `mean_iterations`
    iterations: the mean of all of them until there are so many, later an exponential one.
    """

    def __init__(
        self,
        network: Network,
        device: torch.device,
        adam_epsilon: float,
        threads: int,
        center_filters: bool = False,
        bfloat16: bool = False,
        mean_iterations: int = 1000,
    ):
        self.network = network.to(device)
        self.device = device
        self.adam_epsilon = adam_epsilon
        self.updates, self.threads = 0, threads
        self.ranks = distributed.get_world_size() if distributed.is_initialized() else 1
        self.parameters = list(network.parameters())
        self.mean_iterations = mean_iterations
        self.mean_network = copy.deepcopy(network).requires_grad_(False)
        # Gradients are computed on this one: the network itself, or a copy of it in bfloat16 that
        # `gradients` keeps up to date.
        self.compute_network = in_bfloat16(network) if bfloat16 else network
        self.centered = network.filters() if center_filters else []
        self.optimizer = torch.optim.Adam(self.parameters, fused=True)
        self.cuda = device.type == "cuda"
        self.clip = clip_gradients
        if self.cuda:
            torch.set_float32_matmul_precision("high")  # TF32; convolutions use it by default
            self.copied = torch.cuda.Event()
            self.static_batch: Batch | None = None  # on the GPU, where a graph reads it
            self.entropy_beta = torch.zeros((), device=device)
        # Each thread for itself: a team of threads would wait for members that have no core.
        torch.set_num_threads(1)
        self.pool = ThreadPoolExecutor(threads, "trainer", lambda: torch.set_num_threads(1))

    def update(self, batch: Batch, learning_rate: float, entropy_beta: float, extra=()):
        """Apply one synchronous update of all ranks; returns METRICS (8,) and `extra` behind them.

        These are means over the ranks, on the learner's device. RanksError if the exchange of the
        gradients fails; with gloo nothing has changed then.

        Adam is TensorFlow's:
        w -= lr_t * m / (sqrt(v) + eps), lr_t = lr sqrt(1-b2^t) / (1-b1^t). torch divides sqrt(v) by
        sqrt(1 - b2^t) first, so its epsilon must be divided likewise.
        """
        batch_size = len(batch.actions)
        extra = torch.tensor(extra, dtype=torch.float32, device=self.device)  # waits for the GPU
        terms, gradients = self.gradients(batch, entropy_beta)
        if self.ranks > 1:
            self.average([terms, extra, *gradients])
        norm = self.clip(gradients)
        self.updates += 1
        group = self.optimizer.param_groups[0]
        group["lr"] = learning_rate
        group["eps"] = self.adam_epsilon / (1 - group["betas"][1] ** self.updates) ** 0.5
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient.dim() == 4:  # the fused optimizer ignores strides: they must be the same
                gradient = gradient.contiguous(memory_format=torch.channels_last)
            parameter.grad = gradient
        means = [filters.mean((2, 3), keepdim=True) for filters in self.centered]
        self.optimizer.step()
        for filters, mean in zip(self.centered, means, strict=True):
            filters += mean - filters.mean((2, 3), keepdim=True)
        self.optimizer.zero_grad()  # gives their memory back before the next ones are computed
        with torch.no_grad():
            share = 1 / min(self.updates, self.mean_iterations)
            torch._foreach_lerp_(list(self.mean_network.parameters()), self.parameters, share)
        importance, squared_advantage, value = terms[3:] / batch_size
        cost = cost_of(terms, entropy_beta, batch_size)
        if self.cuda:  # from now on the queue may reuse the memory of the batch
            self.copied.synchronize()
        scalars = torch.stack((cost, importance, squared_advantage.sqrt(), value, norm))
        return torch.cat((terms[:3], scalars, extra))

    def average(self, tensors: list[torch.Tensor]) -> None:
        """Make these tensors their means over all ranks: one transfer of all of them together."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with collective():
            distributed.all_reduce(flat)
        parts = (flat / self.ranks).split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))

    def check_ranks(self) -> None:
        """Raise DivergedError if a checksum of the weights differs between the ranks."""
        flat = torch.cat([parameter.detach().reshape(-1) for parameter in self.parameters])
        words = flat.view(torch.int32).long()
        sums = torch.stack((words.sum(), -words.sum()))  # max(s) + max(-s) is 0 if all are the same
        with collective():
            distributed.all_reduce(sums, distributed.ReduceOp.MAX)
        if sums.sum() != 0:
            raise DivergedError("the ranks hold different weights; nothing is saved")

    def share(self, run: dict) -> dict:
        """Make all ranks hold what rank 0 holds: weights, optimizer, updates; returns its `run`."""
        if self.ranks == 1:
            return run
        content = [checkpoint_file(self, {"run": run})]
        with collective():
            distributed.broadcast_object_list(content, 0, device=self.device)
        state = torch.load(io.BytesIO(content[0]), map_location="cpu", weights_only=True)
        self.load_state_dict(state["learner"])
        return state["run"]

    def gradients(self, batch: Batch, entropy_beta: float) -> tuple[torch.Tensor, list]:
        """Loss terms (6,) and the gradient of the cost for each parameter, before clipping.

        On a GPU they lie in memory that the next call overwrites.
        """
        if self.compute_network is not self.network:
            with torch.no_grad():
                torch._foreach_copy_(list(self.compute_network.parameters()), self.parameters)
        if self.cuda:
            return self.gradients_on_gpu(batch, entropy_beta)
        return self.gradients_on_cpu(batch, entropy_beta)

    def gradients_of(self, batch: Batch, entropy_beta, batch_size: int) -> tuple:
        """As `gradients`, for a part of a batch of `batch_size` states."""
        terms = loss_terms(*self.compute_network(batch.states()), batch)
        cost = cost_of(terms, entropy_beta, batch_size)
        gradients = torch.autograd.grad(cost, list(self.compute_network.parameters()))
        return terms.detach(), [gradient.float() for gradient in gradients]

    def gradients_on_cpu(self, batch: Batch, entropy_beta: float) -> tuple:
        """In parts, a thread each."""
        size = len(batch.actions)
        kind = self.network.kind if self.compute_network is self.network else "bfloat16"
        # With many threads less than CPU_PART each, but no parts so small that threads cost more.
        part_size = min(CPU_PART[kind], max(8, -(-size // self.threads)))
        parts = batch.split(part_size)
        results = self.pool.map(lambda part: self.gradients_of(part, entropy_beta, size), parts)
        terms, gradients = zip(*results, strict=True)
        columns = zip(*gradients, strict=True)
        return sum(terms), [sum(column[1:], column[0]) for column in columns]

    def gradients_on_gpu(self, batch: Batch, entropy_beta: float) -> tuple:
        """In one CUDA graph, which is made for the first batch of a size."""
        size = len(batch.actions)
        is_new = self.static_batch is None or len(self.static_batch.actions) != size
        if is_new:
            self.static_batch = Batch.empty(size, device=self.device)
        for static, column in zip(self.static_batch, batch, strict=True):
            static[: len(column)].copy_(column, non_blocking=True)
        self.copied.record()
        self.entropy_beta.fill_(entropy_beta)
        if is_new:
            self.replay = captured(
                lambda: self.gradients_of(self.static_batch, self.entropy_beta, size)
            )
            gradients = self.replay()[1]
            self.clip = captured(lambda: clip_gradients(gradients))
        return self.replay()

    def measure(self, size: int) -> float:
        """States per second of gradients, from two batches of this size; the first warms up."""
        batch = Batch(*map(torch.zeros_like, Batch.empty(size)))
        batch.newest.fill_(FRAME_HISTORY - 1)
        for _ in range(2):
            start = time.perf_counter()
            self.gradients(batch, 0.0)
        return size / (time.perf_counter() - start)

    def state_dict(self) -> dict:
        """Everything an update depends on."""
        return {
            "kind": self.network.kind,
            "num_actions": self.network.num_actions,
            "updates": self.updates,
            "network": self.network.state_dict(),
            "mean": self.mean_network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue as the learner whose `state_dict` this was.

        Those of earlier versions have no mean. The optimizer's settings stay: those of this
        program, of which `update` sets the rest.
        """
        self.network.load_state_dict(state["network"])
        self.mean_network.load_state_dict(state.get("mean", state["network"]))
        moments = {"state": state["optimizer"]["state"]}
        self.optimizer.load_state_dict(self.optimizer.state_dict() | moments)
        self.updates = state["updates"]


def tensorpack_name(name: str) -> str:
    """`fc_pi.weight` -> `fc-pi/W`."""
    layer, _, kind = name.replace("_", "-").partition(".")
    return f"{layer}/" + ("alpha" if layer == "prelu" else "W" if kind == "weight" else "b")


def in_tensorpack(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """A parameter (or its gradient) as tensorpack lays it out, HWIO, [in, out], (): a view."""
    if name == "prelu/alpha":
        return tensor.reshape(())
    if name.endswith("/W"):
        return tensor.permute(2, 3, 1, 0) if tensor.dim() == 4 else tensor.T
    return tensor


def weights_file(network: Network) -> bytes:
    """`network` as tensorpack's .npz."""
    arrays, file = {}, io.BytesIO()
    for torch_name, parameter in network.named_parameters():
        name = tensorpack_name(torch_name)
        arrays[name] = in_tensorpack(parameter.detach(), name).contiguous().cpu().numpy()
    np.savez(file, **arrays)
    return file.getvalue()


def checkpoint_file(learner: Learner, run: dict) -> bytes:
    """A checkpoint: the learner, torch's random state, and what `run` says of the rest."""
    state = {
        "format": CHECKPOINT_FORMAT,
        "learner": learner.state_dict(),
        "rng": torch.get_rng_state(),
        **run,
    }
    file = io.BytesIO()  # on a full disk torch's own writer raises no OSError
    torch.save(state, file)
    return file.getvalue()


def read_weights(archive) -> Network:
    """The network in an open .npz archive; ValueError if that is not a whole set of weights."""
    keys = {key.removesuffix(":0"): key for key in archive.files}

    def read(name: str) -> np.ndarray:
        if name not in keys:
            raise ValueError(f"it has no variable {name}")
        if archive.zip.getinfo(keys[name] + ".npy").file_size > MAX_ARRAY_BYTES:
            raise ValueError(f"{name} is too large")
        array = archive[keys[name]]
        is_float = array.dtype.kind == "f"
        with np.errstate(over="ignore"):  # what is too large for float32 is infinite there
            array = array.astype(np.float32) if is_float else array
        if not is_float or not np.isfinite(array).all():
            raise ValueError(f"{name} does not hold finite floating-point numbers")
        return array

    num_actions = read("fc-pi/b").size
    if not 0 < num_actions < MAX_ACTIONS:
        raise ValueError(f"fc-pi/b has {num_actions} elements")
    network = Network("ba3c" if keys.keys() & BA3C_ONLY else "a3c", num_actions)
    with torch.no_grad():
        for torch_name, parameter in network.named_parameters():
            name = tensorpack_name(torch_name)
            array, view = read(name), in_tensorpack(parameter, name)
            if array.shape != view.shape:
                kind, shape = network.kind, tuple(view.shape)
                raise ValueError(f"{name} is {array.shape}, but {shape} in the {kind} network")
            view.copy_(torch.from_numpy(array))
    return network


def check_form(value, form, name: str = "") -> None:
    """ValueError unless a value, which may be anything, has a form.

    A form is a dictionary of forms, whose keys must all be there; a tensor, whose type and shape
    are needed, with finite elements; or the type of any other value. name: for the sentence.
    """
    if isinstance(form, dict):
        if not isinstance(value, dict):
            raise ValueError(f"its {name or 'content'} is no dict")
        for key, form_of_value in form.items():
            path = f"{name}.{key}".lstrip(".")
            if key not in value:
                raise ValueError(f"it has no {path}")
            check_form(value[key], form_of_value, path)
    elif isinstance(form, torch.Tensor):
        check_form(value, torch.Tensor, name)
        found, needed = (f"{tuple(t.shape)} {t.dtype}" for t in (value, form))
        if found != needed or value.layout != torch.strided:
            raise ValueError(f"its {name} is {found}, not {needed}")
        if not value.isfinite().all():
            raise ValueError(f"its {name} is not finite")
    elif not isinstance(value, form) or (isinstance(value, bool) and form is not bool):
        # A truth value is no number.
        raise ValueError(f"its {name} is no {getattr(form, '__name__', form)}")


def read_checkpoint(checkpoint: dict) -> Network:
    """The network in a checkpoint; ValueError if not all is there that a Learner needs."""
    form_of_learner = {"kind": str, "num_actions": int, "updates": int, "network": dict}
    form = {"format": str, "learner": form_of_learner, "rng": torch.get_rng_state()}
    check_form(checkpoint, form)
    if checkpoint["format"] != CHECKPOINT_FORMAT:
        raise ValueError("it is of another program")
    learner = checkpoint["learner"]
    if learner["kind"] not in NETWORKS:
        raise ValueError(f"it has a network {learner['kind']!a}, which is unknown here")
    if not 0 < learner["num_actions"] < MAX_ACTIONS:
        raise ValueError(f"it is for {learner['num_actions']} actions")
    if not 0 <= learner["updates"] < MAX_UPDATES:
        raise ValueError(f"it has {learner['updates']} updates")
    network = Network(learner["kind"], learner["num_actions"])
    weights, moments = dict(network.named_parameters()), {}
    if learner["updates"]:  # before its first update an optimizer holds nothing
        for number, weight in enumerate(weights.values()):
            moments[number] = {"exp_avg": weight, "exp_avg_sq": weight, "step": ZERO}
    form = {"network": weights, "mean": weights, "optimizer": {"state": moments}}
    # Checkpoints of earlier versions have no mean.
    check_form({"mean": learner["network"], **learner}, form, "learner")
    if len(learner["network"]) > len(weights) or len(learner["optimizer"]["state"]) > len(moments):
        raise ValueError("it has variables that its network has not")
    network.load_state_dict(learner["network"])
    torch.Generator().set_state(checkpoint["rng"])  # does it fit?
    return network


def load(path: str) -> tuple[Network, dict]:
    """The network in an .npz or a checkpoint, and the checkpoint ({} for an .npz).

    A file of another name than .pt is what its content says. An .npz may be of this program or of
    tensorpack: names may end in `:0`, other arrays are ignored, kind and number of actions are read
    off it. WeightFileError for whatever is unusable; what a checkpoint says of the run beside
    learner and random state is the caller's to check. Nothing is ever unpickled.
    """
    try:
        if not path.endswith(".pt"):
            if os.path.isfile(path) and not zipfile.is_zipfile(path):
                raise ValueError("it is no .npz, or not a whole one")
            with np.load(path, allow_pickle=False) as archive:
                if not any(name.endswith("/data.pkl") for name in archive.files):
                    return read_weights(archive), {}
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return read_checkpoint(checkpoint), checkpoint
    except FileNotFoundError as error:
        raise WeightFileError(f"there is no file {path}") from error
    except Exception as error:  # whatever a damaged file makes of its readers
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise WeightFileError(f"{path} is not usable: {reason}") from error
