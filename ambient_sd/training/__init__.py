"""Training: settings, loop, LoRA, checkpoints, pictures along the way. The only wing that uses accelerate and peft."""
