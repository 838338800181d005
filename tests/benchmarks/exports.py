"""Exports of every block, at every kind of site, in five backbones, loaded in their targets and compared.

For each backbone and block, a network has the block at one site of each kind, all together; for `py` also at one of
these sites alone, but in AlexNet. Norms are settled on random images, so that logits depend on what is computed, as
after a training. The network is exported with these weights, and each file is loaded by a process to which
placesearch is barred: `py` by importing it, `onnx` by onnxruntime, `pt2` by `torch.export.load`. The table shows the
largest difference of logits, relative to the largest logit, over batches of 1 and 4 images; and as a control by how
much the blocks themselves change them, which is what forgotten blocks would show. For `py`, the state dict that the
process saves is also loaded back into `Architecture.build()` with strict=True, and has to be equal. Writes
`reports/benchmarks/exports.md` and `exports.csv`. About 10 minutes on two quiet cores.

    python tests/benchmarks/exports.py [BACKBONE ...]
"""

import copy
import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import safetensors.torch
import torch
from torch import nn

from placesearch.config import KINDS
from placesearch.exporting.checking import LARGEST_DIFFERENCE, difference
from placesearch.exporting.formats import export
from placesearch.models.architecture import Architecture
from placesearch.models.blocks import BLOCKS
from placesearch.models.sites import find_sites
from placesearch.placement import BlockSetting, Placement

BACKBONES = ["resnet18", "mobilenet_v3_small", "regnet_x_400mf", "convnext_tiny", "alexnet"]
TOGETHER = ["alexnet"]  # its weights are too large to be written for each site
FORMATS = ["py", "onnx", "pt2"]
BATCHES = (1, 4)
SIZE = (3, 64, 64)
SETTINGS = {"reduction": 4, "kernel_size": 3}

COLUMNS = ["backbone", "block", "kind", "sites", *FORMATS, "weights_back", "change"]

REPORT = Path(__file__).parents[2] / "reports" / "benchmarks" / "exports.md"

TARGET = """
import importlib.util, json, sys
sys.modules["placesearch"] = None  # whoever imports it fails
import safetensors.torch, torch
torch.set_num_threads(1)

def program(path):
    if path.endswith(".py"):
        spec = importlib.util.spec_from_file_location("network", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model = module.build(weights=path[:-3] + ".safetensors").eval()
        safetensors.torch.save_file(model.state_dict(), path + ".back")
        return model
    if path.endswith(".pt2"):
        return torch.export.load(path).module()
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["logits"], {"image": x.numpy()})[0])

images = safetensors.torch.load_file(sys.argv[1])
for path in json.loads(sys.argv[2]):
    run = program(path)
    with torch.no_grad():
        safetensors.torch.save_file({name: run(x).contiguous() for name, x in images.items()}, path + ".logits")
"""


@dataclass
class Outcome:
    """What was seen of one network.

    Args:
        kinds: At what kinds of site it has blocks.
        placement: Its blocks.
        differences: For each format, of the logits.
        change: By how much the blocks change the logits.
        back: Whether the weights that a `py` export saves are those that it was given.
    """

    kinds: str
    placement: Placement
    differences: dict[str, float]
    change: float
    back: bool


