"""Runs by a schedule: `dayfly apply -f examples/report`."""


def handler(event, context):
    """Say which firing this is for; *event* is a CloudEvent."""
    if "specversion" not in event:
        return "I run by a schedule: dayfly apply -f examples/report\n"
    print(f"reporting to {event['data']['to']} for {event['time']}")
    return {"reported": event["time"]}
