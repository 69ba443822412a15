"""What is decided before the first rollout: the settings, what is refused, and the objects that a run is made of.

Imports training, records, episode, environments, model and curriculum; only the hooks and the tools import it.
"""
