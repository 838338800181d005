"""A bigger plain network, to compare attention with: what would the same parameters do as further residual units?"""

from torchvision.models import ResNet

from placesearch.models.architecture import Architecture
from placesearch.models.backbones import load_backbone, units_of, with_units
from placesearch.models.code import names_code
from placesearch.placement import Placement


def deeper(plain: Architecture, least: int) -> Architecture | None:
    """Return a deeper network of the same family with at least so many parameters, as few more as can be.

    The recipe is the one by which the family itself grows from ResNet-18 to ResNet-152: more residual units in some of
    the four stages (He et al. 2015, table 1, arXiv:1512.03385), a further one having the shape of the last one there.

    Args:
        plain: A backbone; its blocks are left out.
        least: Number of parameters.

    Returns:
        The network, or None if the backbone is no ResNet of torchvision (resnet, resnext and wide_resnet are), or has
        so many parameters already.
    """
    if names_code(plain.backbone) or plain.backbone.startswith("timm:"):
        return None
    model = load_backbone(plain.backbone, plain.num_classes, plain.stem)
    missing = least - sum(weight.numel() for weight in model.parameters())
    if not isinstance(model, ResNet) or missing <= 0:
        return None
    stages = (model.layer1, model.layer2, model.layer3, model.layer4)
    added = [sum(weight.numel() for weight in stage[-1].parameters()) for stage in stages]
    counts = _fewest(added, missing)
    units = tuple(old + new for old, new in zip(units_of(model), counts, strict=True))
    name = with_units(plain.backbone, units)
    return plain.model_copy(update={"backbone": name, "placement": Placement(), "factors": {}, "found": None})


def _fewest(sizes: list[int], least: int) -> tuple[int, ...]:
    """Return how many of each size make up the smallest sum of at least `least`.

    Example:
        >>> _fewest([3, 10], 12)
        (4, 0)
        >>> _fewest([3, 10], 13)
        (1, 1)
    """
    if len(sizes) == 1:
        return (-(-least // sizes[0]),)
    most = -(-least // sizes[-1])
    every = [(*_fewest(sizes[:-1], max(0, least - number * sizes[-1])), number) for number in range(most + 1)]
    return min(every, key=lambda counts: _sum(counts, sizes))


def _sum(counts: tuple[int, ...], sizes: list[int]) -> int:
    return sum(number * size for number, size in zip(counts, sizes, strict=True))
