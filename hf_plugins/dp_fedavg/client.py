"""Flower's ClientApp: the users of a recipe, with LUS and clipping as a mod around their training."""

from typing import Any

from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp.typing import ClientAppCallable

from hf_plugins.dp_fedavg.config import flower_recipe
from hf_plugins.dp_fedavg.hook import FinishUpdate
from hf_plugins.dp_fedavg.trainer import build_task
from hf_plugins.rounds import InProcess, Update
from hf_plugins.rounds.flower import (
    ARRAYS,
    CONFIG,
    UPDATE,
    Population,
    from_arrays,
    hosted_share,
    layout_of,
    read_job,
    read_update,
    reply_with,
    round_client_app,
)
from hf_plugins.rounds.vector import digest


def user_level_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Flower mod: what leaves the node is sparsified, clipped and (with shares) noised, and nothing else.

    Put it around any train function, outermost: ``@app.train(mods=[user_level_mod])``. The function replies
    with ``update`` (local minus global parameters) and ``gradient``, or in Flower's common form with its new
    weights under ``arrays``; then LUS can rank by magnitude or at random only. The number of examples does
    not leave the node.
    """
    reply = call_next(message, context)
    if reply.has_error():
        return reply
    sent: ArrayRecord = message.content.array_records[ARRAYS]
    job, layout = read_job(message.content.config_records[CONFIG]), layout_of(sent)
    if UPDATE in reply.content.array_records:
        update = read_update(reply.content, layout, job)
        if not isinstance(update, Update):
            raise ValueError(f"the train function's update does not fit the model: {update.detail}")
    else:
        update = _difference(reply, sent, layout_job=(layout, job))
    return reply_with(FinishUpdate(layout.sizes, layout.names)(update, job), layout, message)


def _difference(reply: Message, sent: ArrayRecord, *, layout_job: tuple[Any, Any]) -> Update:
    """The update of a train function that replies with its new weights."""
    layout, job = layout_job
    found = reply.content.array_records.get(ARRAYS)
    if found is None or not set(layout.names) <= set(found):
        raise ValueError(
            "a train function under user_level_mod must reply with 'update' or with all its new "
            f"weights under 'arrays'; got array records {sorted(reply.content.array_records)}."
        )
    start = from_arrays(layout, sent)
    # More than was sent (buffers) stays where it is.
    trained = from_arrays(layout, ArrayRecord({name: found[name] for name in layout.names}))
    return Update(
        client_id=job.client_id, round_index=job.round_index, vector_D=trained - start, base=digest(start)
    )


def recipe_population(context: Context) -> Population:
    """The users of a node that runs a recipe: every n-th one; the node's config may name its own ``data``."""
    run, _, local = flower_recipe(context.run_config, context.node_config)
    task = build_task(run, local)
    hosted = hosted_share(context, len(task.clients))
    return Population(transport=InProcess(task.model, task.clients), hosted=hosted)


app = round_client_app(recipe_population, mods=[user_level_mod])
