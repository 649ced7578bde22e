"""The one training loop and what it stands on: state, optimiser, placement, checkpoints, metrics."""
