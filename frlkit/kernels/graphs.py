"""Attack steps of the kit's colour networks on a GPU, recorded once as a CUDA graph and replayed.

A step is some hundred small kernels, and launching them from Python takes several times as long as their work: ten
steps at 128 images 66 and 16 ms for the quarter of PreAct-ResNet-18, 23 and 6 ms for four convolutions (eager and
replayed, one H200, TensorFloat-32). A graph reads the weights where they lie, and training changes them there, so that
one graph a network and shape of batch serves a whole run. No pixel differed by more than 1e-6 from eager steps (ten of
them, weights changed in between; elsewhere cuDNN is free to sum in another order).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from frlkit.kernels.colour import as_built

MOST = 256  # images: larger batches keep a GPU busy, and evaluation has them in many shapes
KEPT = 4  # graphs: a run has batches of one shape and their rest, and perhaps a second loss

Step = Callable[..., Tensor]  # of the adversarial images and what else the step takes: the next adversarial images

_recorded: dict[tuple[object, ...], tuple[list[Tensor], list[Tensor], torch.cuda.CUDAGraph]] = {}


def serves(model: nn.Module, images: Tensor) -> bool:
    """Whether steps on these images can be replayed: a GPU, a small batch, the kit's own code throughout."""
    return images.is_cuda and len(images) <= MOST and as_built(model)


def repeat(step: Step, model: nn.Module, inputs: Sequence[Tensor], steps: int, kind: str) -> Tensor:
    """The images after so many steps, `inputs` being those of the first and what stays the same: as
    ``for _ in range(steps): images = step(images, *others)``. `kind` tells apart steps that differ in more than their
    inputs. The newest `KEPT` graphs stay, with the memory that they need, as long as their networks do.
    """
    weights = [*model.parameters(), *model.buffers()]
    formats = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.is_autocast_enabled("cuda")
    shapes = tuple((value.shape, value.dtype) for value in inputs)
    key = (type(model), kind, formats, shapes, tuple(value.data_ptr() for value in weights))
    if key not in _recorded:
        while len(_recorded) >= KEPT:
            del _recorded[next(iter(_recorded))]
        own, kept = [value.clone() for value in inputs], [value.detach() for value in weights]
        _recorded[key] = kept, own, _record(step, own)  # the weights too: nothing else may come to lie there
        weakref.finalize(model, _recorded.pop, key, None)
    _, own, graph = _recorded[key]
    for place, new in zip(own, inputs, strict=True):
        place.copy_(new)
    for _ in range(steps):
        graph.replay()
    return own[0].clone()


def _record(step: Step, own: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
    """A step that takes its images from the first of these tensors, and leaves the next ones there."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(own[0].device):
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(2):  # libraries are loaded, and choose, in steps that nobody records
                step(*own)
        with torch.cuda.graph(graph, stream=side):  # which ends the recording, come what may
            own[0].copy_(step(*own))
        here.wait_stream(side)
    return graph
