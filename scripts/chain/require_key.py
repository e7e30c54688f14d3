"""For vLLM's option --middleware: the key is needed for all that a server answers, and not below /v1 alone."""

import os
import secrets


class RequireKey:
    """ASGI middleware. /health stays open, and the requests that browsers send ahead (OPTIONS)."""

    def __init__(self, app):
        self.app, self.expected = app, f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope, receive, send) -> None:
        guarded = scope["type"] == "http" and scope["path"] != "/health" and scope["method"] != "OPTIONS"
        given = dict(scope.get("headers", [])).get(b"authorization", b"")
        if guarded and not secrets.compare_digest(given, self.expected):
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})
            return
        await self.app(scope, receive, send)
