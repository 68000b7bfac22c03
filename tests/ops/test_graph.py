"""Steps repeated in place: on CUDA replayed from a graph, elsewhere run as they are."""

import contextlib

import pytest
import torch

from fastvae.ops import generation
from fastvae.ops.generation import BEAM, GREEDY, SAMPLE, Decoder, Search
from fastvae.ops.graph import StepGraph

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def fibonacci(device):
    a, b = torch.zeros(3, device=device), torch.ones(3, device=device)
    return StepGraph(lambda a, b: (b.clone(), a + b), (a, b)), (a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_repeats_in_place(device):
    graph, start = fibonacci(device)
    addresses = [t.data_ptr() for t in graph.state]
    graph.run(9)
    assert graph.state[0].tolist() == [34] * 3
    graph.run()
    assert graph.state[1].tolist() == [89] * 3
    assert [t.data_ptr() for t in graph.state] == addresses
    assert start[0].tolist() == [0] * 3, "the start is the caller's"
    assert graph.block == (10 if device == "cuda" else 1)


def test_order_of_events_on_a_gpu(monkeypatch):
    """The first step runs on the other stream, the second is recorded once, and every one but the first is a replay."""
    events, (graph, _) = [], fibonacci("cpu")

    class Stream:
        device = "cuda:0"

        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

    class CUDAGraph:
        def capture_begin(self, capture_error_mode):
            events.append("record")
            self.before = [t.clone() for t in graph.state]

        def capture_end(self):
            events.append("recorded")
            for t, before in zip(graph.state, self.before, strict=True):
                t.copy_(before)  # what is recorded does not run

        def replay(self):
            events.append("replay")
            graph._advance()

    current, graph._stream = Stream("current"), Stream("other")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext(events.append(f"on {stream.name}")))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
    graph.run(4)
    graph.run()
    assert graph.state[0].tolist() == [5] * 3
    first = ["other waits for current", "on other", "current waits for other"]
    assert events == [*first, "on other", "record", "recorded", *["replay"] * 4]


def test_a_step_of_another_length_is_refused():
    with pytest.raises(ValueError, match="zip"):
        StepGraph(lambda a, b: (a,), (torch.zeros(1), torch.zeros(1))).run()


def decoder(device, vocabulary=50, embed=5, hidden=7, layers=2, batch=6):
    torch.manual_seed(0)
    shapes = [(vocabulary, embed), (4 * hidden, embed), (layers, 4 * hidden, hidden), (layers - 1, 4 * hidden, hidden),
              (layers - 1, 4 * hidden), (batch, 4 * hidden), (layers, batch, hidden), (layers, batch, hidden),
              (vocabulary, hidden), (vocabulary,)]  # fmt: skip
    return Decoder(*(torch.randn(shape, dtype=torch.float64).to(device) for shape in shapes))


SEARCHES = {
    "greedy": Search(2, 3, 0, 23, GREEDY, True),
    "greedy, no bigram twice": Search(2, 3, 0, 23, GREEDY, False, no_repeat_ngram=2),
    "sample": Search(2, 3, 0, 23, SAMPLE, True),
    "top k, top p": Search(2, 3, 0, 23, SAMPLE, True, 0.7, 20, 0.9),
    "beam": Search(2, 3, 0, 23, BEAM, True, 1.0, 0, 1.0, 4, 0.7, 3, 3),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_a_step_of_generation_looks_at_no_value(name, monkeypatch):
    """On meta tensors, which have none, item() and shapes that depend on values raise."""
    stepped = []

    def run(graph, most):
        graph.run(2)
        stepped.extend(graph.state)
        raise InterruptedError

    monkeypatch.setattr(generation, "_run", run)
    prefix, seeds = (
        torch.empty(6, 4, dtype=torch.int64, device="meta"),
        torch.empty(6, dtype=torch.int64, device="meta"),
    )
    with pytest.raises(InterruptedError):
        generation.write(generation.recurrence(decoder("meta")), prefix, seeds, SEARCHES[name])
    assert stepped
    assert {t.device.type for t in stepped} == {"meta"}


@pytest.mark.parametrize("name", SEARCHES)
def test_steps_after_the_end_change_nothing(name, monkeypatch):
    """As on CUDA, where the host looks only every 10 steps."""
    prefix, seeds = torch.full((6, 2), -1), torch.arange(6)
    operands = decoder("cpu")
    operands.output_bias[3] += 4  # so that sentences end early
    expected = generation.reference(*operands, prefix, seeds, *SEARCHES[name])
    assert (expected[1] < 23).any()
    monkeypatch.setattr(generation, "_run", lambda graph, most: graph.run(most))
    for mine, theirs in zip(generation.reference(*operands, prefix, seeds, *SEARCHES[name]), expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SEARCHES)
def test_generation_on_a_gpu_as_on_the_cpu(name):
    prefix, seeds = torch.full((6, 2), -1), torch.arange(6)
    prefix[0, 0] = 7
    expected = generation.reference(*decoder("cpu"), prefix, seeds, *SEARCHES[name])
    ours = generation.generate(*decoder("cuda"), prefix.cuda(), seeds.cuda(), *SEARCHES[name])
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-9, atol=1e-9)
    streamed = generation.recurrence(decoder("cuda")), prefix.cuda(), seeds.cuda(), SEARCHES[name]
    if name != "beam":
        words = torch.stack([*generation.steps(*streamed)], 1).cpu()
        assert torch.equal(words, expected[0][:, 0, : words.shape[1]])
