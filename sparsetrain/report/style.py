"""Colours that all pictures of a run share."""

INK = "#222222"
"""Of titles and labels."""
QUIET = "#666666"
"""Of what is looked at second: ticks, phases, captions."""
GRID = "#E4E4E4"
SHADE = "#F5F5F5"
"""Behind every other phase."""
