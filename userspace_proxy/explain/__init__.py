"""Rules with their reasons, line by line, as text, JSON or in colours. Pure but for `terminal.py` and `rendering.py`.

A reason is written where its line is written, in the renderer of a mode (`modes.rule_line.RuleLine`). No text
is parsed.
"""
