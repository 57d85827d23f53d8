"""Operators that change the text of a row and keep the row; names and parameters are Data-Juicer's."""

from dataclasses import dataclass
from typing import Any, ClassVar

from datasets import Dataset

from hf_plugins.data_ops.filters import _processes
from hf_plugins.data_ops.op import ROW_ID, DataOp, OpContext, register
from hf_plugins.data_ops.text import (
    clean_html,
    map_text,
    normalize_whitespace,
    replace_emails,
    replace_ips,
    replace_links,
    replace_phones,
    replace_resident_ids,
)


@dataclass(frozen=True, kw_only=True)
class TextMapper(DataOp):
    """Changes every piece of text of the named columns: strings, chat messages, turns."""

    text_key: str | tuple[str, ...] = "text"

    def change(self, text: str) -> str:
        """One text, changed."""
        raise NotImplementedError(f"{type(self).__name__} must write change(text).")

    def apply(self, dataset: Dataset, context: OpContext) -> Dataset:
        """Change all rows; rows that differ afterwards are recorded."""
        keys = [self.text_key] if isinstance(self.text_key, str) else list(self.text_key)
        if not len(dataset):
            return dataset

        def changed(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            after = {key: [map_text(value, self.change) for value in batch[key]] for key in keys}
            differs = [any(after[k][i] != batch[k][i] for k in keys) for i in range(len(batch[keys[0]]))]
            return after | {"_changed": differs}

        # Same features: a batch of nothing but None must not turn a text column into one of nulls.
        result = dataset.map(
            changed, batched=True, num_proc=_processes(len(dataset), context), desc=self.name
        )
        for row_id, differs in zip(result[ROW_ID], result["_changed"], strict=True):
            if differs:
                context.ledger.add(self.name, row_id, "changed")
        return result.remove_columns("_changed").cast(dataset.features)


@register
@dataclass(frozen=True, kw_only=True)
class CleanHtmlMapper(TextMapper):
    """Strips HTML: tags, scripts, comments, entities."""

    name: ClassVar[str] = "clean_html_mapper"

    def change(self, text: str) -> str:
        """Text without markup."""
        return clean_html(text)


@register
@dataclass(frozen=True, kw_only=True)
class CleanLinksMapper(TextMapper):
    """Replaces URLs."""

    name: ClassVar[str] = "clean_links_mapper"
    repl: str = ""

    def change(self, text: str) -> str:
        """Text without URLs."""
        return replace_links(text, self.repl)


@register
@dataclass(frozen=True, kw_only=True)
class CleanEmailMapper(TextMapper):
    """Replaces e-mail addresses."""

    name: ClassVar[str] = "clean_email_mapper"
    repl: str = ""

    def change(self, text: str) -> str:
        """Text without addresses."""
        return replace_emails(text, self.repl)


@register
@dataclass(frozen=True, kw_only=True)
class CleanIpMapper(TextMapper):
    """Replaces IPv4 addresses."""

    name: ClassVar[str] = "clean_ip_mapper"
    repl: str = ""

    def change(self, text: str) -> str:
        """Text without addresses."""
        return replace_ips(text, self.repl)


@register
@dataclass(frozen=True, kw_only=True)
class WhitespaceNormalizationMapper(TextMapper):
    """One blank for many, no blanks at line ends."""

    name: ClassVar[str] = "whitespace_normalization_mapper"

    def change(self, text: str) -> str:
        """Text with plain white space."""
        return normalize_whitespace(text)


@register
@dataclass(frozen=True, kw_only=True)
class RemoveSpecificCharsMapper(TextMapper):
    """Removes characters of crawl debris."""

    name: ClassVar[str] = "remove_specific_chars_mapper"
    chars_to_remove: str = "\u25c6\u25cf\u25a0\u25ba\u25bc\u25b2\u25b4\u2206\u25bb\u25b7\u2756\u2661\u25a1"

    def change(self, text: str) -> str:
        """Text without them."""
        return text.translate(dict.fromkeys(map(ord, self.chars_to_remove)))


@register
@dataclass(frozen=True, kw_only=True)
class PiiRedactionMapper(TextMapper):
    """Replaces personal data that patterns can tell: addresses, mobile numbers, resident IDs.

    Chinese resident IDs count only with a right check digit, so order numbers survive. Names are beyond
    patterns: use `PresidioRedactionMapper`.
    """

    name: ClassVar[str] = "pii_redaction_mapper"
    mask_emails: bool = True
    mask_phones: bool = True
    mask_id_cards: bool = True
    mask_ips: bool = True
    mask_urls: bool = False
    email_replacement: str = "[EMAIL_REDACTED]"
    phone_replacement: str = "[PHONE_REDACTED]"
    id_card_replacement: str = "[ID_CARD_REDACTED]"
    ip_replacement: str = "[IP_REDACTED]"
    url_replacement: str = "[URL_REDACTED]"

    def change(self, text: str) -> str:
        """Text with placeholders."""
        # IDs first: a mobile number may stand inside one.
        for wanted, replace, mask in (
            (self.mask_id_cards, replace_resident_ids, self.id_card_replacement),
            (self.mask_urls, replace_links, self.url_replacement),
            (self.mask_emails, replace_emails, self.email_replacement),
            (self.mask_phones, replace_phones, self.phone_replacement),
            (self.mask_ips, replace_ips, self.ip_replacement),
        ):
            if wanted:
                text = replace(text, mask)
        return text
