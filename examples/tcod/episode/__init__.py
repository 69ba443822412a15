"""How one episode is played: the loop, what the student sees at a turn, and the row that the episode is played from.

Knows no slime and no settings: it is given values. Imports environments, model and curriculum.
"""
