"""The native LeNet-5 against plain PyTorch, and every way in which it must step aside."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from frlkit import KitError, attacks, kernels, models
from frlkit.kernels import build, cells, native

PROJECT = Path(__file__).resolve().parents[1]


def why_not() -> str:
    """Why this machine cannot build the native path; empty where it can (and so must)."""
    if torch.backends.cpu.get_cpu_capability() not in build.TARGETS:
        return "no native path: this processor has no AVX2"
    if not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")):
        return "no native path: there is no C++ compiler"
    return ""


needs_native = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")


@pytest.fixture(autouse=True)
def automatic(monkeypatch):
    monkeypatch.setenv("FRLKIT_KERNEL", "auto")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a new process with an empty cache; what the test did to the module is undone."""
    monkeypatch.setattr(native, "_asked", False)
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "frlkit"


@pytest.fixture
def model() -> models.LeNet5:
    model = models.build("lenet5", seed=1)
    with torch.no_grad():  # larger weights than at birth: gradients that differ from pixel to pixel
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


def stages(parameters: list[Tensor], images: Tensor) -> Tensor:
    w1, b1, w2, b2 = parameters[:4]
    x = F.avg_pool2d(F.conv2d(images, w1, b1).tanh(), 2)
    return F.avg_pool2d(F.conv2d(x, w2, b2).tanh(), 2).flatten(1)


def logits(parameters: list[Tensor], images: Tensor) -> Tensor:
    w3, b3, w4, b4, w5, b5 = parameters[4:]
    x = F.linear(stages(parameters, images), w3.flatten(1), b3).tanh()
    return F.linear(F.linear(x, w4, b4).tanh(), w5, b5)


def loss_of(z: Tensor, targets: Tensor, loss: str) -> Tensor:
    if loss == "ce":
        return F.cross_entropy(z, targets, reduction="sum")
    if loss == "kl":
        return F.kl_div(z.log_softmax(1), targets, reduction="sum")
    own = F.one_hot(targets, 10).bool()
    return (z.masked_fill(own, -torch.inf).amax(1) - z[own]).sum()


def oracle(model, images, start, targets, eps, step_size, steps, loss) -> Tensor:
    parameters, x = [p.detach() for p in model.parameters()], start
    eps, step_size = eps[:, None, None, None], step_size[:, None, None, None]
    for _ in range(steps):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(logits(parameters, x), targets, loss), x)
        x = (x.detach() + step_size * gradient.sign()).clamp(images - eps, images + eps).clamp(0, 1)
    return x.detach()


def batch(count: int, loss: str = "ce") -> dict:
    """Images, a random start in the ball, targets, and a radius and step for each image."""
    generator = torch.Generator().manual_seed(count)
    images = torch.rand(count, 1, 32, 32, generator=generator)
    eps = torch.linspace(0.02, 0.3, count)
    noise = torch.rand(count, 1, 32, 32, generator=generator) * 2 - 1
    targets = torch.randint(10, (count,), generator=generator)
    if loss == "kl":
        targets = torch.randn(count, 10, generator=generator).softmax(1)
    start = (images + eps[:, None, None, None] * noise).clamp(0, 1)
    start = torch.minimum(torch.maximum(start, images - eps[:, None, None, None]), images + eps[:, None, None, None])
    inputs = {"images": images, "start": start, "targets": targets, "eps": eps, "step_size": eps / 4}
    return {**inputs, "steps": 5, "loss": loss}


# ---- What it computes ------------------------------------------------------------------------------------------------


@needs_native
def test_the_native_path_is_there_where_it_can_be(model):
    assert kernels.available(model)
    assert kernels.describe(model) == "native"


