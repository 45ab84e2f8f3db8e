"""Books what a queue of Amazon SQS has, ten at a time: `dayfly apply -f examples/on_sqs`."""


def handler(events, context):
    """Only those that are named in the answer are tried again, as in AWS Lambda."""
    if not isinstance(events, list):
        return "I run when there is something to book: dayfly apply -f examples/on_sqs\n"
    failed = []
    for event in events:
        try:
            print(f"booked {event['data']['euros']:.2f} euros for {event['data']['name']}")
        except (KeyError, TypeError, ValueError) as error:
            print(f"cannot book {event['id']}: {error!r}")
            failed.append({"itemIdentifier": event["id"]})
    return {"batchItemFailures": failed}
