"""``make mutants``: seeded faults in the kit, one at a time, each of which some test must notice; prints a table.

``--only WORD`` tries those whose description has this word, ``--every N`` one in so many.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parents[1]


class Mutant(NamedTuple):
    """A fault: in a module of the kit, this text (there exactly once) becomes that; these test files must notice."""

    what: str
    module: str
    old: str
    new: str
    tests: str


ATTACKS, EVALUATION, FAIRNESS = "test_attacks.py", "test_evaluation.py", "test_fairness.py"
TRAINING, FAIR, CHECKPOINT = "test_training.py", "test_fair_training.py", "test_checkpoint.py"
MUTANTS = [
    Mutant("PGD's step downhill", "attacks.py", "step_size, gradient.sign()", "-step_size, gradient.sign()", ATTACKS),
    Mutant("PGD leaves the ball", "attacks.py", ".clamp_(low, high)", ".clamp_(0, 1)", ATTACKS),
    Mutant("PGD leaves [0, 1]", "attacks.py", "(x + eps).clamp_(max=1)", "x + eps", ATTACKS),
    Mutant("starts in half the ball", "attacks.py", "noise.uniform_(-1, 1,", "noise.uniform_(0, 1,", ATTACKS),
    Mutant("the weakest restart is kept", "attacks.py", "score > best_score", "score < best_score", ATTACKS),
    Mutant("KL attack from the attacked", "attacks.py", 'if loss == "kl" else y\n', "if False else y\n", ATTACKS),
    Mutant("attack in train mode", "attacks.py", "            model.eval()", "            model.train()", ATTACKS),
    Mutant("train mode is not restored", "attacks.py", "module.training = training", "pass", ATTACKS),
    Mutant("filters at the wrong offsets", "kernels/cells.py", "windows.flip(1, 2)", "windows", "test_cells.py"),
    Mutant("one stream for every key", "evaluation.py", "SeedSequence(keys)", "SeedSequence(keys[:1])", EVALUATION),
    Mutant(
        "robust error without the natural one",
        *("evaluation.py", "stands = right & (attacked == labels)", "stands = attacked == labels", EVALUATION),
    ),
    Mutant(
        "confusion transposed",
        "evaluation.py",
        "(confusion, (labels, attacked)",
        "(confusion, (attacked, labels)",
        EVALUATION,
    ),
    Mutant(
        "a record of other weights is reused",
        *("records.py", '"weights_sha256": checkpoint.digest(dict(model.state_dict())),', "", EVALUATION),
    ),
    Mutant(
        "evaluation in train mode",
        *("attacks.py", "with evaluating(model):\n        return", "if True:\n        return", EVALUATION),
    ),
    Mutant(
        "looked at in train mode",
        "training.py",
        "all(outputs(run.result, split",
        "all(run.result(split",
        TRAINING,
    ),
    Mutant("average not subtracted", "fairness.py", "- subtract_average * errors.mean() -", "-", FAIRNESS),
    Mutant("tolerance without effect", "fairness.py", "errors.mean() - tau", "errors.mean()", FAIRNESS),
    Mutant("negative multipliers", "fairness.py", "phi = phi.clamp(min=0)", "phi = phi", FAIRNESS),
    Mutant("weights do not sum to 1", "fairness.py", "+ phi - phi.mean()", "+ phi", FAIRNESS),
    Mutant(
        "two classes' weights swapped",
        *(
            "fairness.py",
            "1 / len(phi) + phi - phi.mean()",
            "1 / len(phi) + phi[[1, 0, *range(2, len(phi))]] - phi.mean()",
        ),
        FAIRNESS,
    ),
    Mutant(
        "natural and boundary weights swapped",
        *(
            "fairness.py",
            "weights(natural), weights(state.phi_bdy)",
            "weights(state.phi_bdy), weights(natural)",
        ),
        FAIRNESS,
    ),
    Mutant(
        "radius above its cap", "fairness.py", "state.log_radius.clamp(*_log_caps(rule))", "state.log_radius", FAIRNESS
    ),
    Mutant("radii wind up", "fairness.py", "= log_radius.clamp(*_log_caps(rule))", "= log_radius", FAIRNESS),
    Mutant("always from nothing", "fairness.py", "state if rule.accumulate else", "state if False else", FAIRNESS),
    Mutant("the old violations alone", "fairness.py", "+ rule.smoothing * found", "+ 0 * found", FAIRNESS),
    Mutant("robust target ignored", "fairness.py", 'rule.target == "boundary"', "True", FAIRNESS),
    Mutant(
        "DAFA the wrong way round",
        "fairness.py",
        "own[:, None] < own[None, :]",
        "own[:, None] > own[None, :]",
        FAIRNESS,
    ),
    Mutant(
        "epoch 0's order in every epoch",
        *("training.py", "stream(config.seed, epoch, ORDER)", "stream(config.seed, 0, ORDER)", TRAINING),
    ),
    Mutant(
        "epoch 0's starts in every epoch",
        *("training.py", "stream(config.seed, epoch, START,", "stream(config.seed, 0, START,", TRAINING),
    ),
    Mutant("the rate never falls", "training.py", "** (epoch // config.lr_every)", "** 0", TRAINING),
    Mutant("TRADES without beta", "losses.py", "+ config.beta * (", "+ (", TRAINING),
    Mutant("training in eval mode", "training.py", "run.model.train()", "run.model.eval()", TRAINING),
    Mutant("the last images are left out", "training.py", "batches[first:last]", "batches[first : last - 1]", TRAINING),
    Mutant("optimiser not stored", "training.py", '"optimizer": self.optimizer.state_dict(),', "", TRAINING),
    Mutant(
        "optimiser not restored", "training.py", 'run.optimizer.load_state_dict(state["optimizer"])', "pass", TRAINING
    ),
    Mutant("history begins anew", "training.py", "[*run.history, entry]", "[entry]", TRAINING),
    Mutant(
        "errors before the first epoch serve all",
        *("training.py", "(run.history[-1] if run.history else run.start)", "run.start", FAIR),
    ),
    Mutant(
        "multipliers not restored",
        *("training.py", 'fairness.State(**state["multipliers"])', "run.multipliers", FAIR),
    ),
    Mutant("labels do not travel with images", "losses.py", "else y[order]", "else y", FAIR),
    Mutant(
        "one radius for all classes",
        *(
            "losses.py",
            "eps, step = config.eps_255 / 255 * own,",
            "eps, step = 0 * own + config.eps_255 / 255,",
        ),
        FAIR,
    ),
    Mutant("FRL without beta", "losses.py", "natural + config.beta * boundary", "natural + boundary", FAIR),
    Mutant(
        "every part of an epoch is the first",
        *("training.py", "(run, (part, config.updates)", "(run, (0, config.updates)", FAIR),
    ),
    Mutant("printed weights made to sum to 1", "losses.py", 'config.weighting == "printed"', "False", FAIR),
    Mutant("biases moved anew every time", "training.py", " - fairness.offsets(before)\n", "\n", FAIR),
    Mutant("multipliers in every epoch", "training.py", "run.epoch % config.inner_epochs == 0", "True", FAIR),
    Mutant("changed predictions do not count", "training.py", 'config.boundary == "changed"', "False", FAIR),
    Mutant(
        "the average is not kept", "training.py", "return self.average or self.model", "return self.model", TRAINING
    ),
    Mutant("the average runs too fast", "training.py", "1 - decay)", "decay)", TRAINING),
    Mutant(
        "the average is not restored", "training.py", 'run.average.load_state_dict(state["average"])', "pass", TRAINING
    ),
    Mutant("weights that are NaN pass", "training.py", "        _refuse_nonfinite(run)\n", "", TRAINING),
    Mutant("weights of another digest pass", "runs.py", '== head["sha256"]', "is not None", "test_runs.py"),
    Mutant(
        "a finished run's configuration is not looked at",
        "runs.py",
        "found, described(config))\n    return",
        "{}, {})\n    return",
        TRAINING,
    ),
    Mutant("old outcomes stay", "records.py", 'str(found["weights_sha256"]) != weights', "False", "test_records.py"),
    Mutant(
        "other images pass",
        "runs.py",
        'found.get("data_sha256", data.fingerprint) != data.fingerprint',
        "False",
        "test_runs.py",
    ),
    Mutant("the generation before is lost", "checkpoint.py", "os.replace(path, keep)", "pass", CHECKPOINT),
    Mutant("not flushed to disk", "checkpoint.py", "os.fsync(file.fileno())", "pass", CHECKPOINT),
    Mutant("digest ignored", "checkpoint.py", "digest(state) == found", "True", CHECKPOINT),
    Mutant("strangers' code is run", "checkpoint.py", "weights_only=True)\n", "weights_only=False)\n", CHECKPOINT),
    Mutant("no lock", "disk.py", "fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", CHECKPOINT),
    Mutant("a lock on no name", "disk.py", "os.path.samestat(os.fstat(descriptor), os.stat(path))", "True", CHECKPOINT),
    Mutant("what fails to go stays locked", "disk.py", "            hold.release()\n", "", CHECKPOINT),
    Mutant("NaN weights go on", "checkpoint.py", "(name := models.nonfinite(weights))", "False", CHECKPOINT),
    Mutant(
        "an unreadable file is damaged", "checkpoint.py", "except ReadError:", "except ZeroDivisionError:", CHECKPOINT
    ),
    Mutant("anyone's library", "kernels/build.py", "status.st_mode & 0o022", "False", "test_kernels.py"),
    Mutant("any flag", "kernels/build.py", "if flag.startswith((*CHANGING, *HIDING))", "if False", "test_kernels.py"),
    Mutant("other configurations pass", "checkpoint.py", "found.get(name) != wanted.get(name)", "False", CHECKPOINT),
    Mutant("a damaged copy counts", "drive.py", "draft.read_bytes() != file.read_bytes()", "False", CHECKPOINT),
    Mutant("litter stays", "disk.py", "for file in _litter(folder, name):", "for file in ():", CHECKPOINT),
    Mutant("any file is a run's checkpoint", "checkpoint.py", 'if "epoch" not in state:', "if False:", CHECKPOINT),
    Mutant("images up to 255/256", "data.py", ".float().div_(255)", ".float().div_(256)", "test_data.py"),
    Mutant(
        "training on validation images",
        *("sources/splits.py", "train.take(keep)", "train", "test_data.py"),
    ),
    Mutant("another order is another run", "runs.py", 'frozenset(name.split(","))', "frozenset(name)", "test_runs.py"),
    Mutant("the last of two values counts", "recipes.py", "if key in varied:", "if False:", "test_values.py"),
    Mutant("a refusal may fill a page", "values.py", "_SHORT.repr(value)", "repr(value)", "test_values.py"),
    Mutant("True is a number", "values.py", "ConfigDict(strict=True,", "ConfigDict(strict=False,", "test_values.py"),
]


def mutated(mutant: Mutant, project: Path = PROJECT) -> str:
    """The module's source with the fault. Raises `ValueError` where its text is not there exactly once."""
    source = (project / "frlkit" / mutant.module).read_text(encoding="utf-8")
    if source.count(mutant.old) != 1:
        raise ValueError(
            f"mutant {mutant.what!r}: {mutant.old!r} is {source.count(mutant.old)} times in {mutant.module}: adapt it"
        )
    return source.replace(mutant.old, mutant.new)


