"""How a node lives: process, parameters, worker, diagnostics, clean stop."""
