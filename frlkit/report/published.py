"""What others printed, to stand beside our numbers: fractions, class by class, with the source of each.

The report's figures (one run, no seeds) were read off its plots, to about 0.003. Its robust errors are PGD-20 at
16/255, step 2/255, on the first 3,000 test images, although its text says 8/255.
"""

from __future__ import annotations

#: Fashion-MNIST, LeNet-5: recipe -> class-wise natural error and robust error at 16/255.
REPORT: dict[str, dict[str, tuple[float, ...]]] = {
    "natural": {
        "natural": (0.174, 0.036, 0.191, 0.144, 0.188, 0.036, 0.319, 0.022, 0.041, 0.049),
        "robust": (0.915, 0.405, 0.982, 0.898, 0.981, 0.930, 0.991, 0.986, 0.530, 0.765),
    },
    "pgd_at_half": {
        "natural": (0.115, 0.040, 0.210, 0.114, 0.225, 0.037, 0.447, 0.045, 0.034, 0.060),
        "robust": (0.370, 0.135, 0.609, 0.347, 0.613, 0.277, 0.892, 0.358, 0.137, 0.168),
    },
}

#: CIFAR-10 in the paper's text (PGD-AT, l-inf 8/255): errors in per cent of its easiest and its hardest class.
PAPER_CIFAR10 = {"automobile": {"natural": 7.0, "robust": 33.0}, "cat": {"natural": 40.9, "robust": 82.6}}

#: CIFAR-10, PreAct-ResNet-18, errors in per cent: title -> `tables.scores` column -> what others found who ran the
#: authors' code (1 run, 8 evaluations: mean and, where known, range).
RERUNS = {
    "Reweight": {
        "natural worst": "28.2 (26.6 to 30.2)",
        "boundary worst": "53.0",
        "robust average": "52.6",
        "robust worst": "76.2 (72.8 to 78.2)",
    },
    "Reweight + Remargin": {
        "natural worst": "29.6",
        "boundary worst": "48.3",
        "robust average": "52.3",
        "robust worst": "70.7 (66.9 to 74.3)",
    },
}
