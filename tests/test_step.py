"""A step as one launch: nothing in it waits for the device, and it is the plain step, for every method."""

import contextlib
import math
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_three_steps import CASES, run_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sidae_lib import methods, step, train

CPU = torch.device("cpu")
EVERY = {name: changes for name, (_, changes) in CASES.items()} | {
    "pairwise": {"augment": "report_simclr", "per_class": 1}, "triplet": {"augment": "report_simclr", "per_class": 2},
    "composed": {"augment": "yadim", "backbone": "resnet18", "stem": "cifar", "width": 4, "extract": "00,0r",
                 "compare": "cosine", "loss": "info_nce", "lr": 0.001},
    "nnclr, pairs": {"lr": 0.001, "pairs": "oracle", "pair_share": 1.0, "pair_count": 24, "leave_out": "partners"},
}  # fmt: skip
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "_unique2", "is_nonzero", "isin", "equal", "bincount",
         "repeat_interleave", "_linalg_eigh")  # some wait inside of their CUDA kernels alone  # fmt: skip
FUSED = ("_fused_sgd_", "_fused_adam_")  # of the optimiser, which exist on real devices alone


class Waits(TorchDispatchMode):
    """Collects what a CUDA graph cannot hold: values asked of the device, shapes that depend on them, and tensors that are
    elsewhere than on `device`: Python numbers made tensors, which travel to it, or copies to the host."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device, self.found = device, list[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, given = func.overloadpacket.__name__, (args, kwargs or {})
        out = None if name in FUSED and self.device == "meta" else func(*args, **kwargs or {})
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if name in ("index", "index_put_") else []
        away = [t for t in tree_leaves((given, out)) if isinstance(t, torch.Tensor) and t.device.type != self.device]
        if name in WAITS or masks or away:
            self.found.append(name)
        return out


def of(name: str, mode: str = "eager", **changes) -> train.Run:
    run = run_of(name.split(",")[0], **EVERY[name] | changes)
    run.set_mode(mode)
    return run


def test_every_method_is_here():
    assert {name.split(",")[0] for name in EVERY} == methods.METHODS.keys() - {"untrained"}


# --- no hidden waits --------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(monkeypatch):
    """Runs are made on torch's device without content: whoever asks a value of it, or mixes it with the CPU, fails. Autocast
    and the fused optimiser refuse its name, not its tensors."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    optimizers = sys.modules[torch.optim.Optimizer.__module__]
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    made = train.Run
    monkeypatch.setattr(train, "Run", lambda config, images, device: made(config, images, torch.device("meta")))


@pytest.mark.parametrize("name", EVERY)
def test_a_step_never_waits_for_the_device(name, elsewhere):
    run = of(name, "eager graph")
    run.draw(0)
    with Waits("meta"):
        run._next()  # makes the sums and what the optimiser keeps
    with Waits("meta") as waits:
        run._next()
    assert waits.found == []
    assert {k: v.device.type for k, v in run.state().items()} == dict.fromkeys(run.state(), "meta")


ANYWHERE = (lambda x: x.sum().item(), lambda x: x[x > 1], lambda x: (x > 1).nonzero(), lambda x: torch.tensor(1.0),
            lambda x: bool(x.any()), lambda x: torch.isin(x, x), lambda x: torch.equal(x, x))  # fmt: skip
AWAY = (lambda x: x.cpu(), lambda x: x + torch.ones(()), lambda x: x[torch.arange(2)], lambda x: x.add_(torch.ones(4)))


@pytest.mark.parametrize("device, waiting", [("cpu", ANYWHERE), ("meta", ANYWHERE + AWAY)])
def test_the_check_sees_what_it_looks_for(device, waiting):
    for wait in waiting:
        with Waits(device) as waits, contextlib.suppress(RuntimeError, NotImplementedError):
            wait(torch.arange(4.0, device=device))
            assert waits.found


# --- the same mathematics ---------------------------------------------------------------------------------------------


