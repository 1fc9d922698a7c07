"""The loops that a person starts: reinforcement learning, supervised training, distillation, pipelines, replay."""
