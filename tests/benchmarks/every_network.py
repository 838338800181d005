"""Every convolutional network of torchvision: sites of each kind, and whether blocks can start as the identity.

For each network a block is put at every site, starting as the identity; the table shows by how much the logits then
differ from the plain network's (largest absolute difference over largest logit, in eval and in train mode) and how many
of the blocks a gradient reaches. Writes `reports/benchmarks/every_network.md`. About 10 minutes on two cores.

    python tests/benchmarks/every_network.py [NAME ...]
"""

import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision

from placesearch.config import KINDS
from placesearch.errors import BackboneError, PlacementError
from placesearch.models.backbones import load_backbone
from placesearch.models.insertion import insert
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
REPORT = Path(__file__).parents[2] / "reports" / "benchmarks" / "every_network.md"


@dataclass
class Outcome:
    """What was seen of a network."""

    kinds: Counter[str]
    errors: dict[str, float]
    blocks: int
    reached: int


def check(name: str) -> Outcome:
    """Put a block at every site of a network and compare."""
    torch.manual_seed(0)
    size = (3, LARGER.get(name, SIDE), LARGER.get(name, SIDE))
    plain = load_backbone(name, 10)
    sites = find_sites(plain, size)
    placement = Placement({site.name: BLOCKS[index % len(BLOCKS)] for index, site in enumerate(sites)})
    x = torch.randn(2, *size)
    errors = {}
    for mode in ("train", "eval"):  # eval last: there no drop-path keeps a gradient from its block
        logits = []
        for model in (plain, insert(plain, placement, input_size=size, initial="identity")):
            torch.manual_seed(1)  # dropout and drop-path
            output = model.train(mode == "train")(x)
            logits.append(output if isinstance(output, torch.Tensor) else output[0])
        expected = logits[0].detach()
        errors[mode] = float((expected - logits[1].detach()).abs().max() / expected.abs().max())
    logits[1].square().sum().backward()
    blocks = [module.attention for module in model.modules() if hasattr(module, "attention")]
    reached = sum(any(w.grad is not None and w.grad.abs().sum() > 0 for w in block.parameters()) for block in blocks)
    return Outcome(Counter(kind for site in sites for kind in site.kinds), errors, len(sites), reached)


def main() -> None:
    names = sys.argv[1:] or torchvision.models.list_models(module=torchvision.models)
    warnings.simplefilter("ignore")
    lines, refused, began = [], [], time.monotonic()
    for name in names:
        try:
            seen = check(name)
            counts = " | ".join(str(seen.kinds[kind]) for kind in KINDS)
            errors = f"{seen.errors['eval']:.1e} | {seen.errors['train']:.1e}"
            lines.append(f"| {name} | {counts} | {errors} | {seen.reached} of {seen.blocks} |")
            print(lines[-1], flush=True)
        except (BackboneError, PlacementError) as error:
            refused.append(f"- {name}: {error}")
            print(refused[-1], flush=True)
    head = [
        "# Every network of torchvision",
        "",
        f"{len(lines)} networks at {SIDE}x{SIDE} (inception_v3: 299), batch 2, a block at every site (variants in turn)"
        f", fp32, seed 0, torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"{time.monotonic() - began:.0f} s on {torch.get_num_threads()} cores. "
        "Made by `python tests/benchmarks/every_network.py`.",
        "",
        f"| network | {' | '.join(KINDS)} | identity error, eval | identity error, train | blocks with a gradient |",
        "|---|" + "---:|" * (len(KINDS) + 3),
    ]
    tail = ["", "Refused, in one line each:", "", *refused] if refused else []
    if not sys.argv[1:]:
        REPORT.write_text("\n".join([*head, *lines, *tail]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
