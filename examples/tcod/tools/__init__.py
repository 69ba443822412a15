"""Programs around the recipe: `python -m <package>.tools.NAME --help`. The recipe itself needs none of them.

Imports everything except the hooks.
"""
