"""HPN: hyper-parameters for each client of a federation, from a network that learns from single rounds."""

from hf_plugins.hpn.agent import HPN
from hf_plugins.hpn.client import HPNClient
from hf_plugins.hpn.config import HPNConfig
from hf_plugins.hpn.dataset import encode_client
from hf_plugins.hpn.server import HPNRun
from hf_plugins.hpn.space import Space, space_from

__all__ = ["HPN", "HPNClient", "HPNConfig", "HPNRun", "Space", "encode_client", "space_from"]
