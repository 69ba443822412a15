"""What run_qwen3_8b_tcod.sh calls: it checks settings, data, machine and models, starts the programs, and ends them.

Imports settings, episode, environments, model and the other tools.
"""
