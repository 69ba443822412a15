"""TCOD: multi-turn on-policy distillation with a temporal curriculum. README.md says how to run and adapt it."""
