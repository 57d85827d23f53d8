"""Flower's ServerApp that runs a recipe: ``flwr run configs/dp_fedavg/flower_app``."""

import logging

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from hf_plugins.dp_fedavg.config import flower_recipe
from hf_plugins.dp_fedavg.strategy import UserLevelDP
from hf_plugins.dp_fedavg.trainer import build_task, finish_run

logger = logging.getLogger(__name__)
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train what the run's config says; results lie in its ``output_dir``, from which a restart goes on."""
    run, dp, local = flower_recipe(context.run_config)
    task = build_task(run, local)
    strategy = UserLevelDP(
        task.model,
        dp,
        num_clients=len(task.clients),
        num_rounds=run.num_rounds,
        evaluate=task.evaluate,
        evaluate_every=run.evaluate_every,
        folder=run.output_dir,
        num_nodes=int(context.run_config.get("rounds.num-nodes", 1)),
        timeout=float(context.run_config.get("rounds.timeout", 3600)),
    )
    strategy.start(grid)
    report = finish_run(strategy.engine, task.model, run)
    logger.info("done: %s", report)
