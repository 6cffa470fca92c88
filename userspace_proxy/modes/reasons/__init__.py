"""What rules say in words: shared by the explanations of all modes."""
