"""The nodes: wiring, no decisions and no maths."""
