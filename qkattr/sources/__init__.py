"""What turns a residual stream into vectors, and gives covectors back."""
