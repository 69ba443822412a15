"""Measured comparisons, one a module. They import slime, or its stand-in, so it is found first."""

from smoke.hooks import find_slime

SLIME = find_slime()
