"""Where episodes are played: what an environment has to be, and the worker processes that engines run in.

Imports nothing of the package but its errors; an environment imports environments.protocol alone.
"""
