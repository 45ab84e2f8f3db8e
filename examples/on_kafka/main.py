"""Reads a topic of Kafka, each partition in order: `dayfly apply -f examples/on_kafka`."""


def handler(event, context):
    """The next of a partition comes when this one is over, also when it has to be tried again."""
    if "specversion" not in event:
        return "I run when an account changes: dayfly apply -f examples/on_kafka\n"
    change = event["data"]
    print(f"{change['account']}: {change['cents']:+} cents")
