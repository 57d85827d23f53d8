"""Cells: 15 edges, ten operations, the released three, and what is no cell."""

import json

import pytest
import torch

from hf_plugins.dpnas.genotypes import EDGES, OPERATIONS, RELEASED, Genotype, random_genotype

# As printed in the authors' release (operation, from, to).
PRINTED = {
    "cifar10": [
        (5, 0, 1), (1, 0, 2), (5, 1, 2), (6, 0, 3), (1, 1, 3), (0, 2, 3), (5, 0, 4), (0, 1, 4), (0, 2, 4),
        (3, 3, 4), (5, 0, 5), (5, 1, 5), (6, 2, 5), (1, 3, 5), (6, 4, 5),
    ],
    "mnist": [
        (5, 0, 1), (6, 0, 2), (3, 1, 2), (0, 0, 3), (5, 1, 3), (4, 2, 3), (0, 0, 4), (6, 1, 4), (0, 2, 4),
        (3, 3, 4), (1, 0, 5), (0, 1, 5), (1, 2, 5), (1, 3, 5), (4, 4, 5),
    ],
    "fashion_mnist": [
        (3, 0, 1), (0, 0, 2), (5, 1, 2), (4, 0, 3), (5, 1, 3), (3, 2, 3), (0, 0, 4), (0, 1, 4), (6, 2, 4),
        (3, 3, 4), (5, 0, 5), (6, 1, 5), (1, 2, 5), (4, 3, 5), (1, 4, 5),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", PRINTED)
def test_released_cells_are_those_printed(name: str) -> None:
    assert Genotype.from_triples(PRINTED[name]) == RELEASED[name]


def test_census_of_the_three_cells() -> None:
    """Counted by hand over the three lists: selu 10, max pool 8, none 10, tanh 7, skip 6, relu 4, no
    other.
    """
    used = [OPERATIONS[op] for cell in RELEASED.values() for op in cell.operations]
    counts = {name: used.count(name) for name in OPERATIONS}
    assert counts == {
        "none": 10,
        "max_pool_3x3": 8,
        "avg_pool_3x3": 0,
        "skip_connect": 6,
        "sep_conv_3x3_relu": 4,
        "sep_conv_3x3_selu": 10,
        "sep_conv_3x3_tanh": 7,
        "sep_conv_3x3_linear": 0,
        "sep_conv_3x3_hardtanh": 0,
        "sep_conv_3x3_sigmoid": 0,
    }


def test_description_reads_as_the_dossier_prints_it() -> None:
    assert RELEASED["mnist"].describe() == (
        "n1: selu(0); n2: tanh(0) + skip(1); n3: selu(1) + relu(2); n4: tanh(1) + skip(3); "
        "n5: max_pool(0) + max_pool(2) + max_pool(3) + relu(4)"
    )


def test_triples_survive_json_in_any_order() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        cell = random_genotype(generator)
        triples = json.loads(json.dumps(cell.triples()))
        assert Genotype.from_triples(triples[::-1]) == cell
        assert all(f < t for _, f, t in triples)
        assert len(triples) == len(EDGES) == 15


def test_random_cells_use_every_operation_evenly() -> None:
    """3,000 draws of ten operations: counts are binomial(3000, .1), standard deviation 16.4; 6 of them is
    1e-9.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = [op for _ in range(200) for op in random_genotype(generator).operations]
    assert all(abs(drawn.count(op) - 300) < 6 * 16.5 for op in range(10))


@pytest.mark.parametrize(
    ("triples", "message"),
    [
        (PRINTED["mnist"][:-1], r"each of its edges once; missing \[\(4, 5\)\], doubled \[\]"),
        ([*PRINTED["mnist"][:-1], (1, 3, 5)], r"doubled \[\(3, 5\)\]"),
        (
            [*PRINTED["mnist"][:-1], (1, 5, 5)],
            r"edges must go from a node to a later one among .*0..5; got \[\(5, 5\)\]",
        ),
        ([*PRINTED["mnist"][:-1], (10, 4, 5)], r"operation numbers must lie in .*0..9 .*got \[10\]"),
    ],
)
def test_what_is_no_cell_is_refused(triples: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Genotype.from_triples(triples)


def test_wrong_number_of_operations_is_refused() -> None:
    with pytest.raises(ValueError, match="a cell has .*15 edges, one operation each; got .*3 operations"):
        Genotype((1, 2, 3))
