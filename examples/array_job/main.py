"""Counts primes, a slice of numbers in each task: `dayfly apply -f examples/array_job`."""

SLICE = 10_000


def handler(event, context):
    """Count those of one slice; *event* is {"index": ..., "size": ..., "retry": ...}."""
    if "index" not in event:
        return "I am a task of a job: dayfly apply -f examples/array_job\n"
    low = event["index"] * SLICE
    found = sum(is_prime(n) for n in range(low, low + SLICE))
    print(f"{found} primes from {low} to {low + SLICE - 1}")
    return found


def is_prime(n):
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
