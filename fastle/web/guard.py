"""Keeps other pages away from a server on 127.0.0.1.

Any page that a browser shows can send requests to 127.0.0.1, and with DNS rebinding it can even read the answers: its
own name then leads to 127.0.0.1. The Host header gives that away, since the browser writes the page's name there, and
the Origin and Sec-Fetch-Site headers say which page asks. A page cannot change any of the three.
"""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# the page may load nothing from elsewhere, and no other page may embed it
HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'self'; img-src 'self' blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Guard:
    """An ASGI application before another one, which refuses what does not come from its own page.

    Args:
        app: The application that it guards.
        port: The server's.
    """

    def __init__(self, app: ASGIApp, port: int) -> None:
        self._app = app
        self._hosts = (f"127.0.0.1:{port}", f"localhost:{port}")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            # only HTTP is served: other requests get no answer
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        fault = self._fault(scope["path"], Headers(scope=scope))
        answer = self._app if fault is None else PlainTextResponse(fault + "\n", 403, {"connection": "close"})
        await answer(scope, receive, send_with_headers)

    def _fault(self, path: str, headers: Headers) -> str | None:
        if len(headers.getlist("host")) != 1 or headers["host"].lower() not in self._hosts:
            return f"This server answers to {' and '.join(self._hosts)} only."
        if any(origin not in [f"http://{host}" for host in self._hosts] for origin in headers.getlist("origin")):
            return "This server answers to its own page only."
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not _is_link(path, headers):
            return "This server answers to its own page only."
        return None


def _is_link(path: str, headers: Headers) -> bool:
    """Whether a request follows a link to the page, from wherever that stands."""
    return path == "/" and headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
