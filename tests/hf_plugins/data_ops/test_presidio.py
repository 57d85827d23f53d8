"""Presidio is an extra: what it finds is tested where it is installed, what is said without it everywhere."""

import socket
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from hf_plugins.data_ops import OpContext, make_op
from hf_plugins.data_ops.presidio import PresidioRedactionMapper, analyzer


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError(f"a connection to {args[1:]} was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_without_presidio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    analyzer.cache_clear()
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    data = Dataset.from_dict({"text": ["card 4111 1111 1111 1111"]})
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mmhf-plugins\[pii\]'"):
        PresidioRedactionMapper().run(data)


def test_score_out_of_range() -> None:
    with pytest.raises(ValueError, match="min_score must lie in 0 to 1, got .*2"):
        PresidioRedactionMapper(min_score=2)


@pytest.mark.usefixtures("no_network")
def test_patterns_are_replaced_without_a_model_or_a_network() -> None:
    pytest.importorskip("presidio_analyzer", reason="the extra pii is not installed")
    context = OpContext()
    texts = [
        "Card 4111 1111 1111 1111, mail jane.roe@example.com.",
        # Wrong check digit: no card.
        "Order 4111 1111 1111 1112.",
    ]
    op = make_op({"presidio_redaction_mapper": {"entities": ["CREDIT_CARD", "EMAIL_ADDRESS"]}})
    out = op.run(Dataset.from_dict({"text": texts}), context)
    assert list(out["text"]) == ["Card [CREDIT_CARD_REDACTED], mail [EMAIL_ADDRESS_REDACTED].", texts[1]]
    assert context.ledger.counts() == {("presidio_redaction_mapper", "changed"): 1}


@pytest.mark.usefixtures("no_network")
def test_names_take_a_pipeline_that_is_there(tmp_path: Path) -> None:
    pytest.importorskip("presidio_analyzer", reason="the extra pii is not installed")
    import spacy

    pipeline = spacy.blank("en")
    pipeline.add_pipe("entity_ruler").add_patterns([{"label": "PERSON", "pattern": "Jane Roe"}])
    pipeline.to_disk(tmp_path / "names")
    op = PresidioRedactionMapper(model=str(tmp_path / "names"), entities=("PERSON",))
    assert op.change("Jane Roe has a cold.") == "[PERSON_REDACTED] has a cold."
    with pytest.raises(FileNotFoundError, match="no spaCy pipeline .*en_core_none"):
        PresidioRedactionMapper(model="en_core_none").change("Jane Roe")
    with pytest.raises(ValueError, match="Presidio finds no .*NAME.* with the model .*None.*; it finds"):
        PresidioRedactionMapper(entities=("NAME",))
