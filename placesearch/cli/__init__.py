"""The command line."""

from placesearch.cli.commands import main

__all__ = ["main"]
