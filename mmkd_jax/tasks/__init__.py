"""What is trained: a task owns its parameters, its features and its objective; the loop knows nothing else of it."""
