"""The π0 / π0.5 model: masks, layout, Gemma stacks, flow matching and the three losses. Knows nothing of robots."""
