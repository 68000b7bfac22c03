"""Steps repeated over tensors of fixed shapes: on CUDA captured as a graph once, then replayed without Python."""

import threading
from collections.abc import Callable

import torch
from torch import Tensor

_streams = threading.local()


class StepGraph:
    """Repeats ``state = step(*state)``, in place.

    On CUDA the first step runs as it is, which compiles and allocates what it needs, the second is captured, and from
    then on a step is one launch. Elsewhere every step runs as it is.

    Args:
        step: from the state's tensors to as many new ones, of the same shapes, which share no memory with them. It must
            not look at values: neither ``item()`` nor shapes that depend on them.
        state: the start, which is copied; at least one tensor.

    Attributes:
        state: the tensors as they stand; the same memory throughout.
        block: steps to run before the host looks at the state again: on CUDA each look empties the queue.
    """

    def __init__(self, step: Callable[..., tuple[Tensor, ...]], state: tuple[Tensor, ...]) -> None:
        self.state = tuple(t.clone(memory_format=torch.contiguous_format) for t in state)
        self._step = step
        device = self.state[0].device
        self._stream = _stream_of(device) if device.type == "cuda" else None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = False
        self.block = 1 if self._stream is None else 10

    def run(self, count: int = 1) -> None:
        """Make `count` steps."""
        for _ in range(count):
            if self._stream is None:
                self._advance()
            elif not self._warm:
                self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
                with torch.cuda.stream(self._stream):
                    self._advance()
                torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
                self._warm = True
            else:
                if self._graph is None:
                    self._graph = self._captured(self._stream)
                self._graph.replay()

    def _advance(self) -> None:
        for old, new in zip(self.state, self._step(*self.state), strict=True):
            old.copy_(new)

    def _captured(self, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        # As torch.cuda.graph does, which besides waits for the device and gives all cached memory back.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._advance()  # recorded, not run
            finally:
                graph.capture_end()
        return graph


def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """Return this thread's stream for captures, which must not be on the default stream.

    One for all: each stream keeps memory of its own, that of the matrix products' workspaces among it.
    """
    if not hasattr(_streams, "of"):
        _streams.of = {}
    if device not in _streams.of:
        _streams.of[device] = torch.cuda.Stream(device)
    stream: torch.cuda.Stream = _streams.of[device]
    return stream
