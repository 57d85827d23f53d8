"""A proxy before an OpenAI-compatible server: what matches is answered here, the rest passes through."""

import http.client
import json
import logging
import threading
import time
import urllib.error
import urllib.request
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from hf_plugins.dpf_cm.model import PrivacyPreservingVectorDB

logger = logging.getLogger(__name__)
_MAX_BODY = 16 * 2**20


class GuardProxy:
    """Serves ``/v1/chat/completions`` and ``/v1/completions``; other paths are refused.

    The prompt is matched on the guard's own model (its first layers), before anything is sent on. A reply
    that repeats a private answer in more than ``output_share`` of its n-grams is replaced. Fails closed: what
    the guard cannot read is not sent on.

    Args:
        guard: The guard.
        upstream: Base URL of the server behind it, ending in ``/v1``.
        host: Address to listen on.
        port: Port; 0 takes a free one.
        timeout: Seconds that the server behind may take.
    """

    def __init__(
        self,
        guard: PrivacyPreservingVectorDB,
        upstream: str,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        timeout: float = 600.0,
    ) -> None:
        if not upstream.startswith(("http://", "https://")):
            raise ValueError(f"upstream must begin with http:// or https://; got {upstream!r}.")
        self.guard, self.upstream, self.timeout = guard, upstream.rstrip("/"), timeout
        # The model runs one prompt at a time; waiting for the server behind holds nobody up.
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer((host, port), _handler(self))
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]

    def serve_forever(self) -> None:
        """Serve until `close`."""
        self._server.serve_forever(poll_interval=0.1)

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    def answer(
        self, path: str, body: dict[str, Any], authorization: str | None
    ) -> tuple[int, dict[str, Any]]:
        """Status and reply to one request.

        Args:
            path: ``/chat/completions`` or ``/completions``.
            body: The request.
            authorization: Header to pass on.

        Returns:
            HTTP status and JSON.
        """
        chat = path == "/chat/completions"
        if not chat and path != "/completions":
            return 404, _error(f"the guard serves chat/completions and completions, not {path}.")
        if body.get("stream"):
            return 400, _error("the guard judges whole replies; send stream=false.")
        try:
            rows = self._prompts(body, chat)
        except (KeyError, TypeError, ValueError) as error:
            return 400, _error(f"the guard cannot read the prompt ({type(error).__name__}: {error}).")
        with self._lock:
            matches = self.guard.match_ids(rows)
        hit = next((match for match in matches if match is not None), None)
        if hit is not None:
            return 200, _reply(self.guard.safe_answer(hit.sample), body, chat)
        status, reply = self._forward(path, body, authorization)
        return (status, reply) if status != 200 else self._checked(reply, body, chat)

    def _prompts(self, body: dict[str, Any], chat: bool) -> list[list[int]]:
        tokenizer = self.guard.reader.tokenizer
        if not chat:
            prompt = body["prompt"]
            texts = [prompt] if isinstance(prompt, str) else prompt
            if not all(isinstance(text, str) for text in texts) or not texts:
                raise ValueError("prompt must be text")
            return tokenizer(texts)["input_ids"]
        messages = [{"role": str(m["role"]), "content": _content(m["content"])} for m in body["messages"]]
        if not messages:
            raise ValueError("the list of messages is empty")
        # The whole conversation, and the last question by itself: a preamble must not hide it.
        last = [message for message in messages if message["role"] == "user"][-1:]
        chats = [messages, last] if last and last != messages else [messages]
        texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    def _forward(
        self, path: str, body: dict[str, Any], authorization: str | None
    ) -> tuple[int, dict[str, Any]]:
        headers = {"Content-Type": "application/json"}
        if authorization:
            headers["Authorization"] = authorization
        request = urllib.request.Request(self.upstream + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                reply = json.loads(response.read())
        except urllib.error.HTTPError as error:
            return error.code, _error(error.read(2000).decode("utf-8", "replace"))
        except (OSError, ValueError, http.client.HTTPException) as error:
            return 502, _error(f"the server behind the guard gave no answer ({type(error).__name__}).")
        return (
            (200, reply)
            if isinstance(reply, dict)
            else (502, _error("the server behind the guard gave no object."))
        )

    def _checked(self, reply: dict[str, Any], body: dict[str, Any], chat: bool) -> tuple[int, dict[str, Any]]:
        try:
            texts = [_content(c["message"]["content"]) if chat else c["text"] for c in reply["choices"]]
        except (KeyError, TypeError, ValueError):
            return 502, _error("the server behind the guard gave no completion.")
        for text in texts:
            sample = self.guard.leaks(text)
            if sample is not None:
                return 200, _reply(self.guard.safe_answer(sample), body, chat)
        return 200, reply


def _content(value: Any) -> str:
    """Text of a message's content, which may be a list of parts.

    Raises:
        ValueError: If a part is no text; the guard cannot judge it.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(
        isinstance(p, dict) and isinstance(p.get("text"), str) for p in value
    ):
        raise ValueError("content must be text")
    return "".join(part["text"] for part in value)


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "ppvd_guard"}}


def _reply(text: str, body: dict[str, Any], chat: bool) -> dict[str, Any]:
    choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    return {
        "id": f"ppvd-{uuid.uuid4().hex}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": body.get("model", ""),
        "choices": [{"index": 0, "finish_reason": "stop", **choice}],
    }


def _handler(proxy: GuardProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                size = int(self.headers.get("Content-Length", ""))
                if not 0 < size <= _MAX_BODY:
                    raise ValueError(f"its body has {size} bytes, allowed are 1 to {_MAX_BODY}")
                body = json.loads(self.rfile.read(size))
                if not isinstance(body, dict):
                    raise ValueError("no JSON object")
                status, reply = proxy.answer(
                    self.path.removeprefix("/v1"), body, self.headers.get("Authorization")
                )
            except ValueError as error:
                status, reply = 400, _error(f"the guard cannot read the request ({error}).")
            data = json.dumps(reply, ensure_ascii=False).encode("utf-8", "replace")
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            logger.debug("%s", args)

    return Handler