# The sign of a gradient near 0 hangs on the last bit, so a few pixels may differ: in KL, whose gradient is a difference
# of near equals, more of them.
@needs_native
@pytest.mark.parametrize(("loss", "allowed"), [("ce", 1e-4), ("margin", 1e-4), ("kl", 5e-3)])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 17, 100])
def test_pgd_is_plain_pytorchs(model, loss, allowed, count):
    inputs = batch(count, loss)
    result = native.pgd(model, **inputs)
    assert (result.shape, result.dtype, result.requires_grad) == (inputs["images"].shape, torch.float32, False)
    differing = ((result - oracle(model, **inputs)).abs() > 1e-6).float().mean().item()
    assert differing <= allowed
    eps = inputs["eps"][:, None, None, None]
    assert ((result >= inputs["images"] - eps) & (result <= inputs["images"] + eps)).all()
    assert result.min() >= 0
    assert result.max() <= 1
    assert (result != inputs["start"]).any()


@needs_native
def test_no_radius_no_steps_and_no_images_change_nothing(model):
    inputs = batch(9)
    still = {**inputs, "eps": torch.zeros(9), "start": inputs["images"]}
    assert torch.equal(native.pgd(model, **still), inputs["images"])
    assert torch.equal(native.pgd(model, **{**inputs, "steps": 0}), inputs["start"])
    assert native.pgd(model, **batch(0)).shape == (0, 1, 32, 32)
    assert native.features(model, torch.zeros(0, 1, 32, 32)).shape == (0, 400)


@needs_native
def test_a_zero_gradient_moves_nothing(model):
    nn.init.zeros_(model.fc2.weight)
    inputs = batch(9)
    assert torch.equal(native.pgd(model, **inputs), inputs["start"])


@needs_native
def test_the_first_of_equal_rivals_is_pushed(model):
    """A black image through a network without biases: every logit is exactly 0, and the gradients are not."""
    with torch.no_grad():
        for layer in model.children():
            layer.bias.zero_()
    black, labels, step = torch.zeros(10, 1, 32, 32), torch.arange(10), torch.full((10,), 0.1)
    x = black.clone().requires_grad_()
    z = logits([p.detach() for p in model.parameters()], x)
    first = torch.where(labels == 0, 1, 0)
    (gradient,) = torch.autograd.grad((z.gather(1, first[:, None]) - z.gather(1, labels[:, None])).sum(), x)
    moved = native.pgd(model, black, black, labels, step, step, 1, "margin")
    clear = gradient.abs() > 1e-4 * gradient.abs().max()
    assert torch.equal((moved > 0)[clear], (gradient > 0)[clear])


@needs_native
@pytest.mark.parametrize("count", [1, 9, 100])
def test_features_and_their_gradients_are_plain_pytorchs(model, count):
    images = batch(count)["images"]
    weights = torch.randn(count, 400, generator=torch.Generator().manual_seed(2))
    exact = [p.detach().double().requires_grad_() for p in model.parameters()]
    expected = stages(exact, images.double())
    result = native.features(model, images)
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad((result * weights).sum(), [*model.conv1.parameters(), *model.conv2.parameters()])
    for ours, theirs in zip(gradients, torch.autograd.grad((expected * weights).sum(), exact[:4]), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@needs_native
def test_training_through_the_fast_paths_gives_every_parameter_its_gradient(model, monkeypatch):
    images, labels = batch(20)["images"], batch(20)["targets"]
    gradients = {}
    for setting in ("auto", "off"):
        monkeypatch.setenv("FRLKIT_KERNEL", setting)
        assert kernels.fast(model) is (native if setting == "auto" else cells)
        gradients[setting] = torch.autograd.grad(
            F.cross_entropy(attacks.logits(model, images), labels), list(model.parameters())
        )
    gradients["plain"] = torch.autograd.grad(F.cross_entropy(model(images), labels), list(model.parameters()))
    for fast, portable in zip((*gradients["auto"], *gradients["off"]), 2 * gradients["plain"], strict=True):
        torch.testing.assert_close(fast, portable, rtol=1e-3, atol=1e-5 * float(portable.abs().max()) + 1e-8)


@needs_native
def test_nan_weights_show(model):
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] = torch.nan
    assert native.features(model, batch(3)["images"]).isnan().any()