def as_it_was(run: train.Run, steps: int) -> dict[str, torch.Tensor]:
    """The loop before a step was one launch, on a run's own weights: every number a Python number, sums in a dict."""
    c, m, sums, n = run.config, run.method, {}, 0
    groups = m.param_groups(c.lr)
    optimizer = (torch.optim.SGD(groups, lr=c.lr, momentum=c.momentum, fused=True) if c.optimizer == "sgd" else
                 torch.optim.Adam(groups, lr=c.lr, betas=(c.momentum, c.beta2), fused=True))  # fmt: skip
    while n < steps:
        drawn = run.draw(n // len(run.bounds))
        for a, b in run.bounds:
            out = m.loss(*run.see(*run.samples(drawn, slice(a, b))))
            zn = F.normalize(out.pop("z").float(), dim=1)
            optimizer.zero_grad()
            out["loss"].backward()
            lr = c.lr * (min(1.0, (n + 1) / (c.warmup * run.steps)) if c.warmup else 1.0)
            lr = {"cosine": 0.5 * lr * (1 + math.cos(math.pi * n / run.steps)), "constant": lr, "steps": lr * 0.2 ** (
                (6 * n >= 5 * run.steps) + (15 * n >= 14 * run.steps))}[c.schedule]  # fmt: skip
            for group in optimizer.param_groups:
                group["lr"] = c.lr if group["fixed"] else lr
            optimizer.step()
            n += 1
            for k, v in {**out, "n": torch.ones_like(out["loss"]), "z": zn.sum(0), "zz": zn.square().sum(0)}.items():
                v = v.detach().double() * ((b - a) if k in (*out, "n") else 1)
                sums[k] = sums[k] + v if k in sums else v
            m.after_step(**m.ahead(n, run.steps))
    return {f"method.{k}": v for k, v in m.state_dict().items()} | {f"sums.{k}": v for k, v in sums.items()}


def ended(run: train.Run, steps: int) -> dict[str, torch.Tensor]:
    while run.step < steps:
        drawn = run.draw(run.step // len(run.bounds))
        for a, b in run.bounds:
            run.advance(drawn, a, b)
    return run.state()


SCHEDULES = {"constant": {"schedule": "constant"}, "steps": {"schedule": "steps"}, "warm-up": {"warmup": 0.3}, "adam": {
    "optimizer": "adam", "lr": 1e-3, "momentum": 0.9}, "biases decay": {"decay_bias": True}, "the predictor's rate stays": {
    "predictor_lr": "constant"}}  # fmt: skip
VARIED = [*((name, {}) for name in EVERY), *(
    pytest.param("sidae", changes, marks=() if name == "adam" else pytest.mark.slow)
    for name, changes in SCHEDULES.items())]  # fmt: skip


@pytest.mark.parametrize("name, changes", VARIED, ids=[*EVERY, *SCHEDULES])
def test_a_step_is_what_it_was_to_the_bit(name, changes):
    """Twenty steps: weights, buffers, queues, centres, momentum networks and the sums."""
    new, old = ended(of(name, epochs=10, **changes), 20), as_it_was(of(name, epochs=10, **changes), 20)
    for k, v in old.items():
        assert torch.equal(new[k], v), k


@pytest.mark.parametrize("name, changes", [*VARIED[: len(EVERY)], ("sidae", SCHEDULES["adam"])], ids=[*EVERY, "adam"])
def test_the_counted_step_is_the_plain_step(name, changes):
    """Two epochs, samples, rates and momenta read at a place that the device counts: the plain loop's weights, statistics and
    sums. The rate is a float32 there, a double here, and this is all that differs."""
    plain, counted = (ended(run, run.steps) for run in (of(name, mode, **changes) for mode in ("eager", "eager graph")))
    assert plain.keys() == counted.keys()
    for k, v in plain.items():
        torch.testing.assert_close(counted[k], v, rtol=1e-4, atol=3e-5, msg=lambda text, k=k: f"{k}: {text}")


def test_an_epoch_that_is_met_again_has_its_own_rates():
    """Whoever calls `advance` with the samples of one epoch over and over gets the rates and momenta of every step."""
    plain, counted = (of("byol", mode) for mode in ("eager", "eager graph"))
    for run in (plain, counted):
        drawn = run.draw(0)
        for n in range(run.steps):
            run.advance(drawn, *run.bounds[n % len(run.bounds)])
    for k, v in plain.state().items():
        torch.testing.assert_close(counted.state()[k], v, rtol=1e-4, atol=1e-5)


def test_a_momentum_near_one_is_not_rounded():
    """1 - m of the last step of a long run is 1e-9 and less; in float32 it would be 0 or 6e-8."""
    source = torch.nn.Linear(4, 4)
    target = methods.base.MomentumCopy(source)
    with torch.no_grad():
        target[0].weight.zero_(), source.weight.fill_(1.0)
    target.follow(torch.tensor(1 - 1e-9, dtype=torch.double))
    assert target[0].weight.tolist() == [[pytest.approx(1e-9, rel=1e-6)] * 4] * 4


def test_a_run_stopped_within_an_epoch_goes_on_at_its_place(tmp_path):
    """The counter is set where the epoch's tensors are: after a checkpoint it starts in the middle."""
    whole, first, second = (of("moco_v2", "eager graph") for _ in range(3))
    drawn = whole.draw(0)
    for a, b in whole.bounds:
        whole.advance(drawn, a, b)
    for a, b in first.bounds[:2]:
        first.advance(first.draw(0), a, b)
    first.save(tmp_path / "checkpoint.safetensors")
    second.restore(tmp_path / "checkpoint.safetensors")
    for a, b in second.bounds[2:]:
        second.advance(drawn, a, b)  # of another run: it is copied to where this one's stays
    for name, value in whole.state().items():
        assert torch.equal(second.state()[name], value), name


# --- what fails is said, and the next mode is taken -------------------------------------------------------------------


class Stub:
    """Stands in for a stream: there is no GPU here, and a step that fails to be captured must be taken all the same."""

    def wait_stream(self, other) -> None: ...


def refused(launch: step.Captured, monkeypatch) -> None:
    def refuse(graph, **options):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    launch.aside = Stub()
    monkeypatch.setattr(torch.cuda, "set_stream", lambda s: None)
    monkeypatch.setattr(torch.cuda, "current_stream", Stub)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", refuse)


def test_a_function_that_cannot_be_captured_is_called_all_the_same(monkeypatch):
    calls, launch = [], step.Captured(lambda: calls.append(1), CPU)
    refused(launch, monkeypatch)
    with pytest.warns(UserWarning, match="No CUDA graph .operation not permitted when stream is capturing.;"):
        for _ in range(5):
            launch()
    assert len(calls) == 5 and launch.failed
    with warnings.catch_warnings(action="error"):  # said once
        launch()
    assert len(calls) == 6


def test_a_run_without_its_graph_goes_on_and_says_so(monkeypatch):
    """Capturing fails at the fourth step: it and all others are taken, in the next mode, which the record names."""
    plain, run = of("byol"), of("byol", "eager graph")
    run.draw(0)
    refused(run.launch, monkeypatch)
    with pytest.warns(UserWarning, match="No CUDA graph"):
        end = ended(run, run.steps)
    assert run.mode == run.meta()["mode"] == "eager"
    for k, v in ended(plain, plain.steps).items():
        torch.testing.assert_close(end[k], v, rtol=1e-4, atol=1e-5)


def test_the_next_mode():
    assert [step.after(m) for m in ("views graph", "step graph", "eager graph", "step", "views")] == [
        "step", "step", "eager", "eager", "eager"]  # fmt: skip


@pytest.mark.parametrize("mode", ["views", "step"])
def test_what_cannot_be_compiled_is_run_as_it_is(mode, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError("no compiler")

    plain, run = of("sidae"), of("sidae")
    monkeypatch.setattr(step, "compiled", lambda function: torch.compile(function, backend=broken, fullgraph=True))
    step._view.cache_clear()
    try:
        run.set_mode(mode)
        with pytest.warns(UserWarning, match=f"Mode {mode} cannot be compiled .*no compiler"):
            end = ended(run, run.steps)
    finally:
        step._view.cache_clear()
    assert run.mode == "eager"
    for k, v in ended(plain, plain.steps).items():
        assert torch.equal(end[k], v), k
