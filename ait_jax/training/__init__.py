"""From a config and a teacher to a trained student: the pure step, its state, and the host loop."""
