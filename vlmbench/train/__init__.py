"""Recipe, Stage and Scale; the loop; checkpoints."""
