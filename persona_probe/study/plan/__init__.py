"""What a study would use and take: its model, SAE and texts, with tokens, memory and time of each stage."""
