"""Kinds of option that several commands have."""

from typing import Any

import click

from placesearch.config import read_input_size


class InputSizeOption(click.ParamType[int | tuple[int, ...]]):
    """An input size: `64`, `256x512` or `1x28x28`."""

    name = "input size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | tuple[int, ...]:
        """Read it, or say what is wrong with it."""
        try:
            return read_input_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
