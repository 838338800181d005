"""Find out where attention blocks help in a convolutional network, and what they cost."""

from placesearch.config import StudyConfig
from placesearch.confirming import confirm
from placesearch.costs import CostTable, profile
from placesearch.earnest import Trained, train
from placesearch.errors import (
    BackboneError,
    DataError,
    InputError,
    PlacementError,
    PlacesearchError,
    StudyError,
    TrainingError,
)
from placesearch.evaluation.own import Candidate
from placesearch.exporting.formats import export
from placesearch.joining import Worked, work
from placesearch.models.architecture import Architecture
from placesearch.models.insertion import fold, insert
from placesearch.models.sites import Site, find_sites
from placesearch.models.transfer import Transfer, transfer
from placesearch.placement import BlockSetting, Placement
from placesearch.records import Cost
from placesearch.study import Study, load_study, run

__all__ = [
    "Architecture",
    "BackboneError",
    "BlockSetting",
    "Candidate",
    "Cost",
    "CostTable",
    "DataError",
    "InputError",
    "Placement",
    "PlacementError",
    "PlacesearchError",
    "Site",
    "Study",
    "StudyConfig",
    "StudyError",
    "Trained",
    "TrainingError",
    "Transfer",
    "Worked",
    "confirm",
    "export",
    "find_sites",
    "fold",
    "insert",
    "load_study",
    "profile",
    "run",
    "train",
    "transfer",
    "work",
]
