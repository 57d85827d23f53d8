"""A client app that Flower's simulation can send to its workers."""

from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp

from hf_plugins.dp_fedavg import DPFedAvgConfig, gradient_term
from hf_plugins.dp_fedavg.client import user_level_mod
from hf_plugins.rounds import InProcess
from hf_plugins.rounds.flower import Population, hosted_share, round_client_app
from tests.hf_plugins.dp_fedavg.tiny import config
from tests.hf_plugins.rounds import tiny


def dp(**options: Any) -> DPFedAvgConfig:
    return config(blur=2.0, keep_ratio=0.5, **options)


def populate(context: Context) -> Population:
    clients = [tiny.client(i, terms=[gradient_term]) for i in range(8)]
    return Population(transport=InProcess(tiny.model(), clients), hosted=hosted_share(context, 8))


def simulated_clients() -> ClientApp:
    return round_client_app(populate, mods=[user_level_mod])
