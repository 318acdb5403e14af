"""Names that the command line and the configuration check before they import torch, which takes seconds.

The tables of the library belong to files that import torch. A test compares each of these names with its table.
"""

from __future__ import annotations

NORMS = ("linf", "l2", "l1")
PRESETS = ("default", "madry20", "fgsm")
OBJECTIVES = (
    *("mean-loss", "loss-of-mean", "mean-logits", "margin", "dlr", "denial"),
    *("targeted-loss", "targeted-dlr", "targeted-vote"),
)
SURROGATES = ("ensemble", "member", "noise-free", "resnet")
NOISES = ("fresh", "fixed", "known")
PEERS = ("foolbox", "torchattacks", "autoattack")
RULES = ("hierarchical", "flat")
ADVERSARIES = ("none", "n-fgsm", "pgd", "trades")
PRECISIONS = ("float32", "bfloat16")
ARCHITECTURES = (
    *("resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"),
    *("cifar-resnet18", "cifar-resnet34", "cifar-resnet50"),
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
)
DATA_SETS = ("digits", "cifar10", "cifar100", "imagefolder")
AUGMENTATIONS = ("none", "shift", "flip-crop", "imagenet")
