"""What a run leaves behind: its metrics, saved episodes, and the files of its folder.

Imports episode and what lies below it.
"""
