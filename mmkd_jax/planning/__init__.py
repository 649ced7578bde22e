"""What a training run needs and costs, before there is a machine for it."""
