"""What a network costs."""

from placesearch.costs.counting import profile

__all__ = ["profile"]
