"""What a run costs and what the machine can do: FLOPs, parameters, measured peaks."""
