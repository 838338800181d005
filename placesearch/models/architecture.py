"""Architectures: everything that is needed to rebuild a model, as a value and as a YAML file."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from torch import nn

from placesearch.config import first_problem, read_yaml, shown
from placesearch.errors import InputError, PlacementError
from placesearch.models.backbones import load_backbone
from placesearch.models.code import names_code
from placesearch.models.copying import initialise
from placesearch.models.insertion import factors_of, insert, set_factors
from placesearch.models.sites import Site, every_site
from placesearch.models.weights import Checkpoint, load_weights, read_weights
from placesearch.placement import BlockSetting, Placement

_ENTRY_KEYS = {"site", "block", "reduction", "kernel_size"}
_MOST = {"reduction": 1_000_000, "kernel_size": 2 * 8192 - 1}
"""Largest numbers in a file: a larger window has parts that meet no map of the largest input."""

_PLACEMENT_SCHEMA = {
    "type": "array",
    "description": "Which block goes where; every site at most once.",
    "items": {
        "type": "object",
        "properties": {
            "site": {"type": "string", "pattern": r"^[^\s=]+$", "description": "Name of a module of the backbone."},
            "block": {"type": "string", "description": "A block such as se or cbam, or package.module:Class."},
            "reduction": {"type": "integer", "minimum": 1, "maximum": _MOST["reduction"]},
            "kernel_size": {
                "type": "integer",
                "minimum": 1,
                "maximum": _MOST["kernel_size"],
                "not": {"multipleOf": 2},
            },
        },
        "required": ["site", "block"],
        "additionalProperties": False,
    },
}
"""What `_read_placement` takes, in the words of JSON schema."""


def _read_placement(value: Any) -> Any:
    if isinstance(value, Placement):
        return value
    if not isinstance(value, list):
        raise ValueError("expected a list of entries such as {site: layer1.0.bn2, block: se, reduction: 16}")
    pairs = []
    for entry in value:
        if not isinstance(entry, dict) or not {"site", "block"} <= set(entry) <= _ENTRY_KEYS:
            raise ValueError(f"an entry has the keys site, block, reduction and kernel_size, got {shown(entry)}")
        if not all(isinstance(entry[key], str | int | float) for key in ("site", "block")):
            raise ValueError(f"site and block are names, got {shown(entry)}")
        numbers = {key: entry[key] for key in ("reduction", "kernel_size") if key in entry}
        for key, number in numbers.items():
            if type(number) is not int or not 1 <= number <= _MOST[key]:
                raise ValueError(f"{key} {shown(number)} is no whole number within 1..{_MOST[key]}")
        try:
            pairs.append((str(entry["site"]), BlockSetting(str(entry["block"]), **numbers)))
        except PlacementError as error:
            raise PlacementError(f"site '{entry['site']}': {error}") from None
    return Placement(pairs)


def _write_placement(placement: Placement) -> list[dict[str, Any]]:
    entries = []
    for site, setting in placement.items():
        numbers = {"reduction": setting.reduction, "kernel_size": setting.kernel_size}
        entries.append(
            {"site": site, "block": setting.block} | {key: value for key, value in numbers.items() if value is not None}
        )
    return entries


class Found(BaseModel):
    """Where an architecture comes from, and what was measured there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    study: str
    trial: Annotated[int, Field(ge=0)]
    val_accuracy: Annotated[float, Field(ge=0, le=1)] | None = None
    macs: Annotated[int, Field(ge=0)] | None = None
    params: Annotated[int, Field(ge=0)] | None = None


def _for_files(schema: dict[str, Any]) -> None:
    """Say in the schema what `load` asks for beyond the model: a file has its version."""
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "placesearch architecture file, format version 1"
    schema["description"] = "A backbone with its stem, a placement, a number of classes and an input size."
    schema["required"] = ["placesearch", *schema["required"]]


