"""What slime gets: which tasks are drawn at which depth, samples made of episodes, and the loss as a mean over turns.

Imports episode and what lies below it.
"""
