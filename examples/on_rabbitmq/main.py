"""Sends mails that a queue of RabbitMQ has, two at once: `dayfly apply -f examples/on_rabbitmq`."""

import time


def handler(event, context):
    """A message's headers are attributes of the event: its `To` is `event["to"]`."""
    if "specversion" not in event:
        return "I run when there is a mail to send: dayfly apply -f examples/on_rabbitmq\n"
    time.sleep(0.05)  # stands for a slow server; what there is no room for waits in the queue
    print(f"mail to {event['to']}: {event['data']}")
