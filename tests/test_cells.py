"""The portable path against plain convolutions in double precision, and the algebra it is made of."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from frlkit import kernels, models
from frlkit.kernels import cells
from frlkit.kernels.cells import spread
from frlkit.models import LeNet5


def lenet(classes: int = 10, dtype: torch.dtype = torch.float64) -> LeNet5:
    return models.build("lenet5", classes, seed=1).to(dtype)


def stages(model: LeNet5, x: Tensor) -> Tensor:
    x = F.avg_pool2d(F.conv2d(x, model.conv1.weight, model.conv1.bias).tanh(), 2)
    return F.avg_pool2d(F.conv2d(x, model.conv2.weight, model.conv2.bias).tanh(), 2).flatten(1)


def logits(model: LeNet5, x: Tensor) -> Tensor:
    x = F.conv2d(stages(model, x).view(-1, 16, 5, 5), model.conv3.weight, model.conv3.bias).tanh().flatten(1)
    return F.linear(F.linear(x, model.fc1.weight, model.fc1.bias).tanh(), model.fc2.weight, model.fc2.bias)


def noise(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("out", "channels", "side", "size"), [(6, 1, 4, 32), (16, 6, 2, 14), (3, 2, 4, 12)])
def test_spread_is_the_convolution_at_every_offset(out: int, channels: int, side: int, size: int) -> None:
    """Cut back into pixels, what the spread filters give on cells is the 5x5 convolution with stride 1."""
    weight, x = noise(out, channels, 5, 5), noise(2, channels, size, size)
    cells_of_x = x.view(2, channels, size // side, side, size // side, side)
    found = F.conv2d(
        cells_of_x.permute(0, 3, 5, 1, 2, 4).reshape(2, -1, size // side, size // side), spread(weight, side)
    )
    pooled, places = side // 2, found.shape[-1]
    found = found.view(2, 2, 2, pooled, pooled, out, places, places).permute(0, 5, 6, 3, 1, 7, 4, 2)
    torch.testing.assert_close(found.reshape(2, out, size - 4, size - 4), F.conv2d(x, weight), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [0, 1, 7, 300])
def test_features_and_their_gradients(count: int) -> None:
    model, images, pull = lenet(), noise(count, 1, 32, 32).requires_grad_(), noise(count, 400)
    parameters = [images, *model.conv1.parameters(), *model.conv2.parameters()]
    ours, theirs = cells.features(model, images), stages(model, images)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for mine, reference in zip(
        torch.autograd.grad((ours * pull).sum(), parameters),
        torch.autograd.grad((theirs * pull).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("classes", [10, 3])
def test_logits_and_their_gradients_in_weights_and_images(classes: int) -> None:
    model, images, pull = lenet(classes), noise(7, 1, 32, 32).requires_grad_(), noise(7, classes)
    parameters = [images, *model.parameters()]
    ours, theirs = cells.forward(model, images), logits(model, images)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(images), theirs, rtol=1e-12, atol=1e-12)
    for mine, reference in zip(
        torch.autograd.grad((ours * pull).sum(), parameters),
        torch.autograd.grad((theirs * pull).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("count", "classes"), [(0, 10), (1, 10), (9, 10), (5, 3), (5, 43)])
def test_gradient_of_the_images(count: int, classes: int) -> None:
    model, images, pull = lenet(classes), noise(count, 1, 32, 32), noise(count, classes)
    images.requires_grad_()
    (expected,) = torch.autograd.grad((logits(model, images) * pull).sum(), images)
    with torch.no_grad():
        network = cells.Network(model)
        found = network.forward(cells.into_cells(images))
        torch.testing.assert_close(found, logits(model, images), rtol=1e-11, atol=1e-12)
        gradient = cells.into_images(network.backward(pull))
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("loss", ["ce", "margin", "kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pgd_equals_a_loop_written_out(loss: str, dtype: torch.dtype) -> None:
    model, steps = lenet(dtype=dtype), 5
    count = 30 if dtype == torch.float32 else 150  # more than a group, where rounding turns no sign
    clean, labels = noise(count, 1, 32, 32).to(dtype), torch.arange(count) % 10
    eps = torch.linspace(0, 0.1, count, dtype=dtype)
    step_size, ball = eps / 3, eps.view(-1, 1, 1, 1)
    start = (clean + ball * (2 * noise(count, 1, 32, 32).to(dtype) - 1)).clamp(0, 1)
    targets = logits(model, clean).softmax(1).detach() if loss == "kl" else labels
    x = start
    for _ in range(steps):
        x = x.detach().requires_grad_()
        z = logits(model, x)
        if loss == "ce":
            total = F.cross_entropy(z, labels, reduction="sum")
        elif loss == "kl":
            total = F.kl_div(z.log_softmax(1), targets, reduction="sum")
        else:
            own = z.gather(1, labels[:, None])[:, 0]
            total = (z.scatter(1, labels[:, None], -torch.inf).amax(1) - own).sum()
        (gradient,) = torch.autograd.grad(total, x)
        x = x + step_size.view(-1, 1, 1, 1) * gradient.sign()
        x = torch.minimum(torch.maximum(x, clean - ball), clean + ball).clamp(0, 1)
    found = cells.pgd(model, clean, start, targets, eps, step_size, steps, loss)
    differing = ((found - x).abs() > 1e-6).double().mean().item()
    assert differing <= (1e-3 if dtype == torch.float32 else 0)
    assert torch.equal(found[0], clean[0])  # radius 0
    assert torch.equal(found, cells.pgd(model, clean, start, targets, eps, step_size, steps, loss))


def test_cells_are_pixel_unshuffle() -> None:
    images = noise(3, 1, 32, 32)
    assert torch.equal(cells.into_cells(images), F.pixel_unshuffle(images, cells.SIDE))
    assert torch.equal(cells.into_images(cells.into_cells(images)), images)


def test_no_images_no_result() -> None:
    model, none = lenet(3), noise(0, 1, 32, 32)
    labels, radii = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
    assert cells.pgd(model, none, none, labels, radii, radii, 2, "ce").shape == none.shape
    assert cells.forward(model, none).shape == model(none).shape == (0, 3)


def test_first_use_without_gradients_later_use_with() -> None:
    cells._placements.cache_clear()
    with torch.inference_mode():
        cells.features(lenet(), noise(2, 1, 32, 32))
    cells.features(model := lenet(), noise(2, 1, 32, 32)).sum().backward()
    assert model.conv1.weight.grad.abs().sum() > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_agrees_with_cpu() -> None:
    model, images, labels = lenet(), noise(200, 1, 32, 32), torch.arange(200) % 10
    eps = torch.full((200,), 0.1, dtype=torch.float64)
    moved = [tensor.cuda() for tensor in (images, images, labels, eps, eps / 4)]
    expected = cells.pgd(model, images, images, labels, eps, eps / 4, 5, "ce")
    torch.testing.assert_close(cells.pgd(model.cuda(), *moved, 5, "ce").cpu(), expected)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")
def test_memory_of_a_batch_is_not_handed_back_and_taken_again() -> None:
    """In a process of its own: what was freed before decides what malloc keeps."""
    code = """
import resource, torch
from frlkit import attacks, models
model = models.build("lenet5", seed=0)
images, labels = torch.rand(128, 1, 32, 32), torch.arange(128) % 10
attacks.pgd(model, images, labels, 0.1, 0.01, 10)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
attacks.pgd(model, images, labels, 0.1, 0.01, 10)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    environment["FRLKIT_KERNEL"] = "off"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert int(done.stdout) < 5000  # page faults; 18,500 without the block that `cells` frees, some hundred with it


def test_which_path_serves_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRLKIT_KERNEL", "off")
    model = lenet(dtype=torch.float32)
    assert kernels.fast(model) is cells
    assert kernels.describe(model) == "portable"
    assert kernels.fast(lenet(3)) is cells
    model.conv1 = torch.nn.Conv2d(1, 6, 5, padding="valid", bias=False)
    assert kernels.fast(model) is None
    assert kernels.fast(torch.nn.Linear(2, 2)) is None
