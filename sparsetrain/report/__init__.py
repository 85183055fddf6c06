"""What a person reads about a machine or a run: the doctor, the picture of the losses, the final table."""