def _tests(folder: Path, files: list[str]) -> None:  # in a process of its own, which imports the copied kit anew
    import pytest

    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    paths = [str(folder / "tests" / name) for name in files]
    os._exit(pytest.main(["-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", *paths]))


def run(folder: Path, files: list[str]) -> tuple[int, str]:
    """Pytest's exit code in the copied tree, stopping at the first failure, and the test that failed."""
    process = multiprocessing.get_context("fork").Process(target=_tests, args=(folder, files))
    process.start()
    process.join(600)
    if process.exitcode is None:
        process.kill()
        return 1, "it hangs"
    lines = (folder / "log").read_text(encoding="utf-8").splitlines()
    failed = [
        line.split("::", 1)[1].split(" - ")[0]
        for line in lines
        if line.startswith(("FAILED", "ERROR")) and "::" in line
    ]
    return process.exitcode, failed[0] if failed else lines[-1] if lines else ""


def main() -> int:
    """Returns 1 where a mutant survives, or the tests fail without any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a word of the descriptions")
    parser.add_argument("--every", type=int, default=1, help="only every so-manieth, for a quick look")
    words = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if words.only in mutant.what][:: words.every]
    sources = [mutated(mutant) for mutant in chosen]
    sys.dont_write_bytecode = True  # a mutant may be as old and as long as the original: no stale bytecode
    import torch  # once here instead of once in every forked process
    import torchvision  # noqa: F401

    torch.set_num_threads(1)
    survivors = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("frlkit", "tests"):
            shutil.copytree(PROJECT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(PROJECT / "pyproject.toml", folder)
        code, said = run(folder, sorted({mutant.tests for mutant in chosen}))
        if code:
            print(f"the tests fail without any mutant: {said}")
            return 1
        print(f"{'mutant':<42}{'module':<18}noticed by", flush=True)
        for mutant, source in zip(chosen, sources, strict=True):
            path = folder / "frlkit" / mutant.module
            original = path.read_text(encoding="utf-8")
            path.write_text(source, encoding="utf-8")
            code, said = run(folder, [mutant.tests])
            path.write_text(original, encoding="utf-8")
            survivors += code == 0
            print(f"{mutant.what:<42}{mutant.module:<18}{said if code else 'NOTHING: it survives'}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} noticed")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
