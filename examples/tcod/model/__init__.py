"""Whom an episode asks: the student and the teacher on SGLang, and chat turns as tokens.

Imports nothing of the package but its errors.
"""