@needs_native
def test_repeats_and_threads_change_no_bit(model):
    images, seen = batch(100)["images"], []
    threads = torch.get_num_threads()
    try:
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            features = native.features(model, images)
            features.square().sum().backward()
            gradients = [p.grad for p in (*model.conv1.parameters(), *model.conv2.parameters())]
            seen.append([native.pgd(model, **batch(100)), features.detach(), *gradients])
            model.zero_grad(set_to_none=True)
    finally:
        torch.set_num_threads(threads)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@needs_native
def test_an_image_does_not_depend_on_its_batch(model):
    inputs = batch(20)
    whole = native.pgd(model, **inputs)
    part = {name: value[13:] if isinstance(value, Tensor) else value for name, value in inputs.items()}
    assert torch.equal(native.pgd(model, **part), whole[13:])


# In the child, torch's own pool of threads is gone and would hang: hence comparisons too small for it, and an alarm.
@needs_native
def test_it_works_after_fork_beside_torchs_own_threads():
    code = """if True:
        import os, signal, sys, torch
        from frlkit import models
        from frlkit.kernels import native
        torch.set_num_threads(2)
        model, x, e = models.build("lenet5", seed=1), torch.rand(64, 1, 32, 32), torch.full((64,), 0.1)
        attack = lambda: native.pgd(model, x, x, torch.arange(64) % 10, e, e / 4, 2, "ce")
        torch.ones(500, 500) @ torch.ones(500, 500)
        before = attack()
        child = os.fork()
        if child == 0:
            signal.alarm(120)
            os._exit(0 if all(map(torch.equal, attack(), before)) else 3)
        sys.exit(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
    """
    command = [sys.executable, "-W", "ignore", "-c", code]
    assert subprocess.run(command, cwd=PROJECT, timeout=600).returncode == 0


# ---- What it refuses -------------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize(
    "change",
    [
        {"images": torch.rand(9, 3, 32, 32)},
        {"images": torch.rand(8, 1, 32, 32)},
        {"images": torch.tensor(0.5)},
        {"images": torch.rand(9, 1, 32, 32).double()},
        {"start": torch.rand(9, 1, 32, 32).half()},
        {"start": torch.rand(9, 1, 28, 28)},
        {"eps": torch.tensor(0.1)},
        {"eps": torch.zeros(9, dtype=torch.int64)},
        {"step_size": torch.rand(3)},
        {"targets": torch.zeros(8, dtype=torch.int64)},
        {"targets": torch.full((9,), 10)},
        {"targets": torch.full((9,), -1)},
        {"targets": torch.rand(9)},
        {"targets": torch.rand(9, 9), "loss": "kl"},
        {"targets": torch.rand(9, 10).double(), "loss": "kl"},
        {"steps": -1},
        {"steps": 1.5},
        {"steps": 2**40},
        {"loss": "mse"},
    ],
    ids=lambda change: "-".join(map(str, change)),
)
def test_pgd_refuses_what_does_not_fit(model, change):
    with pytest.raises(KitError):
        native.pgd(model, **{**batch(9), **change})


@needs_native
def test_images_that_ask_for_a_gradient_get_one(model):
    """The native logits have none in the images, so `fast` gives those of the portable path."""
    images = batch(5)["images"].requires_grad_()
    (ours,) = torch.autograd.grad(attacks.logits(model, images).square().sum(), images)
    (theirs,) = torch.autograd.grad(model(images).square().sum(), images)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))
    with pytest.raises(KitError, match="gradient"):
        native.forward(model, images)


@pytest.mark.parametrize("path", [native, cells])
@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 1, 28, 28), (1, 32, 32)])
def test_images_of_another_shape_are_refused_as_the_model_does(model, path, shape):
    for forward in (lambda x: path.forward(model, x), model):
        with pytest.raises(KitError, match="do not fit this network"):
            forward(torch.rand(shape))


@needs_native
def test_features_refuse_what_does_not_fit(model):
    right = torch.rand(3, 1, 32, 32)
    for images in (right[0], right[..., :28], right.double(), right.clone().requires_grad_()):
        with pytest.raises(KitError):
            native.features(model, images)


