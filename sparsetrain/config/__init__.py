"""What a run is: one typed, frozen schema, and the YAML loader that fills it."""
