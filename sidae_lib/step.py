"""One launch for many: a step whose tensors stay where they are becomes a CUDA graph."""

import warnings
from collections.abc import Callable

import torch


class Captured:
    """Calls a function without arguments; on a GPU its kernels are captured once and replayed by a single launch.

    The function reads and writes tensors that stay where they are, and asks no value of the device. Its first calls on a GPU
    run as they are, since libraries choose kernels and make workspaces then. Where it cannot be captured one warning says
    why, `failed` is set, and every call runs as it is: nothing is lost. On a CPU it is always called as it is.
    """

    WARM = 3

    def __init__(self, function: Callable[[], None], device: torch.device) -> None:
        self.function, self.calls, self.failed = function, 0, False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.aside = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self) -> None:
        self.calls += 1
        if self.aside is None or self.failed:
            self.function()
        elif self.calls <= self.WARM:  # on a stream of its own: what the first calls leave behind may not belong to another
            here = torch.cuda.current_stream()
            self.aside.wait_stream(here)
            with torch.cuda.stream(self.aside):
                self.function()
            here.wait_stream(self.aside)
        elif self.graph is None and not self._capture():
            self.function()
        else:
            self.graph.replay()

    def _capture(self) -> bool:
        """Whether the function's kernels are in a graph now; capturing runs none of them."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.function()
        except RuntimeError as e:
            self.failed = True
            warnings.warn(f"No CUDA graph of the step ({str(e).splitlines()[0]}); its kernels are launched one by one.",
                          stacklevel=2)  # fmt: skip
            return False
        self.graph = graph
        return True
