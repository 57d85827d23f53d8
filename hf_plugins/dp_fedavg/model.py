"""Small networks for recipes, and the check that a model may be trained with user-level DP."""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


def check_private_model(model: nn.Module) -> None:
    """Refuse what carries state of a user that is neither clipped nor noised.

    Raises:
        ValueError: If a layer keeps running statistics or mixes the records of a batch; names it.
    """
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and (
            "BatchNorm" in type(module).__name__ or module.track_running_stats
        ):
            raise ValueError(
                f"{name or 'the model'} is a {type(module).__name__}: its running statistics are a "
                "user's data that is neither clipped nor noised. Replace it by GroupNorm or LayerNorm."
            )


class CharacterModel(nn.Module):
    """Next-character model: embedding, GRU, linear layer.

    Args:
        vocabulary: Characters.
        width: Hidden size.
    """

    def __init__(self, vocabulary: int, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 16)
        self.gru = nn.GRU(16, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, characters: Tensor) -> Tensor:
        """Logits (records, positions, vocabulary) of the next character."""
        return self.head(self.gru(self.embed(characters))[0])


def image_model(name: str, *, num_classes: int, size: int) -> nn.Module:
    """A small network for grey images without BatchNorm.

    Args:
        name: ``mlp`` (one hidden layer of 32) or ``cnn`` (two strided convolutions with GroupNorm).
        num_classes: Classes.
        size: Height and width of an image.

    Returns:
        The network; input (records, 1, size, size).

    Raises:
        ValueError: If there is no such network.
    """
    if name == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(size * size, 32), nn.ReLU(), nn.Linear(32, num_classes))
    if name == "cnn":
        end = -(-size // 4)
        return nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2, padding=2),
            nn.GroupNorm(2, 8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.GroupNorm(4, 16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * end * end, num_classes),
        )
    raise ValueError(f"model must be mlp or cnn for images; got {name!r}.")