@needs_native
@pytest.mark.parametrize(
    "other", [models.LeNet5(4), models.LeNet5().double(), nn.Linear(2, 2)], ids=["4", "double", "-"]
)
def test_a_model_it_does_not_serve_is_refused_not_read_past_its_end(other):
    with pytest.raises(KitError, match="does not serve"):
        native.pgd(other, **batch(9))
    with pytest.raises(KitError, match="does not serve"):
        native.features(other, batch(9)["images"])


@needs_native
def test_backward_reads_the_weights_that_forward_read(model):
    """`functional_call` lends the model other weights for one forward pass."""

    class Fast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, images: Tensor) -> Tensor:
            return attacks.logits(self.inner, images)

    images, expected = batch(9)["images"], models.build("lenet5", seed=5)
    other = {f"inner.{name}": weight for name, weight in models.build("lenet5", seed=5).named_parameters()}
    lent = torch.func.functional_call(Fast(), other, (images,)).square().sum()
    own = native.forward(expected, images).square().sum()
    assert torch.equal(lent, own)
    lent.backward()
    own.backward()
    for name, parameter in expected.named_parameters():
        assert torch.equal(other[f"inner.{name}"].grad, parameter.grad)


@needs_native
def test_strided_input_is_read_as_torch_reads_it(model):
    inputs = batch(9)
    turned = {**inputs, "images": inputs["images"].mT.contiguous().mT, "eps": inputs["eps"].repeat_interleave(2)[::2]}
    assert not turned["images"].is_contiguous()
    assert torch.equal(native.pgd(model, **turned), native.pgd(model, **inputs))


class Impostor(nn.Module):
    """The layers of LeNet-5 and its name, and another way to use them."""

    def __init__(self) -> None:
        super().__init__()
        for name, layer in models.LeNet5().named_children():
            setattr(self, name, layer)


Impostor.__name__ = "LeNet5"


@needs_native
def test_other_models_keep_to_pytorch(model):
    assert kernels.available(model)
    for other in (models.LeNet5(4), models.LeNet5().double(), nn.Linear(2, 2), Impostor()):
        assert not kernels.available(other)
    model.fc1.weight = nn.Parameter(model.fc1.weight.detach().mT.contiguous().mT)
    assert not kernels.available(model)


@needs_native
def test_changed_layers_keep_to_pytorch():
    """Their effective weights are not in `layer.weight`, or their arithmetic is another."""
    normed, pruned, replaced, biasless = models.LeNet5(), models.LeNet5(), models.LeNet5(), models.LeNet5()
    nn.utils.parametrizations.weight_norm(normed.conv1)
    prune.l1_unstructured(pruned.conv2, "weight", 0.5)
    replaced.conv1 = nn.Sequential(replaced.conv1)
    biasless.conv1.bias = None
    smaller, padded = models.LeNet5(), models.LeNet5()
    smaller.conv1, padded.conv1 = nn.Conv2d(1, 6, 3), nn.Conv2d(1, 6, 5, padding=1)
    for other in (normed, pruned, replaced, biasless, smaller, padded):
        assert kernels.fast(other) is None
        assert not kernels.available(other)
        images = torch.rand(2, 1, 32, 32)
        x = F.avg_pool2d(other.conv1(images).tanh(), 2)
        x = F.avg_pool2d(other.conv2(x).tanh(), 2).flatten(1)
        x = F.linear(x, other.conv3.weight.flatten(1), other.conv3.bias).tanh()
        expected = other.fc2(other.fc1(x).tanh())
        torch.testing.assert_close(other(images), expected)


