"""Personal data found by Presidio: card, bank, passport and phone numbers, and with a spaCy model names."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from hf_plugins.data_ops.mappers import TextMapper
from hf_plugins.data_ops.op import register


@cache
def analyzer(language: str, model: str | None) -> Any:
    """Presidio's analyzer over a spaCy pipeline that is there; nothing is downloaded.

    Presidio by itself fetches a missing spaCy model and the list of domain suffixes when it is first asked.

    Args:
        language: Language code of the texts.
        model: Installed spaCy package or folder of a pipeline; None splits words only, so patterns are found
            and names are not.

    Returns:
        A ``presidio_analyzer.AnalyzerEngine``.

    Raises:
        FileNotFoundError: If there is no such pipeline.
        ModuleNotFoundError: If Presidio is not installed.
    """
    try:
        import spacy
        import tldextract
        from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
        from presidio_analyzer.nlp_engine import SpacyNlpEngine
        from presidio_analyzer.predefined_recognizers import EmailRecognizer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"presidio_redaction_mapper needs {error.name}; pip install 'mmhf-plugins[pii]'."
        ) from None
    if model is not None and not (spacy.util.is_package(model) or Path(model).is_dir()):
        raise FileNotFoundError(
            f"no spaCy pipeline {model!r} is installed; install it (python -m spacy download {model}), or "
            "name a folder. Nothing is downloaded here."
        )
    suffixes = tldextract.TLDExtract(suffix_list_urls=())

    class OfflineEmail(EmailRecognizer):
        def validate_result(self, pattern_text: str) -> bool:
            return suffixes(pattern_text).fqdn != ""

    engine = SpacyNlpEngine(models=[{"lang_code": language, "model_name": model or "blank"}])
    engine.nlp = {language: spacy.blank(language) if model is None else spacy.load(model)}
    registry = RecognizerRegistry(supported_languages=[language])
    registry.load_predefined_recognizers(languages=[language], nlp_engine=engine)
    registry.remove_recognizer("EmailRecognizer")
    registry.add_recognizer(OfflineEmail(supported_language=language))
    return AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=[language])


@register
@dataclass(frozen=True, kw_only=True)
class PresidioRedactionMapper(TextMapper):
    """Replaces what Presidio finds: many countries' patterns with check digits, and names with a model.

    It adds to `PiiRedactionMapper`, which needs no further package and knows Chinese IDs and numbers.
    """

    name: ClassVar[str] = "presidio_redaction_mapper"
    language: str = "en"
    """Language code of the texts."""
    model: str | None = None
    """Installed spaCy pipeline (``en_core_web_sm``) or its folder; None finds patterns only."""
    entities: tuple[str, ...] = ()
    """Presidio's names of what is replaced (``CREDIT_CARD``, ``PERSON``); empty replaces all it knows."""
    min_score: float = 0.4
    """Least confidence, 0 to 1."""
    replacement: str = "[{entity}_REDACTED]"

    def __post_init__(self) -> None:
        if not 0 <= self.min_score <= 1:
            raise ValueError(f"{self.name}: min_score must lie in 0 to 1, got {self.min_score:g}.")
        if self.entities:
            known = set(analyzer(self.language, self.model).get_supported_entities(self.language))
            if unknown := sorted(set(self.entities) - known):
                raise ValueError(
                    f"{self.name}: Presidio finds no {', '.join(unknown)} in {self.language} with the model "
                    f"{self.model}; it finds {', '.join(sorted(known))}."
                )

    def change(self, text: str) -> str:
        """Text with placeholders; of spans that overlap the surest is replaced, of equal ones the longest."""
        found = analyzer(self.language, self.model).analyze(
            text, language=self.language, entities=list(self.entities) or None, score_threshold=self.min_score
        )
        kept: list[Any] = []
        for span in sorted(found, key=lambda s: (-s.score, s.start - s.end, s.start, s.entity_type)):
            if all(span.end <= other.start or span.start >= other.end for other in kept):
                kept.append(span)
        for span in sorted(kept, key=lambda s: -s.start):
            mark = self.replacement.format(entity=span.entity_type)
            text = text[: span.start] + mark + text[span.end :]
        return text
