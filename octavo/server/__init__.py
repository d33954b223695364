"""The OpenAI-compatible HTTP server: routes over an engine, for asyncio. Never imports torch.

``app.build_app(service)`` makes the ASGI application; ``service.Service`` is what its routes use.
"""
