"""Data, training, distillation, generation and metrics."""
