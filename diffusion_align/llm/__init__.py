"""Language policies: the same estimators and the same loop as for pictures."""
