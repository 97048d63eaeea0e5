"""The view in the browser and the HTTP service: needs the extra ``serve`` (Starlette, uvicorn, websockets)."""
