"""The round engine over Flower: jobs and updates as messages, a transport over the grid, a client app.

One SuperNode may hold one user (a phone) or many (a hospital's patients, a simulation's share): it answers
the query ``query.hosted`` with the ids of the users it holds, and gets one message for each of them that is
drawn. Only Flower's Message API is used, and none of its privacy wrappers.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from torch import Tensor, from_numpy

from hf_plugins.rounds.transport import InProcess
from hf_plugins.rounds.update import Dropped, Job, RoundContext, Update
from hf_plugins.rounds.vector import Layout, digest

logger = logging.getLogger(__name__)
ARRAYS, CONFIG, UPDATE, GRADIENT, METRICS, ECHO = (
    "arrays",
    "config",
    "update",
    "gradient",
    "metrics",
    "rounds",
)
_CLIENT, _ROUND, _SEED, _BASE = "rounds.client", "rounds.round", "rounds.seed", "rounds.base"


def to_arrays(layout: Layout, vector_D: Tensor) -> ArrayRecord:
    """A vector as Flower's named arrays, names as in the model."""
    return ArrayRecord({name: Array(part.cpu().numpy()) for name, part in layout.named(vector_D).items()})


def from_arrays(layout: Layout, record: ArrayRecord) -> Tensor:
    """Flower's named arrays as a vector.

    Raises:
        ValueError: If names or shapes are not the model's.
    """
    return layout.flatten({name: from_numpy(array.numpy().copy()) for name, array in record.items()})


def layout_of(record: ArrayRecord) -> Layout:
    """Names and shapes of named arrays."""
    return Layout({name: tuple(array.shape) for name, array in record.items()})


def job_record(job: Job, base: int) -> ConfigRecord:
    """A job as Flower's config record: the job's own keys, and the client's config beside them."""
    own = {_CLIENT: job.client_id, _ROUND: job.round_index, _SEED: job.seed, _BASE: base}
    return ConfigRecord({**job.config, **own})  # type: ignore[arg-type]


def read_job(record: ConfigRecord) -> Job:
    """The job in a config record."""
    own = {_CLIENT, _ROUND, _SEED, _BASE}
    return Job(
        client_id=int(record[_CLIENT]),  # type: ignore[arg-type]
        round_index=int(record[_ROUND]),  # type: ignore[arg-type]
        seed=int(record[_SEED]),  # type: ignore[arg-type]
        config={name: value for name, value in record.items() if name not in own},  # type: ignore[misc]
    )


def reply_with(update: Update, layout: Layout, message: Message) -> Message:
    """An update as the reply to a job; a gradient goes along for the mod that finishes the update."""
    echo = {_CLIENT: update.client_id, _ROUND: update.round_index}
    if update.base is not None:
        echo[_BASE] = update.base
    content = RecordDict(
        {
            UPDATE: to_arrays(layout, update.vector_D),
            METRICS: MetricRecord({**update.metrics, "num-examples": update.num_examples}),
            ECHO: ConfigRecord(echo),  # type: ignore[arg-type]
        }
    )
    if update.gradient_D is not None:
        content[GRADIENT] = to_arrays(layout, update.gradient_D)
    return Message(content, reply_to=message)


def read_update(content: RecordDict, layout: Layout, job: Job) -> Update | Dropped:
    """The update in a reply, or why it is none."""
    record = content.array_records.get(UPDATE)
    if record is None:
        return Dropped(client_id=job.client_id, reason="wrong shape", detail="the reply holds no update")
    try:
        vector = from_arrays(layout, record)
    except ValueError as error:
        return Dropped(client_id=job.client_id, reason="wrong shape", detail=str(error))
    echo = content.config_records.get(ECHO, ConfigRecord())
    figures = dict(content.metric_records.get(METRICS, MetricRecord()).items())
    size = figures.pop("num-examples", 1)
    gradient = content.array_records.get(GRADIENT)
    return Update(
        client_id=job.client_id,
        round_index=int(echo.get(_ROUND, -1)),  # type: ignore[arg-type]
        vector_D=vector,
        num_examples=int(size) if isinstance(size, int | float) and math.isfinite(size) else -1,
        metrics={name: float(v) for name, v in figures.items() if isinstance(v, int | float)},
        gradient_D=None if gradient is None else from_arrays(layout, gradient),
        base=int(echo[_BASE]) if _BASE in echo else None,  # type: ignore[arg-type]
    )


