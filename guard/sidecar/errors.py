"""What a client of the sidecar is told when it gets no answer, in OpenAI's shape."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse


class ApiError(Exception):
    """A request that ends with an error: HTTP status, one sentence, and the parameter at fault if there is one."""

    def __init__(self, status: int, code: str, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param

    def body(self) -> dict[str, Any]:
        """The JSON that OpenAI clients understand."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, headers: dict[str, str] | None = None) -> JSONResponse:
        """The same as a response."""
        return JSONResponse(self.body(), status_code=self.status, headers=headers)


class Refused(ApiError):
    """A request that the parameter firewall does not let through."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str = "refused_parameter", status: int = 400
    ) -> None:
        super().__init__(status, code, message, param=param)
