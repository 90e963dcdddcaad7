"""Fast paths against the plain one: no further from it than the plain run is from itself after a 1e-7 nudge."""

import contextvars

import pytest
import torch

from sidae_lib import data, experiments, train
from sidae_lib.step import compile_mode, compiled

STEPS = 20


@pytest.fixture(scope="module")
def config():
    return experiments.run("sidae", "digits", "smoke", pool=0, epochs=1)  # a small network compiles in seconds


def trajectory(config, mode: str, nudge: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses (20,) and all weights (P,) of 20 steps; nudge: added to the mean that every input is centred by."""
    run = train.Run(config, data.by_fingerprint(config.data), torch.device("cpu"))
    run.mean += nudge
    run.set_mode(mode)
    losses, drawn = [], run.draw(0)
    for a, b in run.bounds[:STEPS]:
        run.advance(drawn, a, b)
        losses.append(run.sums["loss"].item() / (b - a))
        run.sums["loss"].zero_()
    return torch.tensor(losses), torch.cat([p.detach().flatten() for p in run.method.parameters()])


@pytest.fixture(scope="module")
def plain(config):
    """As it is, and nudged three times."""
    return trajectory(config, "eager"), [trajectory(config, "eager", n) for n in (1e-7, -1e-7, 2e-7)]


@pytest.mark.parametrize("mode", ["views", pytest.param("step", marks=pytest.mark.slow)])
def test_compiled_equals_plain(config, plain, mode):
    (losses, weights), nudged = plain
    fast_losses, fast_weights = trajectory(config, mode)
    assert (fast_losses - losses).norm() <= 2 * max((n - losses).norm() for n, _ in nudged)
    assert (fast_weights - weights).norm() <= 2 * max((n - weights).norm() for _, n in nudged)
    assert losses[-1] < losses[0]  # and the run is one that learns


def test_one_compilation_serves_a_grid(config):
    """Another seed, w and learning rate meet the views compiled for the first."""
    trajectory(config, "views")
    once = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    trajectory(config.replace(seed=1, w=0.9, lr=0.01), "views")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == once


def test_mode_is_a_function_of_length_and_device():
    assert compile_mode(torch.device("cpu"), 8) == "eager"  # too short to repay the compiler's seconds
    assert compile_mode(torch.device("cuda"), 10_000) == "views graph"
    assert compile_mode(torch.device("cuda"), 100) == "eager"


def test_a_process_compiles_for_as_many_shapes_as_its_grid_has(config):
    """torch's own limit is eight, and with whole graphs the ninth is an error. A worker's tasks have a context each, and
    what was compiled in one is called in the next."""
    made = []

    def task(sizes: range) -> None:
        train.Run(config, data.by_fingerprint(config.data), torch.device("cpu"))
        made.extend([] if made else [compiled(lambda x: x + 1)])
        for n in sizes:
            assert (made[0](torch.zeros(n)) == 1).all()

    for sizes in (range(2, 8), range(8, 14)):
        contextvars.Context().run(task, sizes)
