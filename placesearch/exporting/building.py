"""Models for an export: looked at without memory, or built with the weights that they are to have."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from placesearch.errors import InputError, PlacementError
from placesearch.models.architecture import Architecture
from placesearch.models.backbones import load_backbone
from placesearch.models.blocks import make_block
from placesearch.models.code import names_code
from placesearch.models.copying import initialise
from placesearch.models.sites import Site, every_site
from placesearch.models.weights import DEFAULT, read_weights

MOST_PARAMETERS = 10**9
"""An architecture with more is refused before memory is asked for; the largest network of torchvision has 0.64e9."""


def look_at(architecture: Architecture) -> tuple[nn.Module, list[Site]]:
    """Return an architecture's backbone, without memory where it can be built so, and its sites.

    Args:
        architecture: The architecture.

    Raises:
        BackboneError: If the backbone cannot be built.
        InputError: If backbone and blocks together have more than a billion parameters.
    """
    plain = backbone_without_memory(architecture)
    sites = every_site(plain, architecture.input_size) if architecture.placement else []
    channels = {name: site.channels for site in sites for name in (site.name, *site.aliases)}
    parts = [plain]
    for site, setting in architecture.placement.items():
        with suppress(PlacementError), torch.device("meta"):  # building says more about it
            parts += [] if names_code(setting.block) else [make_block(setting, channels.get(site, 1))]
    count = sum(parameter.numel() for part in parts for parameter in part.parameters())
    if count > MOST_PARAMETERS:
        raise InputError(
            f"the architecture has {count:,} parameters; at most {MOST_PARAMETERS:,} are exported; "
            "look at its num_classes and kernel sizes"
        )
    return plain, sites


def backbone_without_memory(architecture: Architecture) -> nn.Module:
    """Return an architecture's backbone, its tensors without memory where it can be built so.

    Args:
        architecture: The architecture.

    Raises:
        BackboneError: If it cannot be built.
    """

    def make() -> nn.Module:
        backbone = load_backbone(architecture.backbone, architecture.num_classes, architecture.stem)
        initialise(backbone, architecture.input_size)
        return backbone

    return _without_memory(make)


def build_without_memory(architecture: Architecture, sites: Sequence[Site]) -> nn.Module:
    """Return an architecture's model, its tensors without memory where it can be built so.

    Args:
        architecture: The architecture.
        sites: The backbone's sites.

    Raises:
        BackboneError: If the backbone cannot be built.
        PlacementError: If the backbone cannot take the placement.
    """
    return _without_memory(lambda: architecture.build(sites=sites))


def _without_memory(make: Callable[[], nn.Module]) -> nn.Module:
    """Make a network of tensors without memory; some look at numbers while they are made (RegNet), and need it."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return make()
        except PlacementError:
            raise
        except Exception:  # noqa: BLE001 - networks raise anything; what is wrong in any case is raised again
            return make()


def build_for_export(architecture: Architecture, weights: str | Path | None) -> nn.Module:
    """Build a model in eval mode, with all of its weights from a file, or fresh ones that are always the same.

    Args:
        architecture: What to build.
        weights: A file with the state dict of this very architecture; None: fresh weights.

    Raises:
        BackboneError: If the backbone cannot be built.
        InputError: If it has more than a billion parameters, or the file does not hold exactly its weights.
        PlacementError: If the backbone cannot take the placement.
    """
    _, sites = look_at(architecture)
    model = architecture.build(seed=0, sites=sites).eval()
    if weights is not None:
        if str(weights) == DEFAULT:
            raise InputError(f"{DEFAULT} weights know no blocks; give a file with the weights of this architecture")
        checkpoint = read_weights(weights, architecture.backbone)
        _load_all(model, checkpoint.tensors, checkpoint.name)
    return model


def _load_all(model: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    own = model.state_dict()
    problems = [
        *(f"lacks '{key}'" for key in own if key not in tensors),
        *(f"has the unknown '{key}'" for key in tensors if key not in own),
        *(
            f"has '{key}' of shape {tuple(tensors[key].shape)} in place of {tuple(own[key].shape)}"
            for key in own
            if key in tensors and own[key].shape != tensors[key].shape
        ),
    ]
    if problems:
        more = f" and {len(problems) - 1} more" if problems[1:] else ""
        raise InputError(f"the weights {name} are not those of this architecture: the file {problems[0]}{more}")
    model.load_state_dict(tensors)
