"""Every convolutional network of torchvision and families of timm: sites of each kind, identity, folding.

For each network a block is put at every site, starting as the identity; the table shows by how much the logits then
differ from the plain network's (largest absolute difference over largest logit, in eval and in train mode) and how many
of the blocks a gradient reaches. Then the blocks' weights are moved at random, by a tenth of the size in which they
usually start, the norms' statistics settle, and the network is folded; the table shows how much that changes the
logits, in single and in double precision, and how many blocks keep their factor. (Moved five times as far, the deepest
ResNets, whose maps grow without training, blow single precision's rounding up to a tenth of the logits and more; double
precision stayed below 1e-9.) Writes `reports/benchmarks/every_network.md`. About 15 minutes on two cores.

    python tests/benchmarks/every_network.py [NAME ...]
"""

import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torchvision
from torch import nn

from placesearch.config import KINDS
from placesearch.errors import BackboneError, PlacementError
from placesearch.models.backbones import load_backbone
from placesearch.models.insertion import blocks_of, factors_of, fold, insert
from placesearch.models.sites import find_sites
from placesearch.placement import BlockSetting, Placement

SIDE = 96
LARGER = {"inception_v3": 299}  # its auxiliary head does not take less
BLOCKS = [
    BlockSetting("se", 4),
    BlockSetting("cbam", 4, 3),
    BlockSetting("cbam_bn", 4, 3),
    BlockSetting("cbam_residual", 4, 3),
    BlockSetting("channel", 4),
    BlockSetting("spatial", None, 3),
    BlockSetting("eca", None, 3),
]
TIMM = [
    "resnet26",
    "seresnet18",
    "ecaresnet26t",
    "skresnet18",
    "resnest14d",
    "res2net50_26w_4s",
    "resnetv2_50",
    "efficientnet_b0",
    "mobilenetv3_small_100",
    "mnasnet_100",
    "regnetx_004",
    "convnext_atto",
    "convnextv2_atto",
    "ghostnet_100",
    "dla34",
    "hrnet_w18_small",
    "repvgg_a0",
    "cspresnet50",
    "darknet53",
    "xception41",
    "densenet121",
    "vgg11",
    "inception_v4",
    "vovnet39a",
    "dpn68",
]
"""One network of each family."""

REPORT = Path(__file__).parents[2] / "reports" / "benchmarks" / "every_network.md"


@dataclass
class Outcome:
    """What was seen of a network."""

    kinds: Counter[str]
    errors: dict[str, float]
    blocks: int
    reached: int
    fold_errors: dict[str, float]
    left: int


def check(name: str) -> Outcome:
    """Put a block at every site of a network and compare."""
    torch.manual_seed(0)
    size = (3, LARGER.get(name, SIDE), LARGER.get(name, SIDE))
    plain = load_backbone(name, 10)
    with torch.no_grad():
        for own, weight in plain.named_parameters():
            if own.endswith("weight") and weight.dim() == 1 and not weight.any():
                weight.add_(0.5)  # timm zeroes the last norm of a residual; no gradient would reach a block after it
    sites = find_sites(plain, size)
    placement = Placement({site.name: BLOCKS[index % len(BLOCKS)] for index, site in enumerate(sites)})
    x = torch.randn(2, *size)
    errors = {}
    for mode in ("train", "eval"):  # eval last: there no drop-path keeps a gradient from its block
        logits = []
        for model in (plain, insert(plain, placement, input_size=size, initial="identity")):
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.momentum = 1.0  # as after a training; else maps grow from layer to layer in eval mode
            torch.manual_seed(1)  # dropout and drop-path
            output = model.train(mode == "train")(x)
            logits.append(output if isinstance(output, torch.Tensor) else output[0])
        expected = logits[0].detach()
        errors[mode] = float((expected - logits[1].detach()).abs().max() / expected.abs().max())
    logits[1].square().sum().backward()
    blocks = list(blocks_of(model).values())
    reached = sum(any(w.grad is not None and w.grad.abs().sum() > 0 for w in block.parameters()) for block in blocks)
    del plain, logits  # the largest network needs 5 GB in double precision
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for block in blocks:
            for weight in block.parameters():
                size_of_start = weight[0].numel() ** -0.5 if weight.dim() > 1 else 1.0
                weight.add_(0.1 * size_of_start * torch.randn_like(weight))
        model.train()(x)  # settles the statistics of norms, those within blocks included
        model.eval()
        fold_errors = {}
        for precision in (torch.float32, torch.float64):
            given = x.to(precision)
            expected = model.to(precision)(given)
            folded = fold(model)
            error = (folded(given) - expected).abs().max() / expected.abs().max()
            fold_errors[str(precision).removeprefix("torch.")] = float(error)
    kinds = Counter(kind for site in sites for kind in site.kinds)
    return Outcome(kinds, errors, len(sites), reached, fold_errors, len(factors_of(folded)))


def main() -> None:
    every = [*torchvision.models.list_models(module=torchvision.models), *(f"timm:{name}" for name in TIMM)]
    names = sys.argv[1:] or every
    warnings.simplefilter("ignore")
    lines, refused, began = [], [], time.monotonic()
    for name in names:
        try:
            seen = check(name)
            counts = " | ".join(str(seen.kinds[kind]) for kind in KINDS)
            errors = f"{seen.errors['eval']:.1e} | {seen.errors['train']:.1e}"
            folding = " | ".join(f"{error:.1e}" for error in seen.fold_errors.values())
            reached, left = f"{seen.reached} of {seen.blocks}", f"{seen.left} of {seen.blocks}"
            lines.append(f"| {name} | {counts} | {errors} | {reached} | {folding} | {left} |")
            print(lines[-1], flush=True)
        except (BackboneError, PlacementError) as error:
            refused.append(f"- {name}: {error}")
            print(refused[-1], flush=True)
    head = [
        "# Every network of torchvision, and families of timm",
        "",
        f"{len(lines)} networks at {SIDE}x{SIDE} (inception_v3: 299), batch 2, a block at every site (variants in turn)"
        f", fp32, seed 0, torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"timm {timm.__version__}, "
        f"{time.monotonic() - began:.0f} s on {torch.get_num_threads()} cores. "
        "Made by `python tests/benchmarks/every_network.py`.",
        "",
        f"| network | {' | '.join(KINDS)} | identity error, eval | identity error, train | blocks with a gradient "
        "| folding error, fp32 | folding error, fp64 | factors left |",
        "|---|" + "---:|" * (len(KINDS) + 6),
    ]
    tail = ["", "Refused, in one line each:", "", *refused] if refused else []
    if not sys.argv[1:]:
        REPORT.write_text("\n".join([*head, *lines, *tail]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
