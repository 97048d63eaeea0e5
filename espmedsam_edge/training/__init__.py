"""Datasets, losses, distillation, fine-tuning and their recipes."""
