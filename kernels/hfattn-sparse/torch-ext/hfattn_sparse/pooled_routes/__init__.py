"""Which key blocks every query reads, chosen from pools of (block, query) scores."""
