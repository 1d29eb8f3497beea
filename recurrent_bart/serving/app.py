"""HTTP application of the service. No text of a user is logged, and no error tells a path or a text."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from recurrent_bart.inference.summarizer import Summarizer
from recurrent_bart.serving.errors import add_errors
from recurrent_bart.serving.middleware import ServiceMiddleware
from recurrent_bart.serving.page import add_page
from recurrent_bart.serving.routes import add_monitoring, add_sessions, add_summaries
from recurrent_bart.serving.service import Service
from recurrent_bart.serving.settings import Settings


def build_app(summarizer: Summarizer, settings: Settings) -> FastAPI:
    """Build the application. It owns the folder of sessions until it ends."""
    service = Service(summarizer, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        deletion = asyncio.create_task(service.delete_old_sessions())
        yield
        deletion.cancel()
        await asyncio.to_thread(service.close)

    # the usual pages load programs from the network
    app = FastAPI(title="Recurrent BART", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(ServiceMiddleware, service=service)
    add_errors(app)
    add_page(app)
    add_monitoring(app, service)
    add_summaries(app, service)
    add_sessions(app, service)
    return app