def test_hooks_are_called_by_attacks_too(model):
    """Such as a pre-hook that normalises the images: an attack must see it."""
    images, labels = torch.rand(4, 1, 32, 32), torch.arange(4)
    calls = []
    for module in (model, model.conv2):
        handle = module.register_forward_pre_hook(lambda *_: calls.append(1))
        attacks.pgd(model, images, labels, 0.1, 0.1, 3)
        handle.remove()
        assert len(calls) >= 4  # each step, and the check of the labels
        calls.clear()
    assert kernels.fast(model) is not None
    for register in ("register_forward_hook", "register_full_backward_hook", "register_full_backward_pre_hook"):
        handle = getattr(model.conv1, register)(lambda *_: None)
        assert kernels.fast(model) is None
        handle.remove()


def test_a_forward_of_its_own_is_called(model):
    model.forward = lambda x: x.flatten(1)[:, :10]
    assert kernels.fast(model) is None
    assert torch.equal(attacks.logits(model, torch.ones(2, 1, 32, 32)), torch.ones(2, 10))


def test_the_switch(model, monkeypatch):
    monkeypatch.setenv("FRLKIT_KERNEL", "off")
    assert not kernels.available(model)
    assert kernels.describe(model) == "portable"
    monkeypatch.setenv("FRLKIT_KERNEL", "fast")
    with pytest.raises(KitError, match="'fast'.*auto.*off"):
        kernels.available(model)


# ---- Building, and doing without -------------------------------------------------------------------------------------


def declines_once(model, match: str) -> None:
    with pytest.warns(UserWarning, match=match) as caught:
        assert not kernels.available(model)
        assert not kernels.available(model)
    assert len(caught) == 1
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 10)  # the portable path, without another warning


def test_without_a_compiler_one_warning_and_pytorch(fresh, model, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    declines_once(model, "portable")


@pytest.mark.parametrize("compiler", ["/bin/false", "/no/such/compiler", 'c++ "-O2'])
def test_with_a_broken_compiler_one_warning_and_pytorch(fresh, model, monkeypatch, compiler):
    monkeypatch.setenv("CXX", compiler)
    declines_once(model, "portable")


@needs_native
def test_source_that_does_not_compile_is_said(fresh, model, monkeypatch, tmp_path):
    source = tmp_path / "lenet5.cpp"
    source.write_text("this is no C++", encoding="utf-8")
    monkeypatch.setattr(build, "SOURCE", source)
    declines_once(model, "failed: .*error.*portable")
    assert not list(fresh.iterdir())


def wrong(name: str):
    """The library with one function that does nothing."""

    class Wrong:
        def __init__(self, library: ctypes.CDLL) -> None:
            self.library = library

        def __getattr__(self, attribute: str):
            return (lambda *_: None) if attribute == name else getattr(self.library, attribute)

    return Wrong


@needs_native
@pytest.mark.parametrize("name", ["frlkit_pgd", "frlkit_features_backward"])
def test_a_library_that_computes_something_else_is_refused(model, monkeypatch, name):
    right = build.build
    monkeypatch.setattr(build, "build", lambda: wrong(name)(right()))
    monkeypatch.setattr(native, "_asked", False)
    monkeypatch.setattr(native, "_library", None)
    declines_once(model, "differ.*autograd.*portable")


@needs_native
def test_the_first_use_may_come_from_anywhere_and_draws_no_random_numbers(model, monkeypatch):
    before = torch.get_rng_state()
    for mode in (torch.no_grad, torch.inference_mode):
        monkeypatch.setattr(native, "_asked", False)
        with mode():
            assert kernels.available(model)
    assert torch.equal(torch.get_rng_state(), before)


# Loading a library cut short kills the process, hence a process of its own.
@needs_native
def test_a_damaged_library_in_the_cache_is_built_again(fresh, model):
    assert kernels.available(model)
    (library,) = fresh.glob("*.so")
    good = library.read_bytes()
    library.unlink()  # this process still has the whole one open
    for damaged in (b"", good[:9000] + bytes(9000) + good[18_000:], good[:20_000]):
        library.write_bytes(damaged)
        assert not build._is_whole(library)
    code = "from frlkit import kernels, models; print(kernels.available(models.build('lenet5', seed=0)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=600)
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, "True", "")
    assert build._is_whole(library)


