"""Where clients' examples come from: encoding a data set, and the tasks of the command line."""

import gzip
import importlib
import math
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_plugins.hpn.client import HPNClient, secret_of
from hf_plugins.hpn.config import HPNConfig
from hf_plugins.hpn.embedding import ClientEncoding, Encoder, encode, median_bandwidth
from hf_plugins.hpn.server import Federation, encoding_noise
from hf_plugins.rounds import (
    InProcess,
    LocalTraining,
    TorchClient,
    TrainableVector,
    dirichlet_split,
    generator_for,
    seed_for,
)

Records = tuple[Tensor, Tensor]


def encode_client(
    dataset: Any,
    encoder: Encoder,
    *,
    noise_multiplier: float,
    generator: torch.Generator,
    input_column: str = "pixel_values",
    label_column: str = "labels",
) -> ClientEncoding:
    """Encode a client's data set and add calibrated Gaussian noise.

    Args:
        dataset: A pair of tensors, a sequence of (input, label) pairs, or of rows with two named columns
            (``datasets.Dataset`` with ``set_format("torch")``, or dicts).
        encoder: Shared by all clients.
        noise_multiplier: Noise over sensitivity; 1.39 is epsilon 3 at delta 1e-5, 0.1 the release's (92).
        generator: Source of the noise; secret if the noise shall protect.
        input_column: Column of the inputs.
        label_column: Column of the labels.

    Returns:
        The noisy vector; ``epsilon(delta)`` tells what it cost.

    Raises:
        ValueError: If there are no examples, or they do not fit the encoder.
    """
    x_ND, labels_N = _tensors(dataset, input_column, label_column)
    return encode(x_ND, labels_N, encoder, noise_multiplier=noise_multiplier, generator=generator)


def _tensors(dataset: Any, input_column: str, label_column: str) -> Records:
    if isinstance(dataset, tuple) and len(dataset) == 2 and isinstance(dataset[0], Tensor):
        return dataset
    if not len(dataset):
        return torch.zeros(0, 0), torch.zeros(0, dtype=torch.long)
    first = dataset[0]
    if isinstance(first, dict):
        missing = [name for name in (input_column, label_column) if name not in first]
        if missing:
            raise ValueError(
                f"the data set has no column {missing[0]!r}; it has {', '.join(sorted(first))}. Name them "
                "with input_column and label_column."
            )
        pairs = [(row[input_column], row[label_column]) for row in dataset]
    else:
        pairs = [tuple(dataset[i]) for i in range(len(dataset))]
    x_ND = torch.stack([torch.as_tensor(x, dtype=torch.float32) for x, _ in pairs])
    return x_ND, torch.tensor([int(label) for _, label in pairs])


# -- tasks --------------------------------------------------------------------------------------------


def make_federation(task: str, task_args: dict[str, Any], config: HPNConfig) -> Federation:
    """Clients of a task of the command line.

    Args:
        task: ``synthetic``, ``images``, ``npz``, or ``module:function``, called with the arguments and
            ``config``.
        task_args: Its keyword arguments.
        config: Options; the encoder's and the seed matter here.

    Returns:
        The federation.

    Raises:
        ValueError: If there is no such task, or an argument does not fit.
    """
    if ":" in task:
        module, name = task.split(":", 1)
        try:
            make = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"task={task!r} cannot be imported ({error}); write module:function of something that "
                "stands on PYTHONPATH."
            ) from error
    elif task in TASKS:
        make = TASKS[task]
    else:
        raise ValueError(f"task must be one of {', '.join(TASKS)} or module:function; got {task!r}.")
    try:
        return make(config=config, **task_args)
    except TypeError as error:
        raise ValueError(f"task_args of {task!r}: {error}") from error


