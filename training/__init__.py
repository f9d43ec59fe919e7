"""Inside a training process: packing, the model, adapters, the loop, checkpoints, the engines."""