@needs_native
def test_the_cache_is_the_users_alone(fresh, model):
    """Whatever the umask, and if an older folder was open to others."""
    fresh.mkdir(mode=0o777)
    fresh.chmod(0o777)
    before = os.umask(0)
    try:
        assert kernels.available(model)
    finally:
        os.umask(before)
    (library,) = fresh.glob("*.so")
    assert fresh.stat().st_mode & 0o777 == 0o700
    assert library.stat().st_mode & 0o077 == 0
    assert build._is_whole(library)
    for mode in (0o720, 0o702, 0o777):
        library.chmod(mode)
        assert not build._is_whole(library)
    inode = library.stat().st_ino
    library.rename(fresh / "kept")  # so that its number is not used again
    shutil.copy2(fresh / "kept", library)
    planted = library.stat().st_ino
    build.build()
    assert library.stat().st_ino not in (planted, inode)
    assert build._is_whole(library)


@needs_native
def test_a_cache_that_others_can_replace_is_not_used(fresh, model):
    fresh.parent.mkdir(parents=True, exist_ok=True)
    mode = fresh.parent.stat().st_mode
    fresh.parent.chmod(0o777)
    with pytest.raises(PermissionError, match="can be written by others"):
        build._cache()
    assert kernels.available(model)  # built for this process alone
    assert not list(fresh.glob("*.so"))
    fresh.parent.chmod(mode)
    elsewhere = fresh.with_name("elsewhere")
    fresh.rename(elsewhere)
    fresh.symlink_to(elsewhere)
    with pytest.raises(PermissionError, match="is a link"):
        build._cache()


@needs_native
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, who can give files away")
@pytest.mark.parametrize("what", ["library", "folder"])
def test_what_belongs_to_somebody_else_is_not_loaded(fresh, model, monkeypatch, what):
    assert kernels.available(model)
    (library,) = fresh.glob("*.so")
    given = library if what == "library" else fresh
    os.chown(given, 65534, 65534)
    opened, right = [], build._open
    monkeypatch.setattr(build, "_open", lambda path: opened.append((path, path.stat().st_uid)) or right(path))
    build.build()
    ((path, owner),) = opened
    assert owner == os.geteuid()
    assert (path == library) == (what == "library")  # written anew; or built for this process alone


@needs_native
@pytest.mark.parametrize("setting", ["", ".", "cache", "../cache"])
def test_a_relative_cache_home_does_not_count(fresh, monkeypatch, tmp_path, setting):
    monkeypatch.setenv("XDG_CACHE_HOME", setting)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert build._cache() == tmp_path / "home" / ".cache" / "frlkit"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]


@needs_native
def test_flags_are_part_of_the_librarys_name(fresh, monkeypatch):
    names = []
    monkeypatch.setattr(build, "_compile", lambda command, folder, name: names.append((name, command)))
    for flags in ("", " -g", " -g -fno-plt"):
        monkeypatch.setenv("CXX", f"c++{flags}")
        build.build()
        build.build()
        assert names[-1] == names[-2]
        assert names[-1][1][: len(flags.split()) + 1] == ["c++", *flags.split()]
    assert len({name for name, _ in names}) == 3


@pytest.mark.parametrize(
    "flag",
    [
        *("-ffast-math", "-Ofast", "-funsafe-math-optimizations", "-fassociative-math", "-ffinite-math-only"),
        *("-ffp-contract=off", "-mno-fma", "-freciprocal-math", "-fno-signed-zeros"),
        *("@flags", "-Wp,-ffast-math", "-include", "-specs=here"),  # which bring others
    ],
)
@needs_native
def test_flags_that_change_results_are_refused(fresh, model, monkeypatch, flag):
    monkeypatch.setenv("CXX", f"c++ -g {flag}")
    declines_once(model, f"{flag} in CXX would change results.*portable")
    assert not fresh.exists()


@needs_native
def test_a_cache_that_cannot_be_written_is_done_without(fresh, model):
    fresh.write_text("a file where the folder should be", encoding="utf-8")
    assert kernels.available(model)