@dataclass(kw_only=True)
class Population:
    """The users that one node holds."""

    transport: InProcess
    """Resident model and clients; only those of ``hosted`` are asked for."""
    hosted: Sequence[int]
    """Their ids."""


def round_client_app(
    populate: Callable[[Context], Population], *, mods: Sequence[Any] = (), finish_needed: bool = True
) -> ClientApp:
    """A ClientApp whose node trains the users it holds.

    Args:
        populate: Builds the node's users from its context; called once for each process and node.
        mods: Flower mods of the train function, outermost first.
        finish_needed: Send an update's gradient on to the mods. Without a mod that takes it off the server
            refuses such updates.

    Returns:
        The app, with ``train``, ``evaluate`` and ``query.hosted``.
    """
    app = ClientApp()
    known: dict[tuple[int, int], Population] = {}

    def population(context: Context) -> Population:
        key = (context.run_id, context.node_id)
        if key not in known:
            known.clear()
            known[key] = populate(context)
        return known[key]

    @app.train(mods=list(mods))
    def train(message: Message, context: Context) -> Message:
        transport = population(context).transport
        job = read_job(message.content.config_records[CONFIG])
        start = from_arrays(transport.weights, message.content.array_records[ARRAYS])
        with transport.resident(start, job):
            update = transport.clients[job.client_id].train(transport.weights, job)
        update.base = digest(start)
        if not finish_needed:
            update.gradient_D = None
        return reply_with(update, transport.weights, message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        transport = population(context).transport
        job = read_job(message.content.config_records[CONFIG])
        start = from_arrays(transport.weights, message.content.array_records[ARRAYS])
        found = dict(transport.evaluate([job], start)).get(job.client_id, {})
        echo = ConfigRecord({_CLIENT: job.client_id, _ROUND: job.round_index})
        return Message(RecordDict({METRICS: MetricRecord(dict(found)), ECHO: echo}), reply_to=message)

    @app.query("hosted")
    def hosted(message: Message, context: Context) -> Message:
        ids = [int(i) for i in population(context).hosted]
        return Message(RecordDict({CONFIG: ConfigRecord({"client-ids": ids})}), reply_to=message)

    return app


def hosted_share(context: Context, num_clients: int) -> list[int]:
    """Users of a node that holds every n-th one: those with ``id % num-partitions == partition-id``.

    Raises:
        ValueError: If the node's config does not say which part it is.
    """
    part, parts = context.node_config.get("partition-id"), context.node_config.get("num-partitions")
    if not isinstance(part, int) or not isinstance(parts, int) or not 0 <= part < parts:
        raise ValueError(
            "the node must know its part of the users; start it with "
            f"--node-config 'partition-id=0 num-partitions=2'. Got {part!r} of {parts!r}."
        )
    return list(range(part, num_clients, parts))


class FlowerTransport:
    """The way to clients over Flower's grid; see `hf_plugins.rounds.Transport`.

    Args:
        grid: Of the ServerApp.
        layout: Names and shapes of the trained parameters.
        num_clients: Users in all. Fixed: one that no connected node holds counts as drawn and not answered,
            so the sampling that is accounted for stays true.
        num_nodes: Wait for this many nodes before the first round.
        timeout: Seconds to wait for a round's answers; who is late is left out.
        poll: Seconds between looks at the grid while waiting for nodes.
    """

    def __init__(
        self,
        grid: Grid,
        layout: Layout,
        *,
        num_clients: int,
        num_nodes: int = 1,
        timeout: float = 3600.0,
        poll: float = 0.5,
    ) -> None:
        self.grid, self.layout, self.num_clients = grid, layout, num_clients
        self.num_nodes, self.timeout, self.poll = num_nodes, timeout, poll
        self._host_of: dict[int, int] = {}
        self._asked: set[int] = set()

    def client_ids(self) -> Sequence[int]:
        """All users."""
        return range(self.num_clients)

    def hosts(self) -> dict[int, int]:
        """``{client id: node id}`` of the nodes that are connected now; new ones are asked whom they hold."""
        nodes = set(self._wait_for_nodes())
        self._host_of = {c: n for c, n in self._host_of.items() if n in nodes}
        new = nodes - self._asked
        self._asked = (self._asked & nodes) | new
        queries = [Message(RecordDict(), dst_node_id=n, message_type="query.hosted") for n in sorted(new)]
        for reply in self._send(queries):
            if reply.has_error():
                logger.warning(
                    "node %d holds no known users: %s", reply.metadata.src_node_id, reply.error.reason
                )
                continue
            for client in reply.content.config_records[CONFIG]["client-ids"]:  # type: ignore[union-attr]
                self._host_of[int(client)] = reply.metadata.src_node_id
        return self._host_of

    def _wait_for_nodes(self) -> list[int]:
        deadline = time.monotonic() + self.timeout
        while len(nodes := list(self.grid.get_node_ids())) < self.num_nodes:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"{len(nodes)} of {self.num_nodes} nodes have connected within {self.timeout:g} "
                    "s; start the missing SuperNodes, or lower num_nodes."
                )
            time.sleep(self.poll)
        return nodes

    def _send(self, messages: list[Message]) -> list[Message]:
        return list(self.grid.send_and_receive(messages, timeout=self.timeout)) if messages else []

    def train(self, jobs: Sequence[Job], context: RoundContext) -> Iterator[Update | Dropped]:
        """Send the jobs, wait, and give back the answers in the order of the jobs."""
        messages = self.messages(jobs, context.start_D, base=context.base, kind="train")
        yield from self.answers(jobs, self._send(messages))

    def evaluate(self, jobs: Sequence[Job], vector_D: Tensor) -> Iterator[tuple[int, dict[str, float]]]:
        """Figures from each user that answers."""
        messages = self.messages(jobs, vector_D, base=digest(vector_D), kind="evaluate")
        found = {}
        for reply in self._send(messages):
            if not reply.has_error() and (figures := dict(reply.content.metric_records[METRICS])):
                found[int(reply.content.config_records[ECHO][_CLIENT])] = figures  # type: ignore[arg-type]
        yield from sorted(found.items())  # type: ignore[misc]

    def messages(self, jobs: Sequence[Job], vector_D: Tensor, *, base: int, kind: str) -> list[Message]:
        """One message for each job whose user some node holds."""
        hosts = self.hosts() if jobs else {}
        arrays = to_arrays(self.layout, vector_D)
        return [
            Message(
                RecordDict({ARRAYS: arrays, CONFIG: job_record(job, base)}),
                dst_node_id=hosts[job.client_id],
                message_type=kind,
            )
            for job in jobs
            if job.client_id in hosts
        ]

    def answers(self, jobs: Sequence[Job], replies: Iterable[Message]) -> Iterator[Update | Dropped]:
        """Replies as updates, in the order of the jobs; a job without one is `Dropped`."""
        by_id = {job.client_id: job for job in jobs}
        found: dict[int, Update | Dropped] = {}
        errors: dict[int, str] = {}
        for reply in replies:
            if reply.has_error():
                errors[reply.metadata.src_node_id] = str(reply.error.reason)
                continue
            client = reply.content.config_records.get(ECHO, ConfigRecord()).get(_CLIENT)
            if isinstance(client, int) and client in by_id and client not in found:
                # A node may only answer for users it holds: else one node could speak for another's.
                if self._host_of.get(client) == reply.metadata.src_node_id:
                    found[client] = read_update(reply.content, self.layout, by_id[client])
        for job in jobs:
            host = self._host_of.get(job.client_id)
            missing = (
                Dropped(client_id=job.client_id, reason="died", detail=errors[host])
                if host in errors
                else Dropped(client_id=job.client_id, reason="no answer")
            )
            yield found.get(job.client_id, missing)
