"""What a run is: its plan, the model's shape, its memory, its folder. Pure Python, no torch."""
