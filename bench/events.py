"""Durable events: how fast they are accepted, and how fast they are run.

    python -m bench.events [SECONDS]

Accepted: POST with `Prefer: respond-async` from 64 connections (wrk), each answered 202 when it is
on the disk. Run: what was accepted, of a function that does nothing, until nothing waits; and the
same while more is accepted. Then the server's memory with very many waiting.
"""
