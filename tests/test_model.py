"""The maths against figures that the original computed, and weight files both ways."""

import copy
import io
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import model
from model import Batch, Learner, Network, WeightFileError, load, weights_file

GOLDEN = Path(__file__).parent / "golden" / "golden_A4.npz"
CPU = torch.device("cpu")
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))
BA3C_SHAPES = {
    "conv0/W": (5, 5, 12, 32),
    "conv0/b": (32,),
    "conv1/W": (5, 5, 32, 32),
    "conv1/b": (32,),
    "conv2/W": (4, 4, 32, 64),
    "conv2/b": (64,),
    "conv3/W": (3, 3, 64, 64),
    "conv3/b": (64,),
    "fc0/W": (6400, 512),
    "fc0/b": (512,),
    "prelu/alpha": (),
    "fc-pi/W": (512, 4),
    "fc-pi/b": (4,),
    "fc-v/W": (512, 1),
    "fc-v/b": (1,),
}
A3C_SHAPES = {
    "conv0/W": (8, 8, 12, 16),
    "conv0/b": (16,),
    "conv1/W": (4, 4, 16, 32),
    "conv1/b": (32,),
    "fc0/W": (2592, 256),
    "fc0/b": (256,),
    "fc-pi/W": (256, 6),
    "fc-pi/b": (6,),
    "fc-v/W": (256, 1),
    "fc-v/b": (1,),
}


def golden_arrays():
    """Weights in the original's layout and a batch, made by the recipe of the golden figures."""
    r = np.random.RandomState(20161122)
    weights = {}
    for name, shape in BA3C_SHAPES.items():
        if name == "prelu/alpha":
            value = 0.25
        elif name.endswith("/b"):
            value = 0.1 * r.standard_normal(shape)
        else:
            value = np.sqrt(2 / np.prod(shape[:-1])) * r.standard_normal(shape)
        weights[name] = np.asarray(value, np.float32)
    state = r.randint(0, 256, (16, 84, 84, 3, 4)).astype(np.uint8)
    state[:4, ..., :3] = 0
    action = r.randint(0, 4, 16)
    action_prob = r.uniform(0.02, 1.0, 16).astype(np.float32)
    action_prob[0], action_prob[1] = 0.0, 1e-9
    future_reward = (3 * r.standard_normal(16)).astype(np.float32)
    frames = np.ascontiguousarray(state.transpose(0, 4, 1, 2, 3)).reshape(64, 84, 84, 3)
    columns = (frames, np.arange(3, 64, 4), action.astype(np.int64), action_prob, future_reward)
    return weights, Batch(*map(torch.from_numpy, columns))


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN)


def without_a_graph(function):
    """What model.captured does, as far as a CPU can: the same memory every time."""
    result = function()

    def leaves(tensors):
        if isinstance(tensors, torch.Tensor):
            return [tensors]
        return [leaf for part in tensors for leaf in leaves(part)]

    def replay(*_):
        for old, new in zip(leaves(result), leaves(function()), strict=True):
            old.copy_(new)
        return result

    return replay


@pytest.fixture(params=["cpu", "the way of a GPU", GPU])
def learner(tmp_path, request, monkeypatch):
    weights, _ = golden_arrays()
    np.savez(tmp_path / "golden.npz", **weights)
    network, place = load(str(tmp_path / "golden.npz"))[0], request.param
    device = torch.device("cuda" if place == "cuda" else "cpu")
    learner = Learner(network, device, adam_epsilon=1e-3, threads=2)
    if place == "the way of a GPU":
        monkeypatch.setattr(model, "captured", without_a_graph)
        learner.cuda, learner.static_batch, learner.entropy_beta = True, None, torch.zeros(())
        learner.copied = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    torch.set_float32_matmul_precision("highest")  # not TF32, as it trains on a GPU
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return learner


def tensorpack_arrays(network, values=None):
    pairs = network.named_parameters()
    names = [(model.tensorpack_name(name), parameter) for name, parameter in pairs]
    values = [parameter for _, parameter in names] if values is None else values
    return {
        name: model.in_tensorpack(v, name).detach().cpu().numpy()
        for (name, _), v in zip(names, values, strict=True)
    }


def sample(array):
    flat = array.ravel()
    return flat[np.linspace(0, flat.size - 1, min(flat.size, 64)).astype(int)]


