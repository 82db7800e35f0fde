"""NOAH's procedure: train a supernet, search it under a limit of parameters, train what was found."""

from dyntune.studies.noah.evolution import Candidate, SearchSettings
from dyntune.studies.noah.pipeline import NoahResult, SearchResult, search_noah, train_noah

__all__ = ["Candidate", "NoahResult", "SearchResult", "SearchSettings", "search_noah", "train_noah"]
