import os


def handler(event, context):
    """What I was given."""
    return {
        "event": event,
        "context": {
            "aws_request_id": context.aws_request_id,
            "function_name": context.function_name,
            "function_version": context.function_version,
            "memory_limit_in_mb": context.memory_limit_in_mb,
            "namespace": context.namespace,
            "remaining": context.get_remaining_time_in_millis(),
            "repr": repr(context),
        },
        "env": dict(os.environ),
    }