class Architecture(BaseModel):
    """A backbone with its stem, a placement, a number of classes and an input size.

    `architecture.schema.json`, beside this module, says in JSON schema what a file of it may hold.

    Args:
        backbone: A torchvision name or `package.module:function`.
        num_classes: Width of the classifier.
        input_size: Channels, height and width of the input.
        placement: Which block goes where.
        factors: For blocks that started as the identity and could not be folded, what their gates are multiplied by.
        stem: `original` or `small`; see `load_backbone`.
        found: Where it comes from.

    Raises:
        InputError: If a value is not legal.

    Example:
        >>> architecture = Architecture(
        ...     backbone="resnet18", num_classes=10, input_size=(3, 64, 64),
        ...     placement=Placement.parse("layer4.1.bn2=se(r=16)"),
        ... )
        >>> sum(p.numel() for p in architecture.build().parameters())
        11214954
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, json_schema_extra=_for_files)

    placesearch: Literal[1] = 1
    backbone: Annotated[str, Field(min_length=1, max_length=500)]
    stem: Literal["original", "small"] = "original"
    num_classes: Annotated[int, Field(ge=1, le=1_000_000)]
    input_size: tuple[
        Annotated[int, Field(ge=1, le=64)], Annotated[int, Field(ge=1, le=8192)], Annotated[int, Field(ge=1, le=8192)]
    ]
    placement: Annotated[
        Placement,
        BeforeValidator(_read_placement),
        PlainSerializer(_write_placement),
        WithJsonSchema(_PLACEMENT_SCHEMA),
    ] = Field(default_factory=Placement)
    factors: dict[str, Annotated[float, Field(gt=0, le=100)]] = {}
    found: Found | None = None

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError(first_problem(error)) from None

    @model_validator(mode="after")
    def _factors_have_blocks(self) -> Self:
        for site in self.factors:
            if site not in self.placement:
                raise ValueError(f"factors: there is no block at '{site}'")
        return self

    @classmethod
    def load(cls, path: str | Path, allow: Collection[str] = ()) -> Self:
        """Read an architecture file.

        Args:
            path: The file.
            allow: Names `package.module:function` of code that the file may name. Code in files is imported only
                if it is repeated here.

        Raises:
            InputError: If the file cannot be read, is of a newer format, has unknown keys or illegal values, or names
                code that is not allowed.
        """
        path = Path(path)
        content = read_yaml(path)
        version = content.get("placesearch")
        if type(version) is int and version > 1:
            raise InputError(
                f"{path} has format version {shown(version)}; this placesearch reads version 1, a newer one is needed"
            )
        if version != 1:
            raise InputError(f"{path} is no architecture file: it lacks the line 'placesearch: 1'")
        try:
            architecture = cls(**content)
        except (InputError, TypeError) as error:
            raise InputError(f"{path}: {error}") from None
        for name in (architecture.backbone, *(setting.block for setting in architecture.placement.values())):
            if names_code(name) and name not in allow:
                raise InputError(f"{path} names code, '{name}'; if you trust it, allow it by that name")
        return architecture

    def save(self, path: str | Path) -> None:
        """Write the architecture file that `load` reads."""
        Path(path).write_text(self.to_yaml(), encoding="utf-8")

    def to_yaml(self) -> str:
        """Return the text of the architecture file."""
        content = self.model_dump(mode="json", exclude_none=True)
        found = content.pop("found", None)
        if not self.factors:
            del content["factors"]
        text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120)
        return text + (yaml.safe_dump({"found": found}, sort_keys=False) if found else "")

    def build(
        self,
        num_classes: int | None = None,
        *,
        weights: str | Path | Checkpoint | None = None,
        initial: str = "standard",
        seed: int | None = None,
        sites: Sequence[Site] | None = None,
    ) -> nn.Module:
        """Build the model.

        Args:
            num_classes: Width of the classifier, if another than the architecture's own.
            weights: What to start from: `DEFAULT` (torchvision's or timm's pretrained weights), a checkpoint file of
                the plain backbone or of this model, or one that was read already. A classifier of another width and
                blocks that the checkpoint lacks keep fresh weights. None: all weights are fresh.
            initial: How fresh blocks start, `standard` or `identity`; see `insert`.
            seed: Makes fresh weights a function of this seed: the backbone's are the same for every placement, and
                the same block at the same site starts the same. None takes torch's global random numbers.
            sites: The backbone's sites, where they are known already.

        Raises:
            BackboneError: If the backbone cannot be built, or the weights do not fit it.
            InputError: If the weights cannot be read.
            PlacementError: If the backbone cannot take the placement.
        """
        classes = self.num_classes if num_classes is None else num_classes
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            backbone = load_backbone(self.backbone, classes, self.stem)
            initialise(backbone, self.input_size)
        try:
            model = insert(
                backbone, self.placement, input_size=self.input_size, sites=sites, seed=seed, initial=initial
            )
        except PlacementError as error:
            raise PlacementError(f"{self.backbone}: {error}") from None
        if initial == "standard":
            set_factors(model, self.factors)
        if weights is not None:
            checkpoint = weights if isinstance(weights, Checkpoint) else read_weights(weights, self.backbone)
            load_weights(model, checkpoint)
        return model

    def with_factors_of(self, model: nn.Module) -> Self:
        """Return the architecture with the factors that the blocks of its model have, to save it with them.

        Args:
            model: What `build` returned, trained perhaps, and perhaps folded since.

        Returns:
            The architecture; if a site with a factor went by an alias, all sites go by their names.
        """
        factors, placement = factors_of(model), self.placement
        if not factors.keys() <= dict(placement.items()).keys():  # a site goes by an alias; factors go by its name
            sites = every_site(load_backbone(self.backbone, 1, self.stem), self.input_size)
            named = {alias: site.name for site in sites for alias in (site.name, *site.aliases)}
            placement = Placement({named[site]: setting for site, setting in placement.items()})
        return self.model_copy(update={"factors": factors, "placement": placement})