def relative(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def test_forward(learner, golden):
    with torch.no_grad():
        results = learner.network(golden_arrays()[1].states().to(learner.device))
    logits, value = (result.cpu() for result in results)
    np.testing.assert_allclose(logits.numpy(), golden["logits"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(value.numpy(), golden["value"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits.softmax(1).numpy(), golden["policy"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("part", [16, 5])
def test_gradients(learner, golden, monkeypatch, part):
    monkeypatch.setattr(model, "CPU_PART", {"ba3c": part})
    _, gradients = learner.gradients(golden_arrays()[1], entropy_beta=0.01)
    for name, gradient in tensorpack_arrays(learner.network, gradients).items():
        norm, expected = np.linalg.norm(gradient), golden[f"grad_norm/{name}"]
        assert abs(norm / expected - 1) < 1e-3, name
        assert relative(sample(gradient), golden[f"grad_sample/{name}"]) < 1e-3, name
    model.clip_gradients(gradients)
    for name, gradient in tensorpack_arrays(learner.network, gradients).items():
        expected = golden[f"clipped_norm/{name}"]
        assert abs(np.linalg.norm(gradient) / expected - 1) < 1e-3, name


@pytest.mark.parametrize("part", [16, 6])
def test_updates(learner, golden, monkeypatch, part):
    monkeypatch.setattr(model, "CPU_PART", {"ba3c": part})
    batch = golden_arrays()[1]
    for step in (1, 2, 3):
        values = learner.update(batch, learning_rate=1e-3, entropy_beta=0.01).tolist()
        metrics = dict(zip(model.METRICS, values, strict=True))
        assert metrics["cost"] == pytest.approx(golden[f"cost_step{step}"], rel=1e-4)
        if step == 1:
            for name in model.METRICS[:-1]:
                assert metrics[name] == pytest.approx(golden[f"scalar/{name}"], rel=1e-4), name
        if step in (1, 3):
            for name, weights in tensorpack_arrays(learner.network).items():
                np.testing.assert_allclose(
                    sample(weights), golden[f"w{step}_sample/{name}"], rtol=0, atol=1e-5
                )


def test_gradient_norm_metric_is_that_of_all_gradients_before_clipping(learner, golden):
    metrics = learner.update(golden_arrays()[1], learning_rate=1e-3, entropy_beta=0.01)
    norms = [golden[f"grad_norm/{name}"] for name in BA3C_SHAPES]
    assert metrics[-1].item() == pytest.approx(np.linalg.norm(norms), rel=1e-3)


@pytest.mark.parametrize("kind, shapes", [("ba3c", BA3C_SHAPES), ("a3c", A3C_SHAPES)])
def test_files_have_tensorpacks_names_and_layouts(tmp_path, kind, shapes):
    network = Network(kind, shapes["fc-pi/b"][0])
    (tmp_path / "x.npz").write_bytes(weights_file(network))
    with np.load(tmp_path / "x.npz", allow_pickle=False) as arrays:
        assert {name: arrays[name].shape for name in arrays.files} == shapes
        assert {arrays[name].dtype for name in arrays.files} == {np.dtype(np.float32)}
    again = load(str(tmp_path / "x.npz"))[0]
    assert (again.kind, again.num_actions) == (kind, network.num_actions)
    for a, b in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_files_of_the_zoo_load(tmp_path, golden):
    """Names with :0, what an optimizer left, float16."""
    weights, batch = golden_arrays()
    zoo = {f"{name}:0": array for name, array in weights.items()}
    zoo |= {"conv0/W/Adam:0": weights["conv0/W"], "global_step:0": np.array(1234)}
    np.savez(tmp_path / "zoo.npz", **zoo)
    with torch.no_grad():
        logits, _ = load(str(tmp_path / "zoo.npz"))[0](batch.states())
    np.testing.assert_allclose(logits.numpy(), golden["logits"], rtol=1e-4, atol=1e-5)
    np.savez(tmp_path / "half.npz", **{name: a.astype(np.float16) for name, a in weights.items()})
    half = tensorpack_arrays(load(str(tmp_path / "half.npz"))[0])
    np.testing.assert_allclose(half["fc0/W"], weights["fc0/W"], atol=1e-3)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-code-ran",)


def broken_files(folder):
    weights, _ = golden_arrays()
    good = folder / "good.npz"
    np.savez(good, **weights)
    (folder / "truncated.npz").write_bytes(good.read_bytes()[:100_000])
    (folder / "text.npz").write_text("not a file of weights\n")
    (folder / "empty.npz").write_bytes(b"")
    np.savez(folder / "foreign.npz", a=np.zeros(3))
    np.savez(folder / "missing.npz", **{n: a for n, a in weights.items() if n != "conv3/W"})
    np.savez(folder / "shape.npz", **(weights | {"conv1/W": np.zeros((5, 5, 32, 31), np.float32)}))
    np.savez(folder / "nan.npz", **(weights | {"fc0/b": np.full(512, np.nan, np.float32)}))
    np.savez(folder / "evil.npz", **(weights | {"fc0/b": np.array([Evil()], object)}))
    (folder / "pickle.npz").write_bytes(pickle.dumps(Evil()))
    np.save(folder / "array.npy", weights["fc0/W"])
    (folder / "array.npy").rename(folder / "array.npz")
    return {path.stem for path in folder.glob("*.npz")} - {"good"}


def test_unusable_files_get_a_sentence_and_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = broken_files(tmp_path)
    assert len(names) == 10
    for name in names | {"not-there"}:
        with pytest.raises(WeightFileError) as caught:
            load(f"{name}.npz")[0]
        assert f"{name}.npz" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(WeightFileError, match="no variable conv3/W"):
        load("missing.npz")[0]
    whole = dict(np.load(io.BytesIO(weights_file(Network("ba3c", 4)))))
    for name in whole:
        np.savez("one-less.npz", **{other: whole[other] for other in whole if other != name})
        with pytest.raises(WeightFileError, match=f"no variable {name}"):
            load("one-less.npz")
    np.savez("large.npz", **whole | {"fc0/b": np.full(512, 1e300)})
    with pytest.raises(WeightFileError, match="fc0/b does not hold finite"):
        load("large.npz")
    with pytest.raises(WeightFileError, match=r"conv1/W.*\(5, 5, 32, 31\).*\(5, 5, 32, 32\)"):
        load("shape.npz")[0]
    assert not Path("evil-code-ran").exists()


def test_unusable_checkpoints_get_a_sentence_and_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": "something else"}, "foreign.pt")
    torch.save({"format": model.CHECKPOINT_FORMAT, "evil": Evil()}, "evil.pt")
    Path("pickle.pt").write_bytes(pickle.dumps(Evil()))
    Path("truncated.pt").write_bytes(Path("foreign.pt").read_bytes()[:200])
    for name in ("foreign.pt", "evil.pt", "pickle.pt", "truncated.pt", "not-there.pt"):
        with pytest.raises(WeightFileError, match=name):
            load(name)
    assert not Path("evil-code-ran").exists()


def test_initialization():
    torch.manual_seed(0)
    network = Network("ba3c", 4)
    for name, array in tensorpack_arrays(network).items():
        if name.endswith("/W"):
            expected = np.sqrt(2 / np.prod(array.shape[:-1]))
            assert array.std() == pytest.approx(expected, rel=4 / np.sqrt(2 * array.size)), name
            assert abs(array.mean()) < 4 * expected / np.sqrt(array.size), name
        elif name.endswith("/b"):
            assert not array.any(), name
    assert network.prelu.weight.item() == pytest.approx(0.001)


def test_a3c_network_is_that_of_the_paper():
    """Against explicit convolutions on the tensorpack arrays, in NHWC."""
    network = Network("a3c", 6)
    weights = {n: a.astype(np.float64) for n, a in tensorpack_arrays(network).items()}
    frames = np.random.default_rng(0).integers(256, size=(4, 84, 84, 3), dtype=np.uint8)
    state = np.concatenate(frames, axis=2)  # channel: history * 3 + rgb, oldest frame first

    def convolve(x, name, stride):
        kernel, size = weights[f"{name}/W"], (x.shape[0] - weights[f"{name}/W"].shape[0]) // stride
        out = np.zeros((size + 1, size + 1, kernel.shape[3]))
        for i in range(size + 1):
            for j in range(size + 1):
                y, z = i * stride, j * stride
                window = x[y : y + kernel.shape[0], z : z + kernel.shape[1]]
                out[i, j] = np.tensordot(window, kernel, 3) + weights[f"{name}/b"]
        return np.maximum(out, 0)

    x = convolve(convolve(state / 255, "conv0", 4), "conv1", 2).reshape(-1)
    x = np.maximum(x @ weights["fc0/W"] + weights["fc0/b"], 0)
    with torch.no_grad():
        logits, value = network(torch.from_numpy(frames[None]))
    np.testing.assert_allclose(logits[0], x @ weights["fc-pi/W"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(value, x @ weights["fc-v/W"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["ba3c", "a3c"])
def test_both_ways_through_the_first_layer_lead_to_one_result(kind):
    network, results = Network(kind, 4), []
    states = torch.randint(0, 256, (3, 4, 84, 84, 3), dtype=torch.uint8)
    for interleave in (False, True):
        x = network.first_layer(states, interleave)
        (gradient,) = torch.autograd.grad(x.square().mean(), network.conv0.weight)
        results.append((x.detach(), gradient))
    for one, other in zip(*results, strict=True):
        assert relative(one.numpy(), other.numpy()) < 1e-5


def test_centered_filters_learn_but_keep_their_means():
    """Whatever means they had: the filters of a loaded agent must not jump."""
    _, batch = golden_arrays()
    torch.manual_seed(1)
    network = Network("a3c", 4)
    before = [filters.clone() for filters in network.filters()]
    learner = Learner(network, CPU, adam_epsilon=1e-5, threads=2, center_filters=True)
    for _ in range(5):
        learner.update(batch, 1e-3, 0.01)
    assert len(before) == 2
    for old, new in zip(before, network.filters(), strict=True):
        assert (new - old).abs().max() > 1e-3  # of five steps of 1e-3 at most
        change = (new - old).mean((2, 3)).abs().max()
        assert change < 1e-6 < 1e-2 < old.mean((2, 3)).abs().max()
    network.center_filters()
    for filters in network.filters():
        assert filters.mean((2, 3)).abs().max() < 1e-6 < 1e-2 < filters.std()
    state = torch.full((1, 4, 84, 84, 3), 99, dtype=torch.uint8)  # the same all over each window
    assert network.first_layer(state, False).std((2, 3)).max() < 1e-5


@pytest.mark.parametrize("kind", ["ba3c", "a3c"])
@pytest.mark.parametrize("place", ["cpu", GPU])
def test_bfloat16_is_near_float32_and_weights_are_not_rounded(kind, place):
    _, batch = golden_arrays()
    torch.manual_seed(0)
    network = Network(kind, 4)
    exact = Learner(copy.deepcopy(network), CPU, 1e-3, threads=2)
    learner = Learner(network, torch.device(place), 1e-3, threads=2, bfloat16=True)
    for rate in (1e-6, 1e-3, 0):  # the first changes no weight by as much as bfloat16 tells apart
        old = [parameter.detach().cpu().clone() for parameter in network.parameters()]
        exact.load_state_dict(learner.state_dict())
        expected, gradients = exact.gradients(batch, 0.01)
        terms, results = learner.gradients(batch, 0.01)
        assert relative(terms.cpu().numpy(), expected.numpy()) < 2e-2
        for result, gradient in zip(results, gradients, strict=True):
            assert result.dtype == torch.float32
            assert relative(result.cpu().numpy(), gradient.numpy()) < 0.25  # the first layer's
        fc0 = list(dict(network.named_parameters())).index("fc0.weight")
        assert relative(results[fc0].cpu().numpy(), gradients[fc0].numpy()) > 1e-4
        exact.update(batch, rate, 0.01)
        learner.update(batch, rate, 0.01)
        for before, a, b in zip(old, exact.parameters, learner.parameters, strict=True):
            change = (a.detach() - before).numpy()
            assert not rate or relative(b.detach().cpu().numpy() - before.numpy(), change) < 0.25


def test_resumed_learner_makes_the_same_next_update(tmp_path):
    _, batch = golden_arrays()
    torch.manual_seed(1)
    learner = Learner(Network("a3c", 4), CPU, adam_epsilon=1e-3, threads=2)
    for _ in range(3):
        learner.update(batch, 1e-3, 0.01)
    torch.save(learner.state_dict(), tmp_path / "state.pt")
    learner.update(batch, 1e-3, 0.01)

    resumed = Learner(Network("a3c", 4), CPU, adam_epsilon=1e-3, threads=2)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    resumed.update(batch, 1e-3, 0.01)
    assert resumed.updates == learner.updates == 4
    for a, b in zip(learner.parameters, resumed.parameters, strict=True):
        assert torch.equal(a, b)


def test_the_mean_of_the_weights_is_that_of_the_last_iterations():
    """Of all iterations at first, later one in which the older ones fade."""
    torch.manual_seed(0)
    _, batch = golden_arrays()
    learner = Learner(Network("a3c", 4), CPU, 1e-3, threads=1, mean_iterations=3)
    seen, expected = [], None
    for step in range(6):
        learner.update(batch, 1e-2, 0.01)
        seen.append(learner.network.fc_pi.weight.detach().clone())
        last = expected if step >= 3 else torch.stack(seen).mean(0)
        expected = last + (seen[-1] - last) / 3 if step >= 3 else last
        torch.testing.assert_close(learner.mean_network.fc_pi.weight, expected)
    other = Learner(Network("a3c", 4), CPU, 1e-3, threads=1)
    state = learner.state_dict()
    other.load_state_dict(state)
    torch.testing.assert_close(other.mean_network.fc_pi.weight, expected)
    del state["mean"]  # a checkpoint of an earlier version
    other.load_state_dict(state)
    torch.testing.assert_close(other.mean_network.fc_pi.weight, seen[-1])
