"""Counts what is in CSV files that appear in a folder: `dayfly apply -f examples/on_folder`."""

import csv


def handler(event, context):
    """The file's content is the event's data; it is in `.done` when this has succeeded."""
    if "specversion" not in event:
        return "I run when there is a file: dayfly apply -f examples/on_folder\n"
    rows = list(csv.DictReader(event["data"].splitlines()))
    total = sum(int(row["number"]) for row in rows)
    print(f"{event['filepath']}: {total} things in {len(rows)} rows")
