"""Everything of ours that can fail, by name. The class docstring is the message and the remedy.

User code's failures are not here: they are data (`models.Failure`).
"""

from typing import Any


class PlatformError(Exception):
    """Something on our side failed."""

    status: int = 500
    retryable: bool = False
    retry_after_s: int | None = None

    def __init__(self, detail: str = "", **fields: Any) -> None:
        super().__init__(detail or type(self).title())
        self.detail = detail
        self.fields = fields

    @classmethod
    def title(cls) -> str:
        """The first sentence of the docstring: what happened."""
        return (cls.__doc__ or cls.__name__).split("\n")[0].strip()

    @classmethod
    def remedy(cls) -> str:
        """The rest of the docstring: what to do about it."""
        return " ".join(line.strip() for line in (cls.__doc__ or "").split("\n")[1:]).strip()


class BadInput(PlatformError):
    """What was sent is not valid.

    Nothing was changed. Correct what the detail names and send it again.
    """

    status = 400


class RunIsOver(BadInput):
    """The run is over.

    `dayfly run retry NAME` begins another one with what succeeded, if it failed.
    """


class BadPackage(BadInput):
    """The package was refused.

    Nothing was changed. Send a zip of regular files and folders within the limits.
    """


class FunctionNotFound(PlatformError):
    """There is no such function.

    `dayfly list` shows what is deployed; `dayfly deploy PATH` deploys one.
    """

    status = 404


class NotReadyHere(PlatformError):
    """What it needs is not on this server yet.

    It was declared at another one, and its package or its environment is on its way: try again in
    a moment. The server's log says why when that fails.
    """

    status = 503
    retryable = True
    retry_after_s = 1


class TriggerNotFound(PlatformError):
    """There is no such trigger.

    `dayfly trigger list` shows them; `dayfly apply -f FILE` declares one.
    """

    status = 404


class JobNotFound(PlatformError):
    """There is no such job.

    `dayfly job list` shows them; `dayfly job run` makes one.
    """

    status = 404


class WorkflowNotFound(PlatformError):
    """There is no such workflow, or none of what it refers to.

    `dayfly workflow list` shows those there are; `dayfly workflow deploy FILE` declares one.
    """

    status = 404


class RunNotFound(PlatformError):
    """There is no such run.

    `dayfly run list` shows them; `dayfly run start WORKFLOW` begins one.
    """

    status = 404


class QueueNotFound(PlatformError):
    """Nothing is declared of such a queue.

    `dayfly queue list` shows those there are; `dayfly apply -f FILE` declares one.
    """

    status = 404


class SecretNotFound(PlatformError):
    """There is no such secret.

    `dayfly secret put NAME` keeps one; `dayfly secret list` shows their names.
    """

    status = 404


class SecretsAreMounted(PlatformError):
    """This server's secrets are kept by somebody else.

    Nothing was changed. Change them where they come from, as in the Kubernetes Secret that is
    mounted there; or start the server without --secrets.
    """

    status = 409


class EnvironmentNotFound(PlatformError):
    """There is no such environment.

    `dayfly list environments` shows them; a requirements.txt beside the code makes one.
    """

    status = 404


class EnvironmentBuildFailed(PlatformError):
    """The environment could not be built.

    The detail is uv's own message. Nothing was changed: correct the requirements and deploy again.
    """

    status = 422


class BodyTooLarge(PlatformError):
    """The request's body is over the limit.

    Send less, or put the data where the function can fetch it and send a reference.
    """

    status = 413


class QueueFull(PlatformError):
    """Too many invocations of this function are waiting.

    Retry after the time in Retry-After, or raise the function's maxScale or queueMax.
    """

    status = 429
    retryable = True
    retry_after_s = 1


class NoCapacity(PlatformError):
    """No sandbox became free before the deadline.

    Retry later. If it stays so, raise the function's maxScale or the server's --sandboxes-max.
    """

    status = 503
    retryable = True
    retry_after_s = 1


class Draining(PlatformError):
    """The server is shutting down.

    Retry: another server, or this one after its restart, will take the request.
    """

    status = 503
    retryable = True
    retry_after_s = 1


class NoShard(NoCapacity):
    """No shard of the pool could be reached before the deadline.

    Retry later. If it stays so, look whether `dayfly pool` runs, and at the gateway's log.
    """


