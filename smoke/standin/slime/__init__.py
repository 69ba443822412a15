"""A minimal stand-in for slime (https://github.com/THUDM/slime), for runs without a checkout of it.

It has the import paths, names and behaviour of the part of slime that the recipe and the smoke run touch: samples, the
data source, the rollout loop with over-sampling, filter and abort, evaluation, and the conversion to a train batch.
Options beyond that are refused, not ignored. The real slime is used whenever it is importable or SLIME_DIR names a
checkout (smoke/hooks.py decides), and tests/smoke/test_standin.py plays the same scenario on both.
"""
