"""Placements as plain values: which block, with which settings, at which sites.

Nothing here knows a network: two placements can be read, compared and sorted without torch.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from placesearch.errors import PlacementError

_SETTING = re.compile(r"(?P<block>[a-z][a-z0-9_]*|[\w.]+:\w+)(?:\((?P<arguments>[^()]*)\))?")
_SITE = re.compile(r"[^\s=]+")  # a module may bear nearly any name: RegNet has `block1-0`
_SHORT = {"r": "reduction", "k": "kernel_size"}


@dataclass(frozen=True, slots=True)
class BlockSetting:
    """One block with its settings, such as `cbam(r=16,k=7)`.

    Args:
        block: Name of the block as in the table of blocks, or `package.module:Class`.
        reduction: The divisor r of the SE paper, at least 1; None for a block without one.
        kernel_size: Odd side of the spatial window in pixels; None for a block without one.

    Raises:
        PlacementError: If a setting is out of range.

    Example:
        >>> BlockSetting.parse("cbam(r=8,k=7)")
        BlockSetting(block='cbam', reduction=8, kernel_size=7)
        >>> str(BlockSetting("se", reduction=16))
        'se(r=16)'
    """

    block: str
    reduction: int | None = None
    kernel_size: int | None = None

    def __post_init__(self) -> None:
        if not _SETTING.fullmatch(self.block):
            raise PlacementError(f"'{self.block}' is no name of a block; expected a word such as 'se' or 'cbam'")
        if self.reduction is not None and self.reduction < 1:
            raise PlacementError(f"reduction {self.reduction} of {self.block} is not allowed; allowed are 1, 2, 3, ...")
        if self.kernel_size is not None and (self.kernel_size < 1 or self.kernel_size % 2 == 0):
            raise PlacementError(
                f"kernel size {self.kernel_size} of {self.block} is not allowed; allowed are odd ones: 1, 3, 5, ..."
            )

    def __str__(self) -> str:
        given = {short: getattr(self, name) for short, name in _SHORT.items()}
        arguments = ",".join(f"{short}={value}" for short, value in given.items() if value is not None)
        return f"{self.block}({arguments})" if arguments else self.block

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the form that `str` writes.

        Raises:
            PlacementError: If the text is not of the form `block(r=NUMBER,k=NUMBER)`.
        """
        match = _SETTING.fullmatch(text)
        if match is None:
            raise PlacementError(f"cannot read block '{text}'; expected a form such as 'se(r=16)' or 'cbam(r=8,k=7)'")
        settings: dict[str, Any] = {}
        for part in (match["arguments"] or "").split(",") if match["arguments"] is not None else ():
            short, _, value = part.partition("=")
            name = _SHORT.get(short.strip())
            if name is None or name in settings or not re.fullmatch(r"-?[0-9]{1,9}", value.strip()):
                raise PlacementError(f"cannot read '{part}' in block '{text}'; settings are r=NUMBER and k=NUMBER")
            settings[name] = int(value)
        return cls(match["block"], **settings)


def natural_key(site: str) -> tuple[tuple[str, int], ...]:
    """Sort key by which `layer2.9` comes before `layer2.10`.

    Example:
        >>> sorted(["layer2.10", "layer2.9", "conv"], key=natural_key)
        ['conv', 'layer2.9', 'layer2.10']
    """
    return tuple((word, int(number or -1)) for word, number in re.findall(r"([^0-9]*)([0-9]*)", site))


class Placement(Mapping[str, BlockSetting]):
    """Which block goes where: an immutable mapping from site name to block setting, in canonical order.

    Equal placements have equal texts and hashes, whatever order they were written in.

    Args:
        blocks: Site names and their block settings.

    Raises:
        PlacementError: If a site is named twice or its name is not a module path.

    Example:
        >>> placement = Placement.parse("layer2.10.bn2=se(r=4) layer2.9.bn2=cbam(r=8,k=7)")
        >>> str(placement)
        'layer2.9.bn2=cbam(r=8,k=7) layer2.10.bn2=se(r=4)'
        >>> str(Placement())
        'none'
    """

    __slots__ = ("_blocks", "_text")

    def __init__(self, blocks: Mapping[str, BlockSetting] | Iterable[tuple[str, BlockSetting]] = ()) -> None:
        pairs = list(blocks.items() if isinstance(blocks, Mapping) else blocks)
        for site, _ in pairs:
            if not _SITE.fullmatch(site):
                raise PlacementError(f"'{site}' is no site name; expected a module path such as 'layer1.0.bn2'")
        self._blocks: dict[str, BlockSetting] = dict(sorted(pairs, key=lambda pair: (natural_key(pair[0]), pair[0])))
        if len(self._blocks) < len(pairs):
            twice = next(site for index, (site, _) in enumerate(pairs) if site in dict(pairs[:index]))
            raise PlacementError(f"site '{twice}' is named twice; a site takes one block")
        self._text = " ".join(f"{site}={setting}" for site, setting in self._blocks.items()) or "none"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text form: `SITE=BLOCK(r=..,k=..)` separated by blanks, or `none`.

        Raises:
            PlacementError: If the text has another form.
        """
        if text.strip() == "none":
            return cls()
        pairs = []
        for word in text.split():
            site, equals, setting = word.partition("=")
            if not equals:
                raise PlacementError(f"cannot read '{word}'; expected SITE=BLOCK, such as 'layer1.0.bn2=se(r=16)'")
            try:
                pairs.append((site, BlockSetting.parse(setting)))
            except PlacementError as error:
                raise PlacementError(f"site '{site}': {error}") from None
        if not pairs:
            raise PlacementError("the placement is empty; write 'none' for a network without blocks")
        return cls(pairs)

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"Placement.parse({str(self)!r})"

    def __getitem__(self, site: str) -> BlockSetting:
        return self._blocks[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Placement) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)
