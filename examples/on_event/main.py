"""Is given CloudEvents that are posted to /events: `dayfly apply -f examples/on_event`."""


def handler(event, context):
    """Every function whose trigger means the event is given it; who sends it knows none."""
    if "specversion" not in event:
        return "I run when there is a big order: dayfly apply -f examples/on_event\n"
    order = event["data"]
    print(f"big order {event['id']}: {order['euros']} euros from {event['source']}")
