"""The journey before and after a training process. Importing anything here imports no torch."""
