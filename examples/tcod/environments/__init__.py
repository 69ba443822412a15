"""Where episodes are played: what an environment has to be, their worker processes, and some environments.

Imports nothing of the package but its errors; an environment imports protocol, and ALFWorld textworld_speedup too.
"""
