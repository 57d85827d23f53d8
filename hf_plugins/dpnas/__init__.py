"""DPNAS: search a network for training with differential privacy, and train the networks it found."""

from hf_plugins.dpnas.agent import SearchResult, search
from hf_plugins.dpnas.config import DPNASSearchConfig
from hf_plugins.dpnas.genotypes import Genotype
from hf_plugins.dpnas.model import DPNASNetConfig, DPNASNetForImageClassification, DPNASNetImageProcessor

__all__ = [
    "DPNASNetConfig",
    "DPNASNetForImageClassification",
    "DPNASNetImageProcessor",
    "DPNASSearchConfig",
    "Genotype",
    "SearchResult",
    "search",
]
