"""What a network costs."""

from placesearch.costs.counting import block_costs, profile

__all__ = ["block_costs", "profile"]
