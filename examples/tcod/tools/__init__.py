"""Programs around the recipe: `python -m <package>.tools.NAME --help`. `launch` is the run script's, `common` theirs.

Imports everything except the hooks.
"""
