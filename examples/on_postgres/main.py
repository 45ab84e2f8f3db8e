"""Takes rows out of a table of PostgreSQL: `dayfly apply -f examples/on_postgres`."""


def handler(event, context):
    """The row, written in the transaction that it tells of, is deleted when this has succeeded."""
    if "specversion" not in event:
        return "I run when somebody signs up: dayfly apply -f examples/on_postgres\n"
    person = event["data"]
    print(f"welcome, {person['name']}, number {person['number']}")
