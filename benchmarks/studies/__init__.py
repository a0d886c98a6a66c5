"""What alignment, training and fault handling are worth."""
