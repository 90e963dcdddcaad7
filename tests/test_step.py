"""A step as one launch: nothing in it asks the device for a value, and it is the plain step."""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sidae_lib import data, experiments, step, train

CPU = torch.device("cpu")
GRAPHED = ("sidae", "simsiam", "dae", "supervised")  # the methods of Table 1
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "_unique2", "is_nonzero")


class Waits(TorchDispatchMode):
    """Collects what a CUDA graph cannot hold: values asked of the device, shapes that depend on them, Python numbers made
    tensors, which travel to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if name in ("index", "index_put_") else []
        if name in WAITS or masks:
            self.found.append(name)
        return func(*args, **kwargs or {})


def run_of(method: str, mode: str = "eager graph", **changes) -> train.Run:
    config = experiments.run(method, "digits", "smoke", **{"augment": "simsiam_cifar", **changes})
    run = train.Run(config, data.by_fingerprint(config.data), CPU)
    run.set_mode(mode)
    return run


@pytest.mark.parametrize("method", GRAPHED)
def test_a_step_asks_the_device_for_nothing(method):
    run = run_of(method)
    drawn = run.draw(0)
    run.advance(drawn, *run.bounds[0])  # makes the tensors that stay
    with Waits() as waits:
        run._next()
    assert waits.found == []


def test_the_check_sees_what_it_looks_for():
    x = torch.arange(4.0)
    for wait in (lambda: x.sum().item(), lambda: x[x > 1], lambda: (x > 1).nonzero(), lambda: torch.tensor(1.0),
                 lambda: bool(x.any())):  # fmt: skip
        with Waits() as waits:
            wait()
        assert waits.found


@pytest.mark.parametrize("method", GRAPHED)
def test_the_counted_step_is_the_plain_step(method):
    """Two epochs, batches and rates read by a counter on the device: the plain loop's weights, statistics and sums. The rate
    is a float32 there, a double here, and this is all that differs."""
    ends = []
    for mode in ("eager", "eager graph"):
        run = run_of(method, mode, warmup=0.1) if method != "supervised" else run_of(method, mode, labels=0.5)
        for epoch in range(2):
            drawn = run.draw(epoch)
            for a, b in run.bounds:
                run.advance(drawn, a, b)
        ends.append(run.state())
    plain, counted = ends
    assert plain.keys() == counted.keys()
    for name, value in plain.items():
        torch.testing.assert_close(counted[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_a_run_stopped_within_an_epoch_goes_on_at_its_place(tmp_path):
    """The counter is set where the epoch's tensors are: after a checkpoint it starts in the middle."""
    whole, first = run_of("sidae"), run_of("sidae")
    drawn = whole.draw(0)
    for a, b in whole.bounds:
        whole.advance(drawn, a, b)
    for a, b in first.bounds[:2]:
        first.advance(first.draw(0), a, b)
    first.save(tmp_path / "checkpoint.safetensors")
    second = run_of("sidae")
    second.restore(tmp_path / "checkpoint.safetensors")
    for a, b in second.bounds[2:]:
        second.advance(drawn, a, b)
    for name, value in whole.state().items():
        assert torch.equal(second.state()[name], value), name


class Stub:
    """Stands in for a stream: there is no GPU here, and a step that fails to be captured must be taken all the same."""

    def wait_stream(self, other) -> None: ...


def test_a_step_that_cannot_be_captured_is_taken_all_the_same(monkeypatch):
    from contextlib import nullcontext

    def refuse(graph):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    calls, launch = [], step.Captured(lambda: calls.append(1), CPU)
    launch.aside = Stub()
    monkeypatch.setattr(torch.cuda, "current_stream", Stub)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    with pytest.warns(UserWarning, match="No CUDA graph of the step .operation not permitted"):
        for _ in range(5):
            launch()
    assert len(calls) == 5 and launch.failed
    with warnings.catch_warnings(action="error"):  # said once
        launch()
    assert len(calls) == 6
