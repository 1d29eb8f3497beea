"""CUDA graphs on a CPU, which run the captured function at each replay; and call orders that are hard for graphs.

As on a GPU, graphs of a module share input and output buffers. They also share the autograd graph of the last forward
pass, which a backward pass consumes. A backward pass at a wrong time fails or gives wrong results.
"""

from types import SimpleNamespace

import torch
from torch import nn

from recurrent_bart.execution import cuda_graphs


class PlayedGraph:
    """Graph that runs the captured function again and copies the results to the captured outputs."""

    def __init__(self, work):
        self.work, self.found = work, work()

    def replay(self):
        again = self.work()
        found, again = ([given] if torch.is_tensor(given) else given or [] for given in (self.found, again))
        for old, new in zip(found, again, strict=True):
            if old is not None:
                with torch.no_grad():
                    old.copy_(new)


class PlayedGenerator:
    """Generators of any device: the CPU's generator, whose offsets are indices of saved states."""

    def __init__(self):
        self.states = []

    def __getitem__(self, index):
        return self

    def get_offset(self):
        self.states.append(torch.get_rng_state())
        return len(self.states) - 1

    def set_offset(self, offset):
        torch.set_rng_state(self.states[offset])


def play_graphs(monkeypatch, *modules):
    """Have modules capture played graphs; return the growing list of graphs."""
    made = []

    def capture(work, stream, pool=None):
        made.append(PlayedGraph(work))
        return made[-1].found, made[-1]

    def warm_up(works, stream):
        for work in works:
            work()

    for module in modules:
        monkeypatch.setattr(module, "warm_up_and_capture", capture, raising=False)
        monkeypatch.setattr(module, "capture", capture, raising=False)
        monkeypatch.setattr(module, "warm_up", warm_up, raising=False)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    memory = SimpleNamespace(total_memory=2**34)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: memory)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "default_generators", PlayedGenerator())
    return made


# forward (f) and backward (b) passes of `call_in_order`, and the number of replayed graphs
ORDERS = {
    "as usual": ("f0 b0 f1 b1 f2 b2", 6),
    "another shape in between": ("f0 f1 b0 b1", 6),
    "the same shape in between": ("f0 f2 b0 b2", 6),
    "the last call first": ("f0 f1 f2 b2 b1 b0", 8),
    "a call after one that is computed again": ("f0 f1 b0 f2 b2 b1", 8),
    "twice backwards": ("f0 b0 b0 f1 b0 b1", 9),
}


def call_plain(module, inputs):
    """Return the reference result of a captured call."""
    return module(inputs)


def call_graphed(module, inputs):
    """Return `module(inputs)` by replays."""
    return cuda_graphs.call_graphed(module, module, [inputs])


def call_in_order(call, order, device):
    """Return values and gradients of three calls of a small module with dropout; the first and the last have one shape.

    Args:
        call: `call_graphed` or `call_plain`.
        order: `f1` is the forward pass of the second call, `b1` its backward pass.
    """
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3)).to(device).double()
    # a parameter without a gradient
    module[0].unused = nn.Parameter(torch.zeros(2, dtype=torch.double, device=device))
    inputs = [torch.randn(n, 4, dtype=torch.double, device=device).requires_grad_() for n in (2, 5, 2)]
    out = {}
    for what, number in order.split():
        if what == "f":
            out[number] = call(module, inputs[int(number)])
        else:
            out[number].square().sum().backward(retain_graph=True)
    gradients = [part.grad for part in (*inputs, *module.parameters())]
    return [part.detach() for part in out.values()], gradients