def make_encoder(config: HPNConfig, *, num_labels: int, public: Tensor) -> Encoder:
    """The encoder that the options ask for.

    Args:
        config: Options.
        num_labels: Labels L.
        public: Inputs of the same kind that are nobody's secret: their dimensions, and the median distance.

    Returns:
        The encoder, to be given to every client.
    """
    bandwidth = config.bandwidth
    if config.encoder == "rff-median":
        bandwidth = median_bandwidth(public.flatten(1), generator=generator_for(config.seed, "bandwidth"))
    return Encoder(
        kind=config.encoder,
        num_labels=num_labels,
        dim=0 if config.encoder == "histogram" else public.flatten(1).shape[1],
        num_features=config.num_features,
        bandwidth=bandwidth,
    )


def federation_of(
    model: nn.Module,
    parts: Sequence[tuple[Records, Records, Records]],
    *,
    loss: Callable[..., Tensor],
    measure: Callable[..., dict[str, float]],
    encoder: Encoder,
    config: HPNConfig,
    training: LocalTraining,
    examples: Sequence[Callable[[], Records]] | None = None,
) -> Federation:
    """Clients with a plain loop over tensors, in one process.

    Args:
        model: The resident model.
        parts: Training, validation and test records of each client.
        loss: Loss of each record.
        measure: Figures on records.
        encoder: Of all clients.
        config: Options.
        training: Options of local training that the space does not hold.
        examples: What each client encodes; None: its training records.

    Returns:
        The federation, with the test records in a transport of their own.
    """
    noise = encoding_noise(config)

    def clients(judged: int) -> list[HPNClient]:
        return [
            HPNClient(
                TorchClient(
                    number,
                    part[0],
                    loss=loss,
                    training=training,
                    validation=part[judged],
                    measure=measure,
                ),
                encoder=encoder,
                examples=examples[number] if examples else lambda part=part: part[0],
                noise_multiplier=noise,
                metric=config.metric,
                reward_noise_multiplier=config.reward_noise_multiplier,
                secret=secret_of(config.seed, number),
            )
            for number, part in enumerate(parts)
        ]

    return Federation(
        transport=InProcess(model, clients(1)),
        test=InProcess(model, clients(2)),
        initial_D=TrainableVector(model).read(),
    )


def _three_ways(x: Tensor, labels: Tensor, *, shares: tuple[float, float], seed: int) -> tuple[Records, ...]:
    """Shuffle and cut into training, validation and test records."""
    order = torch.randperm(len(x), generator=generator_for(seed, "three ways"))
    first, second = (math.floor(share * len(x)) for share in (shares[0], shares[0] + shares[1]))
    return tuple((x[part], labels[part]) for part in (order[:first], order[first:second], order[second:]))


