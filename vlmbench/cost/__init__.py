"""What a recipe costs before a GPU is booked: parameters, FLOPs and memory, without weights."""
