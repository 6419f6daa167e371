"""What a recipe would cost: memory of every rank, arithmetic, days. No torch."""