def placements(backbone: str, block: str) -> dict[str, Placement]:
    """Return placements of a block by the kinds of its sites, of each kind the middle site, and `all` of them together.

    Args:
        backbone: The backbone.
        block: Name of the block.
    """
    setting = BlockSetting(block, **{name: SETTINGS[name] for name in BLOCKS[block].settings})
    sites, chosen = find_sites(backbone, SIZE), {}
    for kind in KINDS:
        of_kind = [site.name for site in sites if kind in site.kinds]
        if of_kind:
            chosen.setdefault(of_kind[len(of_kind) // 2], []).append(kind)
    together = {"all": Placement(dict.fromkeys(chosen, setting))}
    if backbone in TOGETHER:
        return together
    return together | {", ".join(kinds): Placement({site: setting}) for site, kinds in chosen.items()}


def settled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Make logits depend on what the network computes: norms measure what they get, and zero weights are moved."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = 1.0
            if isinstance(weight := getattr(module, "layer_scale", None), nn.Parameter):
                weight.fill_(0.5)  # ConvNeXt starts its residuals at a millionth
        model.train()(torch.randn(16, *SIZE))
    return model.eval()


def prove(backbone: str, placements: dict[str, Placement], formats: list[str]) -> list[Outcome]:
    """Export networks, load the files in their targets and compare; those but `all` as `py` only.

    Args:
        backbone: The backbone.
        placements: Where which blocks go, by the kinds of these sites.
        formats: The formats.
    """
    images = {str(number): torch.randn(number, *SIZE, generator=torch.Generator().manual_seed(9)) for number in BATCHES}
    plain = Architecture(backbone=backbone, num_classes=10, input_size=SIZE)
    built, outcomes = {}, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        safetensors.torch.save_file(images, folder / "images")
        for index, (kinds, placement) in enumerate(placements.items()):
            architecture = plain.model_copy(update={"placement": placement})
            model = settled(architecture.build(seed=index))
            chosen = [name for name in formats if name == "py" or kinds == "all"]
            built[kinds] = architecture, model, {name: folder / f"network-{index}.{name}" for name in chosen}
            weights = folder / f"weights-{index}.safetensors"
            safetensors.torch.save_file(model.state_dict(), weights)
            for format, path in built[kinds][2].items():
                export(architecture, format, path, weights=weights)
        command = [sys.executable, "-I", "-W", "ignore", "-c", TARGET, str(folder / "images")]
        paths = [str(path) for _, _, own in built.values() for path in own.values()]
        subprocess.run([*command, json.dumps(paths)], check=True, cwd=folder)
        for kinds, (architecture, model, own) in built.items():
            without = plain.build()
            without.load_state_dict({name: model.state_dict()[name] for name in without.state_dict()})
            with torch.no_grad():
                logits = {name: model(x) for name, x in images.items()}
                change = difference(logits["4"], without.eval()(images["4"]))
            differences, back = {}, True
            for format, path in own.items():
                given = safetensors.torch.load_file(f"{path}.logits")
                differences[format] = max(difference(logits[name], given[name]) for name in images)
                if format == "py":
                    tensors, expected = safetensors.torch.load_file(f"{path}.back"), model.state_dict()
                    architecture.build().load_state_dict(tensors, strict=True)
                    back = all(torch.equal(expected[name], tensor) for name, tensor in tensors.items())
            outcomes.append(Outcome(kinds, architecture.placement, differences, change, back))
    return outcomes


def rounding_of(row: pd.Series) -> float:
    """Return by how much the logits of a network in single precision differ from those in double precision.

    Args:
        row: Its row in the table.
    """
    every = placements(row.backbone, row.block)
    architecture = Architecture(backbone=row.backbone, num_classes=10, input_size=SIZE, placement=every[row.kind])
    model, x = settled(architecture.build(seed=list(every).index(row.kind))), torch.randn(4, *SIZE)
    with torch.no_grad():
        return difference(copy.deepcopy(model).double()(x.double()), model(x))


def rows_of(backbone: str) -> pd.DataFrame:
    """Prove all blocks in a backbone; return a row for each network."""
    rows = []
    for block in BLOCKS:
        for seen in prove(backbone, placements(backbone, block), FORMATS):
            measured = {name: f"{number:.1e}" for name, number in seen.differences.items()}
            where = {"backbone": backbone, "block": block, "kind": seen.kinds, "sites": " ".join(seen.placement)}
            rows.append(where | measured | {"weights_back": seen.back, "change": f"{seen.change:.1e}"})
            print(rows[-1], flush=True)
    return pd.DataFrame(rows, columns=COLUMNS)


def write_report(table: pd.DataFrame) -> None:
    """Write the table and what it comes to."""
    worst = {name: pd.to_numeric(table[name]).max() for name in FORMATS}
    bad = int((~table.weights_back).sum()) + sum(number > LARGEST_DIFFERENCE for number in worst.values())
    worst_row = table.loc[pd.to_numeric(table.onnx).idxmax()]
    together = int(table[FORMATS].notna().all(axis=1).sum())
    packages = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "safetensors")
    head = [
        "# Exports, loaded in their targets",
        "",
        f"n = {len(table)} networks ({table.backbone.nunique()} backbones, {table.block.nunique()} blocks, all kinds "
        f"of site), {together} of them in {len(FORMATS)} formats and all as `py`, at {SIZE[1]}x{SIZE[2]}, batches of "
        f"{' and '.join(map(str, BATCHES))}, fp32, seed 0; {platform.machine()}, {torch.get_num_threads()} cores; "
        f"{', '.join(f'{name} {version(name)}' for name in packages)}. "
        "Made by `python tests/benchmarks/exports.py`; the same as [a table](exports.csv).",
        "",
        f"Largest difference of logits, relative to the largest logit, in a process to which placesearch is barred: "
        f"{', '.join(f'{name} {number:.1e}' for name, number in worst.items())} (allowed: {LARGEST_DIFFERENCE:g}). "
        f"Formats above it and networks with other weights: {bad}. The largest one of ONNX is of the size of "
        f"rounding: in {worst_row.backbone} with {worst_row.block}, a deep network of random weights, single precision "
        f"itself differs from double precision by {rounding_of(worst_row):.1e}.",
        "",
        "`kind`: `all` has the block at one site of each kind; else it is at one site, which may be of several kinds. "
        "`weights_back`: the state dict that the `py` export saves loads into `Architecture.build()` with strict=True "
        "and equals what the export was given. `change`, the control: what leaving the blocks out does to the "
        "logits. It is nothing for `spatial` right before a downsampling of ConvNeXt, which begins with a layer norm "
        "over channels: that takes a weight common to all channels of a pixel out again.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---|---|---|---|" + "---:|" * (len(FORMATS) + 2),
    ]
    shown = table.astype(object).where(table.notna(), "").replace({True: "yes", False: "**no**"})
    lines = [f"| {' | '.join(map(str, row))} |" for row in shown.itertuples(index=False)]
    REPORT.write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")


def main() -> None:
    """Prove the backbones that are named, all if none is, and write the report with what is known of the others."""
    backbones, table = sys.argv[1:] or BACKBONES, REPORT.with_suffix(".csv")
    for backbone in backbones:
        fresh = rows_of(backbone)
        known = pd.read_csv(table, dtype=str) if table.exists() else fresh.iloc[:0]
        kept = known[(known.backbone != backbone) & known.backbone.isin(BACKBONES)]
        order = {name: index for index, name in enumerate(BACKBONES)}
        pd.concat([kept, fresh.astype(object)]).sort_values(
            "backbone", key=lambda names: names.map(order), kind="stable"
        ).to_csv(table, index=False)
    write_report(pd.read_csv(table, dtype=dict.fromkeys([*FORMATS, "change"], str)))


if __name__ == "__main__":
    main()
