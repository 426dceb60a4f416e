"""One run on several processes or GPUs: ``torchrun --nproc_per_node N -m frlkit train ...``.

The attacks, ten or more parts in eleven of the work, are shared out image by image; the training step that follows is
done by every process on the whole batch. So weights, batch statistics and gradients are those of one process, for every
loss, whatever N. Without torchrun all of this does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
_alone = False  # this process works while the others wait for it


def start(device: torch.device) -> torch.device:
    """Join the processes that torchrun started, if it did; returns this process's device."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def stop() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def shared() -> bool:
    """Whether there are other processes to share work with."""
    return dist.is_initialized() and not _alone


def is_main() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return not dist.is_initialized() or dist.get_rank() == 0


def from_main(make: Callable[[], T]) -> T:
    """What `make` returns in the main process, which works alone meanwhile, in all of them; an exception there is
    raised in all of them."""
    global _alone
    if not shared():
        return make()
    box: list[object] = [None, None]
    if is_main():
        _alone = True
        try:
            box[0] = make()
        except Exception as error:
            box[1] = error
        finally:
            _alone = False
    dist.broadcast_object_list(box)
    if isinstance(box[1], Exception):
        raise box[1]
    return box[0]  # type: ignore[return-value]


def share_out(compute: Callable[[slice], Tensor], like: Tensor) -> Tensor:
    """`compute` of all rows of a batch, each process doing its own part; the result has the shape of `like`."""
    if not shared():
        return compute(slice(None))
    rank, count = dist.get_rank(), dist.get_world_size()
    mine = slice(len(like) * rank // count, len(like) * (rank + 1) // count)
    result = torch.zeros_like(like)
    if mine.start < mine.stop:
        result[mine] = compute(mine)
    dist.all_reduce(result)  # the others' rows are zero here, so nothing is rounded
    return result


def average_gradients(model: nn.Module) -> None:
    """Keep the processes' weights together where the same computation rounds differently, as on GPUs."""
    if shared():
        for parameter in model.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
