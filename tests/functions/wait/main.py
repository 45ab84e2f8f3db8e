import time


def handler(event, context):
    """Takes as many seconds as it is told."""
    time.sleep(event["seconds"])
    return "waited"
