"""Can training start on this machine, what would make it faster, and which command mends what is wrong.

Each concern is a module with `checks(patient)`, which yields findings; `command` prints them, as text or as JSON.
"""
