"""The benchmark: what the engine must reach, measured side by side with what others reach.

`python -m bench` and `oms bench` run it. Everything here talks to the engine through its public
calls, on a server of its own that is durable and is removed at the end.
"""

__all__ = ["MEASUREMENTS"]

# In the order in which they are made.
MEASUREMENTS = (
    "live",
    "profile",
    "dense",
    "sparse",
    "limited",
    "sip",
    "broker",
    "growth",
    "space",
    "start",
    "memory",
)
