"""Is told of payments by a webhook that is signed: `dayfly apply -f examples/on_webhook`."""


def handler(event, context):
    """Who sends it has the secret, and the same `webhook-id` is run once."""
    if "specversion" not in event:
        return "I run when a webhook is sent: dayfly apply -f examples/on_webhook\n"
    if event["type"] == "invoice.paid":
        invoice = event["data"]["data"]
        print(f"paid: {invoice['euros']} euros by {invoice['name']}")
