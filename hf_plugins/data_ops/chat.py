"""Language models behind one small client: a server, a local model, a script; a cache and a budget around."""

import contextlib
import hashlib
import http.client
import json
import os
import re
import sqlite3
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hf_plugins.data_ops.op import canonical, digest

Messages = list[dict[str, str]]
Progress = Callable[[int, int], None]


class ChatError(RuntimeError):
    """A language model could not be asked: the server is away, answers garbage, or refuses."""


class BudgetExceeded(ChatError):
    """The allowed number of calls or tokens is used up; answers so far are in the cache."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is drawn; part of the cache key."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 1024
    n: int = 1
    seed: int = 0


class ChatClient:
    """Base of all clients: `complete` asks once, `complete_many` asks for a list.

    Attributes:
        identity: Model and revision; enters fingerprints and cache keys.
        data_plane: Whether the client may see rows of the data (False for an agent that must not).
    """

    identity: str = "none"
    data_plane: bool = True

    def complete(self, messages: Messages, *, sampling: Sampling | None = None) -> list[str]:
        """``sampling.n`` answers to one conversation.

        Raises:
            ChatError: If the model cannot be asked.
        """
        raise NotImplementedError(f"{type(self).__name__} must write complete(messages).")

    def complete_many(
        self,
        conversations: Sequence[Messages],
        *,
        sampling: Sampling | None = None,
        progress: Progress | None = None,
        on_answer: Callable[[int, list[str]], None] | None = None,
    ) -> list[list[str]]:
        """Answers to many conversations, in order; ``on_answer`` hears of each as soon as it is there.

        Raises:
            ChatError: If one cannot be had; ``on_answer`` has heard of the others.
        """
        found = []
        for index, messages in enumerate(conversations):
            found.append(self.complete(messages, sampling=sampling))
            if on_answer:
                on_answer(index, found[-1])
            if progress:
                progress(index + 1, len(conversations))
        return found


class ScriptedChat(ChatClient):
    """Answers from a list, or from a function of the messages: for tests and for rule-based stand-ins.

    Args:
        script: Answers in order, or ``f(messages) -> str | list[str]``; with ``n > 1`` a string is repeated.
        identity: Name in fingerprints; change it when the function's answers change.
        data_plane: Whether it may see rows.
    """

    def __init__(
        self,
        script: Iterable[str] | Callable[[Messages], str | list[str]],
        *,
        identity: str = "scripted",
        data_plane: bool = True,
    ) -> None:
        self.identity, self.data_plane = identity, data_plane
        self.requests: list[Messages] = []
        self._answer = script if callable(script) else None
        self._rest = iter(()) if callable(script) else iter(script)

    def complete(self, messages: Messages, *, sampling: Sampling | None = None) -> list[str]:
        """The next answers of the script."""
        n = (sampling or Sampling()).n
        self.requests.append([dict(message) for message in messages])
        if self._answer is not None:
            answer = self._answer(messages)
            return list(answer) if isinstance(answer, list) else [answer] * n
        answers = [text for _, text in zip(range(n), self._rest, strict=False)]
        if len(answers) < n:
            raise ChatError(
                f"the script has no answer left for request {len(self.requests)}; give one for each request."
            )
        return answers


class OpenAIChat(ChatClient):
    """Any server with ``/chat/completions``: vLLM, ``transformers serve``, a hosted model.

    Refused connections, timeouts, HTTP 408/409/429/5xx and answers that are no completion are tried again,
    each time after twice the wait; other errors of the server are reported at once.

    Args:
        base_url: For example ``http://127.0.0.1:8000/v1``.
        model: Name that the server knows.
        revision: Of the weights, for fingerprints; a server does not tell it.
        api_key: Default: the environment variable ``OPENAI_API_KEY``, or none.
        timeout: Seconds for one request.
        retries: Further tries after the first.
        concurrency: Requests under way at once in `complete_many`.
        backoff: Seconds before the second try.
        extra: Further fields of each request, for example ``{"chat_template_kwargs": {...}}``.
        data_plane: Whether it may see rows.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        revision: str = "",
        api_key: str | None = None,
        timeout: float = 120.0,
        retries: int = 4,
        concurrency: int = 8,
        backoff: float = 1.0,
        extra: Mapping[str, Any] | None = None,
        data_plane: bool = True,
    ) -> None:
        if not re.match(r"https?://", base_url):
            raise ValueError(f"base_url must begin with http:// or https://; got {base_url!r}.")
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.model, self.extra, self.data_plane = model, dict(extra or {}), data_plane
        self.identity = f"openai:{model}@{revision}" + (f"+{canonical(self.extra)}" if self.extra else "")
        self.timeout, self.retries, self.concurrency, self.backoff = timeout, retries, concurrency, backoff
        self._key = api_key if api_key is not None else os.environ.get("OPENAI_API_KEY", "")

    def complete(self, messages: Messages, *, sampling: Sampling | None = None) -> list[str]:
        """Ask the server, with retries."""
        body = {"model": self.model, "messages": messages, **asdict(sampling or Sampling()), **self.extra}
        wait, problem = self.backoff, ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(wait)
                wait = min(2 * wait, 60.0)
            try:
                return _answers(self._post(body), (sampling or Sampling()).n)
            except urllib.error.HTTPError as error:
                text = error.read(500).decode("utf-8", "replace").strip()
                problem = f"HTTP {error.code} {text}"
                if error.code not in (408, 409, 429) and error.code < 500:
                    raise ChatError(
                        f"{self.url} refuses the request: {problem}. Check the model's name {self.model!r}, "
                        "the key and the length of the messages."
                    ) from error
            except (OSError, ValueError) as error:
                # Refused, reset, timed out; or no JSON, no completion.
                problem = f"{type(error).__name__}: {error}"
        raise ChatError(
            f"{self.url} gave no usable answer in {self.retries + 1} tries; last: {problem[:300]}. Check "
            "that the server runs and raise timeout or retries if it is only slow; answers so far are kept "
            "by CachedChat."
        )

    def _post(self, body: Mapping[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return response.read()
        except (TimeoutError, ConnectionError) as error:
            raise OSError(str(error) or type(error).__name__) from error
        except http.client.HTTPException as error:
            raise OSError(f"the connection broke off: {type(error).__name__}") from error

    def complete_many(
        self,
        conversations: Sequence[Messages],
        *,
        sampling: Sampling | None = None,
        progress: Progress | None = None,
        on_answer: Callable[[int, list[str]], None] | None = None,
    ) -> list[list[str]]:
        """Ask ``concurrency`` at a time; after a failure nothing new is asked, what is under way is kept."""
        found: list[list[str] | None] = [None] * len(conversations)
        failure: ChatError | None = None
        done = 0

        def keep(index: int, answers: list[str]) -> None:
            nonlocal done
            found[index] = answers
            done += 1
            if on_answer:
                on_answer(index, answers)
            if progress:
                progress(done, len(conversations))

        with ThreadPoolExecutor(max(1, self.concurrency)) as pool:
            jobs = {
                pool.submit(self.complete, messages, sampling=sampling): index
                for index, messages in enumerate(conversations)
            }
            waiting = set(jobs)
            for job in as_completed(jobs):
                waiting.discard(job)
                try:
                    keep(jobs[job], job.result())
                except ChatError as error:
                    failure = error
                    break
            if failure is not None:
                # `as_completed` never hears of a job that was cancelled before it began: wait for the others.
                for job in [job for job in waiting if not job.cancel()]:
                    with contextlib.suppress(ChatError):
                        keep(jobs[job], job.result())
        if failure is not None:
            raise failure
        return [answers or [] for answers in found]


def _answers(data: bytes, n: int) -> list[str]:
    """Texts of a completion.

    Raises:
        ValueError: If the bytes are no completion with n answers.
    """
    try:
        reply = json.loads(data)
        texts = [choice["message"]["content"] for choice in reply["choices"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the answer is no chat completion: {data[:120]!r}") from error
    if len(texts) != n or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"the server gave {len(texts)} answers for n={n}, or one without text")
    return texts


class TransformersChat(ChatClient):
    """A local model through ``generate`` and its chat template; no server needed.

    Args:
        model: Folder (or loaded model) of a causal language model.
        tokenizer: Loaded tokenizer if ``model`` is a loaded model.
        batch_size: Conversations generated together.
        device: Where it runs; default: the model's, or a GPU if there is one.
        data_plane: Whether it may see rows.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        batch_size: int = 8,
        device: str | None = None,
        data_plane: bool = True,
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from hf_plugins.data_ops.perplexity import model_hash

        if isinstance(model, str | Path):
            self.identity = f"transformers:{model_hash(str(model))[:16]}"
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(str(model))
            model = AutoModelForCausalLM.from_pretrained(str(model))
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        else:
            if tokenizer is None:
                raise ValueError("a loaded model needs its tokenizer: TransformersChat(model, tokenizer).")
            weights = hashlib.sha256()
            for name, tensor in sorted(model.state_dict().items()):
                weights.update(name.encode())
                weights.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            self.identity = f"transformers:{weights.hexdigest()[:16]}"
        if tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template; set tokenizer.chat_template first.")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.model = (model.to(device) if device else model).eval()
        self.tokenizer, self.batch_size, self.data_plane = tokenizer, batch_size, data_plane

    def complete(self, messages: Messages, *, sampling: Sampling | None = None) -> list[str]:
        """Generate answers to one conversation."""
        return self.complete_many([messages], sampling=sampling)[0]

    def complete_many(
        self,
        conversations: Sequence[Messages],
        *,
        sampling: Sampling | None = None,
        progress: Progress | None = None,
        on_answer: Callable[[int, list[str]], None] | None = None,
    ) -> list[list[str]]:
        """Generate in batches, padded on the left; a seed gives the same draws for the same batch."""
        import torch

        sampling = sampling or Sampling()
        options: dict[str, Any] = {"max_new_tokens": sampling.max_tokens, "num_return_sequences": sampling.n}
        if sampling.temperature > 0:
            options |= {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
        else:
            options |= {"do_sample": False}
            if sampling.n > 1:
                raise ValueError("n > 1 answers need temperature > 0; greedy answers are all the same.")
        found: list[list[str]] = []
        for start in range(0, len(conversations), self.batch_size):
            batch = conversations[start : start + self.batch_size]
            texts = [
                self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                for messages in batch
            ]
            inputs = self.tokenizer(
                texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
            ).to(self.model.device)
            inputs.pop("token_type_ids", None)
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(sampling.seed)
                out = self.model.generate(**inputs, **options, pad_token_id=self.tokenizer.pad_token_id)
            words = self.tokenizer.batch_decode(
                out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            for index in range(len(batch)):
                found.append(words[index * sampling.n : (index + 1) * sampling.n])
                if on_answer:
                    on_answer(start + index, found[-1])
            if progress:
                progress(len(found), len(conversations))
        return found


class CachedChat(ChatClient):
    """A client with a cache on disk and a budget; equal questions are asked once, a killed run goes on.

    Key: model identity, messages, sampling. The file is SQLite in WAL mode, so several processes may share
    it; an answer is on disk before anybody sees it. Failures are never cached.

    Args:
        client: Who is asked when the cache has no answer.
        path: The cache file.
        max_calls: Questions that may reach the client (None: any number).
        max_tokens: Sum of ``max_tokens * n`` that may be asked of the client, the bound of what it can cost.
    """

    def __init__(
        self,
        client: ChatClient,
        path: str | Path,
        *,
        max_calls: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        self.client, self.path = client, Path(path)
        self.identity, self.data_plane = client.identity, client.data_plane
        self.max_calls, self.max_tokens = max_calls, max_tokens
        self.hits = self.calls = self.tokens = 0
        self._lock = threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._connect() as db:
            db.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answers TEXT NOT NULL)")

    def _connect(self) -> sqlite3.Connection:
        try:
            db = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            db.execute("PRAGMA journal_mode=WAL")
            # Survives SIGKILL; a power cut may cost the last answers, never the file.
            db.execute("PRAGMA synchronous=NORMAL")
        except sqlite3.DatabaseError as error:
            raise ChatError(
                f"{self.path} is no usable cache ({error}); move it away to start a new one, or free disk "
                "space."
            ) from error
        return db

    def key(self, messages: Messages, sampling: Sampling) -> str:
        """Cache key of a question."""
        return digest(self.identity, canonical(messages), canonical(asdict(sampling)))

    def complete(self, messages: Messages, *, sampling: Sampling | None = None) -> list[str]:
        """The cached answer, or the client's."""
        return self.complete_many([messages], sampling=sampling)[0]

    def complete_many(
        self,
        conversations: Sequence[Messages],
        *,
        sampling: Sampling | None = None,
        progress: Progress | None = None,
        on_answer: Callable[[int, list[str]], None] | None = None,
    ) -> list[list[str]]:
        """Cached answers where there are any; the client is asked for the others, each question once."""
        sampling = sampling or Sampling()
        keys = [self.key(messages, sampling) for messages in conversations]
        db = self._connect()
        try:
            known: dict[str, list[str]] = {}
            for key in dict.fromkeys(keys):
                row = db.execute("SELECT answers FROM answers WHERE key = ?", (key,)).fetchone()
                if row is not None:
                    known[key] = json.loads(row[0])
            ask = {key: conversations[i] for i, key in reversed(list(enumerate(keys))) if key not in known}
            ask = dict(reversed(ask.items()))
            self.hits += len(keys) - len(ask)
            done = len(conversations) - len(ask)
            within = self._allow(len(ask), sampling)
            asked = list(ask)[:within]

            def keep(index: int, answers: list[str]) -> None:
                nonlocal done
                known[asked[index]] = answers
                text = json.dumps(answers, ensure_ascii=False)
                try:
                    # Lone surrogates cannot be stored as UTF-8; JSON's escapes can.
                    text.encode("utf-8")
                except UnicodeEncodeError:
                    text = json.dumps(answers)
                with self._lock:
                    try:
                        db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (asked[index], text))
                    except sqlite3.Error as error:
                        raise ChatError(
                            f"{self.path} cannot take an answer ({error}); free disk space and run again: "
                            "what is stored will not be asked anew."
                        ) from error
                done += 1
                if progress:
                    progress(done, len(conversations))

            if asked:
                self.client.complete_many([ask[key] for key in asked], sampling=sampling, on_answer=keep)
            if within < len(ask):
                raise BudgetExceeded(
                    f"{len(ask) - within} questions are left and the budget is used up "
                    f"(max_calls={self.max_calls}, max_tokens={self.max_tokens}); raise it and run again, "
                    f"answers so far are in {self.path}."
                )
        finally:
            db.close()
        if on_answer:
            for index, key in enumerate(keys):
                on_answer(index, known[key])
        return [known[key] for key in keys]

    def _allow(self, wanted: int, sampling: Sampling) -> int:
        allowed = wanted
        if self.max_calls is not None:
            allowed = min(allowed, self.max_calls - self.calls)
        cost = sampling.max_tokens * sampling.n
        if self.max_tokens is not None:
            allowed = min(allowed, (self.max_tokens - self.tokens) // cost)
        allowed = max(0, allowed)
        self.calls += allowed
        self.tokens += allowed * cost
        return allowed


ClientKind = Literal["openai", "transformers"]


def make_client(spec: Mapping[str, Any], *, cache: str | Path | None = None) -> ChatClient:
    """A client from a recipe's entry.

    ``{kind: openai, base_url: ..., model: ...}`` or ``{kind: transformers, model: FOLDER}``; with
    ``max_calls`` / ``max_tokens`` as the budget. Other keys are the client's arguments.

    Raises:
        ValueError: If the entry names no known kind or lacks what it needs.
    """
    options = dict(spec)
    kind = options.pop("kind", None)
    budget = {name: options.pop(name) for name in ("max_calls", "max_tokens") if name in options}
    makers: dict[str, Callable[..., ChatClient]] = {"openai": OpenAIChat, "transformers": TransformersChat}
    if kind not in makers:
        raise ValueError(f"kind of a client must be {' or '.join(makers)}; got {kind!r}.")
    try:
        client = makers[kind](**options)
    except TypeError as error:
        raise ValueError(f"client of kind {kind}: {error}. Mend the entry in the recipe.") from error
    if cache is None:
        if budget:
            raise ValueError("max_calls and max_tokens need a cache; give the cache's path too.")
        return client
    return CachedChat(client, cache, **budget)
