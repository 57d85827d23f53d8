"""A loopback server that answers like ``/v1/chat/completions``, or misbehaves as a test asks."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def completion(*texts: str) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}} for text in texts]}).encode()


Reply = tuple[int, bytes] | str


@contextmanager
def serving(reply: Callable[[dict[str, Any], int], Reply]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Serve ``reply(body, number of request) -> (status, bytes)``; "hang" waits, "cut" breaks off."""
    seen: list[dict[str, Any]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append(body | {"_path": self.path, "_key": self.headers.get("Authorization")})
                number = len(seen)
            answer = reply(body, number)
            if answer == "hang":
                time.sleep(1.0)
                return
            if answer == "cut":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"choi')
                self.wfile.flush()
                self.connection.close()
                return
            status, data = answer
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
    finally:
        server.shutdown()
        server.server_close()
