"""What is played and trained on: tasks, curricula, mixtures, filters of groups, examples for supervised training."""
