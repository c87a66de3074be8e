"""Refuses requests to the page that do not come from this machine's own browser windows of it.

The server listens on 127.0.0.1 only, but any website can make the browser of this machine send requests there. With DNS
rebinding such a request carries the website's name as `Host`; without it, the website's address as `Origin`. Neither
can be changed by a website, so both are checked.
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

_LOCAL_HOST = re.compile(rb"(?:localhost|127\.0\.0\.1|\[::1\])(?::([0-9]{1,5}))?", re.IGNORECASE)
_HTTP_PORT = b"80"
REFUSAL = "refused: this page answers only requests of its own, at http://127.0.0.1 or http://localhost with its port\n"


def is_local(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Returns whether a request names this machine as its host, and comes from no other site.

    The port of `Host` may differ from the server's, as it does behind `ssh -L 9000:localhost:7860`. The port of
    `Origin` must be that of `Host`: a page on another port of this machine is another site.

    Args:
        headers: names in lower case, and values, as ASGI gives them.
    """
    values: dict[bytes, list[bytes]] = {b"host": [], b"origin": []}
    for name, value in headers:
        if name in values:
            values[name].append(value)
    if len(values[b"host"]) != 1 or len(values[b"origin"]) > 1:
        return False
    host = _LOCAL_HOST.fullmatch(values[b"host"][0])
    if host is None:
        return False
    for origin in values[b"origin"]:
        site = _LOCAL_HOST.fullmatch(origin.removeprefix(b"http://")) if origin.startswith(b"http://") else None
        if site is None or (site[1] or _HTTP_PORT) != (host[1] or _HTTP_PORT):
            return False
    return True


class LocalOnly:
    """ASGI middleware that answers requests of other sites with HTTP status 403 and one line of text."""

    def __init__(self, app: "ASGIApp") -> None:
        self._app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Passes on local requests and the server's own messages, and refuses everything else."""
        if scope["type"] not in ("http", "websocket") or is_local(scope["headers"]):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: the server answers 403
        else:
            content = REFUSAL.encode()
            headers = [
                (b"content-type", b"text/plain; charset=utf-8"),
                (b"content-length", str(len(content)).encode()),
            ]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": content})
