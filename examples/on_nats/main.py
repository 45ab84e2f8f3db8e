"""Packs what is ordered on a subject of NATS JetStream: `dayfly apply -f examples/on_nats`."""

stock = {"lamp", "table"}


def handler(event, context):
    """*event* is a CloudEvent; what raises is tried again, and is a dead letter at last."""
    if "specversion" not in event:
        return "I run when something is ordered: dayfly apply -f examples/on_nats\n"
    order = event["data"]
    if order["item"] not in stock:
        raise LookupError(f"no {order['item']} in stock")
    print(f"packing {order['number']} of {order['item']}")
    return {"packed": order["item"]}
