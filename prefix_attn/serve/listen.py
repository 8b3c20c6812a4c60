"""Listen on a port until Ctrl-C, or until the process is told to end."""

from __future__ import annotations

import sys
from types import FrameType

import fastapi
import uvicorn

from prefix_attn.serve.engine import Engine


class _Server(uvicorn.Server):
    """uvicorn waits until all requests are answered. So that this is soon, the engine ends them."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self.engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.engine.end()
        super().handle_exit(sig, frame)


def listen(app: fastapi.FastAPI, engine: Engine, *, host: str, port: int) -> None:
    """Serve ``app``. When the process is told to end, requests that are not finished are answered with status 503."""
    server = _Server(uvicorn.Config(app, host=host, port=port, log_level="info"), engine)
    try:
        server.run()
    except KeyboardInterrupt:  # uvicorn raises it anew, when all is over
        return
    if not server.started:
        sys.exit(1)
