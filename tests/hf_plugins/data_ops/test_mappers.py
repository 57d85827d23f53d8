import pytest
from datasets import Dataset

from hf_plugins.data_ops.mappers import (
    CleanEmailMapper,
    CleanHtmlMapper,
    CleanIpMapper,
    CleanLinksMapper,
    PiiRedactionMapper,
    RemoveSpecificCharsMapper,
    TextMapper,
    WhitespaceNormalizationMapper,
)
from hf_plugins.data_ops.op import OpContext


@pytest.mark.parametrize(
    ("op", "before", "after"),
    [
        (CleanHtmlMapper(), "<p>头痛</p>", "\n头痛\n"),
        (CleanLinksMapper(repl="L"), "见 http://a.cn/b 和", "见 L 和"),
        (CleanEmailMapper(), "x@y.cn好", "好"),
        (CleanIpMapper(), "10.0.0.1 x", " x"),
        (WhitespaceNormalizationMapper(), " a   b ", "a b"),
        (RemoveSpecificCharsMapper(), "●头◆痛", "头痛"),
        (PiiRedactionMapper(), "13812345678", "[PHONE_REDACTED]"),
        (PiiRedactionMapper(mask_phones=False), "13812345678", "13812345678"),
        (PiiRedactionMapper(), "ID 11010519491231002X", "ID [ID_CARD_REDACTED]"),
        (PiiRedactionMapper(mask_urls=True), "http://a.cn/x@y.cn", "[URL_REDACTED]"),
    ],
)
def test_changes_and_records(op: TextMapper, before: str, after: str) -> None:
    context = OpContext()
    data = Dataset.from_dict({"text": [before, "平常"], "other": [1, 2]})
    once = op.run(data, context)
    assert list(once["text"]) == [after, "平常"]
    assert list(once["other"]) == [1, 2]
    assert context.ledger.counts() == ({(op.name, "changed"): 1} if before != after else {})
    # Every mapper is idempotent and says so.
    assert op.idempotent
    assert list(op.run(once)["text"]) == list(once["text"])


def test_chat_messages_and_empty_fields_survive() -> None:
    chat = [{"role": "user", "content": "<b>痛</b>"}, {"role": "assistant", "content": "见 x@y.cn"}]
    data = Dataset.from_dict({"messages": [chat, None], "text": [None, "<i>a</i>"]})
    out = CleanHtmlMapper(text_key=("messages", "text")).run(data)
    assert out[0]["messages"][0] == {"role": "user", "content": "痛"}
    assert out[1]["messages"] is None
    assert [row["text"] for row in out] == [None, "a"]
    assert out.features["messages"] == data.features["messages"]


def test_base_says_what_to_write() -> None:
    with pytest.raises(NotImplementedError, match=r"must write change\(text\)"):
        TextMapper().change("a")
