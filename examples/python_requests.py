#!/usr/bin/env python3
"""Runs a deployment and prints its answer while it is generated.

Where the connection breaks, it goes on at the next chunk.

    python3 examples/python_requests.py [query] [deployment] [server]        needs Python 3.8 or later and requests
"""
import json
import os
import sys
import time
import uuid

import requests

MOST_FAILURES = 10  # connections in a row that brought nothing new
SILENCE = 60  # seconds without a sign of life; the server sends a comment every 15


def read_events(response):
    """Yields the events of one connection as dicts of their fields."""
    event = {}
    for line in response.iter_lines():  # bytes: iter_lines would end a line of text at U+2028, too
        if line:
            # What is cut off may end inside a character; it is not used, since no empty line follows.
            name, _, value = line.decode(errors="replace").partition(":")
            event[name] = value[1:] if value.startswith(" ") else value
        else:
            if "data" in event:
                yield event
            event = {}  # an event that no empty line ends does not count


def execute(server, request):
    """Runs the request once and yields its chunks, each once and in order, over as many connections as it takes."""
    address = server + "/api/workflows/execute/stream"
    # What makes the request safe to repeat: the key until the first event is there, then the id of the last one.
    headers = {"Idempotency-Key": str(uuid.uuid4())}
    retry, failures = 1.0, 0
    while failures < MOST_FAILURES:
        try:
            response = requests.post(address, json=request, headers=headers, stream=True, timeout=SILENCE)
            if response.status_code == 204:
                return  # nothing comes after the last event
            if 400 <= response.status_code < 500:
                raise ConnectionError(response.json()["detail"])
            with response:
                for event in read_events(response):
                    headers["Last-Event-ID"] = event["id"]
                    retry = int(event.get("retry", retry * 1000)) / 1000
                    failures = 0
                    chunk = json.loads(event["data"])
                    yield chunk
                    if chunk.get("status") in ("completed", "error", "cancelled"):
                        return
        except requests.RequestException:
            pass  # the connection broke, or there was none
        print("\n[no connection]", file=sys.stderr)
        failures += 1
        time.sleep(retry)
    raise ConnectionError("The server can not be reached.")


def show(chunks):
    """Prints what the agents say, and returns the status of the end."""
    said = []
    for chunk in chunks:
        if chunk["type"] == "content":
            said.append(chunk)
            print(chunk["data"], end="", flush=True)
        elif chunk["status"] == "restarted":
            # A server died, and this agent's part begins anew: what it said after `discard_after` is void.
            said = [
                earlier
                for earlier in said
                if earlier["agent_id"] != chunk["agent_id"] or earlier["sequence"] <= chunk["discard_after"]
            ]
            print("\n[started again]\n" + "".join(earlier["data"] for earlier in said), end="", flush=True)
        elif chunk["status"] != "started":
            print(flush=True)
            print(f"[{chunk.get('error', chunk['status'])}]", file=sys.stderr)
            return chunk["status"]


def argument(position, variable, default):
    return sys.argv[position] if len(sys.argv) > position else os.environ.get(variable, default)


def main():
    query = argument(1, "QUERY", "My last invoice is wrong. What can I do?")
    deployment = argument(2, "DEPLOYMENT", "support-desk")
    server = argument(3, "SERVER", "http://127.0.0.1:8000")
    try:
        status = show(execute(server, {"deployment_name": deployment, "query": query}))
    except OSError as error:
        sys.exit(str(error))
    sys.exit(0 if status == "completed" else 1)


if __name__ == "__main__":
    main()
