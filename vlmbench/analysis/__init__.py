"""What each layer does: streams, importance, similarity, cost."""
