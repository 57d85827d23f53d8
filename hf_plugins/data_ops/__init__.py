"""Data operators on ``datasets.Dataset`` and the client for language models; shared by the data methods.

The contract (stable):

- An operator is a frozen keyword-only dataclass derived from `DataOp`. Its fields are its parameters, all
  plain values; ``name`` is Data-Juicer's where Data-Juicer has the operator, and so are the parameters'
  names.
- ``op.run(dataset, context) -> dataset``. Other columns stay, chat messages and turns are handled like
  strings, rows get a ``row_id`` (hash of their content) if they have none. Every dropped, changed, added or
  flagged row is in ``context.ledger`` with its reason; `run` raises if one is not.
- ``op.fingerprint(context)`` hashes name, version, parameters, prompt templates, files it reads and the
  identity of the clients it asks. No operator has hidden randomness: a ``seed`` is a parameter.
- ``run_ops(dataset, ops, context, work_dir=...)`` keeps each step under ``H(key of the step before ||
  fingerprint)``: resumable, shared between chains with a common beginning, safe against SIGKILL.
- ``make_op({"name": {params}})`` builds from a recipe, ``operators()`` lists all, ``@register`` adds one.

A new operator::

    @register
    @dataclass(frozen=True, kw_only=True)
    class KeepQuestions(DataOp):
        name: ClassVar[str] = "keep_questions_filter"
        text_key: str = "text"

        def apply(self, dataset, context):
            reasons = [None if text.endswith("?") else "no question" for text in dataset[self.text_key]]
            return select_rows(dataset, reasons, context, self.name)

Row-wise figures derive from `RangeFilter` (write ``bounds`` and ``measure``), text changes from `TextMapper`
(write ``change``), operators that ask a language model name their ``roles`` and use ``context.client(role)``.

Language models: ``ChatClient.complete(messages, sampling=Sampling(...)) -> list[str]`` and ``complete_many``;
`OpenAIChat` (any ``/v1`` server; retries), `TransformersChat` (local model), `ScriptedChat` (list or
function), `CachedChat` around any of them (SQLite on disk, budget ``max_calls`` / ``max_tokens``).
``client.data_plane`` says whether it may see rows. ``ask(client, conversations, schema)`` gives answers
checked against an `AnswerSchema`, repaired once, ``value=None`` where that failed. Failures are `ChatError`
(`BudgetExceeded`).
"""

from hf_plugins.data_ops import (
    data_juicer,
    decontamination,
    filters,
    llm_ops,
    mappers,
    minhash,
    perplexity,
    preference,
    presidio,
)
from hf_plugins.data_ops.answers import Answer, AnswerError, AnswerSchema, Field, ask
from hf_plugins.data_ops.chat import (
    BudgetExceeded,
    CachedChat,
    ChatClient,
    ChatError,
    OpenAIChat,
    Sampling,
    ScriptedChat,
    TransformersChat,
    make_client,
)
from hf_plugins.data_ops.filters import RangeFilter
from hf_plugins.data_ops.mappers import TextMapper
from hf_plugins.data_ops.op import (
    ROW_ID,
    DataOp,
    Ledger,
    OpContext,
    content_key,
    make_op,
    operators,
    register,
    run_ops,
    select_rows,
    with_row_ids,
)

__all__ = [
    "ROW_ID",
    "Answer",
    "AnswerError",
    "AnswerSchema",
    "BudgetExceeded",
    "CachedChat",
    "ChatClient",
    "ChatError",
    "DataOp",
    "Field",
    "Ledger",
    "OpContext",
    "OpenAIChat",
    "RangeFilter",
    "Sampling",
    "ScriptedChat",
    "TextMapper",
    "TransformersChat",
    "ask",
    "content_key",
    "data_juicer",
    "decontamination",
    "filters",
    "llm_ops",
    "make_client",
    "make_op",
    "mappers",
    "minhash",
    "operators",
    "perplexity",
    "preference",
    "presidio",
    "register",
    "run_ops",
    "select_rows",
    "with_row_ids",
]
