"""Runs by a schedule: `dayfly apply -f examples/report/schedule.yaml`."""


def handler(event, context):
    """Say which firing this is for; *event* is a CloudEvent."""
    if not isinstance(event, dict) or event.get("type") != "dev.dayfly.cron":
        return "I run by a schedule: dayfly apply -f examples/report/schedule.yaml\n"
    print(f"reporting to {event['data']['to']} for {event['time']}")
    return {"reported": event["time"]}
