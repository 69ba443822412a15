"""What several programs share: options and results, a journal, episodes on any server, the making of data sets.

Imports settings, records, episode, environments and model.
"""
