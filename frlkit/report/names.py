"""What recipes are called where people read, and which recipe is the control of which: the only place that knows both.

A title stands for a recipe in figures, claims and notebooks. A title whose recipe no run has yet gives no error there
but empty numbers, and a verdict of "not tested".
"""

from __future__ import annotations

from frlkit.recipes import RECIPES
from frlkit.values import plain as plain  # for those who show names

#: Title -> recipe.
METHODS: dict[str, str] = {
    "Natural training": "natural",
    "PGD-AT, half of each batch": "pgd_at_half",
    "PGD-AT": "pgd_at",
    "PGD-AT, five steps": "pgd_at,steps=5",
    "N-FGSM, one step": "n_fgsm",
    "TRADES": "trades",
    "PGD-AT, PreAct-ResNet-18": "pgd_at,model=preact_resnet18",
    # the kit's retraining loop, and what differs from a method in one thing
    "Control": "uniform",
    "Reweight": "algorithm1_reweight",
    "Remargin": "algorithm1_remargin",
    "Reweight + Remargin": "algorithm1_both",
    "Reweight, joint constraint": "joint_reweight",
    "Joint constraint, half the bound": "joint_reweight,bound=0.25",
    "Natural multipliers alone": "natural_only",
    "Boundary multipliers alone": "boundary_only",
    "Radii alone": "radii_only",
    "Natural multipliers, one radius": "constant_radius",
    "Natural multipliers, one radius of 16/255": "constant_radius,eps_255=16,step_255=4",
    "One radius for all": "constant_margin",
    "Radii of hard classes shrunk": "shrunk_margin",
    "Biases of PGD-AT moved": "intercept",
    "Biases of the control moved": "intercept_uniform",
    "Output norms of PGD-AT tuned": "head_norms",
    "DAFA": "dafa",
    # intervals instead of attacks in training
    "Certified": "certified",
    "Certified control": "certified_uniform",
    "Certified Reweight": "certified_reweight",
    "Certified Remargin": "certified_remargin",
    "Control, random start": "random_start_uniform",
    "Reweight + Remargin, random start": "random_start_both",
    "Control, TRADES start": "uniform,start=trades",
    "Reweight + Remargin, TRADES start": "algorithm1_both,start=trades",
    # Agarwal et al. on attacked images
    "Baseline reweight": "baseline_reweight",
    "Baseline control": "baseline_uniform",
    # Algorithm 1 with the text's tolerances and no caps: as printed (average not subtracted), and under Eq. 17
    "Reweight as printed": "printed_reweight",
    "Remargin as printed": "printed_remargin",
    "Both as printed": "printed_both",
    "Both as printed, four inner epochs": "printed_both,inner_epochs=4",
    "Reweight under Eq. 17": "eq17_reweight",
    "Remargin under Eq. 17": "eq17_remargin",
    "Both under Eq. 17": "eq17_both",
    "Both under Eq. 17, four inner epochs": "eq17_both,inner_epochs=4",
    # the authors' code
    "Authors' control": "official_uniform",
    "Authors' Reweight": "official_reweight",
    "Authors' Reweight, tolerance of both": "official_reweight,tau_nat=0.07,tau_bdy=0.07",
    "Authors' natural multipliers alone": "official_remargin,alpha_margin=0",
    "Authors' Remargin": "official_remargin",
    "Authors' both": "official_both",
    # the report's code
    "Report's control": "report_uniform",
    "Report's Reweight 1:1": "report_reweight,alpha_nat=1,alpha_bdy=1",
    "Report's Reweight 1:5": "report_reweight,alpha_nat=1,alpha_bdy=5",
    "Report's Reweight 5:1": "report_reweight,alpha_nat=5,alpha_bdy=1",
    "Report's Remargin": "report_remargin",
    "Report's Remargin control": "report_remargin,alpha_nat=0,alpha_margin=0",
}

#: What the shipped runs of the report's recipes still are, until those at full length are finished: said in every
#: notebook that reads them. ``sweeps/published.yaml`` trains the others; then this goes.
EDITION = (
    "Where nothing else is said, the report's recipes are read in the first edition's length: eight epochs, from the "
    "whole-batch model, a tenth of the images set aside and not a fifth, boundary errors of wrong predictions and not "
    "of changed ones, its weights estimated 27 times an epoch and its radii four times. sweeps/published.yaml trains "
    "them as published."
)
REPORT_START = "PGD-AT"  # of the report's recipes in that edition; then "PGD-AT, half of each batch"
_SHORT = {
    f"report_{kind}": f",epochs=8,validation=0.1,start=pgd_at,updates={updates},boundary=wrong"
    for kind, updates in (("uniform", 4), ("reweight", 27), ("remargin", 4))
}


def edition(recipe: str) -> str:
    """The name under which the shipped runs of a recipe are kept: see `EDITION`."""
    return recipe + _SHORT.get(recipe.split(",")[0], "")


def lasting(recipe: str, epochs: int) -> str:
    """A recipe in the first edition's length, in so many epochs instead; 0, and any other recipe: as it is."""
    short = _SHORT.get(recipe.split(",")[0])
    if not epochs or short is None or not recipe.endswith(short):
        return recipe
    return recipe.removesuffix(short) + short.replace("epochs=8", f"epochs={epochs}")


