"""The user's side of a round as hooks of the engine: BLUR in each step, LUS and clipping at the end."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_plugins.dp_fedavg.blur import blur_gradient, proximal_gradient
from hf_plugins.dp_fedavg.clipping import clip_update
from hf_plugins.dp_fedavg.config import DPFedAvgConfig
from hf_plugins.dp_fedavg.noise import share_std
from hf_plugins.dp_fedavg.sparsification import kept_norms, sparsify_update
from hf_plugins.rounds import ClientFailed, Config, Job, Update, generator_for
from hf_plugins.secure_noise import gaussian

PREFIX = "dp_fedavg."


def client_options(
    config: DPFedAvgConfig, *, clipping_norm: float, noise_multiplier: float, num_clients: int
) -> dict:
    """What a user must know of the method in one round, as plain values that travel in a config.

    Args:
        config: Options of the run.
        clipping_norm: S of this round.
        noise_multiplier: Of the sum of updates.
        num_clients: Users in all.

    Returns:
        Keys ``dp_fedavg.*``, and ``keep_gradient`` for local training.
    """
    shares = config.noise_mode == "shares"
    options = {
        "clipping_norm": clipping_norm,
        "blur": config.blur,
        "blur_hinge": config.blur_hinge,
        "proximal": config.proximal,
        "keep_ratio": config.keep_ratio,
        "lus_score": config.lus_score,
        "lus_scope": config.lus_scope,
        "share_std": share_std(noise_multiplier, clipping_norm, config.expected_users(num_clients))
        if shares
        else 0.0,
        "secure": config.secure,
    }
    return {
        "keep_gradient": gradient_needed(config),
        **{PREFIX + name: value for name, value in options.items()},
    }


def gradient_needed(config: DPFedAvgConfig) -> str:
    """What LUS needs of local training: ``none``, ``last`` or ``full``."""
    return config.lus_gradient if config.keep_ratio < 1 and config.lus_score == "utility" else "none"


def gradient_term(delta: list[Tensor], config: Config, lead: int) -> list[Tensor] | None:
    """BLUR's and FedProx's additions to a local gradient; see `hf_plugins.rounds.GradientTerm`."""
    added: list[Tensor] | None = None
    if strength := float(config.get(PREFIX + "blur", 0.0)):
        added = blur_gradient(
            delta,
            strength=strength,
            clipping_norm=float(config[PREFIX + "clipping_norm"]),
            hinge=config[PREFIX + "blur_hinge"],
            lead=lead,
        )
    if strength := float(config.get(PREFIX + "proximal", 0.0)):
        pull = proximal_gradient(delta, strength=strength)
        added = pull if added is None else [a + b for a, b in zip(added, pull, strict=True)]
    return added


class FinishUpdate:
    """What a user does to its update before it leaves: LUS, clip, and the noise share if there is one.

    Args:
        sizes: Lengths of the model's trainable tensors (``TrainableVector.sizes``).
        names: Their names: what LUS keeps of each is then among the metrics.
    """

    def __init__(self, sizes: Sequence[int], names: Sequence[str] = ()) -> None:
        self.sizes = list(sizes)
        self.names = list(names)

    def __call__(self, update: Update, job: Job) -> Update:
        """The update that may leave the user; its record count is replaced by 1.

        Raises:
            ClientFailed: If LUS cannot rank the coordinates.
        """
        options = {name.removeprefix(PREFIX): v for name, v in job.config.items() if name.startswith(PREFIX)}
        vector, keep = update.vector_D, float(options["keep_ratio"])
        metrics = dict(update.metrics)
        if keep < 1 and bool(torch.isfinite(vector).all()) and bool(vector.any()):
            metrics["norm_before_lus"] = float(torch.linalg.vector_norm(vector))
            try:
                vector = sparsify_update(
                    vector,
                    update.gradient_D,
                    keep_ratio=keep,
                    sizes=self.sizes,
                    scope=options["lus_scope"],
                    score=options["lus_score"],
                    generator=generator_for(job.seed, "lus"),
                )
            except ValueError as error:
                raise ClientFailed(f"client {job.client_id}: {error}") from error
            if self.names:
                kept = kept_norms(update.vector_D, vector, self.sizes)
                metrics |= {f"lus_kept/{name}": k for name, k in zip(self.names, kept, strict=True)}
        bound = float(options["clipping_norm"])
        clipped, norm = clip_update([vector], bound)
        if not norm < float("inf"):
            # Sent as it is: the server counts it as not finite, which zeros would hide.
            update.vector_D = torch.full_like(update.vector_D, float("nan"))
            return update
        std = float(options["share_std"])
        if std:
            # Under secure aggregation the server learns the sum only, so nothing else may go along.
            metrics = {}
            source = None if options["secure"] else generator_for(job.seed, "share")
            clipped[0] = clipped[0] + gaussian(clipped[0].numel(), std, generator=source)
        else:
            metrics |= {"norm": norm, "clipped": float(norm > bound)}
        return Update(
            client_id=update.client_id,
            round_index=update.round_index,
            vector_D=clipped[0],
            num_examples=1,
            metrics=metrics,
            base=update.base,
        )
