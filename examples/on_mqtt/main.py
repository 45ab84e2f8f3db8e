"""Looks after rooms whose sensors speak MQTT: `dayfly apply -f examples/on_mqtt`."""


def handler(event, context):
    """Only what is hot gets here: trigger.yaml has a filter. The topic is the event's subject."""
    if "specversion" not in event:
        return "I run when a room is hot: dayfly apply -f examples/on_mqtt\n"
    _, room, _ = event["subject"].split("/")
    print(f"cooling the {room}: it has {event['data']['celsius']} degrees")