def cross_entropy(model: Callable[[Tensor], Tensor], batch: Records) -> Tensor:
    """Loss of each record of a classifier."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def accuracy(model: nn.Module, batch: Records) -> dict[str, float]:
    """Share of right answers."""
    return {"accuracy": float((model(batch[0]).argmax(dim=1) == batch[1]).double().mean())}


def _seeded(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "model") % 2**31)
        return make()


def synthetic(
    *,
    config: HPNConfig,
    num_clients: int = 10,
    dim: int = 16,
    num_records: int = 32,
    scales: int = 5,
    shift: float = 0.7,
) -> Federation:
    """Linear regression whose best learning rate is known for every client: one over its input's scale.

    Client k sees inputs ``x = sqrt(h_k) u`` with ``u`` spread evenly over all directions, so its loss has
    the Hessian ``h_k I``; one full-batch step of rate ``1 / h_k`` lands on its optimum, from anywhere. Weight
    decay only pulls away from it. Optima differ between clients, so that averages stay away from them. The
    figure ``accuracy`` is 1 - relative squared error, cut at 0.

    Args:
        config: Options.
        num_clients: Clients.
        dim: Parameters.
        num_records: Training records of a client, rounded down to a multiple of ``dim``.
        scales: Different scales ``h = 2^j``, j centred on 0.
        shift: Distance of a client's optimum from the common one, over that one's length.

    Returns:
        The federation, with ``known_best``.
    """
    weights = torch.randn(dim, generator=generator_for(config.seed, "optimum"))
    copies = max(1, num_records // dim)
    parts, best = [], {}
    for number in range(num_clients):
        power = number % scales - scales // 2
        own = weights + shift * torch.randn(dim, generator=generator_for(config.seed, "shift", number))
        records = []
        for use in ("train", "validation", "test"):
            generator = generator_for(config.seed, "inputs", use, number)
            # Orthonormal rows times sqrt(dim): the second moment is exactly the identity.
            blocks = [
                torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0] * dim**0.5
                for _ in range(copies)
            ]
            x = torch.cat(blocks) * 2.0 ** (power / 2)
            records.append((x, x @ own))
        parts.append(tuple(records))
        best[number] = {"learning_rate": 2.0**-power, "weight_decay": 0.0}

    def loss(model: Callable[[Tensor], Tensor], batch: Records) -> Tensor:
        return (model(batch[0])[:, 0] - batch[1]).square() / 2

    def measure(model: nn.Module, batch: Records) -> dict[str, float]:
        error = (model(batch[0])[:, 0] - batch[1]).square().mean() / batch[1].square().mean()
        return {"accuracy": max(0.0, 1 - float(error))}

    def zero_model() -> nn.Module:
        model = nn.Linear(dim, 1, bias=False)
        nn.init.zeros_(model.weight)
        return model

    federation = federation_of(
        zero_model(),
        parts,
        loss=loss,
        measure=measure,
        encoder=make_encoder(config, num_labels=1, public=torch.randn(200, dim)),
        config=config,
        training=LocalTraining(batch_size=copies * dim),
        examples=[
            lambda part=part: (part[0][0], torch.zeros(len(part[0][0]), dtype=torch.long)) for part in parts
        ],
    )
    federation.known_best = best
    return federation


def images(
    *,
    config: HPNConfig,
    folder: str,
    split: str = "train",
    num_clients: int = 20,
    alpha: float = 0.5,
    limit: int = 0,
    contrast: Sequence[float] = (1.0,),
    label_noise: float = 0.0,
    noisy_share: float = 0.0,
    hidden: int = 32,
    batch_size: int = 16,
    num_labels: int = 10,
) -> Federation:
    """Images in IDX files (MNIST form), split over clients by a Dirichlet law; a small network with dropout.

    Args:
        config: Options.
        folder: Holds ``SPLIT*images*idx3*`` and ``SPLIT*labels*idx1*``, plain or ``.gz``.
        split: First letters of the files.
        num_clients: Clients.
        alpha: Concentration of the split; small is skewed.
        limit: Use only so many images; 0: all.
        contrast: Factors on the pixels of client 0, 1, ... in turn: sensors that differ.
        label_noise: Share of wrong labels in the training records of the noisy clients.
        noisy_share: Share of clients that are noisy.
        hidden: Width of the network.
        batch_size: Records of a local step, unless it is searched.
        num_labels: Classes.

    Returns:
        The federation.
    """
    x, labels = read_idx(Path(folder), split)
    order = torch.randperm(len(x), generator=generator_for(config.seed, "images"))
    order = order[: limit or len(x)]
    x, labels = x[order].flatten(1), labels[order]
    parts = []
    owned = dirichlet_split(labels.tolist(), num_clients, alpha=alpha, seed=config.seed)
    for number, index in enumerate(owned):
        rows = torch.from_numpy(index)
        factor = contrast[number % len(contrast)]
        seed = seed_for(config.seed, "client", number)
        train, validation, test = _three_ways(x[rows] * factor, labels[rows], shares=(0.6, 0.2), seed=seed)
        # Spread over clients of every contrast.
        if (number * 7 % num_clients) < noisy_share * num_clients:
            train = (train[0], _wrong_labels(train[1], label_noise, num_labels, seed))
        parts.append((train, validation, test))

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Linear(x.shape[1], hidden), nn.ReLU(), nn.Dropout(0.0), nn.Linear(hidden, num_labels)
        )

    return federation_of(
        _seeded(config.seed, build),
        parts,
        loss=cross_entropy,
        measure=accuracy,
        encoder=make_encoder(config, num_labels=num_labels, public=x[:200]),
        config=config,
        training=LocalTraining(batch_size=batch_size),
    )


def npz(
    *,
    config: HPNConfig,
    file: str,
    num_clients: int = 20,
    alpha: float = 0.5,
    batch_size: int = 16,
    scale: Sequence[float] = (1.0,),
) -> Federation:
    """Vectors with labels in one ``.npz``, for example sentence embeddings; a linear classifier.

    Args:
        config: Options.
        file: Arrays ``x`` (N, D) and ``labels`` (N,).
        num_clients: Clients of a Dirichlet split.
        alpha: Its concentration.
        batch_size: Records of a local step, unless it is searched.
        scale: Factors on the inputs of client 0, 1, ... in turn.

    Returns:
        The federation.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If an array is missing.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file} does not exist; write arrays x and labels with numpy.savez.")
    with np.load(file, allow_pickle=False) as arrays:
        missing = {"x", "labels"} - set(arrays.files)
        if missing:
            raise ValueError(f"{file} lacks the arrays {', '.join(sorted(missing))}; it has {arrays.files}.")
        x, labels = torch.from_numpy(arrays["x"]).float(), torch.from_numpy(arrays["labels"]).long()
    num_labels = int(labels.max()) + 1
    parts = []
    for number, index in enumerate(
        dirichlet_split(labels.tolist(), num_clients, alpha=alpha, seed=config.seed)
    ):
        rows = torch.from_numpy(index)
        seed = seed_for(config.seed, "client", number)
        factor = scale[number % len(scale)]
        parts.append(_three_ways(x[rows] * factor, labels[rows], shares=(0.6, 0.2), seed=seed))

    def build() -> nn.Module:
        return nn.Sequential(nn.Dropout(0.0), nn.Linear(x.shape[1], num_labels))

    return federation_of(
        _seeded(config.seed, build),
        parts,
        loss=cross_entropy,
        measure=accuracy,
        encoder=make_encoder(config, num_labels=num_labels, public=x[:200]),
        config=config,
        training=LocalTraining(batch_size=batch_size),
    )


