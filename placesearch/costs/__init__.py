"""What a network costs."""

from placesearch.costs.additive import CostTable
from placesearch.costs.counting import profile

__all__ = ["CostTable", "profile"]
