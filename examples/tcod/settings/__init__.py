"""What a run is made of: its settings, what is refused before the first rollout, and the objects that it uses.

Imports training, records, episode, environments, model and curriculum; only the hooks and the tools import it.
"""