#: Recipe -> title; that of a run in the first edition's length says so.
TITLES: dict[str, str] = {edition(recipe): f"{name} (first edition)" for name, recipe in METHODS.items()}
TITLES |= {recipe: name for name, recipe in METHODS.items()}

#: Title -> the title of its control: the same loop, start and length without what the method adds.
CONTROLS: dict[str, str] = {
    "Reweight": "Control",
    "Remargin": "Natural multipliers alone",
    "Reweight + Remargin": "Control",
    "Reweight, joint constraint": "Control",
    "Joint constraint, half the bound": "Control",
    "Natural multipliers alone": "Control",
    "Boundary multipliers alone": "Control",
    "Radii alone": "Control",
    "Natural multipliers, one radius": "Natural multipliers alone",
    "Natural multipliers, one radius of 16/255": "Natural multipliers alone",
    "One radius for all": "Control",
    "Radii of hard classes shrunk": "Natural multipliers alone",
    "Biases of PGD-AT moved": "PGD-AT",
    "Biases of the control moved": "Control",
    "Output norms of PGD-AT tuned": "PGD-AT",
    "DAFA": "Control",
    "Reweight + Remargin, random start": "Control, random start",
    "Reweight + Remargin, TRADES start": "Control, TRADES start",
    "Certified Reweight": "Certified control",
    "Certified Remargin": "Certified control",
    "Baseline reweight": "Baseline control",
    "Authors' Reweight": "Authors' control",
    "Authors' Reweight, tolerance of both": "Authors' control",
    "Authors' natural multipliers alone": "Authors' control",
    "Authors' Remargin": "Authors' natural multipliers alone",
    "Authors' both": "Authors' control",
    "Report's Reweight 1:1": "Report's control",
    "Report's Reweight 1:5": "Report's control",
    "Report's Reweight 5:1": "Report's control",
    "Report's Remargin": "Report's Remargin control",
}

#: Title -> what was tried on validation images beside its shipped rates: a third of them, and three times.
TRIALS: dict[str, tuple[str, str]] = {
    "Reweight": ("algorithm1_reweight,alpha_nat=0.1,alpha_bdy=0.1", "algorithm1_reweight,alpha_nat=0.9,alpha_bdy=0.9"),
    "Remargin": (
        "algorithm1_remargin,alpha_nat=0.1,alpha_margin=1",
        "algorithm1_remargin,alpha_nat=0.9,alpha_margin=9",
    ),
    "Reweight + Remargin": (
        "algorithm1_both,alpha_nat=0.1,alpha_bdy=0.1,alpha_margin=1",
        "algorithm1_both,alpha_nat=0.9,alpha_bdy=0.9,alpha_margin=9",
    ),
    "Baseline reweight": ("baseline_reweight,alpha_bdy=0.1", "baseline_reweight,alpha_bdy=0.9"),
    "DAFA": ("dafa,strength=0.3", "dafa,strength=3"),
    "Biases of PGD-AT moved": ("intercept,alpha_nat=0.3,alpha_bdy=0.3", "intercept,alpha_nat=3,alpha_bdy=3"),
    "Output norms of PGD-AT tuned": (
        "head_norms,alpha_nat=0.03,alpha_bdy=0.03",
        "head_norms,alpha_nat=0.3,alpha_bdy=0.3",
    ),
}

#: Classes of Fashion-MNIST that look alike and are mostly mistaken for one another.
CONFUSABLE = ("T-shirt/top", "Pullover", "Coat", "Shirt")

_FIELDS = {"alpha_nat": "α natural", "alpha_bdy": "α boundary", "alpha_margin": "α radius", "eps_255": "ε·255"}
_FIELDS |= {"tau_nat": "τ natural", "tau_bdy": "τ boundary"}


def title(recipe: str) -> str:
    """What a recipe is called: its title, or that of what it varies with the fields that differ, in words."""
    if recipe in TITLES:
        return TITLES[recipe]
    base, *fields = recipe.removesuffix(short := _SHORT.get(recipe.split(",")[0], "")).split(",")
    known = TITLES.get(base, RECIPES[base].title if base in RECIPES else base.replace("_", " "))
    pairs = [field.partition("=") for field in fields]
    edited = " (first edition)" if short and recipe.endswith(short) else ""
    return ", ".join([known, *(f"{_FIELDS.get(k, k.replace('_', ' '))} {v}" for k, _, v in pairs)]) + edited


def recipe(name: str) -> str:
    """The recipe of a title, as its shipped runs are named; anything else is taken for a recipe itself."""
    return edition(METHODS[name]) if name in METHODS else name


DATASETS = {"fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10", "svhn": "SVHN", "gtsrb": "GTSRB-43"}
DATASETS |= {"gtsrb17": "GTSRB-17"}  # the 17 classes with the most training images


def dataset(name: str) -> str:
    """A data set's name in prose; what follows it in brackets stays."""
    code, bracket, rest = name.partition(" (")
    return DATASETS.get(code, code) + bracket + rest
