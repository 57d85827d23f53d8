"""Which loss a transformers model has, taken record by record."""

from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_plugins.dp.losses import classification_losses, span_losses, token_losses

_CLASSIFIERS = frozenset({f"For{kind}Classification" for kind in ("Sequence", "Image", "Video", "Audio")})
_CAUSAL = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def plain_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def loss_kind(model: nn.Module) -> str:
    """The host's name of the model's loss, such as ``ForSequenceClassification``.

    Raises:
        ValueError: If the model is of a kind whose loss is not known record by record.
    """
    base = plain_model(model)
    kind = base.loss_type if isinstance(base, PreTrainedModel) else None
    if type(base).__name__ in _CAUSAL and kind not in ("ForCausalLM",):
        kind = "ForCausalLM"
    known = {*_CLASSIFIERS, "ForCausalLM", "ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering"}
    if kind == "ForConditionalGeneration" and base.config.is_encoder_decoder:
        return "Seq2Seq"
    if kind not in known:
        raise ValueError(
            f"the loss of {type(base).__name__} is not known record by record. Give "
            "compute_loss_func(outputs, labels, num_items_in_batch) that returns one loss for each record."
        )
    return str(kind)


def model_losses(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Loss of each record, as the model itself would compute it for a batch of that record alone.

    Args:
        model: A transformers model, or a PEFT model around one.
        inputs: Collated records with their labels.

    Returns:
        ``[B]``, float32.

    Raises:
        ValueError: If the loss is not known by record, or the labels are missing.
    """
    kind, base = loss_kind(model), plain_model(model)
    if kind == "ForQuestionAnswering":
        first, last = inputs.pop("start_positions"), inputs.pop("end_positions")
        outputs = model(**inputs)
        return span_losses(outputs.start_logits, outputs.end_logits, first, last)
    labels = inputs.pop("labels", None)
    if labels is None:
        raise ValueError(
            f"the batch holds {sorted(inputs)} and no labels; the collator must make them (for a causal "
            "model DataCollatorForLanguageModeling(mlm=False))."
        )
    if kind == "Seq2Seq":
        decoder = {"decoder_input_ids": base.prepare_decoder_input_ids_from_labels(labels=labels)}
        return token_losses(model(**{**decoder, **inputs}).logits, labels, shift=False)
    logits = model(**inputs).logits
    if kind in _CLASSIFIERS:
        return classification_losses(logits, labels, problem=_problem(base, labels))
    return token_losses(logits, labels, shift=kind == "ForCausalLM")


def _problem(base: nn.Module, labels: Tensor) -> Any:
    """As the host decides it when the config leaves it open."""
    if base.config.problem_type is not None:
        return base.config.problem_type
    if base.config.num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