TASKS: dict[str, Callable[..., Federation]] = {"synthetic": synthetic, "images": images, "npz": npz}


def _wrong_labels(labels: Tensor, share: float, num_labels: int, seed: int) -> Tensor:
    generator = generator_for(seed, "wrong labels")
    wrong = torch.rand(len(labels), generator=generator) < share
    shift = torch.randint(1, num_labels, (len(labels),), generator=generator)
    return torch.where(wrong, (labels + shift) % num_labels, labels)


def read_idx(folder: Path, split: str) -> Records:
    """Images (N, H, W) in [0, 1] and labels of one split in IDX files.

    Raises:
        FileNotFoundError: If the folder lacks them.
        ValueError: If a file is of another kind.
    """
    found = []
    for kind, magic in (("images", 0x803), ("labels", 0x801)):
        paths = sorted(folder.glob(f"{split}*{kind}*idx*"))
        if not paths:
            raise FileNotFoundError(
                f"{folder} holds no {split}*{kind}*idx* file (MNIST form, plain or .gz); check "
                "folder and split."
            )
        opener = gzip.open if paths[0].suffix == ".gz" else open
        with opener(paths[0], "rb") as file:
            data = file.read()
        rank = magic & 0xFF
        if data[:4] != struct.pack(">I", magic):
            raise ValueError(f"{paths[0]} is no IDX file of {kind}: it starts with {data[:4]!r}.")
        shape = struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
        found.append(np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape).copy())
    return torch.from_numpy(found[0]).float() / 255, torch.from_numpy(found[1]).long()
