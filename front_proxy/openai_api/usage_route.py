"""GET /v1/usage: what the caller's own key used. The scheduler sums, and checks the key itself."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

import grpc
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from front_proxy.openai_api.answer import error_content
from protos.accounts.v1 import accounts_pb2
from scheduler.operator_client import ask_accounts

PATH = "/v1/usage"
TIMEOUT_S = 5.0
_NOT_NOW = "Usage cannot be read: the scheduler does not answer."
_BEARER = "bearer "


def add_usage_route(app: FastAPI, scheduler_address: str) -> None:
    """Serve it, by whichever scheduler leads. The key was checked before: it has the scope usage:own."""

    async def usage(request: Request) -> Response:
        headers = request.headers
        named = headers.get("authorization", "")
        key = named[len(_BEARER) :].strip() if named.lower().startswith(_BEARER) else headers.get("x-api-key", "")
        asked = accounts_pb2.ReportUsageRequest(by=["day"])
        try:
            async with asyncio.timeout(TIMEOUT_S):
                told = await ask_accounts(
                    scheduler_address, key, lambda stub, shown: stub.ReportUsage(asked, metadata=shown)
                )
        except (TimeoutError, grpc.aio.AioRpcError):
            content = error_content(HTTPStatus.SERVICE_UNAVAILABLE, _NOT_NOW, PATH)
            return Response(content, HTTPStatus.SERVICE_UNAVAILABLE, media_type="application/json")
        days = [
            {
                "day": each.group[0],
                "requests": each.requests,
                "prompt_tokens": each.prompt_tokens,
                "cached_tokens": each.cached_tokens,
                "completion_tokens": each.output_tokens,
                "amount": each.amount_nano / 1e9,
            }
            for each in told.sums
        ]
        return JSONResponse({"object": "list", "currency": told.currency, "data": days})

    app.add_api_route(PATH, usage, methods=["GET"])
