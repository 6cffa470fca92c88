"""Rules, explained line by line. Pure but for `command.py` and `terminal.py`.

What is said of a line is read off the line, as it is loaded; so an explanation cannot claim what the line does not say.
A line that nobody here knows stays without one.
"""
