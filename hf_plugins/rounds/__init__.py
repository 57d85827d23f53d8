"""The federated round engine that methods share, and the plumbing of a Flower app.

A method brings functions; the engine draws the cohort, hands out jobs, checks the answers, aggregates, saves
and resumes. The same engine runs many clients in one process and many machines through Flower::

    from hf_plugins.rounds import InProcess, LocalTraining, RoundEngine, Sampling
    from hf_plugins.rounds import TorchClient, TrainableVector, weighted_average

    def loss(model, batch):                                   # one loss for each record
        images, labels = batch
        return F.cross_entropy(model(images), labels, reduction="none")

    clients = [TorchClient(i, records[i], loss=loss, training=LocalTraining(learning_rate=0.1)) for i in ...]
    engine = RoundEngine(
        InProcess(model, clients),
        TrainableVector(model).read(),
        sampling=Sampling(mode="poisson", rate=0.1),
        aggregate=weighted_average,                           # or a function of your own
        configure=lambda context, client_id: {"learning_rate": rates[client_id]},
        folder="work_dirs/run", seed=0,
    )
    history = engine.run(num_rounds=100)                      # resumes from the folder by itself
    TrainableVector(model).write_(engine.vector_D)

====================  ================================================================================
part                  what it is
====================  ================================================================================
`TrainableVector`     a model's trainable parameters as one flat vector: ``read() write_(v)
                      named(v) flatten(d)``
`Client`              protocol: ``client_id``, ``train(weights, job) -> Update``, ``evaluate(weights, job)``
`TorchClient`         tensors and a plain loop; options `LocalTraining`, each overridable by the job's config
`TrainerClient`       a transformers ``Trainer`` in each round; config keys are fields of its arguments
`LazyClients`         clients made when asked for: memory is that of the one that trains
`Job`                 client, round, seed and config: all that a client's work depends on besides its data
`Update`              what comes back: flat difference, size claimed, metrics
`Sampling`            who takes part: poisson, fixed, all; the accountant's names
`RoundContext`        one round: index, seed, cohort, start model, dropped clients, metrics of each client
`Aggregator`          ``aggregate(updates, context) -> Aggregate(step_D, metrics)``; updates come one
                      at a time
`GradientTerm`        a method's addition to each local gradient (proximal term, BLUR)
`Finish`              a method's last touch on an update before it leaves its client (sparsify, clip)
`Transport`           the way to the clients: `InProcess`, `GroupedInProcess` (many small clients side by
                      side), or Flower's grid (`hf_plugins.rounds.flower`)
`RoundEngine`         ``run(n)``; ``step(start, round)``: one round from any model that changes no state
                      of the engine (for searches: ``configure``, a chosen ``cohort``, same draws again);
                      ``evaluate_clients(vector)``; ``save() resume()``
====================  ================================================================================

Rules that a method may rely on: every draw is a function of (seed, round, client), so two calls of ``step``
with the same arguments agree bit for bit, a resumed run equals the uninterrupted one, and in process equals
Flower; updates reach the aggregator in the order of their clients' ids; an update that is not finite, has a
wrong shape, is out of date or did not come is left out, counted in ``context.dropped`` and logged under
``rounds/dropped/REASON``; config keys with a dot (``hpn.dropout``) are for a method's own hooks, other keys
must be options of local training; the checkpoint is written before the new model is sent to anybody.
"""

from typing import TYPE_CHECKING, Any

from hf_plugins.rounds.cohort import Sampling
from hf_plugins.rounds.engine import Outcome, RoundEngine, Stateful
from hf_plugins.rounds.partition import dirichlet_split, split_by
from hf_plugins.rounds.seeds import generator_for, seed_for
from hf_plugins.rounds.training import Client, LocalTraining, TorchClient
from hf_plugins.rounds.transport import InProcess, LazyClients, Transport
from hf_plugins.rounds.update import (
    Aggregate,
    Aggregator,
    ClientFailed,
    Config,
    Configure,
    Dropped,
    Finish,
    GradientTerm,
    Job,
    RoundContext,
    Update,
    plain_mean,
    weighted_average,
)
from hf_plugins.rounds.vector import TrainableVector
from hf_plugins.rounds.vectorised import GroupedInProcess

if TYPE_CHECKING:
    from hf_plugins.rounds.trainer_client import TrainerClient

__all__ = [
    "Aggregate",
    "Aggregator",
    "Client",
    "ClientFailed",
    "Config",
    "Configure",
    "Dropped",
    "Finish",
    "GradientTerm",
    "GroupedInProcess",
    "InProcess",
    "Job",
    "LazyClients",
    "LocalTraining",
    "Outcome",
    "RoundContext",
    "RoundEngine",
    "Sampling",
    "Stateful",
    "TorchClient",
    "TrainableVector",
    "TrainerClient",
    "Transport",
    "Update",
    "dirichlet_split",
    "generator_for",
    "plain_mean",
    "seed_for",
    "split_by",
    "weighted_average",
]


def __getattr__(name: str) -> Any:
    # transformers is heavy, and clients with a plain loop do without.
    if name == "TrainerClient":
        from hf_plugins.rounds.trainer_client import TrainerClient

        return TrainerClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
