"""Training: settings, loop, LoRA, checkpoints, images along the way. The only wing that uses accelerate and peft."""
