"""The LoRA layers that a posterior is over: put in, sampled, and told from what their base holds."""