class ShardLost(PlatformError):
    """The shard that had the request is gone, or does not answer.

    Nobody knows whether the function ran. Retry if it may run twice; what must not be lost is sent
    with `Prefer: respond-async` and an Idempotency-Key.
    """

    status = 502
    retryable = True
    retry_after_s = 1


class ShardFailed(PlatformError):
    """The shard could not do it.

    Its log says why. Retry later.
    """

    status = 503
    retryable = True
    retry_after_s = 1


class CertificatesUnusable(PlatformError):
    """The certificates cannot be used.

    Give a folder with ca.crt, tls.crt and tls.key; `dayfly certificates DIR` makes some to try.
    """


class SandboxStartFailed(PlatformError):
    """A sandbox could not be started.

    `dayfly doctor` says what this machine lacks; the server's log has the details.
    """

    status = 503
    retryable = True
    retry_after_s = 5


class ZygoteUnfit(SandboxStartFailed):
    """Nothing can be forked from a process that has these modules in it.

    Sandboxes of this environment are started instead; it costs each of them what a start costs.
    """


class FetchFailed(PlatformError):
    """The package could not be fetched from its URL.

    Nothing was changed. Correct packageUrl, or upload the package with `dayfly deploy`.
    """

    status = 502
    retryable = True
    retry_after_s = 5


class ItemDamaged(PlatformError):
    """An item of a job is not what was sent."""

    status = 500


class PackageDamaged(PlatformError):
    """The stored package is not what its digest says.

    It is never run. Deploy the function again.
    """

    status = 503


class BadTree(BadInput):
    """What a step left cannot be taken over.

    The detail names the path. Nothing of it was kept.
    """


class TooManyStreams(PlatformError):
    """Too many outputs of steps are being written as streams.

    Retry later: each has memory and threads of the server for as long as its step runs.
    """

    status = 503
    retryable = True
    retry_after_s = 1


class TakingEnded(PlatformError):
    """What a step left is not taken over any more.

    The step was stopped, or is out of time: what it leaves has to be read within its timeout too.
    """


class ArtifactGone(PlatformError):
    """The artifact is not stored.

    The step that made it has to run again.
    """

    status = 410


class ArtifactDamaged(PlatformError):
    """An artifact changed on disk.

    It is never handed over. The step that made it has to run again.
    """

    status = 503


class WorkspaceConflict(BadInput):
    """Parallel branches changed the same paths of a workspace.

    Nothing was joined. Let each branch write to paths of its own, or declare the policy `ordered`
    or `reducer`.
    """

    status = 409


class DiskFull(PlatformError):
    """There is no room left in the data folder.

    Nothing of what was being written is left. Free space there, or have the server keep less.
    """

    status = 507
    retryable = True


class DriverUnavailable(PlatformError):
    """This machine cannot give the isolation that was asked for.

    `dayfly doctor` names the exact fix. `--driver process` runs without isolation: for your own
    code on your own laptop only.
    """

    status = 503


class TooManyHops(BadInput):
    """An event has gone through too many destinations: they lead in a circle.

    It is dead, and can be seen with `dayfly events show`. Correct onSuccess and onFailure.
    """


class Refused(BadInput):
    """The event cannot be given to a function.

    It is dead, and `dayfly events show` has what came. Correct whoever sends such events.
    """


class NotVerified(PlatformError):
    """No key that is trusted has signed this.

    Believe nothing that it says. Ask for it again, or for the public key that it was signed with.
    """

    status = 422


class StoreFailed(PlatformError):
    """The store of events does not work.

    Nobody knows whether this was written: send it again with the same Idempotency-Key. The
    server's log has the cause; the usual one is a disk that is full.
    """

    status = 503
    retryable = True
    retry_after_s = 1


class NameTaken(PlatformError):
    """There is one of that name already.

    Nothing was changed. Choose another name, or delete the one that is there.
    """

    status = 409


class Late(PlatformError):
    """Another server goes on with it.

    What came here was not written. Ask again: the one that has it now answers.
    """

    status = 409
    retryable = True
    retry_after_s = 1


class TooManyWishes(PlatformError):
    """Too much that was asked of this job or run has not been heard yet.

    Retry after the time in Retry-After.
    """

    status = 429
    retryable = True
    retry_after_s = 1


class DataFolderUnusable(PlatformError):
    """The data folder cannot be used.

    Give a folder that this user may write with --data DIR, one server a folder.
    """
