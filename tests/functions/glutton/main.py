def handler(event, context):
    """Takes memory, 8 MiB at a time, and uses every page of it."""
    held = []
    while True:
        held.append(b"x" * (8 << 20))
