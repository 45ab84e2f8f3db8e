"""What a handler is told about its invocation: AWS Lambda's context, plus `deadline`."""

import time

FOLDERS = ("/in", "/out", "/workspaces")
"""Of a step in a sandbox."""


class Context:
    """The second argument of every handler."""

    __slots__ = (
        "aws_request_id",
        "deadline",
        "env",
        "function_name",
        "function_version",
        "in_folder",
        "memory_limit_in_mb",
        "namespace",
        "out_folder",
        "traceparent",
        "workspace_folder",
    )

    def __init__(
        self,
        *,
        aws_request_id: str,
        function_name: str,
        function_version: str,
        memory_limit_in_mb: int,
        namespace: str,
        deadline: float,
        traceparent: str,
        env: dict[str, str] | None = None,
        in_folder: str = FOLDERS[0],
        out_folder: str = FOLDERS[1],
        workspace_folder: str = FOLDERS[2],
    ) -> None:
        self.aws_request_id = aws_request_id
        self.function_name = function_name
        self.function_version = function_version
        self.memory_limit_in_mb = memory_limit_in_mb
        self.namespace = namespace
        self.deadline = deadline
        """The end of this invocation's time, in seconds of `time.monotonic()`."""
        self.traceparent = traceparent
        self.in_folder, self.out_folder = in_folder, out_folder
        """Where a step finds what it is given, and leaves what it makes."""
        self.workspace_folder = workspace_folder
        self.env = env or {}
        """Variables of this invocation: of a job's task `JOB_INDEX` and others."""

    def get_remaining_time_in_millis(self) -> int:
        """Milliseconds until this invocation is ended, never below 0."""
        return max(0, int((self.deadline - time.monotonic()) * 1000))

    def __repr__(self) -> str:
        function = f"{self.function_name} version {self.function_version}"
        return f"<Context {function} invocation {self.aws_request_id}>"
