"""Cells of the DPNAS search space: five nodes, every earlier node feeds every later one through one of ten
operations.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

NUM_NODES = 5
# (from, to) of the 15 edges in the order in which the controller decides them and the release lists them.
EDGES: tuple[tuple[int, int], ...] = tuple((f, t) for t in range(1, NUM_NODES + 1) for f in range(t))
# Index in this list is the operation's number in the released genotypes. "sep_conv" is the release's word:
# the convolution is depthwise only, channels mix in the 1x1 convolution in front of a cell.
OPERATIONS: tuple[str, ...] = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3_relu",
    "sep_conv_3x3_selu",
    "sep_conv_3x3_tanh",
    "sep_conv_3x3_linear",
    "sep_conv_3x3_hardtanh",
    "sep_conv_3x3_sigmoid",
)


@dataclass(frozen=True)
class Genotype:
    """One cell: an operation for each of the 15 edges."""

    operations: tuple[int, ...]
    """Operation numbers in the order of `EDGES`, each in 0..9."""

    def __post_init__(self) -> None:
        if len(self.operations) != len(EDGES):
            raise ValueError(
                f"a cell has {len(EDGES)} edges, one operation each; got {len(self.operations)} operations."
            )
        wrong = [op for op in self.operations if isinstance(op, bool) or op not in range(len(OPERATIONS))]
        if wrong:
            raise ValueError(
                f"operation numbers must lie in 0..{len(OPERATIONS) - 1} ({', '.join(OPERATIONS)}); "
                f"got {wrong}."
            )

    @classmethod
    def from_triples(cls, triples: Sequence[Sequence[int]]) -> "Genotype":
        """Read the released form, (operation, from, to) for each edge in any order.

        Raises:
            ValueError: If an edge is missing, given twice, or does not go from an earlier node to a later
                one.
        """
        edges = [(int(f), int(t)) for _, f, t in triples]
        strange = sorted(set(edges) - set(EDGES))
        if strange:
            raise ValueError(f"edges must go from a node to a later one among 0..{NUM_NODES}; got {strange}.")
        doubled = sorted({edge for edge in edges if edges.count(edge) > 1})
        missing = sorted(set(EDGES) - set(edges))
        if doubled or missing:
            raise ValueError(f"a cell needs each of its edges once; missing {missing}, doubled {doubled}.")
        chosen = dict(zip(edges, (int(op) for op, _, _ in triples), strict=True))
        return cls(tuple(chosen[edge] for edge in EDGES))

    def triples(self) -> list[list[int]]:
        """The released form: [operation, from, to] for each edge, ready for JSON."""
        return [[op, f, t] for op, (f, t) in zip(self.operations, EDGES, strict=True)]

    def describe(self) -> str:
        """Readable form, a node each: ``n1: selu(0); n2: max_pool(0) + selu(1)``; edges without an operation
        left out.
        """
        short = [
            name.removeprefix("sep_conv_3x3_").removesuffix("_3x3").removesuffix("_connect")
            for name in OPERATIONS
        ]
        nodes = []
        for node in range(1, NUM_NODES + 1):
            terms = [
                f"{short[op]}({f})"
                for op, (f, t) in zip(self.operations, EDGES, strict=True)
                if t == node and op != 0
            ]
            nodes.append(f"n{node}: {' + '.join(terms) or 'zero'}")
        return "; ".join(nodes)


def random_genotype(generator: torch.Generator) -> Genotype:
    """A cell drawn uniformly from the 10^15 of the space."""
    drawn = torch.randint(len(OPERATIONS), (len(EDGES),), generator=generator)
    return Genotype(tuple(int(op) for op in drawn))


# The cells found by the authors' search and used in their final runs (release of the paper's code,
# dp_evaluate).
RELEASED: dict[str, Genotype] = {
    "cifar10": Genotype((5, 1, 5, 6, 1, 0, 5, 0, 0, 3, 5, 5, 6, 1, 6)),
    "mnist": Genotype((5, 6, 3, 0, 5, 4, 0, 6, 0, 3, 1, 0, 1, 1, 4)),
    "fashion_mnist": Genotype((3, 0, 5, 4, 5, 3, 0, 0, 6, 3, 5, 6, 1, 4, 1)),
}
